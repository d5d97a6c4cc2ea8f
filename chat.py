"""Talk to the model of any stage."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import torch

from mpo.config import ChatConfig
from mpo.data.batches import fit_prompt
from mpo.data.dialogue import ASSISTANT, HUMAN
from mpo.data.rows import Unusable
from mpo.data.tldr import prompt_text
from mpo.data.tokenizer import shared_tokenizer
from mpo.model.checkpoint import load_model
from mpo.model.generate import Sampling, generate
from mpo.runtime import device
from mpo.runtime.cores import threads
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError, Interrupted
from mpo.runtime.manifest import read_manifest
from mpo.runtime.seeding import generator

GREETINGS = {
    "dialogue": "type a message; empty line: start over, Ctrl-D: quit",
    "post": "type a post on one line, or r/SUBREDDIT | TITLE | POST; Ctrl-D: quit",
    "text": "type a prompt on one line, which the model gets as it is; Ctrl-D: quit",
}
POST = ["relationships", "What should I do?"]  # the subreddit and title of a post without any


def form_of_run(data: str) -> str:
    """The form of a run's prompts (mpo/data/dialogue.py), as its data stage recorded it; a dialogue without a folder.

    Raises InputError for a folder that is not the data stage's.
    """
    if not data:
        return "dialogue"
    results = read_manifest(Path(data) / "manifest.json")["results"]
    form = results.get("prompt_form") or {"hh": "dialogue", "tldr": "post"}.get(str(results.get("task")))
    if form not in GREETINGS:
        raise InputError(f"--data {data}: not the folder of a data stage (its manifest.json has no form of prompts)")
    return str(form)


def as_prompt(form: str, history: str, line: str) -> str:
    """The prompt that a line becomes. `history` is the dialogue so far."""
    if form == "dialogue":
        return f"{history}{HUMAN} {line}{ASSISTANT}"
    if form == "post":
        parts = [part.strip() for part in line.split("|", 2)]
        subreddit, title, post = parts if len(parts) == 3 and parts[0].startswith("r/") else [*POST, line]
        return prompt_text(subreddit.removeprefix("r/"), title, post)
    return line


def read_line() -> str | None:
    """The next line that is typed, without space around it; None at the end of the input."""
    try:
        return input("> ").strip()
    except (EOFError, RuntimeError):  # RuntimeError: the program was started without a standard input
        print()
        return None


def talk(config: ChatConfig) -> None:
    """Answer each line that is typed. In a dialogue, the prompt is all that was said since the last empty line."""
    device.start(config.device)
    torch.set_num_threads(threads())
    form = form_of_run(config.data)
    tokenizer, model = shared_tokenizer([("--model", config.model)]), load_model(config.model)
    room = model.config.max_position_embeddings - config.max_new
    if room < 2:
        raise InputError(
            f"--max_new {config.max_new}: leaves no room for a prompt, since {config.model} takes at most "
            f"{model.config.max_position_embeddings} tokens"
        )
    print(f"{config.model}: {GREETINGS[form]}")
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos)
    history, turn = "", 0
    while (line := read_line()) is not None:
        if not line:
            history = ""
            continue
        prompt = as_prompt(form, history, line)
        try:
            ids, cut = fit_prompt(prompt, tokenizer, room)
        except Unusable as e:
            print(f"({e})")
            continue
        if not ids:
            print(f"(too long: the model has room for {room} tokens)")
            continue
        draw = generator(config.seed, "chat", turn)
        samples = generate(model, [ids], sampling, draw)
        answer = tokenizer.decode(samples.responses[0])
        print(answer.strip() + ("" if samples.finished[0] else " ...") + (" (oldest turns cut)" if cut else ""))
        history, turn = prompt + answer, turn + 1


def main(config: ChatConfig) -> None:
    """Talk until the input ends or Ctrl-C is pressed. Bytes that are not UTF-8 are replaced, in and out."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        talk(config)
    except Interrupted as e:
        if e.status != 128 + signal.SIGINT:
            raise
        print()


if __name__ == "__main__":
    run(main, ChatConfig)
