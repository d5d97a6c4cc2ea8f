"""Talk to the model of any stage."""

from __future__ import annotations

import torch

from mpo.config import ChatConfig
from mpo.data.batches import fit_prompt
from mpo.data.hh import ASSISTANT, HUMAN
from mpo.data.tldr import prompt_text
from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import load_model
from mpo.model.generate import Sampling, generate
from mpo.runtime import device
from mpo.runtime.cores import threads
from mpo.runtime.entry import run
from mpo.runtime.seeding import generator


def main(config: ChatConfig) -> None:
    """Answer each line that is typed. With --task hh, the prompt is the dialogue since the last empty line."""
    device.start(config.device)
    torch.set_num_threads(threads())
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    room = model.config.max_position_embeddings - config.max_new
    print(
        f"{config.model}: type a {'message' if config.task == 'hh' else 'post'}; empty line: start over, Ctrl-D: quit"
    )
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos)
    history, turn = "", 0
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            return
        if not line:
            history = ""
            continue
        if config.task == "hh":
            prompt = f"{history}{HUMAN} {line}{ASSISTANT}"
        else:
            prompt = prompt_text("relationships", "What should I do?", line)
        ids, cut = fit_prompt(prompt, tokenizer, room)
        if not ids:
            print(f"(too long: the model has room for {room} tokens)")
            continue
        draw = generator(config.seed, "chat", turn)
        samples = generate(model, [ids], sampling, draw)
        answer = tokenizer.decode(samples.responses[0])
        print(answer.strip() + ("" if samples.finished[0] else " ...") + (" (oldest turns cut)" if cut else ""))
        history, turn = prompt + answer, turn + 1


if __name__ == "__main__":
    run(main, ChatConfig)
