"""Shapes: B batch, N tokens, C model width, H heads, D head width."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.models.tiny import FAMILIES, batch, tiny_model, token_mask, translated
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from longspan.attention import Full, SlidingWindow
from longspan.models.encoder import ACTIVATIONS, BlockConfig, Encoder, EncoderConfig, Rotary

POST = EncoderConfig(
    width=24,
    blocks=(
        BlockConfig(heads=1, head_width=26, ffn_width=17, pattern=SlidingWindow(3, 5), global_projections=True),
        BlockConfig(heads=3, head_width=8, ffn_width=40),
        BlockConfig(heads=2, head_width=5, ffn_width=1, pattern=SlidingWindow(2, 2, dilation=(1, 3))),
    ),
    activation="relu",
)
PRE = EncoderConfig(
    width=24,
    blocks=(
        BlockConfig(heads=2, head_width=12, ffn_width=30, rope_theta=160_000.0, attention_norm=False),
        BlockConfig(heads=1, head_width=26, ffn_width=9, rope_theta=10_000.0, pattern=SlidingWindow(4, 4)),
        BlockConfig(heads=2, head_width=12, ffn_width=30, pattern=SlidingWindow(2, 2), global_projections=True),
    ),
    norm="pre",
    norm_bias=False,
    attention_bias=False,
    ffn_bias=False,
    gated=True,
)


def noisy(config: EncoderConfig) -> Encoder:
    torch.manual_seed(0)
    encoder = Encoder(config).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return encoder


def rows(lengths: list[int], *, global_fraction: float = 0.2, width: int = 24):
    torch.manual_seed(1)
    mask = token_mask(lengths)
    return torch.randn(*mask.shape, width, dtype=torch.float64), mask, torch.rand(mask.shape) < global_fraction


def dense(encoder: Encoder, x, token_mask, global_mask):
    """The same encoder, N x N and one head at a time, straight from its definition."""
    config, tokens = encoder.config, x.shape[1]
    marked = global_mask & token_mask
    index = torch.arange(tokens)
    for number, (block, described) in enumerate(zip(encoder.blocks, config.blocks, strict=True)):
        pre = config.norm == "pre"
        read = block.attention_norm(x) if pre else x
        local, of_global = block.attention.qkv, block.attention.qkv_global or block.attention.qkv
        heads = []
        for head in range(described.heads):

            def project(linear, head=head, read=read, described=described):
                weight = linear.weight.view(3, described.heads, described.head_width, -1)[:, head]
                bias = 0 if linear.bias is None else linear.bias.view(3, 1, 1, described.heads, -1)[..., head, :]
                parts = torch.einsum("bnc,pdc->pbnd", read, weight) + bias
                return (turn(parts[0], described.rope_theta), turn(parts[1], described.rope_theta), parts[2])

            (q, k, v), (q_global, k_global, v_global) = project(local), project(of_global)
            seen = described.pattern.count(torch.tensor(0), torch.tensor(head), index[:, None], index[None]).bool()
            seen = (seen | marked[:, None]) & token_mask[:, None]
            out = attention(q, k, v, seen)
            everything = attention(q_global, k_global, v_global, token_mask[:, None].expand_as(seen))
            heads.append(torch.where(marked[..., None], everything, out) * token_mask[..., None])
        x = x + block.attention.out(torch.cat(heads, -1))
        x = x if pre else block.attention_norm(x)
        inner = block.ffn_in(block.ffn_norm(x) if pre else x)
        act = ACTIVATIONS[config.activation]
        inner = (
            act(inner[..., : described.ffn_width]) * inner[..., described.ffn_width :] if config.gated else act(inner)
        )
        x = x + block.ffn_out(inner)
        x = x if pre else block.ffn_norm(x)
        if pre and number == len(config.blocks) - 1:
            x = encoder.final_norm(x)
    return x


def attention(q, k, v, seen):
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~seen, -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v


def turn(x, theta):
    """Rotates each pair (d, d + D/2) of x [B, N, D] by position * theta^(-2d/D)."""
    if theta is None:
        return x
    half = x.shape[-1] // 2
    frequency = 1.0 / theta ** (torch.arange(0, 2 * half, 2) / (2 * half))  # float32, as every checkpoint was trained
    angle = (torch.arange(x.shape[1]).float()[:, None] * frequency).double()
    pair = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((pair.real, pair.imag), -1)


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_layers_that_differ_in_everything_equal_the_definition(config):
    encoder, (x, mask, marked) = noisy(config), rows([37, 1, 20])
    with torch.no_grad():
        assert torch.allclose(encoder(x, mask, marked), dense(encoder, x, mask, marked), atol=1e-11)
        none = torch.zeros_like(mask)
        assert torch.allclose(encoder(x, mask), dense(encoder, x, mask, none), atol=1e-11)
        assert torch.allclose(encoder(x), dense(encoder, x, torch.ones_like(mask), none), atol=1e-11)


@pytest.mark.parametrize("std", [0.02, 0.2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_hidden_state_equals_hugging_face(family, std, record_property):
    theirs = tiny_model(family, initializer_range=std)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-6)):
        theirs = theirs.to(dtype)
        ours = translated(theirs)
        inputs = batch(theirs.config, [61, 1, 30])
        kept = inputs["attention_mask"].bool()
        if family == "longformer":
            inputs["global_attention_mask"] = (
                torch.rand(kept.shape, generator=torch.Generator().manual_seed(2)) < 0.1
            ).long()
            inputs["global_attention_mask"][1] = 0
        with torch.no_grad():
            expected = theirs(**inputs, output_hidden_states=True).hidden_states
            found = ours(**inputs, output_hidden_states=True)
        assert len(found.hidden_states) == len(expected) == ours.config.num_hidden_layers + 1
        error = max((a - b)[kept].abs().max().item() for a, b in zip(found.hidden_states, expected, strict=True))
        record_property(f"max_error_{family}_{std}_{dtype}".replace("torch.", ""), error)
        assert error <= tolerance
        assert torch.equal(found.hidden_states[-1], found.last_hidden_state)


@pytest.mark.parametrize("tokens", [1, 2, 8, 13, 24, 64])
def test_any_length_and_any_global_tokens_equal_hugging_face(tokens):
    """Windows of 4, 8 and 16 tokens; none, one, some or all tokens global, wherever, also on padding."""
    theirs = tiny_model("longformer", initializer_range=0.2)
    ours = translated(theirs)
    generator = torch.Generator().manual_seed(tokens)
    inputs = batch(theirs.config, [tokens] * 3 + [max(1, tokens // 2)] * 2)
    share = torch.tensor([0.0, 0.2, 1.0, 0.5, 0.1])[:, None]
    inputs["global_attention_mask"] = (torch.rand(inputs["input_ids"].shape, generator=generator) < share).long()
    with torch.no_grad():
        found, expected = ours(**inputs), theirs(**inputs)
    assert torch.allclose(found.last_hidden_state, expected.last_hidden_state, atol=1e-5)  # at padding too
    assert torch.allclose(found.pooler_output, expected.pooler_output, atol=1e-5)


def test_windows_that_do_not_divide_each_other_run_where_hugging_face_fails():
    """It pads to a multiple of the widest window, 12, and then wants a multiple of 8 in the layer that has 8."""
    theirs = tiny_model("longformer", attention_window=[4, 8, 12], initializer_range=0.2)
    ours = translated(theirs)
    inputs = batch(theirs.config, [12, 5])
    with torch.no_grad():
        with pytest.raises(AssertionError, match="should be multiple of 8"):
            theirs(**inputs)
        pad = {"input_ids": theirs.config.pad_token_id, "attention_mask": 0}
        padded = {name: F.pad(part, (0, 12), value=pad[name]) for name, part in inputs.items()}  # suits both
        assert torch.allclose(ours(**inputs)[0], theirs(**padded)[0][:, :12], atol=1e-5)


def test_float64_is_kept_where_hugging_face_rounds_rotary_positions_to_float32():
    torch.manual_seed(0)
    q = torch.randn(1, 1, 50, 8, dtype=torch.float64)
    rotary = Rotary.at(torch.arange(50)[None], 8, 10_000.0, q.dtype)
    exact = turn(q[0], 10_000.0)
    theirs, _ = apply_rotary_pos_emb(q, q, rotary.cos[:, 0], rotary.sin[:, 0])
    assert (theirs[0] - exact).abs().max() > 1e-8
    assert (rotary.turn(q)[0] - exact).abs().max() < 1e-14


def test_rotary_positions_equal_hugging_face_far_from_the_start():
    """A rounding in the frequencies grows with the position; theirs must be ours."""
    theirs = tiny_model("modernbert", initializer_range=0.2)
    ours = translated(theirs)
    inputs = batch(theirs.config, [20]) | {"position_ids": torch.arange(8_000, 8_020)[None]}
    with torch.no_grad():
        assert torch.allclose(ours(**inputs)[0], theirs(**inputs)[0], atol=1e-5)


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_gradients_reach_the_input_and_every_weight(config):
    encoder, (x, mask, marked) = noisy(config).train(), rows([37, 1, 20])
    x.requires_grad_()
    encoder(x, mask, marked)[mask].square().sum().backward()
    found = [parameter.grad for parameter in (x, *encoder.parameters())]
    encoder.zero_grad()
    x.grad = None
    dense(encoder, x, mask, marked)[mask].square().sum().backward()
    expected = [parameter.grad for parameter in (x, *encoder.parameters())]
    for a, b in zip(found, expected, strict=True):
        assert a.abs().max() > 0
        assert torch.allclose(a, b, rtol=1e-8, atol=1e-8)


def test_a_pattern_without_global_projections_lets_global_tokens_use_the_local_ones():
    encoder, (x, mask, marked) = noisy(POST), rows([30, 11])
    shared = noisy(replace(POST, blocks=tuple(replace(block, global_projections=False) for block in POST.blocks)))
    shared.load_state_dict({name: value for name, value in encoder.state_dict().items() if "global" not in name})
    with torch.no_grad():
        encoder.blocks[0].attention.qkv_global.load_state_dict(encoder.blocks[0].attention.qkv.state_dict())
        assert torch.allclose(shared(x, mask, marked), encoder(x, mask, marked), atol=1e-12)


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_padding_and_neighbours_in_the_batch_change_nothing(config):
    encoder, (x, mask, marked) = noisy(config), rows([21, 9, 15])
    with torch.no_grad():
        together = encoder(x, mask, marked)
        longer = [F.pad(part, (0,) * (2 * part.dim() - 3) + (30,)) for part in (x, mask, marked)]
        assert torch.allclose(encoder(*longer)[:, :21][mask], together[mask], atol=1e-12)
        order = [2, 0, 1]
        assert torch.allclose(encoder(x[order], mask[order], marked[order]), together[order], atol=1e-12)
        for row, length in enumerate(mask.sum(1).tolist()):
            alone = encoder(x[row : row + 1, :length], None, marked[row : row + 1, :length])
            assert torch.allclose(alone[0], together[row, :length], atol=1e-12)


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_garbage_in_padding_stays_there(config):
    encoder, (x, mask, marked) = noisy(config), rows([21, 9, 15])
    marked[1, 12] = True  # on padding
    with torch.no_grad():
        clean = encoder(x, mask, marked)
        for garbage in (math.nan, math.inf, 1e30):
            assert torch.equal(encoder(x.masked_fill(~mask[..., None], garbage), mask, marked)[mask], clean[mask])


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_a_row_without_any_token_gives_finite_numbers(config):
    encoder, (x, mask, marked) = noisy(config), rows([9, 5])
    mask[1] = False
    out = encoder(x, mask, marked)
    out.square().sum().backward()
    assert out.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_a_padded_token_is_never_global():
    encoder, (x, mask, marked) = noisy(POST), rows([21, 9, 15])
    with torch.no_grad():
        assert torch.equal(encoder(x, mask, marked), encoder(x, mask, marked & mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_as_hugging_face_in_bfloat16(family):
    exact = tiny_model(family, initializer_range=0.2)
    inputs = batch(exact.config, [61, 1, 30])
    kept = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = exact(**inputs)[0][kept]
        theirs = (exact.to(torch.bfloat16)(**inputs)[0][kept] - expected).square().mean()
        ours = (translated(exact)(**inputs)[0][kept] - expected).square().mean()
    assert ours <= 1.5 * theirs


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_an_encoder_without_global_tokens_compiles_into_one_graph(config):
    encoder, (x, mask, _) = noisy(config), rows([21, 9, 15])
    compiled = torch.compile(encoder, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(x, mask), encoder(x, mask), atol=1e-12)


def test_a_backend_asked_for_by_name_runs_the_windows():
    encoder, (x, mask, marked) = noisy(POST), rows([21, 9, 15])
    with torch.no_grad():
        by_name = encoder(x, mask, marked, backend="reference")
        assert torch.allclose(by_name, encoder(x, mask, marked), atol=1e-12)
    with pytest.raises(ValueError, match="unknown backend 'fastest'"):
        encoder(x, mask, backend="fastest")


def test_hidden_states_end_with_what_forward_gives():
    encoder, (x, mask, marked) = noisy(PRE), rows([21, 9, 15])
    with torch.no_grad():
        states = encoder.hidden_states(x, mask, marked)
        assert len(states) == 4
        assert torch.equal(states[0], x)
        assert torch.equal(states[-1], encoder(x, mask, marked))


@pytest.mark.parametrize("config", [POST, PRE], ids=["post", "pre"])
def test_a_description_survives_json(config):
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockConfig(heads=0, head_width=8, ffn_width=8), "heads must be at least 1; got 0"),
        (lambda: BlockConfig(heads=1, head_width=7, ffn_width=8, rope_theta=1e4), "head_width must be even; got 7"),
        (lambda: replace(POST, width=0), "width must be at least 1; got 0"),
        (lambda: replace(POST, norm="middle"), "norm must be 'post' or 'pre'; got 'middle'"),
        (lambda: replace(POST, activation="mish"), "unknown activation 'mish'; expected one of"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_full_pattern_needs_no_global_tokens():
    config = replace(
        POST, blocks=tuple(replace(block, pattern=Full(), global_projections=False) for block in POST.blocks)
    )
    encoder, (x, mask, marked) = noisy(config), rows([21, 9, 15])
    with torch.no_grad():
        assert torch.equal(encoder(x, mask, marked), encoder(x, mask))
