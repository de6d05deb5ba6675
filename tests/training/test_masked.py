import shutil
from dataclasses import replace

import pytest
import torch
from tests.distributed.ranks import on_ranks
from tests.training.processes_run import train_masked_on
from transformers import BertConfig, BertForMaskedLM, BertModel

from longspan.models.convert import convert_checkpoint
from longspan.models.heads import LongspanForMaskedLM
from longspan.training.masked import MaskedTraining, train_masked

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


pytestmark = pytest.mark.usefixtures("quiet_transformers")


@pytest.fixture(scope="module")
def sources(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=16, **SIZES)
    for name, kind in (("short", BertForMaskedLM), ("headless", BertModel), ("sure", BertForMaskedLM)):
        if name == "sure":
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        kind(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    convert_checkpoint(folder / "short", folder / "long", max_tokens=64, window=8)
    convert_checkpoint(folder / "sure", folder / "long and sure", max_tokens=64, window=8)
    (folder / "text.txt").write_text("the red zoo is near the old river . " * 150)
    return folder


@pytest.fixture
def config(sources, tmp_path):
    return MaskedTraining(
        source=str(sources / "long"),
        data=str(sources / "text.txt"),
        output=str(tmp_path / "run"),
        length=32,
        steps=6,
        batch=4,
        accumulate=2,
        learning_rate=1e-2,
        evaluate_steps=3,
        save_steps=3,
        log_steps=2,
    )


def test_local_projections_learn_and_global_ones_follow_them(config, sources):
    done = train_masked(config)
    before, after = (LongspanForMaskedLM.from_pretrained(folder) for folder in (sources / "long", done.model))
    first, last = (model.longspan.encoder.blocks[0].attention for model in (before, after))
    assert not torch.equal(first.qkv.weight, last.qkv.weight)
    assert torch.equal(last.qkv_global.weight, last.qkv.weight) and torch.equal(last.qkv_global.bias, last.qkv.bias)
    assert done.unit == "hidden token" and done.steps == 6
    assert after.config.embeddings_config.max_tokens == 64


def test_what_is_hidden_does_not_depend_on_where_a_run_went_on(config, tmp_path):
    whole = train_masked(config)
    cut = replace(config, output=str(tmp_path / "cut"))
    shutil.copytree(tmp_path / "run", tmp_path / "cut", ignore=shutil.ignore_patterns("model", "checkpoint-6"))
    again = train_masked(cut)
    assert again.bits == whole.bits
    losses = [[entry["loss"] for entry in done.history if "loss" in entry] for done in (again, whole)]
    assert losses[0] == losses[1]


def test_models_that_cannot_learn_so_are_refused(config, sources):
    with pytest.raises(ValueError, match="is a LongspanModel: masked language modeling needs the head"):
        train_masked(replace(config, source=str(sources / "headless")))
    with pytest.raises(ValueError, match=r"length is 65 and .* reads 64 tokens"):
        train_masked(replace(config, length=65))


def test_rows_are_as_long_as_the_model_reads_and_short_models_train_too(config, sources):
    done = train_masked(replace(config, source=str(sources / "short"), length=None, steps=2))
    assert done.tokens == 2 * 4 * 16


@pytest.mark.parametrize("changes", [{"sequence_parallel": 2}, {"accumulate": 1, "shard_weights": True}])
def test_two_processes_train_as_one(changes, config, sources, tmp_path):
    alone = replace(config, source=str(sources / "long and sure"), bf16=False, steps=4)
    shared = replace(alone, output=str(tmp_path / "shared"), **changes)
    (losses, folder), _ = on_ranks(2, tmp_path, train_masked_on, 2, shared)
    done = train_masked(alone)
    assert losses == pytest.approx([entry["loss"] for entry in done.history if "loss" in entry], rel=1e-4)
    weights, expected = (LongspanForMaskedLM.from_pretrained(model).state_dict() for model in (folder, done.model))
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-3, msg=lambda text, name=name: name + text)
