"""How many cores and how much memory a process may use, and how many threads it starts."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mpo.kernels import functions as kernels
from mpo.runtime import cores as module
from mpo.runtime import launch, setup
from mpo.runtime.cgroups import memory_limit
from mpo.runtime.cores import cores, threads, threads_asked_for
from mpo.runtime.errors import InputError
from tests.support.scripts import ROOT


@pytest.fixture
def eight(monkeypatch):
    """A process that may run on 8 cores of a machine with 64."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)


def system(root, groups, files):
    """A folder with the files of a system that tell about control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups, encoding="utf-8")
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


V1 = "12:memory:/a\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),  # 2.5 cores
        ("0::/\n", {"cpu.max": "20000 100000\n"}, 1),  # a fifth of a core
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 8),  # more than the process may run on
        ("0::/job/step\n", {"job/cpu.max": "300000 100000", "job/step/cpu.max": "max 100000"}, 3),
        ("0::/job/step\n", {"other/cpu.max": "100000 100000"}, 8),  # a limit of somebody else
        ("0::/../../job\n", {"cpu.max": "200000 100000"}, 2),  # a container that sees only its own group
        (V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        (V1, {"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "50000"}, 3),
        (
            V1,
            {
                "cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000\n",
                "cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ("0::/\n", {"cpu.max": "nonsense"}, 8),
        ("0::/\n", {"cpu.max": "100000 0"}, 8),
        ("no colons\n", {}, 8),
    ],
)
def test_a_containers_limit_on_cpu_time_counts(eight, tmp_path, groups, files, expected):
    assert cores(system(tmp_path, groups, files)) == expected


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"memory.max": "max\n"}, math.inf),
        ("0::/\n", {"memory.max": "4294967296\n"}, 2**32),
        ("0::/job/step\n", {"job/memory.max": "1000", "job/step/memory.max": "max"}, 1000),
        ("0::/job\n", {"memory.max": "3000", "job/memory.max": "5000"}, 3000),
        ("0::/job/step\n", {"other/memory.max": "1000"}, math.inf),  # a limit of somebody else
        (V1, {"memory/a/memory.limit_in_bytes": "2000\n", "memory/memory.limit_in_bytes": "9000"}, 2000),
        (V1, {"cpu/memory.limit_in_bytes": "2000\n"}, math.inf),
        ("0::/\n", {"memory.max": "nonsense"}, math.inf),
        ("no colons\n", {}, math.inf),
    ],
)
def test_a_containers_limit_on_memory_is_the_lowest_of_its_groups(tmp_path, groups, files, expected):
    assert memory_limit(system(tmp_path, groups, files)) == expected


def test_without_control_groups_the_cores_count_on_which_the_process_may_run(eight, tmp_path, monkeypatch):
    assert cores(tmp_path) == 8
    monkeypatch.delattr(os, "sched_getaffinity")  # not on Linux
    assert cores(tmp_path) == 64


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can restrict a process to some cores")
def test_a_process_that_is_restricted_to_one_core_counts_one():
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); os.environ.pop('OMP_NUM_THREADS', '')\n"
        "from mpo.runtime.cores import cores, threads; print(cores(), threads())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "1 1\n"


@pytest.mark.parametrize(
    ("value", "expected"), [("3", 3), ("4,2", 4), (" 2 ", 2), ("5, 1,1", 5), ("", 0), ("  ", 0), (None, 0)]
)
def test_the_first_number_of_omp_num_threads_counts(monkeypatch, capsys, value, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if value is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert threads_asked_for() == expected
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("value", ["0", "-1", "auto", "many", "2.0", "1e1", ",2", "100000", "9" * 5000])
def test_another_omp_num_threads_is_ignored_with_one_line(monkeypatch, capsys, value):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(module, "cores", lambda: 6)
    monkeypatch.setattr(module, "_told", set())
    assert [threads(), threads()] == [6, 6]
    line = capsys.readouterr().err
    assert line.startswith("OMP_NUM_THREADS ")
    assert line.endswith("it is ignored (--threads also sets the number)\n")
    assert line.count("\n") == 1


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(module, "cores", lambda: 7)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads(processes=n) for n in (1, 2, 3, 8)] == [7, 3, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads(processes=2) == 5  # of each process


def test_threads_of_the_flag_come_before_those_of_omp_num_threads(monkeypatch, capsys):
    before = torch.get_num_threads()
    try:
        for value in ("3", "auto"):
            monkeypatch.setenv("OMP_NUM_THREADS", value)
            setup.setup_torch(SimpleNamespace(threads=2))
            assert torch.get_num_threads() == 2
            assert capsys.readouterr().err == ""  # nothing is said about a value that is not used
        monkeypatch.setenv("OMP_NUM_THREADS", "3,1")
        setup.setup_torch(SimpleNamespace(threads=0))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("has_them", "lines"), [(True, 0), (False, 1)])
def test_a_processor_without_products_of_bf16_says_so_in_one_line_and_keeps_fp32(monkeypatch, capsys, has_them, lines):
    monkeypatch.setattr(kernels, "multiplies_bf16", lambda device: has_them)
    x, weight = torch.randn(70, 30), torch.randn(20, 30)
    exact = kernels.linear(x, weight)
    try:
        setup.setup_torch(SimpleNamespace(threads=torch.get_num_threads(), precision="bf16-mixed"))
        said = capsys.readouterr().err
        assert said.count("\n") == lines
        assert ("products stay in fp32" in said) == (not has_them)
        assert torch.equal(kernels.linear(x, weight), exact) == (not has_them)
    finally:
        kernels.use_bf16(False)


@pytest.mark.parametrize(
    "words", [[], ["2"], ["0", "x.py"], ["-1", "x.py"], ["²", "x.py"], ["1.0", "x.py"], ["a", "x.py"]]
)
def test_a_wrong_number_of_processes_is_refused(words):
    with pytest.raises(InputError, match="number of processes"):
        launch.main(words)
