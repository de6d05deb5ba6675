import pytest

from longspan.bench.cases import (
    GOALS,
    attention_cases,
    character_cases,
    dense_cases,
    dilated_cases,
    encoder_cases,
    memory_cases,
    reached,
)
from longspan.bench.corpora import PLAIN, POOL, RAY, WORKERS, CorpusCase, system_name
from longspan.bench.measure import Row, compare
from longspan.bench.scaling import DENSE, LAYERS, OURS, case_name


def encoders(shape, **options):
    return encoder_cases(shape, **{"layers": None, "batches": (), "tokens": (), "quick": False} | options)


CASES = {
    "bench-encoder-large": lambda: encoders("large"),
    "bench-encoder-base": lambda: encoders("base"),
    "bench-encoder-modernbert": lambda: encoders("modernbert"),
    "bench-attention": lambda: [*attention_cases(quick=False), *memory_cases(quick=False)],
    "bench-scaling": lambda: [
        *dilated_cases(precisions=("fp32", "bf16"), quick=False),
        *character_cases(precisions=("fp32", "bf16"), quick=False),
    ],
    "bench-dense": lambda: dense_cases(batches=(), tokens=(), quick=False),
    "bench-corpus": lambda: [],
}


def rows_of(topic):
    """Every row as if measured: others take 24 ms, ours 2, 3, ... and memory is 100 MiB per 65,536 tokens."""
    rows = {"bench-scaling": layer_rows, "bench-corpus": corpus_rows}.get(topic, list)()
    for case in CASES[topic]():
        some = []
        for number, system in enumerate(case.systems()):
            row = Row(
                case=case.name,
                shape=case.shape,
                system=system.name,
                precision=system.precision,
                threads=2,
                ours=system.ours,
                relative_error=0.01,
                gflops=None if system.flops is None else 50.0 if system.ours else 100.0,
                median_ms=2.0 + number if system.ours else 24.0,
            )
            if case.name.startswith("memory"):
                row.median_ms, row.peak_mib = None, 100 * case.tokens / 65536
            some.append(row)
        compare(some, [system for system in case.systems() if system.yardstick])
        rows += some
    return rows


def layer_rows():
    return [
        Row(
            case=case_name(layer.name, backward, tokens),
            shape={"tokens": tokens},
            system=system,
            precision=precision,
            threads=2,
            ours=system == OURS,
            median_ms=1e-3 * tokens * (2 if system == OURS else 24),
            peak_mib=tokens / 1024,
            token_over_short=1.0,
        )
        for layer in LAYERS
        for backward in (False, True)
        for precision in ("fp32", "bf16")
        for tokens in (2048, 2**15, 2**20)
        for system in (OURS, DENSE)
    ]


def corpus_rows():
    """A second worker gains 1.5 times the work, a second process 1.6 times."""
    return [
        Row(
            case=CorpusCase().name,
            shape={"workers": workers},
            system=system_name(engine, workers),
            precision="bf16",
            threads=1,
            ours=engine != PLAIN,
            median_ms=24 / (1 if workers == 1 else 1.6 if engine == PLAIN else 1.5),
        )
        for engine in (PLAIN, POOL, RAY)
        for workers in WORKERS
    ]


@pytest.mark.parametrize("topic", GOALS)
def test_every_goal_finds_its_rows(topic):
    assert [goal["what"] for goal in reached(topic, rows_of(topic))] == [goal.what for goal in GOALS[topic]]


def test_goals_are_measured_and_judged():
    found = {goal["what"]: goal for goal in reached("bench-attention", rows_of("bench-attention"))}
    share = found["forward fp32, share of oneDNN's rate"]
    assert (share["measured"], share["reach"], share["met"]) == (0.5, 0.75, False)
    backward = found["forward and backward fp32 over the best PyTorch path"]
    assert (backward["measured"], backward["met"]) == (12, True)
    growth = found["memory at 262,144 tokens over that at 65,536"]
    assert (growth["measured"], growth["at_most"], growth["met"]) == (4, True, True)


def test_ragged_time_is_judged_by_the_share_of_tokens():
    rows = rows_of("bench-encoder-large")
    goal = next(
        goal for goal in reached("bench-encoder-large", rows) if goal["what"].startswith("rows of many lengths, int8")
    )
    ragged = next(row for row in rows if "longspan, padding computed int8" in row.speedup)
    share = ragged.shape["real_tokens"] / (8 * 4096)
    assert goal["measured"] == pytest.approx(2 / 24 / share, rel=1e-3)


def test_what_a_worker_gains_is_judged_by_what_a_process_gains():
    (goal, _) = reached("bench-corpus", corpus_rows())
    assert (goal["measured"], goal["met"]) == (1.5 / 1.6, True)


def test_what_was_not_measured_is_no_goal():
    rows = [row for row in rows_of("bench-attention") if row.precision == "bf16"]
    assert {goal["what"].split(",")[0] for goal in reached("bench-attention", rows)} == {
        "forward bf16",
        "forward and backward bf16 over the best PyTorch path",
    }
    for row in rows:
        row.status, row.median_ms = "failed tolerance", None
    assert reached("bench-attention", rows) == []


def test_the_tables_cover_what_they_promise():
    large = encoders("large")
    assert {(case.batch, case.tokens) for case in large[:6]} == {(b, n) for b in (1, 8) for n in (1024, 2048, 4096)}
    assert [case.precision for case in large[6:]] == ["fp32", "bf16", "int8"]
    assert large[6].lengths[0] == 200 and large[6].lengths[-1] == 4096
    assert [case.tokens for case in encoders("modernbert")] == [1024, 2048, 4096, 8192]
    assert encoders("modernbert")[0].model.layers == 22
    dense = CASES["bench-dense"]()
    assert {(case.batch, case.tokens) for case in dense} == {(b, n) for b in (1, 32) for n in (64, 128, 256, 512)}
    assert len(set(dense[-1].lengths)) > 10 and dense[-1].lengths[-1] == 512
    assert memory_cases(quick=False)[-1].tokens == 262144


def test_a_selection_replaces_the_defaults():
    (case,) = encoders("base", layers=2, batches=[3], tokens=[512])
    assert (case.batch, case.tokens, case.model.layers, case.model.heads) == (3, 512, 2, 12)


@pytest.mark.parametrize(
    "make", [lambda: encoders("large", tokens=[5000]), lambda: dense_cases(batches=(), tokens=[513], quick=False)]
)
def test_more_tokens_than_positions_are_refused(make):
    with pytest.raises(ValueError, match="reads at most"):
        make()
