"""Models that read long documents: one encoder, described rather than subclassed, and heads on top of it; and one
stack of causal layers for language models.

Importing this package registers the model types "longspan", "longformer_lm" and "longnet" with transformers, so that
AutoConfig, AutoModel, AutoModelForMaskedLM, ... and `pipeline` load what `save_pretrained` wrote.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from longspan.models.config import LongspanConfig
from longspan.models.heads import (
    LongspanForMaskedLM,
    LongspanForMultipleChoice,
    LongspanForQuestionAnswering,
    LongspanForSequenceClassification,
    LongspanForSpanClassification,
    LongspanForTokenClassification,
)
from longspan.models.longformer_lm import LongformerForCausalLM, LongformerLMConfig, LongformerLMModel
from longspan.models.longnet import LongNetConfig, LongNetForCausalLM, LongNetModel
from longspan.models.model import AUTO_CLASSES, LongspanModel

__all__ = [
    "LongNetConfig",
    "LongNetForCausalLM",
    "LongNetModel",
    "LongformerForCausalLM",
    "LongformerLMConfig",
    "LongformerLMModel",
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

for _config, _base, _language_model in (
    (LongformerLMConfig, LongformerLMModel, LongformerForCausalLM),
    (LongNetConfig, LongNetModel, LongNetForCausalLM),
):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModel.register(_config, _base, exist_ok=True)
    AutoModelForCausalLM.register(_config, _language_model, exist_ok=True)
