import logging

import pytest
import torch
from tests.models.tiny import FAMILIES, TASKS, batch, tiny_model, translated

from longspan.models import LongspanForMultipleChoice, LongspanForSequenceClassification

PARTS = ("start_logits", "end_logits", "logits")


def task_batch(config, task, lengths=(37, 9, 21)):
    """Inputs and labels of a task; Longformer's question answering and choices hold three separators a row."""
    inputs = batch(config, list(lengths))
    rows, tokens = inputs["input_ids"].shape
    generator = torch.Generator().manual_seed(3)
    if config.model_type == "longformer":
        for row, length in enumerate(lengths):
            inputs["input_ids"][row, [3 + row, 4 + row, length - 1]] = config.sep_token_id
    if task == "multiple_choice":
        inputs = {name: part.view(1, rows, tokens) for name, part in inputs.items()}
        return inputs | {"labels": torch.tensor([1])}
    if task == "question_answering":
        return inputs | {"start_positions": torch.tensor([2, 3, 99]), "end_positions": torch.tensor([5, 3, 99])}
    if task == "sequence_classification":
        return inputs | {"labels": torch.tensor([0, 1, 1])}
    labels = torch.randint(0, 2, (rows, tokens), generator=generator)
    return inputs | {"labels": labels.masked_fill(inputs["attention_mask"] == 0, -100)}


def compare(theirs, ours, inputs, atol=1e-5):
    """Largest difference of logits at tokens; the losses agree."""
    with torch.no_grad():
        expected, found = theirs(**inputs), ours(**inputs)
    kept = inputs["attention_mask"].bool()
    worst = 0.0
    for name in (part for part in PARTS if part in found):
        a, b = found[name], expected[name]
        if (a.shape[:2] == kept.shape and name != "logits") or a.dim() == 3:
            a, b = a[kept], b[kept]
        worst = max(worst, (a - b).abs().max().item())
    assert worst <= atol
    if expected.loss is not None:
        assert found.loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)
    return worst


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_loss_equal_hugging_face(family, task, std, record_property):
    theirs = tiny_model(family, task, initializer_range=std)
    ours, inputs = translated(theirs, task), task_batch(theirs.config, task)
    if task == "question_answering" and family != "longformer":
        # Padding has a share in this softmax, and what the other families compute there is nobody's business.
        compare(theirs, ours, task_batch(theirs.config, task, (37, 37, 37)))
        inputs = {name: part for name, part in inputs.items() if "positions" not in name}
    error = compare(theirs, ours, inputs)
    record_property(f"max_error_{family}_{task}_{std}", error)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("task", ["sequence_classification", "multiple_choice"])
def test_modernbert_pools_as_it_was_told(pooling, task):
    theirs = tiny_model("modernbert", task, classifier_pooling=pooling, initializer_range=0.2)
    compare(theirs, translated(theirs, task), task_batch(theirs.config, task))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("problem", "num_labels", "labels"),
    [
        ("regression", 1, torch.tensor([0.5, -1.0, 2.0])),
        ("regression", 2, torch.tensor([[0.5, 1.0], [-1.0, 0.0], [2.0, 3.0]])),
        ("multi_label_classification", 3, torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]])),
    ],
)
def test_the_other_losses_of_a_classifier_equal_hugging_face(family, problem, num_labels, labels):
    task = "sequence_classification"
    for problem_type in (problem, None) if num_labels != 2 else (problem,):  # None: guessed from the labels
        theirs = tiny_model(family, task, num_labels=num_labels, problem_type=problem_type)
        inputs = batch(theirs.config, [37, 9, 21]) | {"labels": labels}
        compare(theirs, translated(theirs, task), inputs)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_tuple_comes_back_when_asked_for(family, task):
    theirs = tiny_model(family, task)
    ours = translated(theirs, task)
    inputs = task_batch(theirs.config, task)
    with torch.no_grad():
        whole = ours(**inputs, output_hidden_states=True)
        flat = ours(**inputs, output_hidden_states=True, return_dict=False)
    assert [type(part) for part in flat] == [type(part) for part in whole.to_tuple()]
    assert torch.equal(flat[0], whole.loss)
    assert len(flat[-1]) == ours.config.num_hidden_layers + 1


@pytest.mark.parametrize("task", [task for task in TASKS if task != "multiple_choice"])
def test_exactly_one_input_is_wanted(task):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        translated(tiny_model("longformer", task), task)()


@pytest.mark.parametrize("task", TASKS)
def test_attentions_are_refused_by_name(task):
    theirs = tiny_model("bert", task)
    inputs = task_batch(theirs.config, task)
    with pytest.raises(NotImplementedError, match="output_attentions=True asks for N x N"):
        translated(theirs, task)(**inputs, output_attentions=True)


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering", "multiple_choice"])
def test_longformer_heads_choose_the_global_tokens_hugging_face_chooses(task):
    """And the choice matters: without it the logits are others."""
    theirs = tiny_model("longformer", task, initializer_range=0.2)
    ours = translated(theirs, task)
    inputs = task_batch(theirs.config, task)
    compare(theirs, ours, inputs)
    first = next(part for part in PARTS if part in ours(**inputs))
    with torch.no_grad():
        chosen = ours(**inputs)[first]
        none = ours(**inputs, global_attention_mask=torch.zeros_like(inputs["input_ids"]))[first]
    assert (chosen - none).abs().max() > 1e-4


@pytest.mark.parametrize("task", ["sequence_classification", "question_answering", "multiple_choice"])
def test_global_tokens_that_the_caller_names_are_not_chosen_again(task):
    theirs = tiny_model("longformer", task, initializer_range=0.2)
    inputs = task_batch(theirs.config, task)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][..., 6] = 1
    compare(theirs, translated(theirs, task), inputs)


def test_one_separator_is_enough_where_hugging_face_demands_three():
    theirs = tiny_model("longformer", "question_answering", initializer_range=0.2)
    ours = translated(theirs, "question_answering")
    inputs = batch(theirs.config, [30, 12])
    inputs["input_ids"][:, 5] = 2
    inputs["input_ids"][1, [8, 9, 10]] = 2
    with torch.no_grad():
        with pytest.raises(AssertionError, match="exactly three separator tokens"):
            theirs(**inputs)
        by_hand = (torch.arange(30) < 5).long().expand(2, -1)
        expected = theirs(**inputs, global_attention_mask=by_hand)
        assert torch.allclose(ours(**inputs).start_logits, expected.start_logits, atol=1e-5)


def test_a_row_without_a_separator_is_refused_with_its_number():
    ours = translated(tiny_model("longformer", "question_answering"), "question_answering")
    inputs = batch(ours.config, [30, 12, 9])
    inputs["input_ids"][1, 5] = 2
    with pytest.raises(ValueError, match=r"rows \[0, 2\] hold no separator token \(id 2\).*pass global_attention_mask"):
        ours(**inputs)
    ours.config.sep_token_id = None
    with pytest.raises(ValueError, match=r"config\.sep_token_id is None"):
        ours(**inputs)


def test_a_choice_begins_after_one_separator_or_two():
    ours = translated(tiny_model("longformer", "multiple_choice"), "multiple_choice")
    ids = torch.tensor([[0, 7, 2, 2, 8, 9, 2], [0, 7, 2, 8, 9, 2, 1]])
    chosen = ours.choose_global_tokens(ids, None, ids != 1)
    assert chosen.int().tolist() == [[0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]


def test_embeddings_serve_as_input_where_hugging_face_fails_on_them():
    """Its Longformer classifier puts the global first token into zeros_like(None)."""
    theirs = tiny_model("longformer", "sequence_classification", initializer_range=0.2)
    ours = translated(theirs, "sequence_classification")
    inputs = batch(theirs.config, [30])
    vectors = {"inputs_embeds": ours.get_input_embeddings()(inputs["input_ids"])}
    with torch.no_grad():
        with pytest.raises(TypeError):
            theirs(**vectors)
        assert torch.allclose(ours(**vectors).logits, theirs(**inputs).logits, atol=1e-5)


def test_question_answering_on_embeddings_says_that_it_sees_no_separators(caplog):
    ours = translated(tiny_model("longformer", "question_answering"), "question_answering")
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        ours(inputs_embeds=torch.randn(1, 9, 24))
    assert "pass global_attention_mask" in caplog.text


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_pool_their_first_token_where_hugging_face_pools_padding(family):
    theirs = tiny_model(family, "sequence_classification", initializer_range=0.2)
    ours = translated(theirs, "sequence_classification")
    inputs = batch(theirs.config, [12, 12])
    padded = {name: part.clone() for name, part in inputs.items()}
    for part, pad in ((padded["input_ids"], theirs.config.pad_token_id), (padded["attention_mask"], 0)):
        part[1] = torch.cat((torch.full((4,), pad), part[1, :8]))
    positions = (
        {"position_ids": torch.tensor([[0, 1, 2, 3, *range(8)]]).expand(2, -1)}
        if family in ("bert", "distilbert")
        else {}
    )
    alone = {name: part[1:, :8] for name, part in inputs.items()}
    with torch.no_grad():
        expected = theirs(**alone).logits
        assert torch.allclose(ours(**alone).logits, expected, atol=1e-5)
        assert torch.allclose(ours(**padded, **positions).logits[1:], expected, atol=1e-5)
        assert not torch.allclose(theirs(**padded, **positions).logits[1:], expected, atol=1e-3)


def test_mean_pooling_without_a_mask_means_all_tokens_where_hugging_face_fails():
    theirs = tiny_model("modernbert", "multiple_choice", classifier_pooling="mean", initializer_range=0.2)
    ours = translated(theirs, "multiple_choice")
    ids = task_batch(theirs.config, "multiple_choice", (9, 9, 9))["input_ids"]
    with torch.no_grad():
        with pytest.raises(AttributeError):
            theirs(ids)
        assert torch.allclose(ours(ids).logits, theirs(ids, attention_mask=torch.ones_like(ids)).logits, atol=1e-5)


@pytest.mark.parametrize("task", ["masked_lm", "token_classification", "sequence_classification", "multiple_choice"])
def test_accumulated_losses_weigh_every_label_alike_where_hugging_face_forgets_num_items_in_batch(task):
    theirs = tiny_model("bert", task, initializer_range=0.2)
    ours = translated(theirs, task)
    inputs = task_batch(theirs.config, task)
    counted = inputs["labels"].ne(-100).sum()
    with torch.no_grad():
        alone = ours(**inputs).loss
        half = ours(**inputs, num_items_in_batch=2 * counted).loss
        assert half.item() == pytest.approx(alone.item() / 2, rel=1e-5)
        if task in ("masked_lm", "token_classification"):
            ignored = theirs(**inputs, num_items_in_batch=2 * counted).loss
            assert ignored.item() == pytest.approx(alone.item(), rel=1e-5)


def test_regression_losses_weigh_every_label_alike_too():
    theirs = tiny_model("bert", "sequence_classification", num_labels=1)
    ours = translated(theirs, "sequence_classification")
    inputs = batch(theirs.config, [9, 5]) | {"labels": torch.tensor([0.5, 2.0])}
    with torch.no_grad():
        alone, half = ours(**inputs).loss, ours(**inputs, num_items_in_batch=4).loss
    assert half.item() == pytest.approx(alone.item() / 2, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_fp32_or_wider_whatever_the_model_is(family):
    ours = translated(tiny_model(family, "masked_lm"), "masked_lm")
    inputs = task_batch(ours.config, "masked_lm")
    assert ours.to(torch.bfloat16)(**inputs).loss.dtype == torch.float32
    assert ours.to(torch.float64)(**inputs).loss.dtype == torch.float64


def test_a_head_that_no_configuration_describes_is_a_plain_one():
    config = translated(tiny_model("bert")).config
    config.heads = None
    torch.manual_seed(0)
    model = LongspanForSequenceClassification(config)
    assert (model.described.pooling, model.described.activation) == ("first", "tanh")
    assert model(**batch(config, [9, 5])).logits.shape == (2, 2)


def test_a_head_that_needs_a_missing_pooler_is_refused():
    config = translated(tiny_model("bert")).config
    config.pooler = False
    with pytest.raises(ValueError, match="multiple_choice head reads the base model's pooler"):
        LongspanForMultipleChoice(config)


@pytest.mark.parametrize("task", TASKS)
def test_every_weight_gets_a_gradient(task):
    theirs = tiny_model("longformer", task)
    ours = translated(theirs, task).train()
    ours(**task_batch(theirs.config, task), **GLOBAL.get(task, {})).loss.backward()
    silent = [name for name, parameter in ours.named_parameters() if parameter.grad is None]
    assert not silent


GLOBAL = {task: {"global_attention_mask": torch.eye(37)[:3]} for task in ("masked_lm", "token_classification")}
