import pytest
import torch
from tests.bench.examples import RIGHT, Allocating, Example, system

from longspan.bench.measure import Prepared, measure, measure_memory, time_in_turns


def rows(*systems, **options):
    return measure(Example(list(systems)), **{"seconds": 0, "rounds": 1} | options)


def test_right_output_gets_its_times_and_errors():
    (row,) = rows(system("right", RIGHT * (1 + 1e-6), seconds=0.001), rounds=2)
    assert row.status == "ok" and row.calls >= 2
    assert 1 <= row.p20_ms <= row.median_ms <= row.p80_ms
    assert row.relative_error == pytest.approx(1e-6, rel=0.2)
    assert row.max_error == pytest.approx(8e-6, rel=0.2)
    assert (row.case, row.shape, row.reference, row.tolerance) == ("case", {"tokens": 8}, "float64", 1e-5)
    assert row.threads == torch.get_num_threads()


@pytest.mark.parametrize("wrong", [RIGHT + 0.01, RIGHT * float("nan"), RIGHT.where(RIGHT > 1, torch.inf)])
def test_wrong_output_gets_no_time(wrong):
    right, refused = rows(system("right"), system("wrong", wrong, ours=True))
    assert right.median_ms is not None
    assert refused.status == "failed tolerance" and refused.note.startswith("relative error")
    assert refused.median_ms is None and refused.p20_ms is None and not refused.speedup


def test_one_wrong_tensor_among_several_is_enough():
    two = system(
        "two", prepare=lambda: Prepared(lambda: None, lambda out: (RIGHT, RIGHT * 2)), expected=lambda: (RIGHT, RIGHT)
    )
    assert rows(two)[0].status == "failed tolerance"


def test_a_system_without_tolerance_gives_what_is_expected():
    case = Example([system("stock", RIGHT * 3, tolerance=None), system("same", RIGHT * 3), system("other", RIGHT)])
    assert [row.status for row in measure(case, seconds=0, rounds=1)] == ["ok", "ok", "failed tolerance"]


def test_only_the_last_rows_are_compared_where_others_cannot_be():
    half = torch.cat((torch.zeros(4), RIGHT[4:]))
    assert rows(system("half", half, last_rows=4))[0].status == "ok"


def test_outputs_of_another_shape_are_a_mistake():
    with pytest.raises(ValueError, match=r"an output is \[4\], expected \[8\]"):
        rows(system("short", RIGHT[:4]))


def test_what_is_missing_or_left_out_is_named():
    missing, left_out = rows(
        system("absent", missing="pip install absent"), system("slow", left_out="compiling takes longer than --quick")
    )
    assert (missing.status, missing.note) == ("missing", "pip install absent")
    assert (left_out.status, left_out.note) == ("left out", "compiling takes longer than --quick")


def test_others_may_fail_and_ours_may_only_decline():
    def fails():
        raise RuntimeError("no such operator")

    def declines():
        raise NotImplementedError("backend 'native' cannot run it")

    failed, declined = rows(system("peer", prepare=fails), system("ours", prepare=declines, ours=True))
    assert (failed.status, failed.note) == ("cannot run", "RuntimeError: no such operator")
    assert declined.status == "cannot run" and "backend 'native'" in declined.note
    with pytest.raises(RuntimeError):
        rows(system("ours", prepare=fails, ours=True))


def test_ours_are_compared_with_all_others_that_were_timed():
    stock, ours, _ = rows(
        system("stock", seconds=0.02), system("ours", seconds=0.005, ours=True), system("wrong", RIGHT + 1), rounds=3
    )
    assert stock.speedup == {}
    assert ours.speedup == {"stock fp32": pytest.approx(stock.median_ms / ours.median_ms, rel=1e-3)}
    assert ours.speedup["stock fp32"] > 2


def test_rates_are_shares_of_the_yardstick():
    ours, gemm = rows(
        system("ours", seconds=0.02, flops=1e7, ours=True),
        system("gemm", seconds=0.01, flops=1e7, yardstick=True),
        rounds=3,
    )
    assert ours.speedup == {}
    assert ours.gflops == pytest.approx(10 / ours.median_ms, rel=1e-3)
    assert 0.3 < ours.share_of_gemm < 0.7
    assert gemm.share_of_gemm == 1


def test_systems_take_turns_in_alternating_order():
    order = []
    slow = 0.06  # one call a turn

    def run(name):
        order.append(name)
        torch.zeros(1)
        import time

        time.sleep(slow)

    times = time_in_turns([lambda: run("a"), lambda: run("b")], seconds=0, rounds=3)
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [len(taken) for taken in times] == [3, 3]


def test_quick_calls_are_repeated_and_the_first_of_a_turn_is_not_counted():
    calls = []
    (taken,) = time_in_turns([lambda: calls.append(1)], seconds=0, rounds=1)
    assert len(taken) == len(calls) - 1 > 10


def test_memory_is_the_growth_during_one_call():
    (row,) = measure_memory(Allocating())
    if row.peak_mib is None:
        pytest.skip("this system does not tell a process's peak memory")
    assert 90 < row.peak_mib < 125
    assert row.median_ms is None and row.status == "ok"
