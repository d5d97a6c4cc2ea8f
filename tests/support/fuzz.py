"""Malformed input for every reader: python -m tests.support.fuzz CASES SEED [TARGET ...]

A target is a reader, and a case is a good input that was broken at random. The reader must accept it, or raise an
InputError whose message is one line and names the file. Everything else is a fault: another exception, a hang, a crash
of the process, memory that keeps growing, or a file left behind. CASES are divided among the targets; within each
target they are numbered from 0. Prints one JSON object for each target.
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
from mpo.config import DataConfig, DPOConfig, Range
from mpo.data import hh, tldr
from mpo.data.batches import encode
from mpo.data.formats import read_file
from mpo.data.rows import read_rows, write_rows
from mpo.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from mpo.model.checkpoint import load_model, load_scalar, save_model
from mpo.model.llama import scalar_from
from mpo.preference.objective import parse_objective
from mpo.preference.split import threshold
from mpo.runtime.entry import run_plain
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json
from mpo.runtime.flags import parse, read_number
from mpo.runtime.saves import Part, Saves
from mpo.runtime.seeding import generator
from mpo.tools.verify import verify
from mpo.training.optimisers import make_optimiser
from mpo.world.build import build
from tests.conftest import small_model
from tests.support.mutations import WORDS, broken_bytes, broken_json, broken_lines

SECONDS = 10  # the most time that a case may take
GROWTH = 1 << 30  # the most bytes by which the process may grow over all cases


class GoodInputs:
    """Good inputs of every kind, made once, in a folder. Each case breaks a copy of one of them."""

    def __init__(self, folder: Path):
        self.folder = folder
        splits = build("hh", 1, 40, 4)
        texts = (t for r in splits["train"] for t in (r.prompt, r.chosen, r.rejected))
        self.tokenizer: Tokenizer = train_tokenizer(texts, 400, 1)
        write_rows(folder / "rows.jsonl", splits["train"][:5])
        self.rows = (folder / "rows.jsonl").read_text()
        rows = *splits["train"][:5], *splits["test"]
        dialogues = [{"chosen": r.prompt + r.chosen, "rejected": r.prompt + r.rejected} for r in rows]
        lines = [json.dumps(d) + "\n" for d in dialogues]
        self.dialogues, self.test_dialogues = "".join(lines[:5]), "".join(lines[5:])
        info = {"id": "t3_1", "post": "A post.", "title": "Title", "subreddit": "tifu"}
        comparison = {"info": info, "summaries": [{"text": " one."}, {"text": " two."}], "choice": 1, "split": "train"}
        self.comparisons = (json.dumps(comparison) + "\n") * 3
        self.model = small_model(vocab_size=self.tokenizer.size)
        save_model(folder / "model", self.model)
        save_model(folder / "shards", self.model, shard_bytes=30_000)
        save_model(folder / "rm", scalar_from(self.model, generator(0, "head")))
        self.tokenizer.save(folder / "tokenizer")
        self.files = {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

    def write(self, name: str, content: bytes) -> Path:
        """Write a broken file into the folder. Returns its path."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return path

    def copy(self, name: str) -> Path:
        """Copy one of the good folders to the folder "case", which is replaced. Returns the copy."""
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        shutil.copytree(self.folder / name, case)
        return case


# --- one function for each target: break an input, then read it -------------------------------------


def rows(inputs: GoodInputs, draw: random.Random) -> None:
    """Files of rows, plain and gzipped. Rows that are read are also tokenised."""
    content = broken_lines(inputs.rows, draw)
    compressed = draw.random() < 0.3
    name = "case.jsonl.gz" if compressed else "case.jsonl"
    encode(read_rows(inputs.write(name, gzip.compress(content) if compressed else content)), inputs.tokenizer, 200, 100)


def gz(inputs: GoodInputs, draw: random.Random) -> None:
    """Damaged gzip files."""
    read_rows(inputs.write("case.jsonl.gz", broken_bytes(gzip.compress(inputs.rows.encode()), draw)))


def hh_text(inputs: GoodInputs, draw: random.Random) -> None:
    """HH dialogues, read by the data stage, which must not leave an unfinished file behind."""
    shutil.rmtree(inputs.folder / "hh", ignore_errors=True)
    shutil.rmtree(inputs.folder / "out", ignore_errors=True)
    text = broken_lines(inputs.dialogues, draw)
    if draw.random() < 0.5:  # break the text of a dialogue, so that the line is still JSON
        inner = broken_bytes(json.loads(inputs.dialogues.splitlines()[0])["chosen"].encode(), draw)
        text += json.dumps(
            {"chosen": inner.decode(errors="replace"), "rejected": "\n\nHuman: a\n\nAssistant: b"}
        ).encode()
    inputs.write("hh/base/train.jsonl", text)
    inputs.write("hh/base/test.jsonl", inputs.test_dialogues.encode())
    out = inputs.folder / "out"
    try:
        prepare_data.main(DataConfig(out=str(out), task="hh", data=str(inputs.folder / "hh"), train=0, test=0))
    except InputError:
        if left := [p.name for p in out.rglob("*") if p.name not in ("stage.json", ".lock")]:
            raise AssertionError(f"left behind: {left}") from None
        raise
    hh.read_folder(inputs.folder / "hh", "train", Counter())


def comparisons(inputs: GoodInputs, draw: random.Random) -> None:
    """TL;DR comparison files."""
    inputs.write("tldr/comparisons/train.json", broken_lines(inputs.comparisons, draw))
    tldr.read_folder(inputs.folder / "tldr", "train", Counter())


def formats(inputs: GoodInputs, draw: random.Random) -> None:
    """Files of pairs in the formats of other projects, as lines or as a list. The format itself may be broken, too."""
    message = (
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Yes."},
        {"from": "gpt", "value": "No."},
    )
    good = draw.choice(
        (
            {"prompt": "Hi.", "chosen": "Yes.", "rejected": "No.", "margin": 1},
            {"prompt": [message[0]], "chosen": [message[1]], "rejected": [message[2]], "score_chosen": 1},
            {"chosen": [*message[:2]], "rejected": [message[0], message[2]]},
            {"prompt": "Hi.", "chosen": [*message[:2]], "rejected": [message[0], message[2]], "score_rejected": 2},
            {"conversations": [message[0]], "chosen": message[1], "rejected": message[2], "system": "Be kind."},
            {"instruction": "Hi.", "input": "", "output": ["Yes.", "No."], "history": [["a", "b"]]},
            {"chosen": "The sky is blue.", "rejected": "The sky is far."},
        )
    )
    if draw.random() < 0.5:
        content = broken_lines((json.dumps(good) + "\n") * 3, draw)
    else:
        content = broken_json(json.dumps([good] * 3), draw)
    _, pairs = read_file(inputs.write("case.json", content), Counter())
    for row in pairs:
        inputs.tokenizer.prompt_ids(row.prompt)


def tokenizer(inputs: GoodInputs, draw: random.Random) -> None:
    """tokenizer.model. A tokenizer that is accepted must be able to encode and decode."""
    inputs.write("tok/tokenizer.model", broken_bytes(inputs.tokenizer.vocabulary.files["tokenizer.model"], draw))
    loaded = load_tokenizer(inputs.folder / "tok")
    loaded.decode(loaded.prompt_ids("Hello.\n\nHuman: ä") + loaded.response_ids(" Yes."))


def config(inputs: GoodInputs, draw: random.Random) -> None:
    """The config.json of a model."""
    case = inputs.copy("model")
    (case / "config.json").write_bytes(broken_json((case / "config.json").read_text(), draw))
    load_model(case)


def weights(inputs: GoodInputs, draw: random.Random) -> None:
    """model.safetensors: the JSON of its header, the length of the header, or any of its bytes."""
    case = inputs.copy(draw.choice(("model", "rm")))
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


def index(inputs: GoodInputs, draw: random.Random) -> None:
    """The model.safetensors.index.json of a model in several files."""
    case = inputs.copy("shards")
    path = case / "model.safetensors.index.json"
    path.write_bytes(broken_json(path.read_text(), draw))
    load_model(case)


def flags(inputs: GoodInputs, draw: random.Random) -> None:
    """Command lines of every stage."""
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


def losses(inputs: GoodInputs, draw: random.Random) -> None:
    """The values of --loss and --gamma, which have a grammar of their own."""
    good = draw.choice(("sigmoid+0.1*sft", "simpo:beta=2.5:gamma=0.5", "0.8*sigmoid+0.2*bco_pair", "q0.5", "1.5"))
    text = broken_bytes(good.encode(), draw).decode(errors="replace")
    if draw.random() < 0.5:
        parse_objective(text, 0.1)
    else:
        threshold(inputs.model.lm_head.weight.detach().flatten()[:50], text)


def saves(inputs: GoodInputs, draw: random.Random) -> None:
    """The saves of an interrupted stage. A damaged save is left out, and the stage starts from the beginning."""
    from mpo.runtime.stage import Stage

    out = inputs.folder / "stage"
    shutil.rmtree(out, ignore_errors=True)
    wanted = DPOConfig(out=str(out), data="", model="")
    parts = {"m": Part(inputs.model, make_optimiser(inputs.model, 1e-3, 0.0))}
    of_stage = Saves(Stage(wanted, {}, wanted.out, False), wanted, parts)
    path = draw.choice(sorted(of_stage.write(7, {"a": 1}).iterdir()))
    path.write_bytes(broken_bytes(path.read_bytes(), draw))
    step, numbers = of_stage.restore({"a": 0}, 10)
    assert (step, numbers) in ((0, {"a": 0}), (7, {"a": 1}))


def manifest(inputs: GoodInputs, draw: random.Random) -> None:
    """A stage's manifest.json, as `make verify` reads it."""
    good = {
        "stage": "x",
        "config": {"seed": 1},
        "inputs": {"data": {"path": "d", "sha256": {"a": "b"}}},
        "outputs": {"a": "b"},
        "results": {},
    }
    case = inputs.folder / "run" / "sft"
    case.mkdir(parents=True, exist_ok=True)
    write_json(case / "stage.json", {})
    (case / "manifest.json").write_bytes(broken_json(json.dumps(good), draw))
    verify(inputs.folder / "run")


TARGETS: dict[str, Callable[[GoodInputs, random.Random], None]] = {
    f.__name__: f
    for f in (
        rows,
        gz,
        hh_text,
        comparisons,
        formats,
        tokenizer,
        config,
        weights,
        index,
        flags,
        losses,
        saves,
        manifest,
    )
}
NAMELESS = (
    "flags",
    "losses",
    "hh_text",
    "rows",
)  # their messages may name a flag, or blame all rows together, instead of naming a file


# --- running cases ----------------------------------------------------------------------------------


def too_long(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} seconds")


def one_case(name: str, inputs: GoodInputs, seed: int, number: int) -> str:
    """Run one case. Returns "accepted", "refused", or a description of the fault."""
    signal.alarm(SECONDS)
    try:
        TARGETS[name](inputs, random.Random(f"{seed}/{name}/{number}"))
        return "accepted"
    except InputError as e:
        text = str(e)
        if "\n" in text or not text or (name not in NAMELESS and str(inputs.folder) not in text):
            return f"a message that is not one line with the file: {text!r:.300}"
        return "refused"
    except BaseException:
        return traceback.format_exc(limit=-3)
    finally:
        signal.alarm(0)


def worker(name: str, cases: int, seed: int, first: int, note: Path) -> None:
    """Run the cases from number `first` on, and write the results to the file `note`.

    Until then the file has the number of the current case, so that it is known if the process dies.
    """
    signal.signal(signal.SIGALRM, too_long)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    with tempfile.TemporaryDirectory() as folder:
        inputs = GoodInputs(Path(folder))
        one_case(name, inputs, seed, -1)  # what a first case allocates once does not count as growth
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        if (statm := Path("/proc/self/statm")).exists():  # only Linux can limit the memory that a process maps
            now = int(statm.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (now + 3 * GROWTH, now + 3 * GROWTH))
        ends: Counter[str] = Counter()
        faults = []
        for number in range(first, cases):
            note.write_text(str(number))
            end = one_case(name, inputs, seed, number)
            ends[end if end in ("accepted", "refused") else "faults"] += 1
            if end not in ("accepted", "refused"):
                faults.append({"case": number, "what": end[-700:]})
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        if grown > GROWTH:
            faults.append({"case": -1, "what": f"the process grew by {grown >> 20} MiB"})
    note.write_text(json.dumps({"ends": ends, "faults": faults[:20]}))


def run_target(name: str, cases: int, seed: int) -> dict[str, Any]:
    """Run all cases of one target in a separate process.

    If the process dies, that is a fault of the case it was running, and a new process goes on with the next case.
    """
    ends: Counter[str] = Counter()
    faults, first = [], 0
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "note"
        while first < cases and len(faults) < 20:
            note.write_text(str(first))
            command = [sys.executable, "-m", "tests.support.fuzz", "--worker", name]
            done = subprocess.run([*command, str(cases), str(seed), str(first), str(note)], check=False)
            text = note.read_text()
            if done.returncode == 0:
                report = json.loads(text)
                ends.update(report["ends"])
                faults += report["faults"]
                break
            faults.append({"case": int(text), "what": f"the process ended with {done.returncode}"})
            ends.update({"faults": 1, "unknown": int(text) - first})
            first = int(text) + 1
    return {"target": name, "cases": cases, **ends, "details": faults}


def main(argv: list[str]) -> None:
    """Run the targets named on the command line, by default all. Exits with status 1 if there was a fault."""
    if argv[:1] == ["--worker"]:
        name, count, key, first, note = argv[1:]
        worker(name, int(count), int(key), int(first), Path(note))
        return
    if len(argv) < 2 or set(argv[2:]) - set(TARGETS):
        raise InputError(f"usage: python -m tests.support.fuzz CASES SEED [TARGET ...]; targets: {', '.join(TARGETS)}")
    cases, seed = int(read_number("CASES", int, Range(1), argv[0])), int(read_number("SEED", int, Range(0), argv[1]))
    bad = 0
    targets = argv[2:] or list(TARGETS)
    for name in targets:
        result = run_target(name, math.ceil(cases / len(targets)), seed)
        bad += len(result["details"])
        print(json.dumps(result), flush=True)
    sys.exit(bad > 0)


if __name__ == "__main__":
    run_plain(main)
