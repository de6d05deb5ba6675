import pytest

from longspan.recipes.language_models import RECIPES, paper_stages, recipe_of, tiny_stages
from longspan.training.language import LanguageTraining


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_complete(name):
    recipe = recipe_of(name)
    config = LanguageTraining(output="run", curriculum=recipe.curriculum, **recipe.settings)
    assert all(phase.batch % config.accumulate == 0 for phase in recipe.curriculum.phases)
    if name.endswith("tiny"):
        model = recipe.model(27)
        assert model.config.vocab_size == 27 and 3e6 < model.num_parameters() < 4e6


def test_the_papers_stages_double_windows_and_rows_and_halve_learning_rates():
    curriculum = recipe_of("longformer-small").curriculum
    assert [phase.steps for phase in curriculum.phases] == [430_000, 50_000, 50_000, 35_000, 5_000]
    assert [phase.length for phase in curriculum.phases] == [2048, 4096, 8192, 16384, 23040]
    assert [phase.batch for phase in curriculum.phases] == [32, 32, 16, 16, 16]
    assert [phase.windows[0] for phase in curriculum.phases] == [32, 64, 128, 256, 512]
    assert curriculum.phases[-1].windows[-1] == 8192
    assert [phase.learning_rate for phase in curriculum.phases] == [0.00025 / 2**n for n in range(5)]
    assert [phase.warmup_steps for phase in curriculum.phases] == [10_000, 5_000, 5_000, 3_500, 500]
    assert paper_stages((8,), (10, 10, 10, 10, 10)).phases[0].windows == (1,)


def test_tiny_stages_read_as_many_tokens_a_step_and_end_at_rate_0():
    curriculum = tiny_stages(tokens=10_000, tokens_per_step=100, length=100, learning_rate=0.1, shares=(0.5, 0.3, 0.2))
    assert curriculum.tokens == 10_000 and curriculum.steps == 100
    rates = [curriculum.rate(step) for step in range(100)]
    assert max(rates) == pytest.approx(0.1) and rates[-1] < 0.002
    assert rates[2:] == sorted(rates[2:], reverse=True)
    with pytest.raises(ValueError, match="tokens_per_step one of length; got length 64 and 100"):
        tiny_stages(tokens=1000, tokens_per_step=100, length=64, learning_rate=0.1)


def test_unknown_recipes_are_refused_by_name():
    with pytest.raises(ValueError, match="no recipe 'huge'; there is longformer-tiny, longformer-small"):
        recipe_of("huge")
