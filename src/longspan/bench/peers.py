"""The systems that we compare with, each set up as its own documentation says is best, with as many threads as torch.

Attention peers take contiguous q, k, v [B, H, N, D]: the layout they like best, laid out before the clock starts.
Shapes: B batch, H heads, N tokens, D head width.
"""

# pyright: reportMissingImports=false
# The peers are an extra of their own, which neither the tests nor the types need.

from __future__ import annotations

import importlib.util
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from copy import deepcopy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.bench.measure import Prepared

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [B, H, N, D] -> out [B, H, N, D]
Feed = tuple[Tensor, Tensor]  # input_ids and attention_mask, Long[B, N]


def missing(*modules: str, pip: str) -> str | None:
    """The pip line for what is not installed; None where all modules are."""
    found = all(importlib.util.find_spec(module) is not None for module in modules)
    return None if found else f"pip install {pip}"


# Attention


def dense_sdpa(q: Tensor, window: int) -> tuple[Attend, str]:
    """torch's SDPA over all N x N scores with the window as a boolean mask."""
    position = torch.arange(q.shape[2])
    visible = (position[:, None] - position).abs() <= window
    return partial(F.scaled_dot_product_attention, attn_mask=visible), ""


def chunked_sdpa(q: Tensor, window: int) -> tuple[Attend, str]:
    """torch's SDPA on chunks of queries with overlapping keys, as views: the chunk length that is quickest here."""
    tokens = q.shape[2]
    candidates = [length for length in (32, 64, 128, 256, 512) if tokens % length == 0] or [tokens]
    ways = {
        length: partial(_chunked, visible=_chunk_mask(tokens, length, window), window=window) for length in candidates
    }
    length = _quickest({length: partial(way, q.detach(), q.detach(), q.detach()) for length, way in ways.items()})
    return ways[length], f"chunks of {length}"


def _chunk_mask(tokens: int, length: int, window: int) -> Tensor:
    """Bool[1, N/length, length, length + 2*window]: what the queries of a chunk see of its keys."""
    start = torch.arange(0, tokens, length)[:, None, None]
    query = start + torch.arange(length)[:, None]
    key = start - window + torch.arange(length + 2 * window)
    return (((query - key).abs() <= window) & (key >= 0) & (key < tokens))[None]


def _chunked(q: Tensor, k: Tensor, v: Tensor, *, visible: Tensor, window: int) -> Tensor:
    _, chunks, length, _ = visible.shape
    batch, heads, tokens, width = q.shape
    parts = [q.reshape(batch * heads, chunks, length, width)]
    for x in (k, v):
        padded = F.pad(x, (0, 0, window, window)).flatten(0, 1)
        parts.append(padded.unfold(1, length + 2 * window, length).transpose(2, 3))
    return F.scaled_dot_product_attention(*parts, attn_mask=visible).reshape(batch, heads, tokens, width)


def flex_attention(q: Tensor, window: int) -> tuple[Attend, str]:
    """torch.compile(flex_attention) with a block mask: https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html
    says to compile it and to make the block mask once, not in every call. On CPU it has no backward pass."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    tokens = q.shape[2]
    mask = create_block_mask(
        lambda batch, head, query, key: (query - key).abs() <= window, None, None, tokens, tokens, device="cpu"
    )
    compiled = partial(torch.compile(flex, dynamic=False), block_mask=mask)
    start = time.perf_counter()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Three tensors: for one in three places it would compile again.
        compiled(q.detach().clone(), q.detach().clone(), q.detach().clone())
    return compiled, f"compiled in {time.perf_counter() - start:.1f} s"


def hugging_face_chunks(q: Tensor, window: int) -> tuple[Attend, str]:
    """The sliding chunks of transformers' LongformerSelfAttention, without its projections and global tokens."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    heads, tokens, width = q.shape[1:]
    if tokens % (2 * window):
        raise NotImplementedError(f"needs a multiple of {2 * window} tokens; got {tokens}")
    config = LongformerConfig(hidden_size=heads * width, num_attention_heads=heads, attention_window=[2 * window])
    chunks = LongformerSelfAttention(config, layer_id=0)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # its own layout is [B, N, H, D]
        q, k, v = (x.transpose(1, 2) for x in (q * width**-0.5, k, v))
        scores = chunks._sliding_chunks_query_key_matmul(q, k, window)
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        return chunks._sliding_chunks_matmul_attn_probs_value(probabilities, v, window).transpose(1, 2)

    return attend, ""


def local_attention(q: Tensor, window: int) -> tuple[Attend, str]:
    """lucidrains' local-attention, which looks one window back and forth; exact_windowsize makes that our window
    (https://github.com/lucidrains/local-attention#usage). Rotary positions, its default, are left out."""
    from local_attention import LocalAttention

    exact = {"exact_windowsize": True, "use_rotary_pos_emb": False}
    return LocalAttention(window_size=window, causal=False, look_backward=1, look_forward=1, **exact), ""


# Whole encoders, for texts of a few hundred tokens. Each gets the rows padded to the longest, and one by one: the
# better way counts, for none of them leaves out padding by itself.


def hugging_face(model: Any, lengths: list[int], ids: Tensor, *, dtype: torch.dtype = torch.float32) -> Prepared:
    """transformers' own BertModel with attn_implementation="sdpa", its fastest on CPU:
    https://huggingface.co/docs/transformers/attention_interface"""
    if dtype != model.dtype:
        model = deepcopy(model).to(dtype)

    def run(feed: Feed) -> Tensor:
        with torch.inference_mode():
            mask = None if len(feed[1]) == 1 else feed[1]
            return model(input_ids=feed[0], attention_mask=mask).last_hidden_state

    return _best_way(run, lengths, ids)


def onnx_runtime(model: Any, lengths: list[int], ids: Tensor, *, int8: bool) -> Prepared:
    """ONNX Runtime's transformer optimizer, and its dynamic int8 with a scale for each channel; reduce_range only
    without VNNI. https://onnxruntime.ai/docs/performance/transformers-optimization.html: export, then optimize_model;
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html: optimize before quantizing."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    file, note = _optimized_onnx(model, int8)
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(feed: Feed) -> Tensor:
        fed = dict(zip(("input_ids", "attention_mask"), (part.numpy() for part in feed), strict=True))
        return torch.from_numpy(session.run(None, fed)[0])

    prepared = _best_way(run, lengths, ids)
    return prepared._replace(note=", ".join(part for part in (note, prepared.note) if part))


def openvino(model: Any, lengths: list[int], ids: Tensor, *, precision: str, int8: bool = False) -> Prepared:
    """OpenVINO by direct conversion, with the latency hint and the precision hint that its documentation names
    (https://docs.openvino.ai/2025/openvino-workflow/running-inference/inference-devices-and-modes/cpu-device.html);
    static shapes for whole batches, which the same documentation prefers. int8 is NNCF's post-training quantization."""
    import openvino as ov

    converted = _converted(model, int8)
    properties = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,  # it would pin the thread that everyone else runs on, too
    }

    def compiled(shape: list[int]) -> Any:
        shaped = converted.clone()
        shaped.reshape({name: shape for name in ("input_ids", "attention_mask")})
        return ov.Core().compile_model(shaped, "CPU", properties).create_infer_request()

    static, dynamic = compiled(list(ids.shape)), compiled([1, -1])

    def run(feed: Feed) -> Tensor:
        request = static if feed[0].shape == ids.shape else dynamic
        results = request.infer([part.numpy() for part in feed], share_inputs=True, share_outputs=True)
        return torch.from_numpy(np.array(results[0]))

    with _same_cores():
        return _best_way(run, lengths, ids)


class _LastHiddenState(torch.nn.Module):
    """What exporters want: tensors in, one tensor out."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def _example(model: Any) -> dict[str, Tensor]:
    ids = torch.arange(2 * 16).view(2, 16) % model.config.vocab_size
    return {"input_ids": ids, "attention_mask": (torch.arange(16) < torch.tensor([[16], [9]])).long()}


@lru_cache(maxsize=2)
def _optimized_onnx(model: Any, int8: bool) -> tuple[Path, str]:
    """The optimized graph in a file that lives as long as the process, and how many attention layers were fused."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    folder = Path(_folder().name)
    if int8:
        plain, note = _optimized_onnx(model, False)
        with _quiet():
            quantize_dynamic(
                plain,
                folder / f"int8-{id(model)}.onnx",
                per_channel=True,
                reduce_range=not _has_vnni(),
                weight_type=QuantType.QInt8,
                extra_options={"DefaultTensorType": 1},  # FLOAT: its type inference does not know its own fused layers
            )
        return folder / f"int8-{id(model)}.onnx", note

    file, optimized = folder / f"model-{id(model)}.onnx", folder / f"optimized-{id(model)}.onnx"
    example, model = _example(model), deepcopy(model)
    model.set_attn_implementation("eager")  # the optimizer knows this graph: it finds no Attention to fuse in sdpa's
    with _quiet():
        torch.onnx.export(
            _LastHiddenState(model).eval(),
            tuple(example.values()),
            str(file),
            dynamo=False,  # the optimizer fuses no attention in what the new exporter writes
            input_names=list(example),
            output_names=["x"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in (*example, "x")},
        )
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        graph = optimizer.optimize_model(str(file), "bert", num_heads=heads, hidden_size=width, opt_level=0)
        graph.save_model_to_file(str(optimized))
    fused = graph.get_fused_operator_statistics()["Attention"]
    return optimized, f"{fused} of {model.config.num_hidden_layers} attention layers fused"


@lru_cache(maxsize=2)
def _converted(model: Any, int8: bool) -> Any:
    """The OpenVINO model, any shape; int8 calibrated on random tokens such as the benchmark's."""
    import openvino as ov

    with _quiet(), _same_cores():
        if not int8:
            return ov.convert_model(_LastHiddenState(model).eval(), example_input=_example(model))
        import nncf

        nncf.set_log_level(logging.ERROR)
        generator = torch.Generator().manual_seed(1)
        tokens = min(128, model.config.max_position_embeddings)
        feeds = [
            {
                "input_ids": torch.randint(5, model.config.vocab_size, (1, tokens), generator=generator).numpy(),
                "attention_mask": np.ones((1, tokens), dtype=np.int64),
            }
            for _ in range(32)
        ]
        # https://docs.openvino.ai/2025/openvino-workflow/model-optimization-guide/quantizing-models-post-training/basic-quantization-flow.html
        return nncf.quantize(
            _converted(model, False), nncf.Dataset(feeds), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(feeds)
        )


def _best_way(run: Callable[[Feed], Tensor], lengths: list[int], ids: Tensor) -> Prepared:
    """All rows at once, padded, or one after the other as they are: whichever is quicker with this system."""
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    rows = [
        (ids[row : row + 1, :length].contiguous(), mask[row : row + 1, :length].contiguous())
        for row, length in enumerate(lengths)
    ]
    if len(rows) == 1:
        return Prepared(partial(run, rows[0]), lambda out: (out[0],))
    padded, single = partial(run, (ids, mask)), partial(_one_by_one, run, rows)
    if _quickest({"padded": padded, "one by one": single}) == "padded":
        return Prepared(padded, lambda out: (out[mask.bool()],), "padded")
    return Prepared(single, lambda outs: (torch.cat([out[0] for out in outs]),), "one by one")


def _one_by_one(run: Callable[[Feed], Tensor], rows: list[Feed]) -> list[Tensor]:
    return [run(row) for row in rows]


def _quickest(ways: dict[Any, Callable[[], Any]]) -> Any:
    """The name of the way with the quickest call; the first is not counted, and there are fewer where they are slow."""
    taken = {}
    for name, way in ways.items():
        times: list[float] = []
        while len(times) < 2 or (len(times) < 4 and sum(times) < 1):
            start = time.perf_counter()
            way()
            times.append(time.perf_counter() - start)
        taken[name] = min(times[1:])
    return min(taken, key=lambda name: taken[name])


@lru_cache(maxsize=1)
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="longspan-bench-")


def _has_vnni() -> bool:
    try:
        return "avx512_vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


@contextmanager
def _same_cores() -> Iterator[None]:
    """Gives the process its cores back: OpenVINO's threads have widened a restricted process to the whole machine."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        yield
    finally:
        if cores is not None:
            os.sched_setaffinity(0, cores)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings, log lines and progress bars of exporters, which talk on stdout and stderr."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            Path(os.devnull).open("w") as nowhere,
            redirect_stdout(nowhere),
            redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
