"""What all tests share: no network, memory that shows when it is read before it is written, and tiny things to load."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

WORDS = """the a of is was who what when where red green blue zebra lives in zoo near river old town wrote report
alice bob""".split()  # noqa: SIM905


@pytest.fixture(autouse=True, scope="session")
def _empty_tensors_hold_nan():
    """With deterministic algorithms on, torch.empty fills its result with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def quiet_transformers():
    """What transformers says of checkpoints that it loads in part is not shown."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def tokenizer():
    """A WordPiece tokenizer of BERT's kind that knows `WORDS`, and other words letter by letter; rows of 64 tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    vocabulary = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *".,?![]",
    ]
    vocabulary += [word for word in WORDS if word not in vocabulary]
    backend = Tokenizer(models.WordPiece({word: index for index, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def save_tiny_bert(tokenizer):
    """save(folder, kind, **changes): a random BERT of one layer that reads 64 tokens, with its tokenizer beside it."""
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}

    def save(folder, kind, **changes):
        torch.manual_seed(0)
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes | changes)
        kind(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save
