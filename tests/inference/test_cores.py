import os

import pytest

from longspan.inference.cores import allowed_cores, cpu_quota


def groups(tmp_path, files, membership):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "membership").write_text(membership)
    return {"root": tmp_path, "membership": tmp_path / "membership"}


@pytest.mark.parametrize(
    ("files", "membership", "quota"),
    [
        ({"a/b/cpu.max": "150000 100000\n"}, "0::/a/b\n", 1.5),
        ({"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n"}, "0::/a/b\n", 3),
        ({"a/cpu.max": "300000 100000\n", "cpu.max": "100000 100000\n"}, "0::/a\n", 1),
        ({"cpu.max": "200000 100000\n"}, "0::/docker/hidden\n", 2),
        ({"a/cpu.max": "max 100000\n"}, "0::/a\n", None),
        (
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            "4:cpu,cpuacct:/a\n1:memory:/b\n",
            0.5,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu,cpuacct:/a\n0::/\n", None),
        ({"unified/a/cpu.max": "100000 50000\n"}, "2:memory:/x\n0::/a\n", 2),
        ({}, "4:cpu:/a\n0::/\n", None),
        ({"cpu.max": "what is this\n"}, "0::/\n", None),
    ],
)
def test_the_smallest_quota_of_the_process_and_the_groups_above_it_counts(tmp_path, files, membership, quota):
    assert cpu_quota(**groups(tmp_path, files, membership)) == quota


def test_a_system_without_control_groups_has_no_quota(tmp_path):
    assert cpu_quota(tmp_path, tmp_path / "nowhere") is None


def test_the_quota_cuts_the_cores_but_leaves_one(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5, 2, 9})
    for quota, cores in ((None, [2, 5, 9]), (2.9, [2, 5]), (0.5, [2]), (64, [2, 5, 9])):
        monkeypatch.setattr("longspan.inference.cores.cpu_quota", lambda quota=quota: quota)
        assert allowed_cores() == cores
