import pytest
import torch
from tests.compression.small import tiny_batches, tiny_classifier, tiny_ours

from longspan.compression.importance import measure_importance


def scores_by_masks(model, batches):
    """Heads by the gradient of real masks; units by sum_t z_t dL/dz_t (gated: z is the gate)."""
    blocks = model.base_model.encoder.blocks
    heads = [torch.zeros(block.block.heads) for block in blocks]
    units = [torch.zeros(block.block.ffn_width) for block in blocks]
    for batch in batches:
        masks = [torch.ones(block.block.heads, requires_grad=True) for block in blocks]
        inner = []
        hooks = []
        for block, mask in zip(blocks, masks, strict=True):
            width = block.block.head_width
            hooks.append(
                block.attention.out.register_forward_pre_hook(
                    lambda _, args, mask=mask, width=width: (args[0] * mask.repeat_interleave(width),)
                )
            )

            def keep(_, __, output, inner=inner):
                output.retain_grad()
                inner.append(output)

            hooks.append(block.ffn_in.register_forward_hook(keep))
        model(**batch).loss.backward()
        for hook in hooks:
            hook.remove()
        for layer, (mask, z) in enumerate(zip(masks, inner, strict=True)):
            heads[layer] += mask.grad.abs() / len(batches)
            of_units = (z * z.grad).sum((0, 1))[-len(units[layer]) :]
            units[layer] += of_units.abs().detach() / len(batches)
    return heads, units


@pytest.mark.parametrize("family", ["bert", "longformer", "modernbert"])
def test_scores_are_the_gradients_of_masks(family):
    model = tiny_ours(family)
    batches = tiny_batches(padding=1 if family == "longformer" else 0)
    heads, units = scores_by_masks(model, batches)
    found = measure_importance(model, batches)
    for layer in range(len(heads)):
        torch.testing.assert_close(found.heads[layer], heads[layer], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.units[layer], units[layer], rtol=1e-3, atol=1e-6)
    assert min(float(scores.max()) for scores in (*found.heads, *found.units)) > 1e-5


def test_every_batch_starts_from_zero_gradients():
    """FastFormers adds gradients up over batches before it takes absolute values, so their order changes its scores."""
    model = tiny_ours()
    batches = tiny_batches()
    whole = measure_importance(model, batches)
    parts = [measure_importance(model, [batch]) for batch in batches]
    for layer in range(3):
        mean = sum(part.heads[layer] for part in parts) / len(parts)
        torch.testing.assert_close(whole.heads[layer], mean)


def test_padding_has_no_share():
    model = tiny_ours()
    (batch,) = tiny_batches(1)
    plain = measure_importance(model, [batch])
    more = {
        name: torch.nn.functional.pad(value, (0, 9)) if value.dim() == 2 else value for name, value in batch.items()
    }
    more["input_ids"][:, -5:] = 7
    padded = measure_importance(model, [more])
    for one, other in zip((*plain.heads, *plain.units), (*padded.heads, *padded.units), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_model_stays_as_it_was():
    model = tiny_ours().train()
    model.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    measure_importance(model, tiny_batches(1))
    assert model.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_bad_calibration_splits_are_refused():
    model = tiny_ours()
    with pytest.raises(ValueError, match="calibration split holds no rows"):
        measure_importance(model, [])
    (batch,) = tiny_batches(1)
    del batch["labels"]
    with pytest.raises(ValueError, match=r"hold no labels.*attention_mask, input_ids"):
        measure_importance(model, [batch])
    with torch.no_grad():
        model.classifier.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss of a calibration batch is nan"):
        measure_importance(model, tiny_batches(1))
    with pytest.raises(ValueError, match=r"own encoder.*BertForSequenceClassification"):
        measure_importance(tiny_classifier(), tiny_batches(1))
