"""Linear layers that learn, by oneDNN as on the processors where it is faster, against torch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longspan.models import trained_linear
from longspan.models.trained_linear import TrainedLinear, linear

needs_one_dnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def by_one_dnn(monkeypatch):
    """The names of the products that oneDNN computed."""
    calls = []
    product = trained_linear._product
    monkeypatch.setattr(trained_linear, "one_dnn_is_faster", lambda: True)
    monkeypatch.setattr(trained_linear, "LEAST_WORK", 2000)
    monkeypatch.setattr(trained_linear, "_product", lambda *given: calls.append(len(given)) or product(*given))
    return calls


@needs_one_dnn
@pytest.mark.parametrize("shape", [(2, 600, 24), (1, 1100, 24), (1025, 24), (7, 24)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_and_gradients_are_as_exact_as_torchs(shape, has_bias, by_one_dnn):
    torch.manual_seed(0)
    layer = TrainedLinear(24, 40, bias=has_bias)
    x = torch.randn(shape, requires_grad=True)
    grad = torch.randn(40, *shape[:-1]).movedim(0, -1)  # not contiguous
    exact = [part.detach().double().requires_grad_() for part in (x, *layer.parameters())]
    expected = F.linear(*exact)
    expected.backward(grad.double())
    theirs = [part.detach().clone().requires_grad_() for part in (x, *layer.parameters())]
    F.linear(*theirs).backward(grad)
    out = layer(x)
    out.backward(grad)
    assert by_one_dnn
    assert (out - expected).abs().max() < 1e-5
    for ours, torchs, right in zip((x, *layer.parameters()), theirs, exact, strict=True):
        assert ours.grad is not None and torchs.grad is not None and right.grad is not None
        error, allowed = ((part.grad.double() - right.grad).square().mean().sqrt() for part in (ours, torchs))
        assert error <= 2 * allowed


@needs_one_dnn
def test_what_needs_no_gradient_costs_no_product(by_one_dnn):
    layer = TrainedLinear(24, 40).requires_grad_(False)
    layer(torch.randn(300, 24, requires_grad=True)).sum().backward()
    assert len(by_one_dnn) == 2  # forward, and the gradient of x
    assert layer.weight.grad is None and layer.bias.grad is None
    with torch.inference_mode():
        layer(torch.randn(300, 24))
    assert len(by_one_dnn) == 3


def test_torch_computes_what_one_dnn_does_not(by_one_dnn):
    layer = TrainedLinear(24, 40)
    x = torch.randn(300, 24)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x[:1]), F.linear(x[:1], layer.weight, layer.bias))  # too little work
    assert layer(x[:0]).shape == (0, 40)
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.to("meta")(x.to("meta")).is_meta
    assert linear(x.bfloat16(), torch.ones(40, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert not by_one_dnn


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_graphs_hold_torchs_own_product(by_one_dnn):
    layer, x = TrainedLinear(24, 40).eval(), torch.randn(300, 24)
    traced = torch.jit.trace(layer, x, check_trace=False)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    exported = torch.export.export(layer, (x,)).module()
    for graph in (traced, compiled, exported):
        assert torch.equal(graph(x), F.linear(x, layer.weight, layer.bias))
    assert not by_one_dnn


def test_it_is_a_linear_layer_with_the_same_weights():
    ours, theirs = TrainedLinear(8, 4), nn.Linear(8, 4)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 8)
    assert isinstance(ours, nn.Linear) and torch.equal(ours(x), theirs(x))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(torch.randn(3, 7))


@pytest.mark.parametrize(
    ("maker", "capability", "faster"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
def test_who_computes_is_decided_by_the_processor(maker, capability, faster, monkeypatch):
    monkeypatch.setattr(trained_linear.Path, "read_text", lambda *_, **__: f"vendor_id\t: {maker}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    assert trained_linear.one_dnn_is_faster.__wrapped__() == (faster and both)
