"""Models that read long documents: one encoder, described rather than subclassed, and heads on top of it.

Importing this package registers model_type "longspan" with transformers, so that AutoConfig, AutoModel,
AutoModelForMaskedLM, ... and `pipeline` load what `save_pretrained` wrote.
"""

from transformers import AutoConfig

from longspan.models.config import LongspanConfig
from longspan.models.heads import (
    LongspanForMaskedLM,
    LongspanForMultipleChoice,
    LongspanForQuestionAnswering,
    LongspanForSequenceClassification,
    LongspanForSpanClassification,
    LongspanForTokenClassification,
)
from longspan.models.model import AUTO_CLASSES, LongspanModel

__all__ = [
    "LongspanConfig",
    "LongspanForMaskedLM",
    "LongspanForMultipleChoice",
    "LongspanForQuestionAnswering",
    "LongspanForSequenceClassification",
    "LongspanForSpanClassification",
    "LongspanForTokenClassification",
    "LongspanModel",
]

AutoConfig.register(LongspanConfig.model_type, LongspanConfig, exist_ok=True)
for _model in (
    LongspanModel,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
    LongspanForTokenClassification,
    LongspanForQuestionAnswering,
    LongspanForMultipleChoice,
):
    AUTO_CLASSES[_model.task].register(LongspanConfig, _model, exist_ok=True)
