"""make gpu-check without a GPU: parts and their limits, what is run again, and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_page
from benchmarks.gpu import Outcome, Part, Place
from mpo.runtime import lock
from mpo.runtime.errors import InputError, RunError
from tests.support.scripts import ROOT

ABOUT = {"device": "A GPU", "commit": "c1", "torch": "9", "cuda": "13", "triton": "4", "driver": "600", "machine": "M"}


@pytest.fixture
def place(tmp_path):
    return Place("cuda", tmp_path / "kept", 1)


def part(name, code, limit=20.0, read=None, **more):
    """A part that runs some Python in a process of its own. Its result is what the process printed, as JSON."""

    def printed(place, log):
        return Outcome(json.loads(log.read_text() or "{}"))

    command = [sys.executable, "-S", "-c", code]
    return Part(name, limit, lambda place: command, lambda place: {}, read or printed, **more)


@pytest.fixture
def check(place, tmp_path, monkeypatch):
    """A function that runs parts as `make gpu-check` does; it returns what failed, and what gpu.json holds."""
    monkeypatch.setattr(gpu_page, "page", lambda about, entries, rehearsal: " ".join(entries))

    def run(*parts, about=ABOUT, minutes=1.0):
        out = tmp_path / "gpu.json"
        failed = gpu.check(parts, place, about, out, tmp_path / "gpu.md", time.monotonic() + 60 * minutes)
        return failed, json.loads(out.read_text())["parts"] if out.exists() else {}

    return run


def test_a_finished_part_is_not_run_again_on_the_same_commit_and_gpu(check, tmp_path):
    counter = tmp_path / "counter"
    once = part("one", f"open({str(counter)!r}, 'a').write('x')")
    for about, runs in ((ABOUT, 1), (ABOUT, 1), (ABOUT | {"commit": "c2"}, 2), (ABOUT | {"device": "Another"}, 3)):
        failed, entries = check(once, about=about)
        assert not failed
        assert entries["one"]["device"] == about["device"]
        assert len(counter.read_text()) == runs


def test_a_part_that_fails_is_recorded_in_one_line_and_the_others_go_on(check):
    bad = part("bad", "import sys; print('{}'); sys.exit('first line\\n  the reason\\n\\n')")
    torn = part("torn", "print('not JSON')")  # a fault of the check itself
    failed, entries = check(bad, torn, part("good", "print('{\"x\": 1}')"))
    assert failed == ["bad", "torn"]
    assert entries["bad"]["error"] == "the reason (exit status 1)"
    assert "JSONDecodeError" in entries["torn"]["error"]
    assert entries["good"]["result"] == {"x": 1}


def test_a_part_that_failed_is_run_again_and_a_finished_one_is_not(check, tmp_path):
    marker = tmp_path / "marker"
    code = f"import os, sys; p = {str(marker)!r}; done = os.path.exists(p); open(p, 'w').close(); sys.exit(not done)"
    assert check(part("moody", code))[0] == ["moody"]
    failed, entries = check(part("moody", code))
    assert not failed
    assert "error" not in entries["moody"]


def test_a_signal_ends_the_check_and_the_part_with_all_that_it_started(tmp_path):
    """The parts before are kept; this one is no failure, and none comes after it."""
    script, alive = tmp_path / "check.py", tmp_path / "alive"
    last = f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(2); open({str(alive)!r}, 'w')"
    script.write_text(
        "import math\nimport sys\nfrom pathlib import Path\n"
        "from benchmarks import gpu\nfrom mpo.runtime.entry import run_plain\n"
        "from tests.benchmarks.test_gpu import ABOUT, part\n"
        f"parts = part('one', ''), part('two', {last!r}), part('three', '')\n"
        f"here = Path({str(tmp_path)!r})\nplace = gpu.Place('cuda', here, 1)\n"
        "run_plain(lambda argv: gpu.check(parts, place, ABOUT, here / 'gpu.json', here / 'gpu.md', math.inf))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    running = subprocess.Popen([sys.executable, script], cwd=ROOT, env=environment, **quiet)
    while not (tmp_path / "begun").exists():
        assert running.poll() is None
        time.sleep(0.02)
    running.terminate()
    assert b"interrupted; the same command runs the parts that have not finished" in running.communicate(timeout=20)[1]
    assert running.returncode == 128 + 15
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["one"]
    time.sleep(2.2)
    assert not alive.exists()


def test_every_result_is_on_the_disk_before_the_next_part_begins(check, tmp_path):
    code = f"import json; print(json.dumps({{'seen': list(json.load(open({str(tmp_path / 'gpu.json')!r}))['parts'])}}))"
    _, entries = check(part("one", ""), part("two", code))
    assert entries["two"]["result"] == {"seen": ["one"]}
    assert (tmp_path / "gpu.md").read_text() == "one two"


def test_a_part_is_ended_at_its_limit_with_all_that_it_started(check, tmp_path):
    child = f"import time; time.sleep(3); open({str(tmp_path / 'alive')!r}, 'w')"
    code = "import subprocess, sys; print('{\"half\": 1}', flush=True)"
    code += f"; subprocess.run([sys.executable, '-c', {child!r}])"
    began = time.monotonic()
    failed, entries = check(part("slow", code, limit=0.7), part("next", ""))
    assert failed == ["slow"]
    assert entries["slow"]["error"] == "not done within 1 s"
    assert entries["slow"]["result"] == {"half": 1}  # what it had printed is kept
    assert entries["next"]["result"] == {}
    time.sleep(max(0.0, 3.5 - (time.monotonic() - began)))
    assert not (tmp_path / "alive").exists()


def test_parts_for_which_no_time_is_left_come_in_the_next_call(check):
    assert check(part("late", ""), minutes=0.0) == (["late"], {})
    failed, entries = check(part("late", ""))
    assert not failed
    assert "late" in entries


def test_a_part_ends_with_the_minutes_of_the_whole_check(check):
    failed, entries = check(part("slow", "import time; time.sleep(60)", limit=50.0), minutes=1.2 / 60)
    assert failed == ["slow"]
    assert entries["slow"]["error"] == "not done within 1 s"


def test_a_part_that_fails_slowly_each_time_does_not_keep_the_others_from_their_turn(check, tmp_path):
    def noted(name, more="", **limits):
        return part(name, f"open({str(tmp_path / 'order')!r}, 'a').write('{name} '); {more}", **limits)

    parts = noted("bad", "import time; time.sleep(60)", limit=1.2), noted("two"), noted("three")
    assert check(*parts, minutes=2 / 60)[0] == ["bad", "two", "three"]
    assert check(*parts)[0] == ["bad"]
    assert (tmp_path / "order").read_text() == "bad two three bad "


def test_a_skipped_part_is_no_failure_and_is_tried_again(check, tmp_path):
    counter = tmp_path / "counter"

    def read(place, log):
        return Outcome({}, skipped="no network")

    skipping = part("install", f"import sys; open({str(counter)!r}, 'a').write('x'); sys.exit('no index')", read=read)
    for runs in (1, 2):
        failed, entries = check(skipping)
        assert not failed
        assert entries["install"]["skipped"] == "no network (no index (exit status 1))"
        assert len(counter.read_text()) == runs


def test_the_environment_of_a_part_is_free_of_what_would_change_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MPO_KERNELS", "reference")
    monkeypatch.setenv("MAKEFLAGS", "REHEARSE=1")
    code = "import os; print(os.environ.get('MPO_KERNELS'), os.environ.get('MAKEFLAGS'), os.environ['MINE'])"
    gpu.call([sys.executable, "-S", "-c", code], {"MINE": "yes"}, tmp_path / "log", 20)
    assert (tmp_path / "log").read_text() == "None None yes\n"


def test_failed_tests_are_read_with_the_first_line_of_their_error(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): raise ValueError('CUDA\\nmore')\n"
        "@pytest.mark.skip\ndef test_not(): pass\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", "test_x.py"]
    subprocess.run([*command, f"--junitxml={tmp_path / 'x.xml'}"], cwd=tmp_path, capture_output=True)
    result, error, _ = gpu.read_tests(None, tmp_path / "x.log")
    assert result == {"passed": 1, "skipped": 1, "failed": {"test_bad": "ValueError: CUDA"}}
    assert error == "1 of 2 tests failed; test_bad: ValueError: CUDA"
    assert gpu.read_tests(None, tmp_path / "y.log").error == "the tests did not get to their end"


def test_cases_that_were_measured_before_a_process_died_are_kept(tmp_path):
    log = tmp_path / "speed.log"
    log.write_text(
        'noise\nRESULT {"dpo": {"seconds": 1.0}}\nRESULT {"ppo": {"error": "OutOfMemoryError: CUDA"}}\nKilled'
    )
    result, error, _ = gpu.read_worker(None, log)
    assert result["dpo"] == {"seconds": 1.0}
    assert error == "1 of 2 cases failed; ppo: OutOfMemoryError: CUDA"
    log.write_text('RESULT {"dpo": {"skipped": "trl is not installed"}}')
    assert gpu.read_worker(None, log) == ({"dpo": {"skipped": "trl is not installed"}}, "", "trl is not installed")


def test_without_cuda_it_says_so_in_one_line_and_starts_no_part(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu, "probe", lambda place, left: ABOUT | {"device": None, "torch": "2.13.0+cpu"})
    monkeypatch.setattr(gpu, "ROOT", tmp_path / "root")
    with pytest.raises(InputError, match=r"torch 2.13.0\+cpu reaches no CUDA device") as caught:
        gpu.main(gpu.GPUConfig(out=str(tmp_path / "x.json"), page=str(tmp_path / "x.md")))
    assert caught.value.status == 2
    assert [path.name for path in tmp_path.iterdir()] == ["root"]
    assert not list(tmp_path.glob("root/runs/gpu-check/*"))


def test_the_exit_status_is_1_if_a_part_failed(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "source", lambda: "c1")
    monkeypatch.setattr(gpu, "probe", lambda place, left: ABOUT)
    monkeypatch.setattr(gpu, "PARTS", (part("hh", "import sys; print('{}'); sys.exit('CUDA error')"),))
    with pytest.raises(RunError, match="hh: failed or not finished") as caught:
        gpu.main(gpu.GPUConfig())
    assert caught.value.status == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"  # one GPU is enough, and trl would take all of them
    assert "CUDA error (exit status 1)" in (tmp_path / "docs" / "gpu.md").read_text()
    assert (tmp_path / "benchmarks" / "gpu.json").exists()


def test_a_second_check_is_refused_while_one_runs(monkeypatch, tmp_path):
    """Two at once would disturb each other's times, and write the same files."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "source", lambda: "c1")
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    folder = tmp_path / "runs" / "gpu-check"
    folder.mkdir(parents=True)
    code = f"import sys; from pathlib import Path; from mpo.runtime.lock import Lock; Lock(Path({str(folder)!r}))"
    code += "; print('held', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(InputError, match=str(other.pid)):
            gpu.main(gpu.GPUConfig())
    finally:
        other.communicate()


def timing(seconds, **more):
    return {"seconds": seconds, "all": [seconds], "first": 9.5, "mib": 100.0} | more


ENTRIES = {
    "kernels": {"passed": 70, "skipped": 1, "failed": {"test_x": "AssertionError: 1"}},
    "stages": {"passed": 8, "skipped": 0, "failed": {}},
    "hh": {"sft": {"seconds": 3.0, "peak_memory_mb": 1000.0, "peak_device_memory_mb": 55.0}},
    "speed": {
        "dpo": timing(0.2),
        "dpo-bf16": timing(0.05),
        "ppo": {"error": "RuntimeError: x"},
        "same bytes": {"same": False},
    },
    "plan": {"dpo --recompute true": {"planned": 900.0, "measured": 1000.0}, "ppo": {"error": "OutOfMemoryError: y"}},
    "head": {"ours": timing(0.002), "ours-bf16": timing(0.001)},
    "deterministic": {"dpo": timing(0.3), "same bytes": {"same": True}},
    "compile": {"dpo": timing(0.1)},
    "peers": {
        "dpo": {"seconds": 0.5, "all": [0.5], "step_mib": 300.0},
        "reward": {"skipped": "trl is not installed"},
        "ppo-bf16": {"skipped": "trl is not installed"},
    },
}


def test_the_page_shows_every_result():
    entries = {name: {"seconds": 10.0, "result": result} for name, result in ENTRIES.items()}
    entries["kernels"]["error"] = "1 of 71 tests failed; test_x: AssertionError: 1"
    page = gpu_page.page(ABOUT | {"capability": "9.0", "mib": 81920}, entries, False)
    for words in (
        "GPU: A GPU, compute capability 9.0, 80 GiB.",
        "driver 600, torch 9, CUDA 13, triton 4",
        "All parts together took 90 s.",
        "70 passed, 1 failed",
        "**Failed or not finished**: 1 of 71 tests failed; test_x: AssertionError: 1.",
        "- ppo: RuntimeError: x",
        "Not measured, since trl is not installed: reward-model step; PPO iteration, bf16.",
        "usual no, deterministic yes",
    ):
        assert words in page, words
    lines = {
        line.split("|")[1].strip() + line.split("|")[-2].strip(): line for line in page.splitlines() if "|" in line
    }
    rows = [" ".join(line.split()) for line in lines.values()]
    assert "| DPO step, reference computed in the step | 200.0 | 50.0 | 4.00 | 100 | 100 |" in rows
    assert "| dpo --recompute true | 900 | 1,000 | 0.90 |" in rows
    assert "| DPO step, reference computed in the step | 200.0 | 300.0 | 1.50 |" in rows  # deterministic
    assert "| DPO step, reference computed in the step | 200.0 | 100.0 | 0.50 | 9.5 |" in rows  # compiled
    assert "| DPO step, reference computed in the step | 200.0 | 500.0 | 2.50 | 100 | 300 |" in rows  # trl
    assert "rehearsal" not in page
    for i, line in enumerate(lines := page.splitlines()):  # a line of text right below a table would belong to it
        assert line.startswith("|") or not line or not lines[i - 1].startswith("|"), line


def test_the_page_says_which_parts_are_missing_and_what_is_a_rehearsal():
    page = gpu_page.page(ABOUT, {"hh": {"seconds": 9.0, "result": {}, "error": "not done within 9 s"}}, True)
    assert "No number on this page means anything" in page
    assert page.count("Not run yet.") == len(gpu_page.TEXTS) - 1
    assert "**Failed or not finished**: not done within 9 s." in page
    assert "No Triton kernel ran" not in page
    unknown = gpu_page.page(ABOUT | {"driver": "", "cuda": None}, {}, True)
    assert "Versions: torch 9, triton 4." in unknown
    lacking = ABOUT | {"lacks": "Triton needs a C compiler"}
    assert "**No Triton kernel ran**: Triton needs a C compiler." in gpu_page.page(lacking, {}, False)


def test_every_part_is_on_the_page():
    assert {part.name for part in gpu.PARTS} == gpu_page.TEXTS.keys() == gpu_page.TABLES.keys()


def test_every_case_that_is_measured_has_its_words_on_the_page_and_every_peer_stands_beside_ours():
    """In a process of its own, since turns.py redirects standard output."""
    code = (
        "import json, sys\nfrom benchmarks import gpu_worker as g\n"
        "print(json.dumps({task: [name for name, _ in cases(1)] for task, cases in g.TASKS.items()}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    cases = json.loads(done.stderr.splitlines()[-1])
    for task in ("speed", "deterministic", "compile", "peers"):
        assert {name.removesuffix("-bf16") for name in cases[task]} <= gpu_page.NAMES.keys()
    assert {"sft", "dpo-bf16", "ppo"} <= set(cases["peers"]) <= set(cases["speed"])
    assert set(cases["deterministic"]) | set(cases["compile"]) <= set(cases["speed"])


def test_the_page_exists_only_with_figures_from_a_gpu():
    page, numbers = ROOT / "docs" / "gpu.md", ROOT / "benchmarks" / "gpu.json"
    assert page.exists() == numbers.exists()
    if page.exists():
        held = json.loads(numbers.read_text())
        assert page.read_text() == gpu_page.page(held["about"], held["parts"], False)
        assert held["about"]["cuda"]


def test_the_commit_of_a_changed_tree_depends_on_its_code(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    (tmp_path / "eval.py").write_text("1")
    monkeypatch.setattr(gpu, "commit", lambda: "abc")
    assert gpu.source() == "abc"
    for known in ("abc+", ""):
        monkeypatch.setattr(gpu, "commit", lambda known=known: known)
        before = gpu.source()
        (tmp_path / "eval.py").write_text(known + "2")
        assert gpu.source() != before


def test_the_worker_measures_its_cases_and_one_that_fails_does_not_stop_it():
    """In a process of its own, since turns.py redirects standard output."""
    code = (
        "from benchmarks import gpu_worker as g\n"
        "def bad(): raise RuntimeError('no such kernel\\nmore')\n"
        "print(g.run(iter([('bad', bad), ('good', lambda: {'x': 1})])))\n"
        "g.main(['ordinary bytes+head', '1'])"
    )
    sizes = {"MPO_BENCH": json.dumps(gpu.REHEARSAL), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | sizes, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line[7:]) for line in done.stderr.splitlines() if line.startswith("RESULT ")]
    assert rows[0] == {"bad": {"error": "RuntimeError: no such kernel"}}
    assert rows[1:3] == [{"good": {"x": 1}}, {"same bytes": {"same": True}}]
    assert {"ours-pair-bf16", "plain-backward"} <= {name for row in rows for name in row}
    assert "['bad: RuntimeError: no such kernel']" in done.stderr


def test_the_tests_of_the_kernels_part_cover_every_program_for_gpus():
    command = gpu.PARTS[0].command(Place("cuda", Path("/nowhere"), 1))
    chosen = command[command.index("-k") + 1]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    listing = [sys.executable, "-m", "pytest", "--collect-only", "tests/kernels", "-k", chosen]
    said = subprocess.run(listing, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert "test_attention_matches_its_definition" in said
    if "[gpu" not in said:
        pytest.skip("triton is not installed")
    for name in ("forward_pass", "gradients", "sampling_inverts", "products_in_bf16"):
        assert name in said
