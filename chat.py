"""Talk to the model of any stage."""

from __future__ import annotations

from mpo.config import ChatConfig
from mpo.data.batches import fit_prompt
from mpo.data.hh import ASSISTANT, HUMAN
from mpo.data.tldr import prompt_text
from mpo.data.tokenizer import shared_tokenizer
from mpo.model.checkpoint import load_model
from mpo.model.generate import Sampling, generate
from mpo.runtime import device
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.seeding import generator


def main(config: ChatConfig) -> None:
    """Answer each line that is typed. With --task hh, the prompt is the dialogue since the last empty line."""
    device.start(config.device)
    tokenizer, model = shared_tokenizer([("--model", config.model)]), load_model(config.model)
    room = model.config.longest - config.max_new
    if room < 1:
        raise InputError(
            f"--max_new {config.max_new}: leaves no room for a prompt, since {config.model} takes at most "
            f"{model.config.longest} tokens"
        )
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
