from dataclasses import asdict

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from longspan.attention.patterns import DilatedSegments, Full, SlidingWindow
from longspan.models.longformer_lm import LongformerForCausalLM, LongformerLMConfig
from longspan.training.curriculum import Curriculum, Phase, forward_operations, visible_keys
from longspan.training.language import cost_lines

FIRST = Phase(steps=10, length=8, batch=4, learning_rate=0.1, warmup_steps=4, windows=(1, 2))
SECOND = Phase(steps=5, length=16, batch=2, learning_rate=0.05, final_learning_rate=0.0, windows=(2, 4))
BOTH = Curriculum(phases=(FIRST, SECOND))


def test_steps_fall_into_phases():
    assert (BOTH.steps, BOTH.tokens) == (15, 480)
    assert [BOTH.at(step)[::2] for step in (0, 9, 10, 14, 15)] == [(0, 0), (0, 9), (1, 0), (1, 4), (1, 5)]
    assert Curriculum.of_dicts([asdict(phase) for phase in BOTH.phases]) == BOTH


def test_learning_rates_rise_stay_or_fall_in_a_line():
    assert [BOTH.rate(step) for step in range(5)] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])
    assert BOTH.rate(9) == 0.1
    assert [BOTH.rate(step) for step in range(10, 16)] == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01, 0.0])


def test_fewer_steps_keep_the_shares_of_the_phases():
    assert [phase.steps for phase in BOTH.in_steps(3).phases] == [2, 1]
    assert [phase.warmup_steps for phase in BOTH.in_steps(30).phases] == [8, 0]
    assert [phase.steps for phase in BOTH.in_steps(2).phases] == [1, 1]
    with pytest.raises(ValueError, match="2 phases need at least as many steps; got 1"):
        BOTH.in_steps(1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps of a phase must be at least 1; got 0"),
        ({"batch": 0}, "batch of a phase must be at least 1"),
        ({"length": 1}, "length of a phase must be at least 2"),
        ({"learning_rate": 0.0}, "learning_rate of a phase must be greater than 0"),
        ({"final_learning_rate": -1.0}, "final_learning_rate of a phase must not be negative"),
        ({"warmup_steps": 11}, "between 0 and its 10 steps; got 11"),
        ({"windows": ()}, "one number of keys a layer"),
    ],
)
def test_phases_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Phase(**asdict(FIRST) | changes)


def test_curricula_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least one phase"):
        Curriculum(phases=())
    with pytest.raises(ValueError, match=r"the same number of layers; got \[1, 2\]"):
        Curriculum(phases=(FIRST, Phase(**asdict(SECOND) | {"windows": (4,)})))


@pytest.mark.parametrize(
    "pattern",
    [
        Full(causal=True),
        SlidingWindow(3, 0),
        SlidingWindow(5, 0, (1, 2)),
        DilatedSegments(((8, 1), (16, 2)), 2, causal=True),
    ],
)
def test_visible_keys_are_those_that_the_pattern_counts(pattern):
    length = 48
    head, query, key = torch.arange(2)[:, None, None], torch.arange(length)[:, None], torch.arange(length)
    truth = (pattern.count(torch.zeros(1, dtype=torch.long), head, query, key) > 0).expand(2, length, length)
    assert visible_keys(pattern, 2, length) == pytest.approx(float(truth.sum()) / (2 * length))


def test_operations_are_those_of_weights_and_of_attention():
    width, ffn, vocabulary, length = 16, 64, 27, 32
    sizes = {"hidden_size": width, "num_attention_heads": 2, "intermediate_size": ffn, "vocab_size": vocabulary}
    model = LongformerForCausalLM(LongformerLMConfig.tiny(**sizes, num_hidden_layers=2, windows=(4, 100), dilations=1))
    weights = 2 * (4 * width * width + 2 * width * ffn) + width * vocabulary
    keys = [visible_keys(pattern, 2, length) for pattern in model.config.patterns]
    assert keys[1] == (length + 1) / 2
    assert forward_operations(model, length) == pytest.approx(2 * weights + 4 * width * sum(keys))
    stock = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=2, n_head=2, n_inner=ffn))
    assert forward_operations(stock, length) == pytest.approx(2 * weights + 8 * width * keys[1])


def test_the_cost_is_told_phase_by_phase_and_windows_stay_as_they_were():
    model = LongformerForCausalLM(LongformerLMConfig.tiny(num_hidden_layers=2, windows=(3, 3), dilations=1))
    lines = cost_lines(BOTH, model)
    assert lines[0].startswith("phase 1: 10 steps of 4 x 8 tokens, windows 1 to 2, learning rate 0.1:")
    assert "learning rate 0.05 to 0:" in lines[1] and lines[2].startswith("in all: 15 steps")
    assert model.config.windows == (3, 3)
    small, large = (row["operations"] / row["tokens"] for row in BOTH.table(model))
    assert large > small
    with pytest.raises(ValueError, match="GPT2LMHeadModel has none that can be set"):
        BOTH.table(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2)))
