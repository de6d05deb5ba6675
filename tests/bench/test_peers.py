import time

import pytest
import torch

from longspan.bench import peers
from longspan.bench.attention import PEERS, AttentionCase, exact
from longspan.bench.encoders import TINY_DENSE, DenseCase, stock_model

SMALL = {"tokens": 64, "heads": 2, "width": 8, "window": 16}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_attention_peers_compute_the_window(peer, backward):
    if peer.missing() is not None or (peer.forward_only and backward) or peer.make is peers.flex_attention:
        pytest.skip("needs another package, a backward pass, or half a minute of compiling")
    case = AttentionCase(precision="fp32", backward=backward, **SMALL)
    prepared = case._prepare(peer)
    for output, expected in zip(prepared.read(prepared.run()), case.expected(), strict=True):
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-6)


def test_the_expected_attention_is_a_masked_softmax():
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    (out,) = exact(q, k, v, None, window=3)
    position = torch.arange(20)
    visible = (position[:, None] - position).abs() <= 3
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=visible)
    torch.testing.assert_close(out, expected)


def test_what_is_not_installed_is_named_with_its_pip_line():
    assert peers.missing("torch", "nonexistent_engine", pip="nonexistent-engine") == "pip install nonexistent-engine"
    assert peers.missing("torch", pip="torch") is None


@pytest.mark.parametrize(("cost", "best"), [(0.004, "one by one"), (0.0, "padded")])
def test_a_batch_is_read_in_the_quicker_way(cost, best):
    """A system whose time grows with the padded tokens, and one that pays for every call."""
    ids = torch.arange(24).view(3, 8)

    def run(feed):
        time.sleep(cost * feed[0].numel() / 4 if cost else 0.005)
        return (feed[0] * feed[1])[..., None].float()

    prepared = peers._best_way(run, [2, 3, 8], ids)
    assert prepared.note == best
    (rows,) = prepared.read(prepared.run())
    assert rows[:, 0].tolist() == [0, 1, 8, 9, 10, *range(16, 24)]


@pytest.mark.parametrize(
    ("name", "modules"),
    [("ONNX Runtime", ("onnxruntime", "onnx")), ("OpenVINO", ("openvino", "nncf"))],
)
def test_engines_compute_the_stock_model(name, modules):
    for module in modules:
        pytest.importorskip(module)
    case = DenseCase(model=TINY_DENSE, batch=3, tokens=24)
    systems = {(system.name, system.precision): system for system in case.systems()}
    stock = systems["Hugging Face", "fp32"].prepare()
    (expected,) = stock.read(stock.run())
    for (engine, _), system in systems.items():
        if engine == name:
            prepared = system.prepare()
            (output,) = prepared.read(prepared.run())
            assert float((output - expected).norm() / expected.norm()) <= system.tolerance


def test_onnx_runtime_runs_its_fused_attention():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    model = stock_model(TINY_DENSE)
    _, note = peers._optimized_onnx(model, False)
    assert note == "2 of 2 attention layers fused"
    assert model.config._attn_implementation == "sdpa" and not model.training
