"""A `Decoder` as a transformers model: with embeddings before it, and with a language model's head after it.

Families (`longformer_lm.py`, `longnet.py`) add a configuration that describes a `DecoderConfig`, and nothing else.

Shapes: B batch, N tokens, C model width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from longspan.attention import Pattern
from longspan.attention.positions import DistanceBuckets, RelativeSinusoids
from longspan.models.decoder import Block, Decoder, DecoderConfig
from longspan.models.decoder_cache import DecoderCache
from longspan.models.sequence import WholeSequence
from longspan.models.trained_linear import TrainedLinear


class StackConfig(PreTrainedConfig):
    """What the configurations of all families of a `Decoder` share. A family adds its own fields and `patterns`.

    The fields mean what they mean in `DecoderConfig`; initializer_range is the deviation of weights that neither sub-LN
    nor DeepNorm prescribes.
    """

    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]

    vocab_size: int = 256
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    positions: str = "xpos"
    xpos_scale_base: float = 512.0
    relative_width: int = 64
    relative_buckets: int = 32
    relative_max_distance: int = 128
    subln: bool = False
    deepnorm: bool = False
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        super().__post_init__(**kwargs)
        if self.vocab_size < 1 or self.num_hidden_layers < 1:
            raise ValueError(
                f"a model needs vocab_size and num_hidden_layers of at least 1; got {self.vocab_size} and "
                f"{self.num_hidden_layers}"
            )
        self.decoder_config  # noqa: B018  # it checks what the fields describe

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this checkpoint is a {found!r} model and {cls.__name__} describes {cls.model_type!r} models; load it "
                f"with the class it was saved by, or with an Auto class"
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def decoder_config(self) -> DecoderConfig:
        return DecoderConfig(
            width=self.hidden_size,
            heads=self.num_attention_heads,
            ffn_width=self.intermediate_size,
            patterns=self.patterns,
            positions=self.positions,  # type: ignore[arg-type]  # checked there
            xpos_scale_base=self.xpos_scale_base,
            relative_width=self.relative_width,
            relative_buckets=self.relative_buckets,
            relative_max_distance=self.relative_max_distance,
            subln=self.subln,
            deepnorm=self.deepnorm,
            activation=self.hidden_act,
            norm_eps=self.layer_norm_eps,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            ffn_inner_dropout=self.activation_dropout,
        )

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """What each layer sees, from bottom to top."""
        raise NotImplementedError

    @property
    def is_causal(self) -> bool:
        """Whether no layer looks ahead."""
        return self.decoder_config.causal


class StackPreTrainedModel(PreTrainedModel):
    """What base models and language models share: loading, saving and initialization."""

    config: StackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["Block"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """The model in a directory or on the hub. Takes transformers' arguments.

        Raises OSError where there is no model, ValueError for one of another family, or whose weights do not fit the
        configuration or are not complete.
        """
        name = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        try:
            load: Any = super().from_pretrained
            model, info = load(name, *model_args, output_loading_info=True, **kwargs)
        except RuntimeError as error:
            if "mismatch" not in str(error):
                raise
            raise ValueError(
                f"the weights of {name} have other shapes than the configuration says; they belong to another "
                f"configuration: leave `config` out, or give the one that was saved with them. {error}"
            ) from error
        missing = sorted(key for key in info["missing_keys"] if not key.startswith("lm_head."))
        if missing:
            raise ValueError(
                f"the checkpoint {name} lacks {len(missing)} weights of this model, {', '.join(missing[:3])} first; it "
                "belongs to another configuration, or is not complete"
            )
        return (model, info) if wants_info else model

    @property
    def patterns(self) -> tuple[Pattern, ...]:
        """What each layer sees, from bottom to top."""
        return self.config.patterns

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # As transformers' own code: `init` leaves loaded weights alone. Else modules without weights of their own, such
        # as blocks, would be passed over.
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        deviation = self.config.initializer_range
        if isinstance(module, RelativeSinusoids):
            init.normal_(module.weight, std=deviation)
            init.zeros_(module.content_bias)
            init.zeros_(module.position_bias)
        elif isinstance(module, DistanceBuckets):
            init.normal_(module.weight, std=deviation)
        elif isinstance(module, Block) and module.config.output_gain is not None:
            _init_for_depth(module, module.config.output_gain)


def _init_for_depth(block: Block, gain: float) -> None:
    """Weights as torchscale draws them for sub-LN and DeepNorm."""
    fused = block.attention.qkv.weight
    q, k, v = (torch.empty_like(part) for part in fused.chunk(3))
    for part, factor in ((q, 1.0), (k, 1.0), (v, gain)):
        nn.init.xavier_uniform_(part, gain=factor / math.sqrt(2))
    init.copy_(fused, torch.cat((q, k, v)))
    init.xavier_uniform_(block.attention.out.weight, gain=gain)
    for linear in (block.ffn_in, block.ffn_out):
        bound = gain / math.sqrt(linear.in_features)
        init.uniform_(linear.weight, -bound, bound)


class StackModel(StackPreTrainedModel):
    """Token ids -> a vector for every token."""

    def __init__(self, config: StackConfig):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.embedding_drop = nn.Dropout(config.dropout)
        self.decoder = Decoder(config.decoder_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def set_input_embeddings(self, value: Any):
        self.embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """attention_mask: [B, tokens so far and N], nonzero = token. Padding may stand anywhere and changes nothing.

        past_key_values: the cache that an earlier call gave; it takes in these tokens, too. use_cache: whether to give
        one; None: as the configuration says, and never in training.
        """
        if output_attentions:
            raise NotImplementedError("output_attentions=True asks for N x N probabilities, which longspan never forms")
        x = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        token_mask = self._token_mask(attention_mask, x, cache)
        x = self.embedding_drop(x)
        states = None
        if output_hidden_states or (output_hidden_states is None and self.config.output_hidden_states):
            states = self.decoder.hidden_states(x, token_mask, cache)
            x = states[-1]
        else:
            x = self.decoder(x, token_mask, cache)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=cache, hidden_states=states)

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids [B, N] or inputs_embeds [B, N, C]")
        given = inputs_embeds if input_ids is None else input_ids
        assert given is not None
        if given.ndim < 2 or 0 in given.shape[:2]:
            raise ValueError(f"the model needs at least one row of at least one token; got {list(given.shape)}")
        if inputs_embeds is not None:
            return inputs_embeds
        try:
            return self.embeddings(input_ids)
        except IndexError:
            raise ValueError(
                f"token ids must lie in 0..{self.config.vocab_size - 1}, the model's vocabulary; "
                f"got {int(given.min())} to {int(given.max())}. Is it the tokenizer that the model was trained with?"
            ) from None

    def _cache(self, given: DecoderCache | None, use_cache: bool | None) -> DecoderCache | None:
        if given is not None and not isinstance(given, DecoderCache):
            raise ValueError(
                f"past_key_values must be the DecoderCache that an earlier call of this model gave, or None; "
                f"got {type(given).__name__}"
            )
        if not self.decoder.sequence.can_grow:
            if use_cache or given is not None:
                raise NotImplementedError(
                    "a sequence that lies on several ranks is not continued token by token: give neither use_cache nor "
                    "past_key_values, and call generate() on a model that was not sharded"
                )
            return None
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if not use_cache and given is None:
            return None
        if not self.config.is_causal:
            if use_cache and given is None:
                return None  # what is not causal cannot be continued
            raise ValueError("a model that is not causal sees later tokens, so it takes no past_key_values")
        return self.new_cache() if given is None else given

    def _token_mask(self, attention_mask: Tensor | None, x: Tensor, cache: DecoderCache | None) -> Tensor | None:
        if attention_mask is None:
            return None
        past = 0 if cache is None else cache.get_seq_length()
        if attention_mask.shape != (len(x), past + x.shape[1]):
            raise ValueError(
                f"attention_mask must be [B, tokens so far and new ones] = {[len(x), past + x.shape[1]]}; "
                f"got {list(attention_mask.shape)}"
            )
        token_mask = attention_mask[:, past:].bool()
        return None if token_mask.all() else token_mask

    def new_cache(self) -> DecoderCache:
        """An empty cache for this model."""
        return DecoderCache(self.decoder.patterns)


class StackForCausalLM(StackPreTrainedModel, GenerationMixin):
    """Logits over the vocabulary for what follows each token."""

    model_class: ClassVar[type[StackModel]]
    accepts_loss_kwargs = True  # so that Trainer tells num_items_in_batch and accumulated tokens weigh alike
    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.embeddings.weight"}

    def __init__(self, config: StackConfig):
        super().__init__(config)
        if not config.is_causal:
            raise ValueError(f"{type(self).__name__} predicts what follows, so its configuration must be causal")
        self.model = self.model_class(config)
        self.lm_head = TrainedLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutputWithPast:
        """Logits [B, N, V]; with labels [B, N] also the loss: nats for each token that a token before it predicts.

        labels: usually the input ids; they are shifted here, and -100 counts for nothing. logits_to_keep: only those of
        so many last tokens, 0 for all, or of the tokens with these numbers. num_items_in_batch: what the summed loss is
        divided by, the number of labels by default. The rest is explained at the base model.

        Of a sequence on several ranks the loss is that of all of it, on every rank. With num_items_in_batch, which the
        caller counted on all ranks, it is this rank's share: the shares' sum is the loss.
        """
        if labels is not None and use_cache is None and past_key_values is None:
            use_cache = False
        outputs = self.model(
            input_ids,
            attention_mask,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_hidden_states,
            output_attentions,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            if logits.shape[:2] != labels.shape:
                raise ValueError(
                    f"labels must be [B, N] = {list(logits.shape[:2])}, one for each token with logits; "
                    f"got {list(labels.shape)}"
                )
            loss = _next_token_loss(logits, labels, num_items_in_batch, self.model.decoder.sequence)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args: Any) -> None:
        """transformers makes the caches it knows here; the one for these patterns is ours."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not for this model; leave it out: "
                "its own cache is bounded by what its patterns see"
            )
        if model_kwargs.get("past_key_values") is not None:
            prepare: Any = super()
            prepare._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self.model.new_cache()


def _next_token_loss(logits: Tensor, labels: Tensor, items: Tensor | int | None, sequence: WholeSequence) -> Tensor:
    """In float32 or wider; 0 where no token has another before it."""
    targets = sequence.following(labels.to(logits.device))
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    summed = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), reduction="sum")
    if items is not None:
        return summed / items
    return sequence.total(summed) / sequence.total((targets != -100).sum()).clamp(min=1)
