"""Plans against what attention and whole models send, keep and hold on 2, 3 and 4 processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.distributed.ranks import on_ranks
from tests.planning.measures import kept_bytes, longformer, longnet, loss_of, peak_bytes, some_ids
from tests.planning.test_attention import PATTERNS, D, H
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.attention import GlobalKeys, Pattern
from longspan.distributed import SequenceShards, attend, shard
from longspan.distributed.global_rows import attend_all
from longspan.planning import plan
from longspan.planning.attention import Heads, Ranks, load_of

SHARDED = ((512, 2), (500, 3), (513, 4))  # tokens and ranks
MODELS = {
    "LongNet, segments cut": lambda: longnet(segment_lengths=(96, 384, 8192), dilations=(1, 3, 16)),
    "LongNet, one segment for all": lambda: longnet(segment_lengths=(64, 8192), dilations=(1, 16)),
    "Longformer": lambda: longformer(windows=100, dilated_heads=0),
}

SHARDED_RUNS: tuple[Any, ...] = (("training", "fp32"), ("training", "bf16"), ("checkpointing", "bf16"))
SHARDED_SIZE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 8}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """(of attention, of models) on each of four ranks."""
    return on_ranks(4, tmp_path_factory.mktemp("ranks"), run)


def run(rank: int) -> tuple[Any, Any]:
    groups = [torch.distributed.new_group(list(range(count))) for _, count in SHARDED]
    attention = [
        [run_attention(*pattern, Ranks(tokens, count), rank, group) for pattern in PATTERNS.values()]
        for (tokens, count), group in zip(SHARDED, groups, strict=True)
        if rank < count
    ]
    return attention, [run_model(make(), groups[0]) for make in MODELS.values()] if rank < 2 else []


def run_attention(pattern: Pattern, global_tokens: int, ranks: Ranks, rank: int, group: Any) -> tuple[int, int, int]:
    """Bytes sent forward and backward, and kept between them."""
    shards = SequenceShards(ranks.start(rank + 1) - ranks.start(rank), group)
    assert shards.start == ranks.start(rank)
    joined = torch.ones(1, shards.end - shards.start, 3, H, D).requires_grad_()
    q, k, v = (part.transpose(1, 2) for part in (joined * 1).unbind(2))
    q, k = q * 1, k * 1  # as turned by their positions
    marked = (torch.arange(ranks.tokens) < global_tokens)[None, shards.start : shards.end]
    if global_tokens:
        pattern = pattern | GlobalKeys(marked)
    sums = []

    def call() -> None:
        out = attend(q, k, v, pattern, shards).transpose(1, 2).flatten(2)
        sums.append((out * out).sum())  # keeps out, as a linear layer does

    kept = kept_bytes(call)
    total = sums[0]
    if global_tokens:
        total = total + attend_all(q[:, :, : int(marked.sum())], k, v, shards).sum()
    forward = shards.bytes_sent
    total.backward()
    return forward, shards.bytes_sent - forward, kept


def run_model(model: Any, group: Any) -> tuple[int, int, int, int, int]:
    """Bytes sent forward and backward, kept between them, and held at the peak of training and of reading."""
    torch.manual_seed(0)
    ids = some_ids(2048)
    shard(model, group)
    loss_of(model, ids).backward()  # makes the gradients
    shards = model.model.decoder.sequence.shards
    before, losses = shards.bytes_sent, []
    kept = kept_bytes(lambda: losses.append(loss_of(model, ids)), model)
    forward = shards.bytes_sent - before
    losses.pop().backward()
    backward = shards.bytes_sent - before - forward
    training = peak_bytes(lambda: loss_of(model, ids).backward())
    with torch.no_grad():
        reading = peak_bytes(lambda: model.eval()(ids))
    return forward, backward, kept, training, reading


def run_sharded(rank: int) -> list[tuple[int, int]]:
    """Bytes that weights and gradients send in a step, and held at its peak beside weights, gradients and optimizer."""
    found = []
    for mode, precision in SHARDED_RUNS:
        model = longnet(**SHARDED_SIZE)
        shard(model, torch.distributed.group.WORLD)
        if mode == "checkpointing":
            model.gradient_checkpointing_enable()
        for unit in (*model.model.decoder.blocks, model):
            fully_shard(unit, mesh=init_device_mesh("cpu", (2,)))

        def step(model=model, narrow=precision == "bf16") -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                loss = loss_of(model, some_ids(128))
            loss.backward()

        with Sent() as sent:
            step()  # makes the gradients
        found.append((sent.bytes, min(peak_bytes(step) for _ in range(2))))  # more where the other rank is late
    return found


class Sent(TorchDispatchMode):
    """Counts what one of two ranks sends where weights are gathered and gradients scattered."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "allgather_base" in str(func):
            self.bytes += args[1].nbytes
        if "reduce_scatter_base" in str(func):
            self.bytes += args[1].nbytes // 2
        return func(*args, **kwargs or {})


def test_attention_sends_and_keeps_what_was_planned(measured):
    for number, (tokens, count) in enumerate(SHARDED):
        ranks = Ranks(tokens, count)
        for rank in range(count):
            found = zip(PATTERNS.items(), measured[rank][0][number - len(SHARDED)], strict=True)
            for (name, (pattern, global_tokens)), (forward, backward, kept) in found:
                load = load_of(pattern, ranks, rank, Heads(H, D, 4), global_tokens)
                assert (load.sent, load.returned) == (forward, backward), (name, count, rank)
                if "dilated" in name:
                    continue  # whose parts no kernel takes, so that the reference computes and keeps all scores
                copies = {3: 6, 2: 5, 0: 1}[load.held]  # of q in joined projections, q and k turned, and the output
                planned = (load.rows + load.wide_rows) * 4 * D + load.other
                planned += (ranks.start(rank + 1) - ranks.start(rank)) * H * (copies * 4 * D + 4)
                assert planned == pytest.approx(kept, rel=0.1), (name, count, rank)


def test_models_send_keep_and_hold_what_was_planned(measured):
    for (name, make), *ranks in zip(MODELS.items(), measured[0][1], measured[1][1], strict=True):
        forward, backward, *memory = (max(figures) for figures in zip(*ranks, strict=True))
        found, read = (
            plan(make(), tokens=4096, devices=2, mode=mode, precision="fp32") for mode in ("training", "inference")
        )
        assert sum(layer.most_forward_bytes for layer in found.layers) == forward, name
        assert sum(layer.most_backward_bytes for layer in found.layers) == backward, name
        planned = [found.memory.kept, found.memory.kept + found.memory.working, read.memory.working]
        assert planned == pytest.approx(memory, rel=0.1), name


def test_sharded_weights_send_and_hold_what_was_planned(tmp_path):
    measured = zip(SHARDED_RUNS, *on_ranks(2, tmp_path, run_sharded), strict=True)
    for (mode, precision), *ranks in measured:
        found = plan(longnet(**SHARDED_SIZE), tokens=256, devices=2, mode=mode, precision=precision, shard_weights=True)
        sent, held = (min(figures) for figures in zip(*ranks, strict=True))
        assert found.reduced_bytes == pytest.approx(sent, rel=0.01)  # which is padded to a number for each rank
        assert found.memory.total == pytest.approx(held + 16 * found.parameters / 2, rel=0.1), (mode, precision)
