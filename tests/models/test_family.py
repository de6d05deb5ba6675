"""The family as transformers sees it: directories, Auto classes, pipelines, Trainer."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.models.tiny import AUTO, FAMILIES, OURS, TASKS, batch, tiny_config, tiny_model, translated
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    Trainer,
    TrainingArguments,
    pipeline,
)

from longspan.models import (
    LongspanConfig,
    LongspanForMaskedLM,
    LongspanForSequenceClassification,
    LongspanForTokenClassification,
    LongspanModel,
)
from longspan.models.model import LongspanPreTrainedModel

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "a", "mat", "log", "and", "then", "it", "slept", "well"]


def same(a, b) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def bert(tmp_path) -> Path:
    tiny_model("bert", "masked_lm").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[SEP]", "[CLS]", "[MASK]"]
    words = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    ids = [("[CLS]", 3), ("[SEP]", 2)]
    words.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=64, **names)


@pytest.mark.parametrize("task", [None, *TASKS])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hugging_face_directory_is_translated_while_it_loads(family, task, tmp_path):
    theirs = tiny_model(family, task)
    theirs.save_pretrained(tmp_path)
    ours = OURS[task].from_pretrained(tmp_path)
    assert same(ours.state_dict(), translated(theirs, task).state_dict())
    assert not ours.training
    assert ours.name_or_path == str(tmp_path)


@pytest.mark.parametrize("task", [None, *TASKS])
@pytest.mark.parametrize("family", ["bert", "longformer", "modernbert"])
def test_what_we_save_the_auto_classes_read_back(family, task, tmp_path):
    ours = translated(tiny_model(family, task), task)
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, LongspanConfig)
    again = AUTO[task].from_pretrained(tmp_path)
    assert type(again) is OURS[task]
    assert same(again.state_dict(), ours.state_dict())
    assert same(OURS[task].from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_a_sharded_checkpoint_is_read(tmp_path):
    theirs = tiny_model("roberta")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same(LongspanModel.from_pretrained(tmp_path).state_dict(), translated(theirs).state_dict())


def test_transformers_arguments_keep_working(bert):
    names = {0: "no", 1: "yes", 2: "maybe"}
    model, info = LongspanForTokenClassification.from_pretrained(
        bert,
        dtype=torch.bfloat16,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        revision="main",
        local_files_only=True,
        hidden_dropout_prob=0.25,
        output_hidden_states=True,
        output_loading_info=True,
    )
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.config.id2label == names
    assert model.classifier.out_features == 3
    assert model.config.encoder_config.dropout == 0.25
    assert "classifier.weight" in info["missing_keys"]
    assert len(model(**batch(tiny_config("bert"), [9])).hidden_states) == 4
    assert LongspanForSequenceClassification.from_pretrained(bert, num_labels=5).classifier.out_features == 5


def test_a_subfolder_is_read(bert, tmp_path):
    shutil.move(bert, tmp_path / "hub" / "inside")
    assert LongspanModel.from_pretrained(tmp_path / "hub", subfolder="inside").config.family == "bert"


def test_a_hugging_face_config_beside_the_directory_is_used(bert):
    config = tiny_config("bert", num_labels=4)
    assert LongspanForTokenClassification.from_pretrained(bert, config=config).classifier.out_features == 4


def test_a_new_head_is_drawn_anew_with_a_warning(bert, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING, logger="transformers"):
        model = LongspanForTokenClassification.from_pretrained(bert)
    assert "classifier.weight" in caplog.text
    base = LongspanModel.from_pretrained(bert).state_dict()
    shared = {name.removeprefix("longspan."): part for name, part in model.state_dict().items() if "longspan" in name}
    assert same(shared, {name: part for name, part in base.items() if "pooler" not in name})
    assert 0.01 < model.classifier.weight.std() < 0.04


class WithOwnHead(LongspanPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.longspan = LongspanModel(config, add_pooling_layer=False)
        self.scorer = nn.Linear(config.hidden_size, 1)
        self.post_init()


def test_a_model_with_a_head_of_its_own_starts_from_the_base_model(bert):
    model = WithOwnHead.from_pretrained(bert)
    base = LongspanModel(model.config, add_pooling_layer=False)
    base.load_state_dict(
        {k: v for k, v in LongspanModel.from_pretrained(bert).state_dict().items() if "pooler" not in k}
    )
    assert same(model.longspan.state_dict(), base.state_dict())


def test_an_old_checkpoint_with_gamma_and_beta_is_read(bert):
    weights = load_file(bert / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): part
        for name, part in weights.items()
    }
    assert set(old) != set(weights)
    expected = LongspanForMaskedLM.from_pretrained(bert).state_dict()
    save_file(old, bert / "model.safetensors", metadata={"format": "pt"})
    assert same(LongspanForMaskedLM.from_pretrained(bert).state_dict(), expected)


# Bad input


def test_a_name_that_is_nowhere_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        LongspanModel.from_pretrained(str(tmp_path / "nowhere"), local_files_only=True)


def test_a_directory_without_a_config_is_an_oserror(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        LongspanModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["bert", "longspan"])
def test_a_directory_without_weights_is_an_oserror(family, tmp_path):
    config = tiny_config("bert") if family == "bert" else translated(tiny_model("bert")).config
    config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"no file named model\.safetensors") as error:
        LongspanModel.from_pretrained(tmp_path)
    assert "pickle" not in str(error.value)


@pytest.mark.parametrize("family", ["bert", "longspan"])
def test_pickled_weights_are_refused_with_the_way_out_and_read_on_request(family, tmp_path):
    model = tiny_model("bert") if family == "bert" else translated(tiny_model("bert"))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"unpickling can run code\. .* use_safetensors=False\)\.save_pretrained"):
        LongspanModel.from_pretrained(tmp_path)
    read = LongspanModel.from_pretrained(tmp_path, use_safetensors=False)
    assert same(read.state_dict(), translated(tiny_model("bert")).state_dict())


def test_an_unknown_family_is_refused_with_those_there_are(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="model_type 't5'; it reads bert, camembert, distilbert, longformer"):
        LongspanModel.from_pretrained(tmp_path)


def test_a_config_without_a_model_type_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 24}')
    with pytest.raises(ValueError, match=r"has no .model_type."):
        LongspanModel.from_pretrained(tmp_path)


def test_an_option_we_lack_is_refused_before_any_output(tmp_path):
    tiny_model("bert", hidden_act="mish").save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="hidden_act='mish'"):
        LongspanModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("whose", ["hugging face", "longspan"])
def test_a_checkpoint_that_lost_a_weight_is_refused_with_its_name(whose, bert):
    lost, name = "bert.encoder.layer.1.output.dense.weight", "longspan.encoder.blocks.1.ffn_out.weight"
    if whose == "longspan":
        LongspanForMaskedLM.from_pretrained(bert).save_pretrained(bert)
        lost = name
    weights = load_file(bert / "model.safetensors")
    del weights[lost]
    save_file(weights, bert / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"bert is not complete; missing: {name}$"):
        LongspanForMaskedLM.from_pretrained(bert)


def test_a_config_that_describes_nothing_says_so():
    with pytest.raises(ValueError, match="does not describe its embeddings"):
        LongspanModel(LongspanConfig())


# Life with transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_resizing_the_vocabulary_keeps_the_tie_and_the_old_logits(family, tmp_path):
    ours = translated(tiny_model(family, "masked_lm"), "masked_lm")
    inputs = batch(ours.config, [9])
    with torch.no_grad():
        before = ours(**inputs).logits
        ours.resize_token_embeddings(120, mean_resizing=False)
        after = ours(**inputs).logits
    assert ours.config.vocab_size == ours.config.embeddings_config.vocab_size == after.shape[-1] == 120
    assert ours.classifier.weight is ours.longspan.embeddings.word.weight
    assert torch.allclose(after[..., :99], before, atol=1e-6)
    ours.save_pretrained(tmp_path)
    assert same(LongspanForMaskedLM.from_pretrained(tmp_path).state_dict(), ours.state_dict())


def test_the_output_layer_is_tied_only_when_the_checkpoint_says_so(tmp_path):
    assert (tied := translated(tiny_model("bert", "masked_lm"), "masked_lm")).config.tie_word_embeddings
    assert tied.classifier.weight is tied.longspan.embeddings.word.weight
    theirs = tiny_model("bert", "masked_lm", tie_word_embeddings=False)
    with torch.no_grad():
        theirs.cls.predictions.decoder.weight.add_(1)
    theirs.save_pretrained(tmp_path)
    ours = LongspanForMaskedLM.from_pretrained(tmp_path)
    assert not torch.equal(ours.classifier.weight, ours.longspan.embeddings.word.weight)
    assert torch.equal(ours.classifier.weight, theirs.cls.predictions.decoder.weight)


def test_new_weights_are_drawn_from_the_initializer_range():
    torch.manual_seed(0)
    config = translated(tiny_model("longformer")).config
    config.initializer_range = 0.5
    model = LongspanModel(config)
    assert 0.45 < model.encoder.blocks[0].attention.qkv_global.weight.std() < 0.55
    assert not model.encoder.blocks[0].ffn_in.bias.any()
    assert model.encoder.blocks[0].ffn_norm.weight.eq(1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(family):
    ours = translated(tiny_model(family, "masked_lm", initializer_range=0.2), "masked_lm").train()
    for part in ours.modules():  # dropout would draw anew
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        elif hasattr(part, "dropout"):
            part.dropout = 0.0
    inputs = batch(ours.config, [20, 9])
    inputs["labels"] = inputs["input_ids"]
    gradients = []
    for _ in range(2):
        ours.zero_grad()
        ours(**inputs).loss.backward()
        gradients.append({name: part.grad.clone() for name, part in ours.named_parameters() if part.grad is not None})
        ours.activation_checkpointing_enable()
    assert ours.longspan.encoder.gradient_checkpointing
    assert set(gradients[0]) == set(gradients[1])
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


@pytest.mark.parametrize("family", ["bert", "longformer", "modernbert"])
def test_pipelines_give_what_the_model_gives(family, tokenizer, tmp_path):
    def saved(task, **changes):
        fields = {"vocab_size": len(tokenizer), "pad_token_id": 0} | changes
        folder = tmp_path / task
        translated(tiny_model(family, task, **fields, initializer_range=0.2), task).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    text = "the cat sat on a [MASK] and then it slept"
    folder = saved("masked_lm")
    guesses = pipeline("fill-mask", model=folder)(text, top_k=3)
    model = LongspanForMaskedLM.from_pretrained(folder)
    inputs = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        best = model(inputs["input_ids"], inputs["attention_mask"]).logits[0, 6].topk(3).indices
    assert [guess["token"] for guess in guesses] == best.tolist()

    names = {0: "good", 1: "bad", 2: "ugly"}
    folder = saved("sequence_classification", id2label=names)
    answers = pipeline("text-classification", model=folder)([text, "a dog"], top_k=None, batch_size=2)
    assert {answer["label"] for answer in answers[0]} == set(names.values())
    assert sum(answer["score"] for answer in answers[1]) == pytest.approx(1)

    folder = saved("token_classification", id2label=names)
    answers = pipeline("token-classification", model=folder)(["a dog ran", text], batch_size=2)
    assert [answer["word"] for answer in answers[0]] == ["a", "dog", "ran"]


@pytest.mark.parametrize("family", ["roberta", "longformer", "modernbert"])
def test_trainer_lowers_the_loss_with_gradient_checkpointing(family, tmp_path):
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    theirs = tiny_model(family, "token_classification")
    model = translated(theirs, "token_classification")
    rows = []
    for length in (20, 9, 15, 12) * 4:
        ids = torch.randint(5, 99, (length,))
        rows.append({"input_ids": ids.tolist(), "labels": (ids > 50).long().tolist(), "length": length})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_steps=6,
        learning_rate=3e-3,
        activation_checkpointing=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=pad_rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.69, abs=0.15)  # ln 2, not its double: accumulation divides
    assert losses[-1] < losses[0] - 0.02
    trainer.save_model(str(tmp_path / "out"))
    assert same(LongspanForTokenClassification.from_pretrained(tmp_path / "out").state_dict(), model.state_dict())


def pad_rows(rows):
    longest = max(len(row["input_ids"]) for row in rows)

    def pad(name, value):
        return torch.tensor([row[name] + [value] * (longest - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": pad("input_ids", 1), "labels": pad("labels", -100), "attention_mask": mask}


def test_touching_one_name_registers_the_family(bert, tmp_path):
    """`import longspan` loads no transformers; the first name of ours does, and registers every class."""
    LongspanForMaskedLM.from_pretrained(bert).save_pretrained(tmp_path / "ours")
    code = (
        "import sys, longspan\n"
        "assert 'transformers' not in sys.modules\n"
        "longspan.LongspanConfig\n"
        "from transformers import AutoModelForMaskedLM\n"
        "print(type(AutoModelForMaskedLM.from_pretrained(sys.argv[1])).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "ours")], capture_output=True, text=True)
    assert found.stdout.strip() == "LongspanForMaskedLM", found.stderr


def test_the_saved_config_is_plain_data(tmp_path):
    translated(tiny_model("longformer", "masked_lm"), "masked_lm").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert (fields["model_type"], fields["family"], fields["trained_tokens"]) == ("longspan", "longformer", 64)
    assert fields["encoder"]["blocks"][2]["pattern"] == {
        "type": "sliding_window",
        "before": 8,
        "after": 8,
        "dilation": 1,
    }
