"""Kill a stage again and again, and check that its result stays the same:

    python -m tests.support.crashes RUN WORK STAGE KILLS SEED

RUN is a finished run, whose data and models the stage reads. WORK is a folder for what the stage writes. The stage is
killed KILLS times at random moments. With KILLS = 0 it is killed within its writes instead, at one step after another.
With STAGE = all, every stage is killed once in each of its phases.

This process imports everything once and forks each attempt. A kill then costs only the work that the stage had done,
and not another import. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's optimisers would import it in every fork, which is slow

import train_dpo
import train_ppo
import train_rm
import train_sft
from mpo.config import DPOConfig, PPOConfig, RMConfig, SFTConfig, Training
from mpo.runtime import files
from mpo.runtime.entry import run
from mpo.runtime.files import sha256
from mpo.runtime.saves import Saves
from mpo.runtime.stage import Stage

PPO = "--batch 8 --minibatch 4 --microbatch 4 --max_new 10 --critic_warmup 1"
MODELS = "--prompts {run}/split/prompts.jsonl --model {run}/dpo --ref {run}/sft --rm {run}/rm"
DPO = "--data {run}/split/pairs.jsonl --model {run}/sft --steps 48 --batch 8"

# stage -> (its script, its config class, its flags)
STAGES: dict[str, tuple[Any, type, str]] = {
    "sft": (train_sft, SFTConfig, "--data {run}/data --tokenizer {run}/tokenizer --batch 8 --microbatch 8 --epochs 2"),
    "sft-frugal": (
        train_sft,
        SFTConfig,
        "--data {run}/data --tokenizer {run}/tokenizer --model {run}/sft --batch 8 --microbatch 8 --epochs 1 "
        "--precision bf16 --optimiser adafactor",
    ),
    "rm": (train_rm, RMConfig, "--data {run}/data --model {run}/sft --batch 8 --microbatch 8 --epochs 2"),
    "dpo": (train_dpo, DPOConfig, f"{DPO} --microbatch 8 --keep 2"),
    "dpo-bco": (train_dpo, DPOConfig, f"{DPO} --microbatch 4 --loss bco_pair+0.1*sft"),
    "dpo-lora": (train_dpo, DPOConfig, f"{DPO} --microbatch 4 --lora_rank 2 --lr 1e-2"),
    "ppo": (train_ppo, PPOConfig, f"{MODELS} {PPO} --iterations 12 --keep 2 --kl_target 1"),
    "ppo-shared": (train_ppo, PPOConfig, f"{MODELS} {PPO} --iterations 12 --shared_critic true"),
    "ppo-lora": (
        train_ppo,
        PPOConfig,
        f"{MODELS.replace('{run}/sft', '{run}/dpo')} {PPO} --iterations 12 --lora_rank 2",
    ),
    "ppo-grpo": (train_ppo, PPOConfig, f"{MODELS} {PPO} --iterations 6 --advantage grpo --group 4 --threads 2"),
}

# Flags that shorten a stage but keep its intermediate models, by the part of its name before the dash.
FEW_STEPS = {"sft": "--epochs 0.4", "rm": "--epochs 0.4", "dpo": "--steps 6", "ppo": "--iterations 4"}
# Flags that shorten a stage, by the part of its name before the dash.
SHORT = {"sft": "--epochs 0.5", "rm": "--epochs 0.5", "dpo": "--steps 8 --keep 0", "ppo": "--iterations 4 --keep 0"}
SHORTEST = {
    "sft": "--epochs 0.25",
    "rm": "--epochs 0.25",
    "dpo": "--steps 4 --keep 0",
    "ppo": "--iterations 2 --keep 0",
}


def start(stage: str, base: Path, out: Path, *more: str, before: Any = None) -> int:
    """Run a stage in a forked process, as a user would run it. Returns the process id.

    Args:
        stage: a key of STAGES.
        base: the run whose data and models the stage reads.
        out: the stage's folder. What it prints is appended to a log beside the folder.
        more: further flags.
        before: a function that the child calls before the stage starts.
    """
    script, config, flags = STAGES[stage]
    sys.stdout.flush()
    if child := os.fork():
        return child
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    sys.argv = [script.__file__, "--out", str(out), "--threads", "1"]
    sys.argv += ["--save_every", "0"] if issubclass(config, Training) else []
    sys.argv += [*flags.format(run=base).split(), *more]
    status = 0
    try:
        if before:
            before()
        run(script.main, config, script.check)
    except SystemExit as e:
        status = int(e.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 99
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def wait(child: int) -> int:
    """Wait for a process. Returns its exit status, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def has_ended(child: int) -> bool:
    """True once a process has ended. `wait` still has to be called for it."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def result_hashes(out: Path) -> dict[str, str]:
    """Hashes of what a kill must not change: the metrics, and every model, including the intermediate ones."""
    files = (p for p in sorted(out.rglob("*")) if p.suffix in (".safetensors", ".jsonl"))
    return {str(p.relative_to(out)): sha256(p) for p in files if "saves" not in p.parts}


def uninterrupted(stage: str, base: Path, out: Path, *more: str) -> tuple[dict[str, str], float]:
    """Run a stage without killing it. Returns the hashes of its result, and how many seconds it took."""
    began = time.monotonic()
    if status := wait(start(stage, base, out, *more)):
        raise RuntimeError(f"{stage} ended with {status}: {out.with_suffix('.log').read_text()[-2000:]}")
    return result_hashes(out), time.monotonic() - began


def resumptions(out: Path) -> int:
    """How many attempts continued from a save, according to the log."""
    return out.with_suffix(".log").read_text().count("going on after step")


def metrics_size(out: Path) -> int:
    """The size of metrics.jsonl in bytes; 0 before it exists."""
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def kill_at_random(stage: str, base: Path, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill a stage at random moments until `kills` kills have hit. A stage that finishes first is started anew."""
    expected, seconds = uninterrupted(stage, base, work / "uninterrupted")
    draw, hit, finished, same, resumed = random.Random(seed), 0, 0, True, 0
    while hit < kills:
        out = work / f"killed-{finished}"
        child = start(stage, base, out)
        if hit % 3:  # two kills in three wait until the stage has logged a step; the third may come during start-up
            size = metrics_size(out)
            while metrics_size(out) == size and not has_ended(child):
                time.sleep(0.002)
        time.sleep(draw.uniform(0, (0.2 if hit % 3 else 0.7) * seconds))
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            hit += 1
        else:
            finished, same = finished + 1, same and result_hashes(out) == expected
            resumed += resumptions(out)
    out = work / f"killed-{finished}"
    status = wait(start(stage, base, out))
    resumed += resumptions(out)
    return {
        "kills": hit,
        "resumed": resumed,
        "runs": finished + 1,
        "same": same and not status and result_hashes(out) == expected,
    }


def die_at_write(call: int) -> Callable[[], None]:
    """A function that makes a process kill itself before step number `call`, counted over all of its writes.

    A write has three steps: it syncs the temporary file, renames it, and syncs the folder. If the file has not been
    synced yet, half of it is cut off, as a crash of the machine might do.
    """
    count, sync, replace = [0], files.sync, Path.replace

    def step(path: Path) -> None:
        count[0] += 1
        if count[0] == call:
            if path.is_file() and ".partial" in str(path):
                os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def patched_sync(path: Path) -> None:
        step(path)
        sync(path)

    def patched_replace(self: Path, target: Path) -> Path:
        step(self)
        return replace(self, target)

    def patch() -> None:
        files.sync, Path.replace = patched_sync, patched_replace  # type: ignore[method-assign, assignment]

    return patch


def die_at_call(owner: type, method: str, call: int, after: bool) -> Callable[[], None]:
    """A function that makes a process kill itself before (or after) the given call of a method."""
    count, original = [0], getattr(owner, method)

    def patched(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return lambda: setattr(owner, method, patched)


# What one attempt after another dies of: each leaves the folder in another state.
PHASES: dict[str, Callable[[], None]] = {
    "before the first step": die_at_call(Saves, "restore", 1, after=False),
    "between a step and its save": die_at_call(Stage, "log", 2, after=True),
    "within a save": die_at_write(12),
    "between a save and the next step": die_at_call(Saves, "write", 1, after=True),
    "after the last save": die_at_call(Stage, "finish", 1, after=False),
}


def kill_in_each_phase(stage: str, base: Path, work: Path) -> dict[str, Any]:
    """Kill a stage once in each of its phases, each attempt continuing the one before; then let it finish."""
    few = FEW_STEPS[stage.split("-")[0]].split()
    expected, _ = uninterrupted(stage, base, work / f"{stage}-uninterrupted", *few)
    out = work / f"{stage}-killed"
    for phase, patch in PHASES.items():
        if (status := wait(start(stage, base, out, *few, before=patch))) != -signal.SIGKILL:
            raise RuntimeError(f"{stage}, {phase}: {status}, {out.with_suffix('.log').read_text()[-2000:]}")
    status = wait(start(stage, base, out, *few))
    same = not status and result_hashes(out) == expected
    return {"kills": len(PHASES), "resumed": resumptions(out), "runs": 1, "same": same}


def kill_within_writes(stage: str, base: Path, work: Path) -> dict[str, Any]:
    """Kill a stage at the first step of its writes, then at the second step, and so on until an attempt finishes."""
    short = SHORT[stage.split("-")[0]].split()
    expected, _ = uninterrupted(stage, base, work / "uninterrupted", *short)
    out, kills = work / "killed", 0
    call = 4  # steps 1 to 3 write stage.json, before the stage has done anything
    while not (out / "manifest.json").exists():
        status = wait(start(stage, base, out, *short, before=die_at_write(call)))
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{stage} ended with {status}: {out.with_suffix('.log').read_text()[-2000:]}")
        kills += status != 0
        call += 1
    return {"kills": kills, "resumed": resumptions(out), "runs": 1, "same": result_hashes(out) == expected}


def main() -> None:
    """Kill the stage named on the command line, and print what happened."""
    base, work, stage = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    kills, seed = int(sys.argv[4]), int(sys.argv[5])
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    if stage == "all":
        for name in STAGES:
            print(json.dumps({"stage": name, **kill_in_each_phase(name, base, work)}), flush=True)
        return
    outcome = kill_at_random(stage, base, work, kills, seed) if kills else kill_within_writes(stage, base, work)
    print(json.dumps({"stage": stage, **outcome}))


if __name__ == "__main__":
    main()
