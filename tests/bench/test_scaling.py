"""Layers at growing length: exact gradients with linear memory, what is left out, what a second run takes up."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from longspan.attention import DilatedSegments, SlidingWindow, attend
from longspan.bench import cases, scaling
from longspan.bench.attention import DilatedCase, exact_dilated
from longspan.bench.character import local_attention
from longspan.bench.measure import MOST_CALLS, Row
from longspan.bench.scaling import DENSE, OURS, SHORT_TOKENS, TINY_LAYERS, Layer, Point, measure_layers, run_layer
from longspan.cli import app

LONGNET, LONGFORMER = TINY_LAYERS


@pytest.mark.parametrize("layer", TINY_LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("dense", [False, True])
def test_the_layer_is_attention_between_its_projections(layer: Layer, dense: bool):
    torch.manual_seed(0)
    tokens = 300
    inputs = [torch.randn(tokens, layer.width), *layer.weights(torch.float32)]
    inputs = [value.double().requires_grad_() for value in inputs]
    x, w_in, w_out = inputs
    q, k, v = ((x @ weight.T).view(1, tokens, layer.heads, -1).transpose(1, 2) for weight in w_in.chunk(3))
    if dense:
        heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=bool(layer.branches))
    else:
        heads = attend(q, k, v, layer.pattern(0, layer.heads), backend="reference")
    expected = heads[0].transpose(0, 1).flatten(1) @ w_out.T
    actual = run_layer(layer, x, w_in, w_out, dense=dense)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, inputs, grad) for y in (actual, expected)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def fake(monkeypatch: pytest.MonkeyPatch, seconds_per_token: float = 1e-6, **points: Point) -> list[tuple]:
    """Measuring takes no time: dense is quadratic, both take 1 MiB per 1,024 tokens. Returns what was asked for."""
    asked = []

    def measure(self, layer, dense, precision, backward, tokens, seconds, threads):
        asked.append((layer.name, dense, precision, backward, tokens))
        took = seconds_per_token * tokens * (tokens / 1024 if dense else 1)
        short = [] if dense or tokens <= SHORT_TOKENS else [SHORT_TOKENS * took / tokens]
        return Point([took], tokens / 1024, None if dense or backward else 1e-7, short)

    monkeypatch.setattr(scaling._Worker, "measure", measure)
    return asked


def ask(**options) -> list[Row]:
    asked = {"precisions": ("fp32",), "seconds": 0, "max_tokens": 2**16, "memory_gib": 20, **options}
    return measure_layers((LONGNET,), **asked)


def test_lengths_double_until_memory_would_not_hold_them(monkeypatch):
    fake(monkeypatch)
    rows = [row for row in ask(memory_gib=8 / 1024) if row.system == OURS and not row.shape["backward"]]
    assert [row.shape["tokens"] for row in rows] == [256, 512, 1024, 2048, 4096, 8192, 16384]
    assert {row.status for row in rows[:-1]} == {"ok"}
    assert (rows[-1].status, rows[-1].note) == ("left out", "would need about 0.0 GiB")


def test_dense_ends_before_a_length_would_take_it_over_a_minute(monkeypatch):
    fake(monkeypatch, seconds_per_token=2e-2)
    rows = [row for row in ask() if not row.shape["backward"]]
    assert max(row.shape["tokens"] for row in rows if row.system == DENSE) == 1024  # 20 seconds; 2048 would take 82
    assert max(row.shape["tokens"] for row in rows if row.system == OURS) == 2**16


@pytest.mark.parametrize(
    ("call", "asked", "calls"),
    [(1.0, 1.0, 4), (1.0, 9.0, 9), (29.0, 1.0, 3), (90.0, 1.0, 2), (0.0, 0.0, 4), (0.0, 1.0, MOST_CALLS)],
)
def test_three_calls_count_and_fewer_of_slow_ones(call: float, asked: float, calls: int):
    taken = []
    while scaling._more_calls(taken, asked):
        taken.append(call)
    assert len(taken) == calls


def test_a_wrong_output_gets_no_time(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setattr(scaling._Worker, "measure", lambda self, *asked: Point([1.0], 1.0, float("nan")))
    row = ask()[0]
    assert (row.status, row.median_ms) == ("failed tolerance", None)


def test_a_second_run_measures_only_what_is_missing(monkeypatch):
    asked = fake(monkeypatch)
    first = ask(max_tokens=1024)
    assert len(asked) == 2 * 2 * 3
    asked.clear()
    second = ask(max_tokens=2048, done=first)
    assert [tokens for *_, tokens in asked] == [2048] * 4
    assert len(second) == len(first) + 4


def test_goals_compare_lengths_and_systems(monkeypatch):
    fake(monkeypatch)
    rows = measure_layers((LONGNET,), precisions=("bf16",), seconds=0, max_tokens=2**20, memory_gib=20)
    goals = {goal["what"]: goal for goal in cases.reached("bench-scaling", rows)}
    name = "LongNet layer, forward, bf16"
    assert goals[f"{name}: longest"]["measured"] == 2**20
    assert goals[f"{name}: time per token at 1,048,576 over 32,768"]["measured"] == 1
    assert goals[f"{name}: memory per token at 1,048,576 over 32,768"]["measured"] == 1
    assert goals[f"{name}: faster than dense SDPA from"]["measured"] == 2048


@pytest.mark.parametrize("causal", [False, True])
def test_longnet_written_out_is_the_reference(causal: bool):
    torch.manual_seed(0)
    pattern = DilatedSegments(((16, 1), (24, 3), (64, 5)), heads=3, causal=causal)
    q, k, v = torch.randn(3, 1, 3, 100, 8, dtype=torch.float64).unbind()
    expected = attend(q, k, v, pattern, backend="reference")
    torch.testing.assert_close(exact_dilated(q, k, v, pattern), expected, rtol=0, atol=1e-12)


def test_the_issue_states_the_operations_of_the_single_case():
    assert DilatedCase(precision="fp32").flops == 4 * 16 * 16384 * 64 * (2048 + 1024 + 512 + 256)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_way_to_train_the_character_model_gives_the_same_logits(precision: str):
    (case,) = cases.character_cases(precisions=(precision,), quick=True)
    (expected,) = case.expected()
    for system in case.systems():
        if system.missing is None:
            prepared = system.prepare()
            (logits,) = prepared.read(prepared.run())
            assert float((logits - expected).norm() / expected.norm()) <= system.tolerance, system.name


def test_local_attention_computes_dilated_heads():
    pytest.importorskip("local_attention")
    q, k, v = torch.randn(3, 2, 4, 50, 8).unbind()
    pattern = SlidingWindow(5, 0, dilation=(1, 1, 3, 3))
    expected = attend(q, k, v, pattern, scale=0.3)
    torch.testing.assert_close(local_attention(q, k, v, pattern, scale=0.3), expected, rtol=0, atol=1e-5)


def bench(*arguments: str):
    done = CliRunner().invoke(
        app, ["bench", "scaling", "--quick", "--threads", "1", *arguments], catch_exceptions=False
    )
    return done


def test_the_command_writes_a_result_and_a_plot_and_goes_on_where_it_was_cut(tmp_path: Path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        done = bench("--max-tokens", "512", "--precision", "fp32", "--out", "here.json")
        assert done.exit_code == 0, done.stderr
        result = json.loads(Path("here.json").read_text())
        assert result["topic"] == "bench-scaling-quick"
        assert result["command"] == "longspan bench scaling --max-tokens 512 --precision fp32 --threads 1 --quick"
        assert {row["status"] for row in result["rows"] if row["ours"]} == {"ok"}
        assert {row["status"] for row in result["rows"]} <= {"ok", "cannot run", "missing"}  # of the peers
        layers = [row for row in result["rows"] if "layer" in row["shape"]]
        assert len(layers) == 2 * 2 * 2 * 2 and all(row["median_ms"] for row in layers)
        assert Path("here.png").read_bytes()[:4] == b"\x89PNG"
        asked = fake(monkeypatch)
        again = bench("--max-tokens", "1024", "--precision", "fp32", "--out", "here.json", "--resume")
        assert again.exit_code == 0, again.stderr
        assert {tokens for *_, tokens in asked} == {1024}
        result["commit"] = "another"
        Path("here.json").write_text(json.dumps(result))
        refused = bench("--precision", "fp32", "--out", "here.json", "--resume")
        assert refused.exit_code == 2 and "without --resume" in refused.stderr.replace("\n", " ")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is read from /proc")
def test_a_point_is_measured_with_its_memory():
    layer = Layer(name="Longformer", window=16, heads=4, head_width=16)
    point = scaling.measure_point(layer, False, "fp32", True, 2**16, 0, torch.get_num_threads())
    assert point.peak_mib is not None and point.peak_mib > 2**16 * layer.width * 4 * 3 / 2**20  # x, y and a gradient
    assert point.relative_error is None
    assert len(point.seconds) == 3 and len(point.short_seconds) == 3  # after the first call of each; four in turns


def test_a_long_row_is_compared_with_a_short_one_in_the_same_minutes(monkeypatch):
    fake(monkeypatch)
    monkeypatch.setattr(scaling._Worker, "measure", lambda self, *asked: Point([4.0, 6.0, 5.0], 1.0, 1e-7, [1.0, 2.0]))
    rows = measure_layers((LONGNET,), precisions=("fp32",), seconds=0, max_tokens=2**17, memory_gib=20)
    assert next(row for row in rows if row.shape["tokens"] == 2**17).token_over_short == pytest.approx(
        5 / 4 / 1.5, 1e-3
    )
