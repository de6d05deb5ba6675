"""Models whose sequence lies on several ranks against one process: states, losses and the gradients of all weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from tests.distributed.ranks import on_ranks
from tests.models.tiny import tiny_config, translated
from tests.models.tiny import tiny_model as bert_model
from tests.models.tiny_language_models import POSITIONS, VOCABULARY, some_ids, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from longspan import accelerate
from longspan.attention import Full, SlidingWindow
from longspan.compression.ngrams import with_ngrams
from longspan.distributed import SequenceShards, shard
from longspan.models import LongNetModel, LongspanForSpanClassification
from longspan.models.checkpoints import translate_config
from longspan.models.encoder import BlockConfig, Encoder, EncoderConfig
from longspan.models.longnet import LongNetConfig

B, QA = 2, "question_answering"
LENGTHS = {1: (33,), 2: (13, 20), 3: (7, 20, 6), 4: (9, 1, 17, 6)}
CLOSE = {"rtol": 0, "atol": 1e-10}


def part_of(rank: int, world: int) -> slice:
    start = sum(LENGTHS[world][:rank])
    return slice(start, start + LENGTHS[world][rank])


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def summed_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: torch.zeros_like(w) if w.grad is None else w.grad.clone() for name, w in model.named_parameters()}
    for gradient in found.values():
        dist.all_reduce(gradient)
    return found


def compare(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], case: str) -> None:
    for name, gradient in expected.items():
        message = f"{case}, {name}: "
        torch.testing.assert_close(found[name], gradient, **CLOSE, msg=lambda text, start=message: start + text)


CASES = [  # of what each family must be told in shards, each positions with padding or without
    *(("longformer_lm", positions, number % 2 == 0) for number, positions in enumerate(POSITIONS)),
    ("longformer_lm", "relative", True),
    ("longnet", "xpos", True),
    ("longnet", "relative", False),
    ("longnet, no branch keeps all", "none", False),
]


def language_models(rank: int, world: int, cases: list[tuple[str, str, bool]]) -> None:
    here = part_of(rank, world)
    ids = some_ids(B, sum(LENGTHS[world]))
    for family, positions, padded in cases:
        mask = torch.ones_like(ids)
        mask[1, -9:] = 0 if padded else 1  # the last rank's, and some of its neighbor's
        hidden = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 0.2
        labels = ids.masked_fill(hidden | (mask == 0), -100)
        changes = {"positions": positions, "deepnorm": family == "longformer_lm", "subln": family == "longnet"}
        whole, model = (tiny_model(family, num_hidden_layers=3, **changes).train() for _ in range(2))
        expected = whole(ids, mask, labels=labels)
        expected.loss.backward()
        shard(model)
        if positions in ("rotary", "none"):
            model.gradient_checkpointing_enable()
        found = model(ids[:, here], mask[:, here] if padded else None, labels=labels[:, here])
        found.loss.backward()
        case = f"{family}, {positions}, rank {rank}"
        torch.testing.assert_close(found.loss, expected.loss, **CLOSE, msg=lambda text, at=case: f"{at}: {text}")
        seen = mask[:, here].bool()
        torch.testing.assert_close(found.logits[seen], expected.logits[:, here][seen], **CLOSE)
        compare(summed_gradients(model), gradients(whole), case)


@pytest.mark.parametrize(("world", "cases"), [(2, CASES), (3, CASES[::3])])
def test_language_models_are_those_of_one_process(world, cases, tmp_path):
    on_ranks(world, tmp_path, language_models, world, cases)


def other_lengths(rank: int) -> None:
    """The same model on rows of other lengths, with the shares of a loss whose labels the caller counted."""
    whole, model = (tiny_model("longformer_lm").train() for _ in range(2))
    shard(model)
    for total, items in ((3, 5), (40, 11), (4, 2)):
        ids = some_ids(B, total)
        here = slice(0, total - 2) if rank == 0 else slice(total - 2, total)
        expected = whole(ids, labels=ids, num_items_in_batch=items).loss
        found = model(ids[:, here], labels=ids[:, here], num_items_in_batch=items).loss
        expected.backward()
        found.backward()
        dist.all_reduce(found.detach())
        torch.testing.assert_close(found.detach(), expected.detach(), **CLOSE)
    compare(summed_gradients(model), gradients(whole), "three lengths")


def test_rows_may_have_another_length_at_each_pass_and_counted_labels_give_shares(tmp_path):
    on_ranks(2, tmp_path, other_lengths)


def base_models(rank: int) -> None:
    here, ids = part_of(rank, 3), some_ids(B, 33)
    torch.manual_seed(0)
    config = LongNetConfig(vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, num_hidden_layers=2)
    model = LongNetModel(config).double().eval()  # looks ahead
    expected = model(ids, output_hidden_states=True).hidden_states
    shard(model)
    for found, state in zip(model(ids[:, here], output_hidden_states=True).hidden_states, expected, strict=True):
        torch.testing.assert_close(found, state[:, here], **CLOSE)


def test_longnet_that_looks_ahead(tmp_path):
    on_ranks(3, tmp_path, base_models)


def dropped(rank: int) -> list:
    model = tiny_model("longformer_lm", dropout=0.3, attention_dropout=0.2).train()
    shard(model)
    ids, found = some_ids(1, 6), []
    for _ in range(2):
        torch.manual_seed(10 + rank)
        found.append(model(ids, output_hidden_states=True))
    assert torch.equal(found[0].logits, found[1].logits)
    return (found[0].hidden_states[0] == 0).tolist()  # of the same embeddings on both ranks


def test_masks_of_dropout_are_each_ranks_own_and_come_again(tmp_path):
    first, second = on_ranks(2, tmp_path, dropped)
    assert first != second


def mean_of_dropped(rank: int) -> None:
    """Probabilities of keys on both ranks are dropped, and what is left weighs more."""
    from longspan.distributed import attend

    torch.manual_seed(rank)
    shards = SequenceShards(4)
    v = torch.ones(200, 4, 4, 8, dtype=torch.float64)
    q = torch.randn_like(v)
    out = attend(q, q, v, SlidingWindow(5, 5), shards, dropout=0.25)
    assert (out - 1).abs().max() > 0.1
    torch.testing.assert_close(out.mean(), torch.ones((), dtype=torch.float64), rtol=0.02, atol=0)


def test_attention_drops_probabilities_across_ranks(tmp_path):
    on_ranks(2, tmp_path, mean_of_dropped)


def tiny_encoder(norm: str, global_projections: bool, rope: bool) -> Encoder:
    torch.manual_seed(0)
    patterns = (SlidingWindow(3, 3), SlidingWindow(2, 2, 2), Full())
    blocks = tuple(
        BlockConfig(
            heads=2,
            head_width=8,
            ffn_width=24,
            pattern=pattern,
            global_projections=global_projections,
            rope_theta=100.0 if rope else None,
        )
        for pattern in patterns
    )
    encoder = Encoder(EncoderConfig(width=16, blocks=blocks, norm=norm)).double()
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return encoder


def encoders(rank: int, world: int) -> None:
    here, total = part_of(rank, world), sum(LENGTHS[world])
    generator = torch.Generator().manual_seed(1)
    states, weight = (torch.randn(B, total, 16, dtype=torch.float64, generator=generator) for _ in range(2))
    token_mask = torch.rand(B, total, generator=generator) > 0.2  # padding anywhere
    nowhere = torch.zeros(B, total, dtype=torch.bool)
    some, at_first = nowhere.clone(), nowhere.clone()
    some[0, [0, 5, 16, 30]] = some[1, [9]] = True
    at_first[:, :2] = True  # of the first rank alone
    all_padding = token_mask.clone()
    all_padding[1, part_of(0, world)] = False  # of a row on the first rank
    for norm, projections, rope, mask, marked in (
        ("post", True, False, token_mask, some),
        ("post", True, False, None, at_first),
        ("post", True, False, all_padding, at_first),
        ("post", False, False, token_mask, nowhere),
        ("post", False, False, None, some),
        ("pre", True, True, token_mask, some),
        ("pre", False, True, None, None),
    ):
        case = f"{norm}, {projections}, {rope}, rank {rank}"
        whole, model = (tiny_encoder(norm, projections, rope) for _ in range(2))
        shard(model)
        model.gradient_checkpointing = norm == "pre"
        x, own = states.clone().requires_grad_(), states[:, here].clone().requires_grad_()
        expected = whole(x, mask, marked)
        found = model(own, *(None if part is None else part[:, here] for part in (mask, marked)))
        kept = torch.ones_like(nowhere) if mask is None else mask
        (expected * weight)[kept].sum().backward()
        (found * weight[:, here])[kept[:, here]].sum().backward()
        torch.testing.assert_close(found[kept[:, here]], expected[:, here][kept[:, here]], **CLOSE)
        torch.testing.assert_close(own.grad, x.grad[:, here], **CLOSE)
        compare(summed_gradients(model), gradients(whole), case)


@pytest.mark.parametrize("world", [2, 3])
def test_encoders_with_global_rows_are_those_of_one_process(world, tmp_path):
    on_ranks(world, tmp_path, encoders, world)


def whole_encoders(rank: int, world: int) -> None:
    here, total = part_of(rank, world), sum(LENGTHS[world])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (B, total), generator=generator)
    mask, marked = torch.ones_like(ids), torch.zeros_like(ids)
    mask[1, total // 3 :] = 0  # of all later ranks, in one row
    marked[0, [0, total - 2]] = 1
    unsaid = (torch.rand(ids.shape, generator=generator) < 0.7) | (mask == 0)
    for family, task, period in (
        ("bert", "masked_lm", None),
        ("roberta", "token_classification", None),  # whose positions pass over padding
        ("longformer", "masked_lm", None),
        ("longformer", None, 7),
        ("modernbert", "masked_lm", None),
    ):
        whole, model = (translated(bert_model(family, task), task).double() for _ in range(2))
        for one in (whole, model):
            if task is None:
                one.pooler = None
                one.embeddings.config = replace(one.embeddings.config, position_period=period)
        given = [
            ids.masked_fill(mask == 0, whole.config.pad_token_id),
            mask,
            marked if family == "longformer" else None,
        ]
        labels = None if task is None else (ids % whole.classifier.out_features).masked_fill(unsaid, -100)
        expected = whole(*given, **{} if labels is None else {"labels": labels})
        shard(model)
        own = [None if part is None else part[:, here] for part in given]
        found = model(*own, **{} if labels is None else {"labels": labels[:, here]})
        states, reference = (one.last_hidden_state if task is None else one.logits for one in (found, expected))
        seen = mask.bool()
        torch.testing.assert_close(states[seen[:, here]], reference[:, here][seen[:, here]], **CLOSE)
        if labels is None:
            reference[seen].sum().backward()
            states[seen[:, here]].sum().backward()
        else:
            torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
            expected.loss.backward()
            found.loss.backward()
        compare(summed_gradients(model), gradients(whole), f"{family}, {task}, rank {rank}")


@pytest.mark.parametrize("world", [2, 3])
def test_encoders_with_their_embeddings_and_losses_are_those_of_one_process(world, tmp_path):
    on_ranks(world, tmp_path, whole_encoders, world)


def made_in_double(family: str, task: str | None, **changes) -> nn.Module:
    if task == "spans":
        torch.manual_seed(3)
        model = LongspanForSpanClassification(translate_config(tiny_config(family)))
    elif task == "n-grams":
        table = torch.randn(97, 2, generator=torch.Generator().manual_seed(4))
        model = with_ngrams(bert_model(family, "sequence_classification"), table)
    else:
        model = translated(bert_model(family, task, **changes), task)
    return model.double().eval()


def pooled_heads(rank: int, world: int) -> None:
    here, total = part_of(rank, world), sum(LENGTHS[world])
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (B, total), generator=generator)
    ids[0, 3] = ids[1, total // 2] = 2  # the separators, the second one beyond the first rank
    mask = torch.ones_like(ids)
    mask[1, : LENGTHS[world][0] + 2] = 0  # a row whose first token is not on the first rank
    mask[0, total - 2 :] = 0
    one_label, two_numbers = torch.tensor([1, 0]), {"start_positions": [2, total - 5], "end_positions": [4, total + 9]}
    places = {name: torch.tensor(values) for name, values in two_numbers.items()}
    spans = torch.tensor([[[1, 4], [total - 7, total - 2]], [[total - 9, total - 4], [total - 3, total]]])
    for family, task, given, changes in (
        ("bert", None, {}, {}),  # the pooler
        ("bert", "sequence_classification", {"labels": one_label}, {}),
        ("roberta", "sequence_classification", {"labels": one_label}, {}),
        ("bert", "n-grams", {"labels": one_label}, {}),  # with pairs across the ranks' edges
        ("longformer", "sequence_classification", {"labels": one_label}, {}),  # whose first token is global
        ("modernbert", "sequence_classification", {"labels": one_label}, {"classifier_pooling": "mean"}),
        ("modernbert", "sequence_classification", {"labels": one_label}, {"classifier_pooling": "cls"}),
        ("longformer", QA, places, {}),  # where all before the separator is global
        ("roberta", QA, places, {}),
        ("bert", "multiple_choice", {"labels": one_label[:1]}, {}),
        ("longformer", "multiple_choice", {"labels": one_label[:1]}, {}),  # where all after the separator is
        ("longformer", "spans", {"span_ranges": spans, "labels": one_label}, {}),
    ):
        case = f"{family}, {task}, {changes}, rank {rank}"
        whole, model = (made_in_double(family, task, **changes) for _ in range(2))
        padded = ids.masked_fill(mask == 0, whole.config.pad_token_id)
        inputs = [padded, mask] if task != "multiple_choice" else [padded[None], mask[None]]
        expected = whole(*inputs, **given)
        shard(model)
        found = model(*(part[..., here] for part in inputs), **given)
        if task is None:
            torch.testing.assert_close(found.pooler_output, expected.pooler_output, **CLOSE)
            expected.pooler_output.square().sum().backward()
            found.pooler_output.square().sum().backward()
        else:
            torch.testing.assert_close(found.loss, expected.loss, **CLOSE)
            if task == QA:
                seen = mask[:, here].bool()
                torch.testing.assert_close(found.end_logits[seen], expected.end_logits[:, here][seen], **CLOSE)
            else:
                torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
            expected.loss.backward()
            found.loss.backward()
        compare(summed_gradients(model), gradients(whole), case)


@pytest.mark.parametrize("world", [2, 3])
def test_heads_of_whole_rows_are_those_of_one_process(world, tmp_path):
    on_ranks(world, tmp_path, pooled_heads, world)


def dropped_head(rank: int) -> None:
    torch.manual_seed(rank)
    model = made_in_double("roberta", "sequence_classification")
    model.head.input_drop.p = model.head.drop.p = 0.5
    shard(model.train())
    logits = model(some_ids(2, 9)[:, :4]).logits
    said = SequenceShards(1).gather_rows(logits)
    assert torch.equal(*said) and torch.equal(logits, said[0])


def test_dropout_in_a_head_gives_all_ranks_the_same_logits(tmp_path):
    on_ranks(2, tmp_path, dropped_head)


def bytes_of_global_rows(rank: int) -> list[int]:
    block = BlockConfig(heads=2, head_width=8, ffn_width=8, pattern=SlidingWindow(3, 3), global_projections=True)
    encoder = Encoder(EncoderConfig(width=16, blocks=(block,))).double()
    sent = []
    for tokens in (16, 128):
        shard(encoder)
        marked = torch.zeros(1, tokens, dtype=torch.bool)
        marked[0, 0] = True  # one on each rank
        encoder(torch.randn(1, tokens, 16, dtype=torch.float64), None, marked)
        sent.append(encoder.sequence.shards.bytes_sent)
    return sent


def test_bytes_of_global_rows_do_not_grow_with_the_sequence(tmp_path):
    few, many = on_ranks(2, tmp_path, bytes_of_global_rows)[0]
    keys, flags, positions = 2 * (3 + 1) * 2 * 8 * 8, 3, 8  # of the window and the marked key, with their values
    question, answer = 2 * 8 * 8, 2 * 9 * 8  # of two heads, with the log of the softmax sum
    assert few == many == keys + flags + positions + question + answer


def on_a_mesh(rank: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))
    ids = some_ids(4, 11)
    whole, model = (tiny_model("longformer_lm").train() for _ in range(2))
    shard(model, mesh["sequence"])
    rows = slice(0, 2) if mesh.get_local_rank("data") == 0 else slice(2, 4)
    tokens = slice(0, 4) if mesh.get_local_rank("sequence") == 0 else slice(4, 11)
    parallel = DistributedDataParallel(model)
    whole(ids, labels=ids).loss.backward()
    own = ids[rows, tokens]
    (parallel(own, labels=own).loss * mesh["sequence"].size()).backward()
    compare(gradients(model), gradients(whole), f"rank {rank}")
    model.zero_grad()
    whole.zero_grad()
    whole(ids, labels=ids, num_items_in_batch=40).loss.backward()
    (parallel(own, labels=own, num_items_in_batch=40).loss * mesh.size()).backward()  # as the Trainer does
    compare(gradients(model), gradients(whole), f"rank {rank}, counted labels")


def test_rows_by_tokens_on_a_mesh_are_one_process(tmp_path):
    """DistributedDataParallel takes the mean over all ranks, where gradients are to be added up along the sequence."""
    on_ranks(4, tmp_path, on_a_mesh)


def refused(rank: int) -> list[str]:
    model = tiny_model("longformer_lm")
    shard(model)
    ids = some_ids(2, 6)
    gap, left = torch.ones_like(ids), torch.ones_like(ids)
    gap[0, 2] = 0
    left[1, -1] = rank  # padding before the second rank's tokens
    longnet = tiny_model("longnet", positions="bucketed")
    shard(longnet)
    plugged, packed = accelerate(bert_model("bert")), accelerate(translated(bert_model("bert")), precision="fp32")
    long, asked = (translated(bert_model(*of), of[1]) for of in (("bert", "masked_lm"), ("longformer", QA)))
    shard(long)
    shard(asked)
    calls = [
        partial(model, ids, gap if rank else None),
        partial(model, ids, left),
        partial(model, ids[: 1 + rank]),
        partial(model, ids, use_cache=True),
        partial(model.generate, ids, max_new_tokens=2),
        partial(longnet, ids),
        partial(shard, plugged),
        partial(shard, packed),
        partial(asked, torch.full_like(ids, 9)),
        partial(long, some_ids(1, 40 if rank else 30)),
        partial(shard, nn.Linear(2, 2)),
    ]
    said = []
    for call in calls:
        with pytest.raises((ValueError, NotImplementedError)) as error:
            call()
        said.append(str(error.value))
    assert model(ids).past_key_values is None  # and none is made unasked
    return said


def test_what_cannot_be_sharded_is_refused_on_all_ranks(tmp_path):
    for said in on_ranks(2, tmp_path, refused):
        for text, expected in zip(
            said,
            (
                "padding may stand only at the end",
                "padding may stand only at the end",
                "they hold (1, 2) rows",
                "not continued token by token",
                "not continued token by token",
                "a bias by distance cannot be sharded",
                "BertModel cannot be sharded",
                "LongspanModel cannot be sharded",
                "rows [0, 1] hold no separator token",
                "the input needs positions for 70 tokens and this model has 64",
                "Linear cannot be sharded",
            ),
            strict=True,
        ):
            assert expected in text
