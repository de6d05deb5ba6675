"""Measures and plans for docs/billion.md: `python docs/billion.py` writes its tables and draws docs/billion.png.

It runs LongNet's attention on 2, 4 and 8 processes of this machine, which takes a minute or two.
"""

from __future__ import annotations

import os
import re
import tempfile
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from torch import Tensor
from typer.testing import CliRunner

from longspan.attention import DilatedSegments, Full, Pattern
from longspan.attention import attend as attend_here
from longspan.cli import app
from longspan.distributed import SequenceShards, attend
from longspan.distributed import attention as sharded_attention
from longspan.models import LongNetConfig
from longspan.planning.attention import Heads, Ranks, load_of

PAGE = Path(__file__).parent / "billion.md"
RANKS = (2, 4, 8)
TOKENS_PER_RANK, HEADS, WIDTH, KEPT = 4096, 4, 16, 512
PAPER = Heads(12, 64, 2)
DEVICES, PAPER_KEPT = 64, 2048
COMMANDS = (
    "longspan plan longnet --tokens 1e9 --devices 64 --device-memory 80GiB --mode checkpointing "
    "--flops-per-second 4e14 --bytes-per-second 50GB",
    "longspan plan longnet --tokens 1e9 --devices 64 --device-memory 80GiB --mode inference",
    "longspan plan longnet --tokens 1073741824 --devices 64 --device-memory 80GiB --mode checkpointing",
)


class Measured(NamedTuple):
    """Of one rank: pairs of queries and keys that its attention was asked for, bytes sent forward and backward."""

    pairs: int
    forward: int
    backward: int


def longnet(tokens: int, tokens_per_rank: int, kept: int, heads: int) -> DilatedSegments:
    """The paper's three segments for long sequences: a fixed one, a device's tokens, and all; each keeps as many."""
    lengths = sorted({kept, max(kept, tokens_per_rank), max(kept, tokens)})
    return DilatedSegments(tuple((length, length // kept) for length in lengths), heads, causal=True)


def measure(world: int) -> list[Measured]:
    """LongNet's attention forward and backward on so many processes."""
    context = get_context("fork")
    answers = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_run, args=(rank, world, folder, answers)) for rank in range(world)]
        for process in processes:
            process.start()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(world)]


def _run(rank: int, world: int, folder: str, answers: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(minutes=5)
    )
    pairs = []

    def counting(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, **options: Any) -> Any:
        pairs.append(_pairs(q, k, pattern, options["token_mask"], options.get("query_positions")))
        return attend_here(q, k, v, pattern, **options)

    sharded_attention.attend_here = counting  # what the ranks compute goes through it
    shards = SequenceShards(TOKENS_PER_RANK)
    torch.manual_seed(rank)
    q, k, v = (torch.randn(1, HEADS, TOKENS_PER_RANK, WIDTH, requires_grad=True) for _ in range(3))
    out = attend(q, k, v, longnet(shards.total, TOKENS_PER_RANK, KEPT, HEADS), shards)
    forward = shards.bytes_sent
    out.sum().backward()
    answers.put((rank, Measured(sum(pairs), forward, shards.bytes_sent - forward)))
    dist.barrier()
    dist.destroy_process_group()


def _pairs(q: Tensor, k: Tensor, pattern: Pattern, token_mask: Tensor | None, positions: Tensor | None) -> int:
    """How often a query of one call reads a key, counted one by one."""
    positions = torch.arange(q.shape[2]) if positions is None else positions
    rows, heads, keys = torch.arange(q.shape[0]), torch.arange(q.shape[1]), torch.arange(k.shape[2])
    total = 0
    for query in positions.split(256):
        count = pattern.count(
            rows[:, None, None, None], heads[:, None, None], query[:, None], keys
        )  # broadcasts to [B, H, 256, N]
        if token_mask is not None:
            count = count * token_mask[:, None, None, :] * token_mask[:, query][:, None, :, None]
        total += int(count.expand(len(rows), len(heads), len(query), len(keys)).sum())
    return total


def table(measured: dict[int, list[Measured]]) -> str:
    """Counted beside planned, as Markdown."""
    lines = [
        "| processes | tokens | keys a token reads: counted, planned | bytes forward, at most: sent, planned "
        "| bytes backward, at most: sent, planned |",
        "|---:|---:|---:|---:|---:|",
    ]
    for world, ranks in measured.items():
        tokens = world * TOKENS_PER_RANK
        pattern = longnet(tokens, TOKENS_PER_RANK, KEPT, HEADS)
        loads = [load_of(pattern, Ranks(tokens, world), rank, Heads(HEADS, WIDTH, 4)) for rank in range(world)]
        each = HEADS * tokens
        keys = f"{sum(one.pairs for one in ranks) / each:.1f}, {sum(one.pairs for one in loads) / each:.1f}"
        forward = f"{max(one.forward for one in ranks):,}, {max(one.sent for one in loads):,}"
        backward = f"{max(one.backward for one in ranks):,}, {max(one.returned for one in loads):,}"
        lines.append(f"| {world} | {tokens:,} | {keys} | {forward} | {backward} |")
    return "\n".join(lines) + "\n"


def plans() -> str:
    """What the commands print for a LongNet of the paper's shape."""
    before, printed = Path.cwd(), []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            LongNetConfig(positions="rotary").save_pretrained("longnet")
            for command in COMMANDS:
                done = CliRunner().invoke(app, command.split()[1:])
                printed.append(f"$ {command}\n" + "\n".join(line.rstrip() for line in done.stdout.splitlines()))
        finally:
            os.chdir(before)
    return "```\n" + "\n\n".join(printed) + "\n```\n"


def draw(measured: dict[int, list[Measured]], path: Path) -> None:
    """Keys that a token reads, and bytes that a device sends, against the length; points are measured."""
    lengths = [2**power for power in range(13, 31)]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    work, wire = figure.subplots(1, 2)
    full = [_most(Full(causal=True), tokens, 1, PAPER) for tokens in lengths]
    sparse = [longnet(tokens, min(tokens, 2**30 // DEVICES), PAPER_KEPT, PAPER.count) for tokens in lengths]
    pairs = [load_of(one, Ranks(tokens, 1), 0, PAPER).pairs for one, tokens in zip(sparse, lengths, strict=True)]
    small = [longnet(tokens, TOKENS_PER_RANK, KEPT, HEADS) for tokens in lengths]
    few = [load_of(one, Ranks(tokens, 1), 0, PAPER).pairs for one, tokens in zip(small, lengths, strict=True)]
    work.loglog(lengths, [one.pairs / PAPER.count / n for one, n in zip(full, lengths, strict=True)], "tab:red")
    work.loglog(lengths, [one / PAPER.count / n for one, n in zip(pairs, lengths, strict=True)], "tab:blue")
    work.loglog(lengths, [one / HEADS / n for one, n in zip(few, lengths, strict=True)], "tab:green")
    worlds = [world * TOKENS_PER_RANK for world in measured]
    counted = [sum(one.pairs for one in ranks) for ranks in measured.values()]
    work.loglog(worlds, [pairs / HEADS / n for pairs, n in zip(counted, worlds, strict=True)], "o", color="tab:green")
    work.set(xlabel="tokens", ylabel="keys that a token reads")
    by_device = [longnet(tokens, tokens // DEVICES, PAPER_KEPT, PAPER.count) for tokens in lengths]
    labels = (
        "full attention, computed: 12 heads of 64 in bf16, on 64 devices",
        "LongNet's, computed for the same",
        "LongNet's, computed: 4 heads of 16 in fp32, on devices of 4,096 tokens",
        "measured for the same, on 2, 4 and 8 processes",
    )
    series = [
        [_most(Full(causal=True), tokens, DEVICES, PAPER) for tokens in lengths],
        [_most(one, tokens, DEVICES, PAPER) for one, tokens in zip(by_device, lengths, strict=True)],
        [
            _most(one, tokens, tokens // TOKENS_PER_RANK, Heads(HEADS, WIDTH, 4))
            for one, tokens in zip(small, lengths, strict=True)
        ],
    ]
    for loads, color, label in zip(series, ("tab:red", "tab:blue", "tab:green"), labels[:3], strict=True):
        wire.loglog(lengths, [load.sent for load in loads], color, label=label)
    sent = [max(one.forward for one in ranks) for ranks in measured.values()]
    wire.loglog(worlds, sent, "o", color="tab:green", label=labels[3])
    wire.set(xlabel="tokens", ylabel="bytes that the busiest device sends, forward")
    for axes in (work, wire):
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    figure.legend(*wire.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=100)


def _most(pattern: Pattern, tokens: int, devices: int, heads: Heads) -> Any:
    """Of the first device, which sends most where attention is causal."""
    return load_of(pattern, Ranks(tokens, devices), 0, heads)


def with_parts(text: str, **parts: str) -> str:
    """The page with what stands between its marks written anew."""
    for name, part in parts.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, part=part: found[1] + part + found[2],
            text,
            flags=re.DOTALL,
        )
    return text


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = {world: measure(world) for world in RANKS}
    print(table(found))
    draw(found, PAGE.with_suffix(".png"))
    PAGE.write_text(
        with_parts(PAGE.read_text(encoding="utf-8"), measured=table(found), plans=plans()), encoding="utf-8"
    )
