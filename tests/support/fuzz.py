"""Malformed input for every reader: python -m tests.support.fuzz CASES SEED [TARGET ...]

A case is a good input, broken at random. Each has to end in acceptance or in an InputError of one line that names the
file: no other exception, no hang, no crash of the process, no memory that grows, nothing written. Prints one JSON
object a target. CASES are shared out among the targets; within each they are numbered from 0.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepare_data
from mpo import config as configs
from mpo.config import DataConfig, DPOConfig
from mpo.data import hh, tldr
from mpo.data.batches import encode
from mpo.data.rows import read_rows, write_rows
from mpo.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mpo.model.checkpoint import load_model, load_scalar, save_model
from mpo.model.llama import scalar_from
from mpo.preference.objective import parse_objective
from mpo.preference.split import threshold
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json
from mpo.runtime.flags import parse
from mpo.runtime.saves import Part, Saves
from mpo.runtime.seeding import generator
from mpo.tools.verify import verify
from mpo.training.optimisers import make_optimiser
from mpo.world.build import build
from tests.conftest import small_model
from tests.support.mutations import WORDS, broken_bytes, broken_json, broken_lines

SECONDS = 10  # a case may take
GROWTH = 1 << 30  # bytes by which the process may grow over all cases


class Ground:
    """Good inputs of every kind, made once, in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        splits = build("hh", 1, 40, 4)
        texts = (t for r in splits["train"] for t in (r.prompt, r.chosen, r.rejected))
        self.tokenizer: Tokenizer = train_tokenizer(texts, 400, 1)
        write_rows(folder / "rows.jsonl", splits["train"][:5])
        self.rows = (folder / "rows.jsonl").read_text()
        dialogues = [{"chosen": r.prompt + r.chosen, "rejected": r.prompt + r.rejected} for r in splits["train"][:5]]
        self.dialogues = "".join(json.dumps(d) + "\n" for d in dialogues)
        info = {"id": "t3_1", "post": "A post.", "title": "Title", "subreddit": "tifu"}
        comparison = {"info": info, "summaries": [{"text": " one."}, {"text": " two."}], "choice": 1, "split": "train"}
        self.comparisons = (json.dumps(comparison) + "\n") * 3
        self.model = small_model(vocab_size=self.tokenizer.size)
        save_model(folder / "model", self.model)
        save_model(folder / "shards", self.model, 30_000)
        save_model(folder / "rm", scalar_from(self.model, generator(0, "head")))
        self.tokenizer.save(folder / "tokenizer")
        self.files = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def put(self, path: str, content: bytes) -> Path:
        """Write a broken file."""
        where = self.folder / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_bytes(content)
        return where

    def copy(self, name: str) -> Path:
        """A fresh copy of one of the good folders."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.folder / name, case)
        return case


# --- one function a reader: break an input, read it -------------------------------------------------


def rows(ground: Ground, draw: random.Random) -> None:
    """Our own row files, plain and gzipped, up to token ids."""
    content = broken_lines(ground.rows, draw)
    packed = draw.random() < 0.3
    name = "case.jsonl.gz" if packed else "case.jsonl"
    encode(read_rows(ground.put(name, gzip.compress(content) if packed else content)), ground.tokenizer, 200, 100)


def gz(ground: Ground, draw: random.Random) -> None:
    """Damaged gzip files."""
    read_rows(ground.put("case.jsonl.gz", broken_bytes(gzip.compress(ground.rows.encode()), draw)))


def hh_text(ground: Ground, draw: random.Random) -> None:
    """HH dialogues through the data stage, which must leave nothing half-written behind."""
    shutil.rmtree(ground.folder / "hh", ignore_errors=True)
    shutil.rmtree(ground.folder / "out", ignore_errors=True)
    text = broken_lines(ground.dialogues, draw)
    if draw.random() < 0.5:  # within a string, so that it stays JSON
        inner = broken_bytes(json.loads(ground.dialogues.splitlines()[0])["chosen"].encode(), draw)
        text += json.dumps(
            {"chosen": inner.decode(errors="replace"), "rejected": "\n\nHuman: a\n\nAssistant: b"}
        ).encode()
    ground.put("hh/base/train.jsonl", text)
    ground.put("hh/base/test.jsonl", ground.dialogues.encode())
    out = ground.folder / "out"
    try:
        prepare_data.main(DataConfig(out=str(out), task="hh", data=str(ground.folder / "hh"), train=0, test=0))
    except InputError:
        if left := [p.name for p in out.rglob("*") if p.name not in ("stage.json",)]:
            raise AssertionError(f"left behind: {left}") from None
        raise
    hh.read_folder(ground.folder / "hh", "train", Counter())


def comparisons(ground: Ground, draw: random.Random) -> None:
    """TL;DR comparison files."""
    ground.put("tldr/comparisons/train.json", broken_lines(ground.comparisons, draw))
    tldr.read_folder(ground.folder / "tldr", "train", Counter())


def tokenizer(ground: Ground, draw: random.Random) -> None:
    """tokenizer.model; one that is accepted has to encode and decode."""
    ground.put("tok/tokenizer.model", broken_bytes(ground.tokenizer.vocabulary.files["tokenizer.model"], draw))
    found = load_tokenizer(ground.folder / "tok")
    found.decode(found.prompt_ids("Hello.\n\nHuman: ä") + found.response_ids(" Yes."))


def config(ground: Ground, draw: random.Random) -> None:
    """config.json of a model."""
    case = ground.copy("model")
    (case / "config.json").write_bytes(broken_json((case / "config.json").read_text(), draw))
    load_model(case)


def weights(ground: Ground, draw: random.Random) -> None:
    """model.safetensors: its header, as JSON or bytes, and its content."""
    case = ground.copy(draw.choice(("model", "rm")))
    path = case / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    how = draw.random()
    if how < 0.5:
        header = broken_json(data[8 : 8 + size].decode(), draw)
        data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    elif how < 0.7:
        data = draw.choice((0, 1, size + 1, 2**40, 2**63, 2**64 - 1)).to_bytes(8, "little") + data[8:]
    else:
        data = broken_bytes(data, draw)
    path.write_bytes(data)
    (load_scalar if draw.random() < 0.3 else load_model)(case)


def index(ground: Ground, draw: random.Random) -> None:
    """model.safetensors.index.json of shards."""
    case = ground.copy("shards")
    path = case / "model.safetensors.index.json"
    path.write_bytes(broken_json(path.read_text(), draw))
    load_model(case)


def flags(ground: Ground, draw: random.Random) -> None:
    """Command lines of every stage, --loss and --gamma."""
    classes = [c for c in vars(configs).values() if isinstance(c, type) and c.__name__.endswith("Config")]
    words = [
        "--lr",
        "--out",
        "--loss",
        "--batch",
        "--seed",
        "--",
        "-",
        "=",
        "--out=x",
        "1",
        "-1",
        "nan",
        "1e400",
        "9" * 400,
    ]
    words += [str(w)[:100] for w in WORDS if isinstance(w, str | int | float) and w != "\ud800"]
    parse(
        draw.choice(classes),
        [draw.choice(words) for _ in range(draw.randint(0, 6))] + ["--out", "x"] * draw.randint(0, 1),
    )


def losses(ground: Ground, draw: random.Random) -> None:
    """--loss and --gamma."""
    good = draw.choice(("sigmoid+0.1*sft", "simpo:beta=2.5:gamma=0.5", "0.8*sigmoid+0.2*bco_pair", "q0.5", "1.5"))
    text = broken_bytes(good.encode(), draw).decode(errors="replace")
    if draw.random() < 0.5:
        parse_objective(text, 0.1)
    else:
        threshold(ground.model.lm_head.weight.detach().flatten()[:50], text)


def saves(ground: Ground, draw: random.Random) -> None:
    """The saves of an interrupted stage: what is damaged is left out, and the stage begins again."""
    from mpo.runtime.stage import Stage

    out = ground.folder / "stage"
    shutil.rmtree(out, ignore_errors=True)
    asked = DPOConfig(out=str(out), data="", model="")
    kept = Saves(
        Stage(asked, {}, asked.out, False), asked, {"m": Part(ground.model, make_optimiser(ground.model, 1e-3, 0.0))}
    )
    path = draw.choice(sorted(kept.write(7, {"a": 1}).iterdir()))
    path.write_bytes(broken_bytes(path.read_bytes(), draw))
    step, numbers = kept.restore({"a": 0})
    assert (step, numbers) in ((0, {"a": 0}), (7, {"a": 1}))


def manifest(ground: Ground, draw: random.Random) -> None:
    """manifest.json and stage.json, as make verify and the next stage read them."""
    good = {
        "stage": "x",
        "config": {"seed": 1},
        "inputs": {"data": {"path": "d", "sha256": {"a": "b"}}},
        "outputs": {"a": "b"},
        "results": {},
    }
    case = ground.folder / "run" / "sft"
    case.mkdir(parents=True, exist_ok=True)
    write_json(case / "stage.json", {})
    (case / "manifest.json").write_bytes(broken_json(json.dumps(good), draw))
    verify(ground.folder / "run")


TARGETS: dict[str, Callable[[Ground, random.Random], None]] = {
    f.__name__: f
    for f in (rows, gz, hh_text, comparisons, tokenizer, config, weights, index, flags, losses, saves, manifest)
}
NAMELESS = ("flags", "losses", "hh_text", "rows")  # what is wrong may be a flag, or all rows together


# --- running cases ----------------------------------------------------------------------------------


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def one_case(name: str, ground: Ground, seed: int, number: int) -> str:
    """ "accepted", "refused", or what went wrong."""
    signal.alarm(SECONDS)
    try:
        TARGETS[name](ground, random.Random(f"{seed}/{name}/{number}"))
        return "accepted"
    except InputError as e:
        text = str(e)
        if "\n" in text or not text or (name not in NAMELESS and str(ground.folder) not in text):
            return f"a message that is not one line with the file: {text!r:.300}"
        return "refused"
    except BaseException:
        return traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)


def worker(name: str, cases: int, seed: int, first: int, note: Path) -> None:
    """Run cases from `first` on; `note` says which one is running, should the process die."""
    signal.signal(signal.SIGALRM, too_long)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        one_case(name, ground, seed, -1)  # once, so that growth is growth
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if (statm := Path("/proc/self/statm")).exists():  # Linux alone can limit what a process maps
            now = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + 3 * GROWTH, now + 3 * GROWTH))
        ends: Counter[str] = Counter()
        faults = []
        for number in range(first, cases):
            note.write_text(str(number))
            end = one_case(name, ground, seed, number)
            ends[end if end in ("accepted", "refused") else "faults"] += 1
            if end not in ("accepted", "refused"):
                faults.append({"case": number, "what": end[-700:]})
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        if grown > GROWTH:
            faults.append({"case": -1, "what": f"the process grew by {grown >> 20} MiB"})
    note.write_text(json.dumps({"ends": ends, "faults": faults[:20]}))


def run_target(name: str, cases: int, seed: int) -> dict[str, Any]:
    """All cases of one reader in processes of their own; one that dies is a fault of the case it was at."""
    ends: Counter[str] = Counter()
    faults, first = [], 0
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note"
        while first < cases and len(faults) < 20:
            note.write_text(str(first))
            command = [
                sys.executable,
                "-m",
                "tests.support.fuzz",
                "--worker",
                name,
                str(cases),
                str(seed),
                str(first),
                str(note),
            ]
            done = subprocess.run(command, check=False)
            text = note.read_text()
            if done.returncode == 0:
                found = json.loads(text)
                ends.update(found["ends"])
                faults += found["faults"]
                break
            faults.append({"case": int(text), "what": f"the process ended with {done.returncode}"})
            ends.update({"faults": 1, "unknown": int(text) - first})
            first = int(text) + 1
    return {"target": name, "cases": cases, **ends, "details": faults}


def main() -> None:
    """As the command line says."""
    if sys.argv[1] == "--worker":
        name, cases, seed, first, note = sys.argv[2:]
        worker(name, int(cases), int(seed), int(first), Path(note))
        return
    cases, seed = int(sys.argv[1]), int(sys.argv[2])
    bad = 0
    targets = sys.argv[3:] or list(TARGETS)
    for name in targets:
        found = run_target(name, math.ceil(cases / len(targets)), seed)
        bad += len(found["details"])
        print(json.dumps(found), flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
