from types import SimpleNamespace

import pytest
import torch
from transformers import BertConfig, BertForQuestionAnswering

from longspan.errors import DocumentError, NotFiniteError, QuestionError
from longspan.inference.extractive import SpanFinder, _window_tokens


class SeesWords:
    """A question-answering model that answers "zebra" and, a little less surely, "green zoo"."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, positions=64):
        self.config = SimpleNamespace(model_type="bert", max_position_embeddings=positions)
        self.zebra, self.green, self.zoo = tokenizer.convert_tokens_to_ids(["zebra", "green", "zoo"])
        self.shapes = []

    def __call__(self, **inputs):
        return self.forward(**inputs)

    def forward(self, input_ids, attention_mask, token_type_ids):
        self.shapes.append(tuple(input_ids.shape))
        assert (input_ids[attention_mask == 0] == 0).all()
        start = 9.0 * (input_ids == self.zebra) + 8.5 * (input_ids == self.green) + 50.0 * (token_type_ids == 0)
        end = 9.0 * (input_ids == self.zebra) + 8.5 * (input_ids == self.zoo) + 50.0 * (token_type_ids == 0)
        return SimpleNamespace(start_logits=start, end_logits=end)


def find(model, tokenizer, *texts, question="who lives in the zoo", **kwargs):
    return SpanFinder(model, tokenizer).candidates(question, list(texts), passage_words=10, **kwargs)


def best(found, *texts):
    rank = found.probability.argmax()
    start, end = found.chars[rank]
    return texts[found.document[rank]][start:end]


@pytest.mark.parametrize("place", [0, 1, 40, 41, 55, 56, 57, 58, 100, 297, 298])
def test_an_answer_is_found_wherever_it_stands(tokenizer, place):
    words = ["old"] * 299
    words[place] = "zebra"
    text = " ".join(words)
    found = find(SeesWords(tokenizer), tokenizer, text)
    assert found.answer == "zebra"
    assert "zebra" in best(found, text)
    assert len(best(found, text).split()) == 10


def test_a_span_across_the_end_of_a_window_is_found_in_the_next(tokenizer):
    for place in range(30, 70):
        words = ["old"] * 120
        words[place : place + 3] = ["green", "old", "zoo"]
        assert find(SeesWords(tokenizer), tokenizer, " ".join(words)).answer == "green old zoo"


def test_every_token_of_every_document_is_read_once(tokenizer):
    for length in (1, 50, 51, 52, 53, 54, 300):
        texts = [" ".join(["old"] * length), "red zebra"]
        found = find(SeesWords(tokenizer), tokenizer, *texts)
        assert found.tokens == length + 2
        assert found.document[found.probability.argmax()] == 1


def test_answers_never_reach_into_the_question_nor_past_30_tokens(tokenizer):
    text = "green " + "old " * 29 + "zoo"
    assert find(SeesWords(tokenizer), tokenizer, text).answer != text
    text = "green " + "old " * 28 + "zoo"
    assert find(SeesWords(tokenizer), tokenizer, text).answer == text


def test_probabilities_are_a_softmax_over_distinct_spans(tokenizer):
    found = find(SeesWords(tokenizer), tokenizer, "old zebra town " + "old " * 100)
    assert found.probability.sum() == pytest.approx(1)
    assert found.probability.max() > 0.99
    again = find(SeesWords(tokenizer), tokenizer, "zebra " + "old " * 40 + "zebra")
    assert sorted(again.probability)[-2:] == pytest.approx([0.5, 0.5], abs=0.01)


def test_windows_of_one_length_are_read_together_and_progress_ends_at_the_total(tokenizer):
    model, calls = SeesWords(tokenizer), []
    find(model, tokenizer, "red zebra", "old " * 3000, progress=lambda done, total: calls.append((done, total)))
    assert model.shapes[0][0] > 50
    assert calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_the_best_spans_equal_brute_force_on_a_real_model(tokenizer):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    model = BertForQuestionAnswering(config).eval()
    text = "alice wrote the report near the old river. bob lives in the red town."
    with torch.inference_mode():
        found = find(model, tokenizer, text)
        encoded = tokenizer("who lives in the zoo", text, return_tensors="pt", return_offsets_mapping=True)
        offsets = encoded.pop("offset_mapping")[0].tolist()
        output = model(**encoded)
    start, end = output.start_logits[0], output.end_logits[0]
    context = [i for i, of in enumerate(encoded.sequence_ids(0)) if of == 1]
    pairs = [(i, j) for i in context for j in context if i <= j < i + 30]
    first, last = max(pairs, key=lambda pair: start[pair[0]] + end[pair[1]])
    assert found.answer == text[offsets[first][0] : offsets[last][1]]


def test_special_tokens_in_a_document_are_plain_text(tokenizer):
    text = "[SEP] zebra [CLS]"
    assert find(SeesWords(tokenizer), tokenizer, text).answer == "zebra"


def test_a_question_longer_than_half_the_window_is_refused(tokenizer):
    find(SeesWords(tokenizer), tokenizer, "red zebra", question="who " * 32)
    with pytest.raises(QuestionError, match="33 tokens long, more than half of the 64 tokens"):
        find(SeesWords(tokenizer), tokenizer, "red zebra", question="who " * 33)


def test_a_model_that_gives_nan_is_refused(tokenizer):
    class Broken(SeesWords):
        def __call__(self, **inputs):
            return SimpleNamespace(
                **{name: logits * torch.nan for name, logits in vars(self.forward(**inputs)).items()}
            )

    with pytest.raises(NotFiniteError, match="NaN or infinite logits"):
        find(Broken(tokenizer), tokenizer, "red zebra")


def test_text_that_the_tokenizer_drops_is_refused(tokenizer):
    with pytest.raises(DocumentError, match="no text that this model's tokenizer knows"):
        find(SeesWords(tokenizer), tokenizer, "\u200b\u200b")


def test_inputs_that_the_model_does_not_take_are_left_out(tokenizer):
    class WithoutTypes(SeesWords):
        def forward(self, input_ids, attention_mask):
            return super().forward(input_ids, attention_mask, torch.ones_like(input_ids))

    assert find(WithoutTypes(tokenizer), tokenizer, "old zebra").answer == "zebra"


@pytest.mark.parametrize(
    ("positions", "tokenizer_limit", "expected"),
    [(512, 512, 512), (514, int(1e30), 512), (4098, 4096, 4096), (None, int(1e30), 8192), (512, 64, 64)],
)
def test_the_window_is_the_models_limit(positions, tokenizer_limit, expected):
    config = SimpleNamespace(model_type="bert", max_position_embeddings=positions)
    assert _window_tokens(config, SimpleNamespace(model_max_length=tokenizer_limit)) == expected
