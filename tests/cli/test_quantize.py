import copy

import pytest
import torch
from safetensors import safe_open
from tests.models.tiny import OURS, batch, tiny_model, translated
from transformers import AutoModel
from transformers.utils import logging
from typer.testing import CliRunner

from longspan.cli import app
from longspan.models.evidence import LongspanForEvidence
from longspan.models.packed import PackedEncoder
from longspan.models.plug_in import accelerate
from longspan.models.quantize import quantize_checkpoint


@pytest.fixture(autouse=True)
def _transformers_stays_as_loud_as_it_was():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tensors(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("family", "task"), [("longformer", "masked_lm"), ("modernbert", None), ("roberta", "question_answering")]
)
def test_what_it_writes_loads_as_the_model_that_accelerate_packs(tmp_path, tokenizer, family, task, precision):
    theirs = tiny_model(family, task)
    theirs.save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    done = invoke("quantize", tmp_path / "wide", tmp_path / "small", "--precision", precision)
    assert done.exit_code == 0, done.output
    assert f"{type(translated(theirs, task)).__name__} in {precision}, " in done.stdout
    assert " MiB of weights instead of " in done.stdout

    kind = OURS[task]
    small, wide = kind.from_pretrained(tmp_path / "small"), kind.from_pretrained(tmp_path / "wide")
    assert isinstance(small.base_model.encoder, PackedEncoder)
    assert small.config.precision == precision and small.dtype == torch.float32 and not small.training
    assert small.config.encoder_config == wide.config.encoder_config
    inputs = batch(theirs.config, [50, 31])
    if family == "longformer":
        inputs["global_attention_mask"] = (torch.arange(50) < 3).long().expand(2, -1)
    if family == "roberta":
        inputs["input_ids"][:, 5] = theirs.config.eos_token_id
    with torch.no_grad():
        assert torch.equal(small(**inputs)[0], accelerate(wide, precision)(**inputs)[0])
    assert isinstance(AutoModel.from_pretrained(tmp_path / "small").encoder, PackedEncoder)
    assert (tmp_path / "small" / "tokenizer.json").exists()


def test_int8_keeps_embeddings_head_and_vectors_as_they_were_and_global_projections_in_bf16(tmp_path):
    theirs = tiny_model("longformer", "masked_lm")
    theirs.save_pretrained(tmp_path / "wide")
    done = quantize_checkpoint(tmp_path / "wide", tmp_path / "small")
    written, ours = tensors(tmp_path / "small"), translated(theirs, "masked_lm").state_dict()
    for name, weight in ours.items():
        if ".qkv_global.weight" in name:
            assert written[name].dtype == torch.bfloat16
        elif ".encoder." in name and weight.ndim == 2:
            assert written[name].dtype == torch.int8
            assert written[f"{name}.scale"].shape == weight.shape[:1]
        elif name in written:
            assert torch.equal(written[name], weight)
    assert done.architecture == "LongspanForMaskedLM"
    assert done.bytes_after < done.bytes_before
    assert list(tmp_path.iterdir()) and {path.name for path in tmp_path.iterdir()} == {"wide", "small"}


def test_an_evidence_reader_is_quantized(tmp_path):
    torch.manual_seed(0)
    config = translated(tiny_model("longformer")).config
    config.calibration = [1.0, 0.5, 0.25]
    model = LongspanForEvidence(config).eval()
    model.save_pretrained(tmp_path / "wide")
    model.save_compact(tmp_path / "compact")
    for name in ("wide", "compact"):
        quantize_checkpoint(tmp_path / name, tmp_path / f"{name}-small")
        small = LongspanForEvidence.from_pretrained(tmp_path / f"{name}-small")
        assert isinstance(small.longspan.encoder, PackedEncoder)
        assert small.config.calibration == [1.0, 0.5, 0.25]
        question, document = torch.randint(5, 99, (6,)), torch.randint(5, 99, (50,))
        spans = torch.tensor([[0, 20], [20, 50]])
        wide = accelerate(LongspanForEvidence.from_pretrained(tmp_path / name), "int8")
        expected = wide.score_windows(question, document, spans)
        assert torch.equal(small.score_windows(question, document, spans), expected)


def test_another_head_may_be_put_on_it(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "wide")
    quantize_checkpoint(tmp_path / "wide", tmp_path / "small")
    model, info = OURS["token_classification"].from_pretrained(tmp_path / "small", output_loading_info=True)
    assert isinstance(model.longspan.encoder, PackedEncoder)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}


@pytest.fixture
def small(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "wide")
    quantize_checkpoint(tmp_path / "wide", tmp_path / "small")
    return tmp_path / "small"


def rewrite(folder, change):
    from safetensors.torch import save_file

    written = tensors(folder)
    change(written)
    save_file(written, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_packed_checkpoint_with_gaps_is_refused(small):
    rewrite(small, lambda written: written.pop("encoder.blocks.1.ffn_in.weight"))
    with pytest.raises(ValueError, match=r"missing: blocks\.1\.ffn_in\.weight$"):
        OURS[None].from_pretrained(small)


def test_a_packed_checkpoint_without_embeddings_is_refused(small):
    rewrite(small, lambda written: written.pop("embeddings.word.weight"))
    with pytest.raises(ValueError, match=r"is not complete; missing: embeddings\.word\.weight"):
        OURS[None].from_pretrained(small)


def test_a_packed_checkpoint_without_weights_is_refused(small):
    (small / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        OURS[None].from_pretrained(small)


def test_a_damaged_scale_is_named(small):
    rewrite(small, lambda written: written["encoder.blocks.0.ffn_in.weight.scale"].fill_(torch.nan))
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0\.ffn_in\.weight\.scale holds NaN"):
        OURS[None].from_pretrained(small)


def test_a_packed_checkpoint_is_not_packed_again(small):
    done = invoke("quantize", small, small.with_name("smaller"))
    assert done.exit_code == 2
    assert "is packed in int8 already: name the checkpoint that it was made of" in done.stderr
    assert not small.with_name("smaller").exists()


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    done = invoke("quantize", tmp_path / "model", tmp_path / "out")
    assert done.exit_code == 2
    assert "exists and is not an empty directory" in done.stderr


def test_weights_with_nan_are_refused_and_nothing_is_written(tmp_path):
    model = copy.deepcopy(tiny_model("bert"))
    with torch.no_grad():
        model.encoder.layer[2].intermediate.dense.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "wide")
    done = invoke("quantize", tmp_path / "wide", tmp_path / "out")
    assert done.exit_code == 2
    assert "encoder.blocks.2.ffn_in.weight holds NaN" in done.stderr
    assert not (tmp_path / "out").exists()


def test_other_precisions_are_refused(tmp_path):
    assert invoke("quantize", tmp_path, tmp_path / "out", "--precision", "int4").exit_code == 2
    with pytest.raises(ValueError, match="precision must be 'fp32', 'bf16', 'int8' on cpu; got 'int4'"):
        quantize_checkpoint(tmp_path, tmp_path / "out", precision="int4")
