import pytest
import torch
from tests.training.language_run import small_model
from transformers import GPT2Config, GPT2LMHeadModel

from longspan.inference.generate import Sampling, generate_text
from longspan.models.text_tokenizers import bpe_tokenizer, byte_tokenizer, character_tokenizer

CHARACTERS = character_tokenizer(" abcde")


@pytest.mark.parametrize("kind", ["character", "byte", "bpe"])
def test_pieces_are_the_text(kind):
    """Random bytes make broken characters: pieces come when they are whole, and replaced where they never are."""
    tokenizer = {"character": CHARACTERS, "byte": byte_tokenizer(), "bpe": bpe_tokenizer(["a cab"], 260)}[kind]
    pieces = []
    model = small_model(len(tokenizer))
    done = generate_text(model, tokenizer, "a cab", Sampling(max_new_tokens=40), write=pieces.append)
    assert "".join(pieces) == done.text and done.tokens == 40
    if kind == "character":
        assert len(pieces) == len(done.text) == 40
    assert model.training


def test_the_seed_decides_the_text_and_the_callers_random_numbers_stay():
    model = small_model(6)
    torch.manual_seed(5)
    first, second, other = (
        generate_text(model, CHARACTERS, "a", Sampling(max_new_tokens=20, seed=seed)).text for seed in (1, 1, 2)
    )
    after = torch.rand(1)
    torch.manual_seed(5)
    assert first == second != other and torch.equal(after, torch.rand(1))


def test_temperature_0_takes_the_likeliest_token():
    model = small_model(6).eval()
    text = generate_text(model, CHARACTERS, "ab", Sampling(max_new_tokens=10, temperature=0, seed=1)).text
    ids = torch.tensor([[1 + "abcde".index(letter) for letter in "ab"]])
    for letter in text:
        with torch.inference_mode():
            likeliest = int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax())
        assert " abcde"[likeliest] == letter
        ids = torch.cat((ids, torch.tensor([[likeliest]])), 1)
    narrow = generate_text(model, CHARACTERS, "ab", Sampling(max_new_tokens=10, top_k=1)).text
    assert narrow == text


def test_a_prompt_must_be_of_the_models_alphabet_and_not_empty():
    with pytest.raises(ValueError, match=r"outside the model's alphabet: 'X' \(1 times\)"):
        generate_text(small_model(6), CHARACTERS, "aXe")
    with pytest.raises(ValueError, match="the prompt is empty"):
        generate_text(small_model(6), CHARACTERS, "")


def test_generation_past_what_a_model_reads_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=6, n_embd=8, n_layer=1, n_head=1, n_positions=16, eos_token_id=None))
    with pytest.raises(ValueError, match=r"2 tokens, and with 15 new ones that is more than the 16 .* at most 14"):
        generate_text(model, CHARACTERS, "ab", Sampling(max_new_tokens=15))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0 or greater"),
        ({"temperature": float("nan")}, "temperature must be 0 or greater"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be greater than 0"),
    ],
)
def test_sampling_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)
