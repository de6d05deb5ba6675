"""Transformers that read long documents.

The names below load on first use: `import longspan` alone is quick and imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longspan import nn as nn
    from longspan.attention import attend as attend
    from longspan.attention import explain as explain
    from longspan.attention import patterns as patterns
    from longspan.inference.documents import Document as Document
    from longspan.inference.reader import Answer as Answer
    from longspan.inference.reader import Passage as Passage
    from longspan.inference.reader import Reader as Reader
    from longspan.models.attention_interface import set_attention as set_attention
    from longspan.models.config import LongspanConfig as LongspanConfig
    from longspan.models.convert import to_long as to_long
    from longspan.models.evidence import LongspanForEvidence as LongspanForEvidence
    from longspan.models.heads import LongspanForMaskedLM as LongspanForMaskedLM
    from longspan.models.heads import LongspanForMultipleChoice as LongspanForMultipleChoice
    from longspan.models.heads import LongspanForQuestionAnswering as LongspanForQuestionAnswering
    from longspan.models.heads import LongspanForSequenceClassification as LongspanForSequenceClassification
    from longspan.models.heads import LongspanForSpanClassification as LongspanForSpanClassification
    from longspan.models.heads import LongspanForTokenClassification as LongspanForTokenClassification
    from longspan.models.longformer_lm import LongformerForCausalLM as LongformerForCausalLM
    from longspan.models.longformer_lm import LongformerLMConfig as LongformerLMConfig
    from longspan.models.longnet import LongNetConfig as LongNetConfig
    from longspan.models.longnet import LongNetForCausalLM as LongNetForCausalLM
    from longspan.models.longnet import LongNetModel as LongNetModel
    from longspan.models.model import LongspanModel as LongspanModel
    from longspan.models.plug_in import accelerate as accelerate

__version__ = "0.1.0"

_HOME = {
    "Answer": "longspan.inference.reader",
    "Document": "longspan.inference.documents",
    "LongNetConfig": "longspan.models.longnet",
    "LongNetForCausalLM": "longspan.models.longnet",
    "LongNetModel": "longspan.models.longnet",
    "LongformerForCausalLM": "longspan.models.longformer_lm",
    "LongformerLMConfig": "longspan.models.longformer_lm",
    "LongspanConfig": "longspan.models.config",
    "LongspanForEvidence": "longspan.models.evidence",
    "LongspanForMaskedLM": "longspan.models.heads",
    "LongspanForMultipleChoice": "longspan.models.heads",
    "LongspanForQuestionAnswering": "longspan.models.heads",
    "LongspanForSequenceClassification": "longspan.models.heads",
    "LongspanForSpanClassification": "longspan.models.heads",
    "LongspanForTokenClassification": "longspan.models.heads",
    "LongspanModel": "longspan.models.model",
    "Passage": "longspan.inference.reader",
    "Reader": "longspan.inference.reader",
    "accelerate": "longspan.models.plug_in",
    "attend": "longspan.attention",
    "explain": "longspan.attention",
    "nn": "longspan",
    "patterns": "longspan.attention",
    "set_attention": "longspan.models.attention_interface",
    "to_long": "longspan.models.convert",
}

__all__ = list(_HOME)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'longspan' has no attribute {name!r}; it has {', '.join(_HOME)}.")
    home = _HOME[name]
    value = import_module(f"longspan.{name}") if home == "longspan" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*_HOME, "__version__"]
