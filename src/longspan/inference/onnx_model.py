"""An exported model at work: ONNX Runtime on the CPU.

Shapes: B batch, N tokens; a multiple choice model takes [B, K, N], K choices.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from longspan.inference.cores import allowed_cores
from longspan.models.embeddings import check_length

METADATA = "longspan"  # the key of the file's metadata under which `export` writes what an `OnnxModel` reads
# What stands for an input that the caller leaves out, one number for all tokens.
DEFAULTS = {"attention_mask": 1, "token_type_ids": 0, "global_attention_mask": -1}


def require(module: str) -> None:
    """ImportError with the pip line where one of the `onnx` extra's packages is missing."""
    try:
        __import__(module)
    except ImportError as error:
        raise ImportError(f"{module} is not installed; pip install longspan[onnx]") from error


class OnnxModel:
    """A file that `export` wrote, in a session of ONNX Runtime. Call it with the inputs by name.

    threads: that compute one call; None: as many as this process may use cores.
    task: such as "sequence_classification", None for a model without a head. inputs, outputs: names in the graph.
    labels: their names in the order of the logits. max_tokens: the longest row, None = any. precision: "fp32", "int8".
    Raises ImportError where onnxruntime is missing, FileNotFoundError, and ValueError for a file of other origin.
    """

    def __init__(self, file: str | Path, *, threads: int | None = None):
        require("onnxruntime")
        import onnxruntime

        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} is no file: name one that `longspan export` wrote")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(allowed_cores()) if threads is None else threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; it warns of every input that has a default
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            described = json.loads(self.session.get_modelmeta().custom_metadata_map[METADATA])
        except Exception as error:
            raise ValueError(f"{file} is not a model that `longspan export` wrote: {error}") from error
        self.task: str | None = described["task"]
        self.precision: str = described["precision"]
        self.labels: tuple[str, ...] = tuple(described["labels"])
        self.max_tokens: int | None = described["max_tokens"]
        self.pad_token_id: int = described["pad_token_id"]
        self.inputs = tuple(part.name for part in self.session.get_inputs())
        self.inputs += tuple(part.name for part in self.session.get_overridable_initializers())
        self.outputs = tuple(part.name for part in self.session.get_outputs())

    def __call__(self, input_ids: Any, **others: Any) -> dict[str, np.ndarray]:
        """The outputs by name, for arrays or tensors [B, N] by the names of the graph's inputs.

        attention_mask: all tokens by default. token_type_ids: 0. global_attention_mask: 1 for a token that sees and is
        seen by all, 0, or -1 where the head is to choose as it does in training; that is the default.
        Raises ValueError for inputs that the graph lacks, of different shapes, or longer than max_tokens.
        """
        feed = {"input_ids": np.asarray(input_ids, dtype=np.int64)}
        shape = feed["input_ids"].shape
        feed |= {name: np.asarray(value).astype(np.int64) for name, value in others.items() if value is not None}
        shapes = {name: value.shape for name, value in feed.items() if name != "span_ranges"}
        if unknown := set(feed) - set(self.inputs):
            raise ValueError(f"this model has no input {sorted(unknown)}; its inputs are {', '.join(self.inputs)}")
        dimensions = 3 if self.task == "multiple_choice" else 2
        if len(shape) != dimensions or 0 in shape or set(shapes.values()) != {shape}:
            wanted = "[B, K, N]" if dimensions == 3 else "[B, N]"
            raise ValueError(f"all inputs must be {wanted}, alike and not empty; got {shapes}")
        if self.max_tokens is not None:
            check_length(shape[-1], self.max_tokens)
        for name in self.inputs:
            if name == "span_ranges" and name not in feed:
                raise ValueError("this model reads spans: give span_ranges, [B, S, 2]")
            if name not in feed:
                feed[name] = np.full(shape, DEFAULTS[name], dtype=np.int64)
        outputs: Any = self.session.run(None, feed)
        return dict(zip(self.outputs, outputs, strict=True))
