"""Kill a stage again and again, and compare results: python -m tests.support.crashes RUN WORK STAGE KILLS SEED

A process that has imported everything forks the stage, so that a kill costs what the stage had done and not an
import. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # torch's optimisers would, in each stage

import train_dpo
import train_ppo
import train_rm
import train_sft
from mpo.config import DPOConfig, PPOConfig, RMConfig, SFTConfig, Training
from mpo.runtime import files
from mpo.runtime.entry import run
from mpo.runtime.files import sha256

PPO = "--batch 8 --minibatch 4 --microbatch 4 --max_new 10 --critic_warmup 1"
MODELS = "--prompts {run}/split/prompts.jsonl --model {run}/dpo --ref {run}/sft --rm {run}/rm"
DPO = "--data {run}/split/pairs.jsonl --model {run}/sft --steps 48 --batch 8"

# name -> (script, its config, flags)
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


FEW = {
    "sft": "--epochs 0.5",
    "rm": "--epochs 0.5",
    "dpo": "--steps 8 --keep 0",
    "ppo": "--iterations 4 --keep 0",
}  # steps
FEWER = {"sft": "--epochs 0.25", "rm": "--epochs 0.25", "dpo": "--steps 4 --keep 0", "ppo": "--iterations 2 --keep 0"}


def start(stage: str, base: Path, out: Path, *more: str, before: Any = None) -> int:
    """Fork a stage as a user runs it; returns its process id. `before` is called in the child first."""
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
    """The exit status; minus the signal for a process that one ended."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out: Path) -> dict[str, str]:
    """Hashes of all that must come out alike: every model, kept ones too, and the metrics."""
    files = (p for p in sorted(out.rglob("*")) if p.suffix in (".safetensors", ".jsonl"))
    return {str(p.relative_to(out)): sha256(p) for p in files if "saves" not in p.parts}


def straight(stage: str, base: Path, out: Path, *more: str) -> tuple[dict[str, str], float]:
    """The result without any interruption, and how long it takes."""
    began = time.monotonic()
    if status := wait(start(stage, base, out, *more)):
        raise RuntimeError(f"{stage} ended with {status}: {out.with_suffix('.log').read_text()[-2000:]}")
    return result(out), time.monotonic() - began


def going_on(out: Path) -> int:
    """How often the log says that a try went on from a save."""
    return out.with_suffix(".log").read_text().count("going on after step")


def logged(out: Path) -> int:
    """The size of the metrics so far."""
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def at_random(stage: str, base: Path, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """SIGKILL after random times, until so many have hit; when a stage is finished, the next one starts."""
    expected, seconds = straight(stage, base, work / "straight")
    draw, hit, finished, same, resumed = random.Random(seed), 0, 0, True, 0
    while hit < kills:
        out = work / f"killed-{finished}"
        child = start(stage, base, out)
        if hit % 3:  # of three kills one comes at any time, two while the stage takes its steps
            steps = logged(out)
            while logged(out) == steps and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.002)
        time.sleep(draw.uniform(0, (0.2 if hit % 3 else 0.7) * seconds))
        os.kill(child, signal.SIGKILL)
        if wait(child) == -signal.SIGKILL:
            hit += 1
        else:
            finished, same = finished + 1, same and result(out) == expected
            resumed += going_on(out)
    out = work / f"killed-{finished}"
    status = wait(start(stage, base, out))
    resumed += going_on(out)
    return {
        "kills": hit,
        "resumed": resumed,
        "runs": finished + 1,
        "same": same and not status and result(out) == expected,
    }


def at_every_point_of_a_save(stage: str, base: Path, work: Path) -> dict[str, Any]:
    """Die at each of the moments within writing a file: before it is on the disk, before and behind its name."""
    few = FEW[stage.split("-")[0]].split()
    expected, _ = straight(stage, base, work / "straight", *few)
    out, died = work / "killed", 0

    def die_at(call: int) -> Any:
        """SIGKILL at the call-th step of any write from now on; half of the file is there at the first of three."""
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

    call = 4  # 1 to 3: stage.json
    while not (out / "manifest.json").exists():
        status = wait(start(stage, base, out, *few, before=die_at(call)))
        if status not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{stage} ended with {status}: {out.with_suffix('.log').read_text()[-2000:]}")
        died += status != 0
        call += 1
    return {"kills": died, "resumed": going_on(out), "runs": 1, "same": result(out) == expected}


def main() -> None:
    """Every stage, or the named one."""
    base, work, stage, kills, seed = (
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3],
        int(sys.argv[4]),
        int(sys.argv[5]),
    )
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = at_every_point_of_a_save(stage, base, work) if kills == 0 else at_random(stage, base, work, kills, seed)
    print(json.dumps({"stage": stage, **found}))


if __name__ == "__main__":
    main()
