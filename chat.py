"""Talk to the model of any stage."""

from __future__ import annotations

import io
import signal
import sys

import torch

from mpo.config import ChatConfig
from mpo.data.rows import Unusable
from mpo.data.tokenizer import shared_tokenizer
from mpo.data.typed import as_prompt, form_of_run, prompt_ids, room_for_prompts
from mpo.kernels import functions as kernels
from mpo.model.checkpoint import load_model
from mpo.model.generate import Sampling, generate
from mpo.runtime import device
from mpo.runtime.cores import threads
from mpo.runtime.entry import run
from mpo.runtime.errors import Interrupted
from mpo.runtime.seeding import generator

GREETINGS = {
    "dialogue": "type a message; empty line: start over, Ctrl-D: quit",
    "post": "type a post on one line, or r/SUBREDDIT | TITLE | POST; Ctrl-D: quit",
    "text": "type a prompt on one line, which the model gets as it is; Ctrl-D: quit",
}


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
    kernels.compile_once()
    torch.set_num_threads(threads())
    form = form_of_run(config.data)
    tokenizer, model = shared_tokenizer([("--model", config.model)]), load_model(config.model)
    room = room_for_prompts(model.config.max_position_embeddings, config.max_new, ("--max_new", config.model))
    print(f"{config.model}: {GREETINGS[form]}")
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos)
    history, turn = "", 0
    while (line := read_line()) is not None:
        if not line:
            history = ""
            continue
        prompt = as_prompt(form, history, line)
        try:
            ids, cut = prompt_ids(prompt, tokenizer, room)
        except Unusable as e:
            print(f"({e})")
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
