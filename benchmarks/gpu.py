"""make gpu-check: all that has to be known of a GPU, in minutes. Writes benchmarks/gpu.json and docs/gpu.md.

The work is divided into parts (PARTS), which run one after another, each as a process of its own with a time limit.
gpu.json is written after each part. When all minutes are used up, the part that runs then is ended, and no other one
begins. The same command goes on later. It leaves out what has finished on the same commit and GPU, and runs what has
not been tried before what has failed. So a part that fails slowly each time cannot keep the others from their turn.
This process itself leaves the GPU alone.

--rehearse true runs every part on the CPU at the smallest sizes, and writes to runs/gpu-rehearsal/ instead.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_page
from experiments.grid import ROOT, commit, machine
from mpo.config import Positive, Size
from mpo.runtime import signals
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError, Interrupted, RunError
from mpo.runtime.files import read_json, write_json, write_text
from mpo.runtime.flags import parse
from mpo.runtime.lock import Lock

Row = dict[str, Any]
STAGES = ("sft", "rm", "split", "dpo", "mpo", "eval")
WORKLOAD = {"device": "cuda", "width": 1024, "vocabulary": 32768, "tokens": 384, "pairs": 32, "rollout": 64}
REHEARSAL = {"device": "cpu", "width": 64, "vocabulary": 128, "tokens": 24, "pairs": 2, "rollout": 2, "layers": 1}
# Of the environment, what would change the parts, or would make the make that a part starts one of ours.
LEFT_OUT = ("MPO_KERNELS", "MPO_BENCH", "MPO_TEST_DEVICE", "TRITON_INTERPRET", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")


@dataclass(frozen=True, kw_only=True)
class GPUConfig:
    """Check and measure this project on a GPU."""

    minutes: Positive = 8.0  # for everything, once `make` has installed what this project needs
    repeats: Size = 5  # steps that count of each case
    rehearse: bool = False  # on the CPU, at the smallest sizes; the numbers mean nothing
    out: str = ""  # every number measured; benchmarks/gpu.json if not set, or runs/gpu-rehearsal/gpu.json
    page: str = ""  # the page; docs/gpu.md if not set, or runs/gpu-rehearsal/gpu.md


class Place(NamedTuple):
    """Where and how the parts run."""

    device: str  # cuda, or cpu in a rehearsal
    folder: Path  # for runs and logs of this commit
    repeats: int

    @property
    def rehearsal(self) -> bool:
        """Whether the parts run on the CPU at the smallest sizes."""
        return self.device == "cpu"

    def workload(self, **more: Any) -> str:
        """The value of MPO_BENCH."""
        return json.dumps((REHEARSAL if self.rehearsal else WORKLOAD) | more)


class Outcome(NamedTuple):
    """What a part has found; at most one of `error` and `skipped` is set."""

    result: Row
    error: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Part:
    """One part of the check."""

    name: str
    limit: float  # seconds
    command: Callable[[Place], Sequence[str]]
    environment: Callable[[Place], Mapping[str, str]]
    read: Callable[[Place, Path], Outcome]  # from the log; also of a part that failed or ran out of time


# --- the parts ------------------------------------------------------------------------------------


def tests(place: Place, name: str, *words: str) -> list[str]:
    """The command that runs some tests. Their outcomes go to a file beside the log."""
    report = f"--junitxml={place.folder / name}.xml"
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", report, *words]


def test_environment(place: Place) -> dict[str, str]:
    """In a rehearsal, Triton's programs run in its interpreter, and the GPU is the pretended one."""
    return {"TRITON_INTERPRET": "1"} if place.rehearsal else {"MPO_TEST_DEVICE": place.device}


def read_tests(place: Place, log: Path) -> Outcome:
    """How many tests passed, and which of them failed, each with the first line of its error."""
    path = log.with_suffix(".xml")
    if not path.exists():
        return Outcome({}, "the tests did not get to their end")
    passed, skipped, failed = 0, 0, dict[str, str]()
    for case in xml.etree.ElementTree.parse(path).iter("testcase"):
        faults = [*case.iter("failure"), *case.iter("error")]
        if faults:
            words = (faults[0].get("message") or "?").strip()
            failed[str(case.get("name"))] = words.splitlines()[0][:300]
        elif list(case.iter("skipped")):
            skipped += 1
        else:
            passed += 1
    result = {"passed": passed, "skipped": skipped, "failed": failed}
    if failed:
        name = next(iter(failed))
        return Outcome(result, f"{len(failed)} of {passed + len(failed)} tests failed; {name}: {failed[name]}")
    return Outcome(result, "" if passed else "no test ran")


def worker(*tasks: str) -> Callable[[Place], list[str]]:
    """The command that runs tasks of gpu_worker.py in one process."""
    return lambda place: [sys.executable, "-m", "benchmarks.gpu_worker", "+".join(tasks), str(place.repeats)]


def workload(**more: Any) -> Callable[[Place], dict[str, str]]:
    """The environment of gpu_worker.py."""
    return lambda place: {"MPO_BENCH": place.workload(**more)}


def read_worker(place: Place, log: Path) -> Outcome:
    """The cases that gpu_worker.py has measured so far."""
    rows: Row = {}
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("RESULT "):
            rows |= json.loads(line.removeprefix("RESULT "))
    failed = {name: row["error"] for name, row in rows.items() if "error" in row}
    if failed:
        name = next(iter(failed))
        return Outcome(rows, f"{len(failed)} of {len(rows)} cases failed; {name}: {failed[name]}")
    reasons = [row["skipped"] for row in rows.values() if "skipped" in row]
    return Outcome(rows, skipped=reasons[0] if reasons and len(reasons) == len(rows) else "")


def pipeline(place: Place) -> list[str]:
    """The command of a tiny make hh."""
    own = [] if Path(sys.executable).is_relative_to(ROOT / ".venv") else [f"PY={sys.executable}"]
    run = place.folder / "hh"
    where = run.relative_to(ROOT) if run.is_relative_to(ROOT) else run
    return ["make", "--no-print-directory", "hh", "QUICK=1", f"RUN={where}", f"DEVICE={place.device}", *own]


def read_pipeline(place: Place, log: Path) -> Outcome:
    """Seconds and peak memory of each stage that has finished."""
    rows: Row = {}
    for stage in STAGES:
        with suppress(InputError):
            manifest = read_json(place.folder / "hh" / stage / "manifest.json")
            rows[stage] = {key: manifest.get(key) for key in ("seconds", "peak_memory_mb", "peak_device_memory_mb")}
    missing = [stage for stage in STAGES if stage not in rows]
    return Outcome(rows, f"{missing[0]} has not finished" if missing else "")


def peers(place: Place) -> list[str]:
    """The command that makes the peers' environments, unless this is a rehearsal, and measures those that are there."""
    install = "make --no-print-directory .peers/now/.done .peers/ppo/.done; "
    return ["sh", "-c", ("" if place.rehearsal else install) + shlex.join(worker("peers")(place))]


def peers_environment(place: Place) -> dict[str, str]:
    """Without a network, pip is to give up soon."""
    return {"MPO_BENCH": place.workload(), "PIP_RETRIES": "1", "PIP_DEFAULT_TIMEOUT": "15"}


KERNELS = "gpu or matches_its_definition and not decoder"
FEW = "gpu and (empty or extreme or widths or another_width)"  # a rehearsal: the interpreter is slow
DEVICES = "on_another_device"
PARTS = (
    Part(
        "kernels",
        130,
        lambda place: tests(place, "kernels", "tests/kernels", "-k", FEW if place.rehearsal else KERNELS),
        test_environment,
        read_tests,
    ),
    Part(
        "stages",
        130,
        lambda place: tests(place, "stages", "tests/runtime/test_device.py", "-k", DEVICES),
        test_environment,
        read_tests,
    ),
    Part("hh", 150, pipeline, lambda place: {}, read_pipeline),
    Part("speed", 100, worker("speed", "ordinary bytes"), workload(), read_worker),
    Part("plan", 80, worker("plan"), workload(), read_worker),
    Part("head", 60, worker("head"), workload(), read_worker),
    Part("deterministic", 70, worker("deterministic", "deterministic bytes"), workload(), read_worker),
    Part("compile", 150, worker("compile"), workload(compile=True), read_worker),
    Part("peers", 600, peers, peers_environment, read_worker),
)


# --- running them ---------------------------------------------------------------------------------


def last_line(log: Path) -> str:
    """The last line of a log that is not empty: of a program that failed, the reason."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"


def call(command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float) -> str:
    """Run a command with all that it starts, and end it after `limit` seconds; returns what went wrong, or ""."""
    kept = {name: value for name, value in os.environ.items() if name not in LEFT_OUT}
    kept["PYTHONUNBUFFERED"] = "1"  # or the reason of a failure would come before what was printed earlier
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=kept | dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"not done within {limit:.0f} s"
        finally:  # also where this program is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"{last_line(log)} (exit status {status})" if status else ""


def run_part(part: Part, place: Place, left: float) -> Row:
    """Run one part; returns its entry in gpu.json. `left`: seconds until the end of the check."""
    log = place.folder / f"{part.name}.log"
    began = time.monotonic()
    limit = part.limit * (10 if place.rehearsal else 1)  # a busy CPU is not what a rehearsal is about
    wrong, outcome = "", Outcome({})
    try:
        wrong = call(part.command(place), part.environment(place), log, min(limit, left))
        outcome = part.read(place, log)
    except Interrupted:  # the part has not failed: the same command runs it again
        raise
    except Exception as e:  # a fault of this file must not cost the other parts their minutes
        wrong = wrong or f"{type(e).__name__}: {e}"
    row: Row = {"seconds": round(time.monotonic() - began, 1), "result": outcome.result}
    if outcome.skipped:
        return row | {"skipped": outcome.skipped + (f" ({wrong})" if wrong else "")}
    if error := outcome.error or wrong:
        more = wrong if wrong.startswith("not done") and outcome.error else ""
        return row | {"error": " ".join(f"{more} {error}".split()), "log": str(log)}
    return row


def source() -> str:
    """The commit; where files differ from it, or no commit is known, also a hash of the code."""
    known = commit()
    if known and not known.endswith("+"):
        return known
    code = hashlib.sha256()
    for pattern in ("*.py", "mpo/**/*.py", "kernels/**/*.*p*", "benchmarks/*.py", "tests/**/*.py", "make/*"):
        for path in sorted(p for p in ROOT.glob(pattern) if p.suffix in (".py", ".cpp", ".mk")):
            code.update(path.read_bytes())
    return f"{known or 'unknown commit'} {code.hexdigest()[:10]}"


def driver() -> str:
    """The version of NVIDIA's driver; "" where it cannot be found."""
    if not shutil.which("nvidia-smi"):
        return ""
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    said = subprocess.run(asked, capture_output=True, encoding="utf-8", errors="replace", check=False)
    return said.stdout.strip().splitlines()[0] if said.returncode == 0 and said.stdout.strip() else ""


def probe(place: Place, left: float) -> Row:
    """What this machine is (gpu_worker.py), or RunError where not even that can be found out."""
    log = place.folder / "probe.log"
    command = [sys.executable, "-m", "benchmarks.gpu_worker", "probe"]
    wrong = call(command, {"MPO_BENCH": json.dumps(REHEARSAL)}, log, min(120, left))
    about = read_worker(place, log).result.get("about")
    if wrong or about is None:
        raise RunError(f"cannot ask torch for a GPU: {wrong or last_line(log)}")
    return about | {"commit": source(), "machine": machine(), "driver": driver()}


def finished(entry: Row | None, about: Row) -> bool:
    """Whether a part has been run to its end on this commit and GPU."""
    same = entry and all(entry.get(name) == about[name] for name in ("commit", "device"))
    return bool(same and entry and "error" not in entry and "skipped" not in entry)


def check(parts: Sequence[Part], place: Place, about: Row, out: Path, page: Path, end: float) -> list[str]:
    """Run the parts that have not finished yet; returns the names of those that still have not.

    The results of other commits and GPUs are dropped from the file, since the page has room for one.

    Args:
        end: when all parts must be done, as a time of time.monotonic().
    """
    before = read_json(out)["parts"] if out.exists() else {}
    entries: dict[str, Row] = {
        name: entry for name, entry in before.items() if all(entry.get(k) == about[k] for k in ("commit", "device"))
    }
    signals.promise("runs the parts that have not finished")
    waiting = [part for part in parts if not finished(entries.get(part.name), about)]
    for part in parts:
        if part not in waiting:
            print(f"{part.name}: finished before", flush=True)
    for part in sorted(waiting, key=lambda part: part.name in entries):  # those that have failed come last
        if (left := end - time.monotonic()) < 1:
            print(f"{part.name}: no time is left for it", flush=True)
            continue
        entry = run_part(part, place, left)
        entries[part.name] = entry | {"commit": about["commit"], "device": about["device"]}
        write_json(out, {"about": about, "parts": entries})
        write_text(page, gpu_page.page(about, entries, place.rehearsal))
        verdict = entry.get("error") or (f"skipped: {entry['skipped']}" if "skipped" in entry else "done")
        print(f"{part.name}: {verdict} ({entry['seconds']:.0f} s)", flush=True)
    write_text(page, gpu_page.page(about, entries, place.rehearsal))
    return [part.name for part in parts if "error" in entries.get(part.name, {"error": "not run"})]


def main(config: GPUConfig) -> None:
    """Look for a GPU, run the parts, write the page.

    Raises InputError without a GPU or while another check runs here, and RunError where a part failed.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one is enough
    kept = ROOT / "runs" / ("gpu-rehearsal" if config.rehearse else "gpu-check")
    kept.mkdir(parents=True, exist_ok=True)
    lock = Lock(kept)
    try:
        check_here(config, kept)
    finally:
        lock.release()


def check_here(config: GPUConfig, kept: Path) -> None:
    """See `main`. `kept`: the folder for runs and logs."""
    minutes = max(config.minutes, 60.0) if config.rehearse else config.minutes  # a rehearsal is to reach the last part
    end = time.monotonic() + 60 * minutes
    version = source().replace(" ", "-")
    place = Place("cpu" if config.rehearse else "cuda", kept / version, 1 if config.rehearse else config.repeats)
    about = probe(place, end - time.monotonic())
    if config.rehearse:
        about["device"] = "none, since this is a rehearsal on the CPU"
    elif about["device"] is None:
        raise InputError(
            f"gpu-check: torch {about['torch']} reaches no CUDA device on this machine; "
            "to rehearse the check on the CPU: make gpu-check REHEARSE=1"
        )
    out = Path(config.out or (kept / "gpu.json" if config.rehearse else ROOT / "benchmarks" / "gpu.json"))
    page = Path(config.page or (kept / "gpu.md" if config.rehearse else ROOT / "docs" / "gpu.md"))
    failed = check(PARTS, place, about, out, page, end)
    print(f"written: {out}, {page}", flush=True)
    if failed:
        again = "the same command runs only these again"
        raise RunError(f"gpu-check: {', '.join(failed)}: failed or not finished ({page} says why); {again}")


if __name__ == "__main__":
    run_plain(lambda argv: main(parse(GPUConfig, argv)))
