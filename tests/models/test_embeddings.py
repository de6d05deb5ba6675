import pytest
import torch
from tests.models.tiny import FAMILIES, MAX_TOKENS, batch, tiny_model, translated

from longspan.models.embeddings import Embeddings, EmbeddingsConfig

SKIPPING = EmbeddingsConfig(
    vocab_size=20, width=6, positions=10, position_offset=2, positions_skip_padding=True, padding_idx=1
)
COUNTING = EmbeddingsConfig(vocab_size=20, width=6, positions=8)


def make(config: EmbeddingsConfig) -> Embeddings:
    torch.manual_seed(0)
    return Embeddings(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_equal_hugging_face(family):
    theirs = tiny_model(family)
    ours = translated(theirs)
    inputs = batch(theirs.config, [MAX_TOKENS, 1, 30])
    arguments = {"input_ids": inputs["input_ids"]}
    if family in ("bert", "roberta", "longformer"):
        arguments["token_type_ids"] = torch.arange(MAX_TOKENS).expand(3, -1) % 2
    with torch.no_grad():
        assert torch.allclose(ours.embeddings(**arguments), theirs.embeddings(**arguments), atol=1e-6)
        vectors = theirs.get_input_embeddings()(inputs["input_ids"])
        given = {"input_ids": None, "inputs_embeds": vectors}
        assert torch.allclose(ours.embeddings(**given), theirs.embeddings(**given), atol=1e-6)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "modernbert"])
def test_an_input_longer_than_the_position_table_is_refused_with_the_way_out(family):
    theirs = tiny_model(family)
    ours = translated(theirs)
    assert ours.config.embeddings_config.max_tokens == ours.config.trained_tokens == MAX_TOKENS
    ours(**batch(theirs.config, [MAX_TOKENS]))
    message = r"needs positions for 65 tokens and this model has 64: .* longspan\.to_long\(model, max_tokens=65\)"
    with pytest.raises(ValueError, match=message):
        ours(**batch(theirs.config, [MAX_TOKENS + 1]))


def test_rotary_models_read_any_length_as_hugging_face_lets_them():
    theirs = tiny_model("modernbert", initializer_range=0.2)
    ours = translated(theirs)
    assert (ours.config.embeddings_config.max_tokens, ours.config.trained_tokens) == (None, MAX_TOKENS)
    inputs = batch(theirs.config, [3 * MAX_TOKENS])
    with torch.no_grad():
        assert torch.allclose(ours(**inputs)[0], theirs(**inputs)[0], atol=1e-5)


def test_positions_that_skip_padding_count_tokens_only():
    ids = torch.tensor([[5, 6, 7, 1, 1], [1, 1, 5, 6, 7]])
    assert make(SKIPPING).number(torch.zeros(2, 5, 6), ids).tolist() == [[2, 3, 4, 1, 1], [1, 1, 2, 3, 4]]
    assert make(COUNTING).number(torch.zeros(2, 5, 6), ids).tolist() == [[0, 1, 2, 3, 4]]


def test_padding_beyond_the_table_is_fine_where_positions_skip_it():
    ids = torch.full((1, 30), 1)
    ids[0, :8] = 5
    assert make(SKIPPING)(ids).shape == (1, 30, 6)
    with pytest.raises(ValueError, match="for 9 tokens and this model has 8"):
        make(SKIPPING)(torch.full((1, 9), 5))
    with pytest.raises(ValueError, match="for 30 tokens and this model has 8"):
        make(COUNTING)(ids)


def test_position_ids_given_by_hand_are_checked_too():
    ids = torch.full((1, 3), 5)
    make(COUNTING)(ids, position_ids=torch.tensor([[0, 7, 3]]))
    with pytest.raises(ValueError, match="for 9 tokens"):
        make(COUNTING)(ids, position_ids=torch.tensor([[0, 8, 3]]))


def test_a_period_repeats_the_rows_after_the_offset_and_leaves_those_below():
    fields = {**SKIPPING.to_dict(), "position_period": 3}
    periodic = make(EmbeddingsConfig(**fields))
    table = make(EmbeddingsConfig(**{**SKIPPING.to_dict(), "positions": 40}))
    with torch.no_grad():
        table.word.weight.copy_(periodic.word.weight)
        table.position.weight[:2] = periodic.position.weight[:2]
        table.position.weight[2:] = periodic.position.weight[2:5].repeat(13, 1)[:38]
        ids = torch.randint(2, 20, (2, 35))
        ids[1, 20:] = 1
        assert torch.equal(periodic(ids), table(ids))
    assert periodic.config.max_tokens is None


def test_exactly_one_input_is_wanted():
    embeddings = make(COUNTING)
    ids, vectors = torch.full((1, 3), 5), torch.zeros(1, 3, 6)
    for arguments in ({}, {"input_ids": ids, "inputs_embeds": vectors}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            embeddings(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_period": 9}, "position_period must lie between 1 and the position table's 8 usable rows; got 9"),
        ({"position_offset": 8}, "a position table of 8 rows leaves none after position_offset=8"),
        ({"positions_skip_padding": True, "padding_idx": None}, "positions_skip_padding needs a padding_idx"),
    ],
)
def test_a_description_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EmbeddingsConfig(**{**COUNTING.to_dict(), **changes})


def test_embeddings_compile_into_one_graph():
    embeddings = make(SKIPPING)
    compiled = torch.compile(embeddings, fullgraph=True, backend="aot_eager")
    ids = torch.tensor([[5, 6, 7, 1, 1], [5, 5, 5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(compiled(ids), embeddings(ids))
