import json
from dataclasses import replace

import pytest
import torch
from tests.training.conftest import data  # noqa: F401
from transformers import BertConfig, BertModel

from longspan.models.evidence import LongspanForEvidence
from longspan.recipes.reader import Readers, SmallReader, readers
from longspan.training.reader import untrained_reader


@pytest.fixture
def config(data, tokenizer, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    model = untrained_reader(str(tmp_path / "base"))
    model.config.calibration = [1.0, 1.0, 0.0]
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    small = SmallReader(name="half of it", heads=1, units=8)
    changes = {"calibrated": 2, "questions": 2, "tokens_per_row": 192, "readers": (small,), "steps": 2, "batch": 2}
    return Readers.quick(str(tmp_path / "run"), str(data), model=str(tmp_path / "whole"), **changes)


def test_every_reader_is_judged_and_a_finished_step_is_not_repeated(config, tmp_path):
    told = []
    rows = readers(config, tell=told.append)
    assert [(row.name, row.precision) for row in rows] == [
        ("the reader", "fp32"),
        ("the reader", "bf16"),
        ("the reader", "int8"),
        ("half of it", "int8"),
    ]
    assert rows[0].faster == 1 and all(row.tokens_per_second > 0 for row in rows)
    assert json.loads((tmp_path / "run" / "report.json").read_text())["rows"][3]["name"] == "half of it"
    small = LongspanForEvidence.from_pretrained(tmp_path / "run" / "half-of-it" / "reader")
    assert [(block.heads, block.ffn_width) for block in small.config.encoder_config.blocks] == [(1, 8)] * 2
    assert small.config.calibration != [1.0, 1.0, 0.0]
    assert told[0] == "small reader: half of it"

    weights = (tmp_path / "run" / "half-of-it" / "reader" / "model.safetensors").stat()
    again = readers(replace(config, questions=1), tell=told.append)
    assert len(again) == 4 and told.count("small reader: half of it") == 1
    assert (tmp_path / "run" / "half-of-it" / "reader" / "model.safetensors").stat() == weights
