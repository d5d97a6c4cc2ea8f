"""The command `mpo`: every stage and tool under a short name. `python -m mpo` is the same."""

from __future__ import annotations

import difflib
import runpy
import sys

STAGES = {
    "data": ("mpo.stages.prepare_data", "rows from the built-in world, or from preference pairs of your own"),
    "tokenizer": ("mpo.stages.train_tokenizer", "a tokenizer, new or taken from a model"),
    "sft": ("mpo.stages.train_sft", "supervised fine-tuning on the chosen responses"),
    "rm": ("mpo.stages.train_rm", "a reward model"),
    "split": ("mpo.stages.split_data", "score every pair, and split: easy, hard, contradicted"),
    "dpo": ("mpo.stages.train_dpo", "DPO or another preference loss on pairs; in MPO, on the easy ones"),
    "ppo": ("mpo.stages.train_ppo", "PPO on prompts; in MPO, on those of the hard pairs"),
    "eval": ("mpo.stages.eval", "compare models on held-out prompts"),
}
TOOLS = {
    "chat": ("mpo.stages.chat", "type to a model"),
    "score": ("mpo.tools.score", "a reward model's accuracy on pairs, by category"),
    "report": ("mpo.tools.page", "the report of a run, with figures where matplotlib is installed"),
    "verify": ("mpo.tools.verify", "is any file of a run damaged, out of date or unfinished?"),
    "download": ("mpo.tools.hub", "a model or a data set from the Hugging Face hub"),
    "kernels": ("mpo.kernels.build", "compile the kernels now, and not when they are first needed"),
    "launch": ("mpo.runtime.launch", "a stage in several processes: mpo launch 2 dpo --data ..."),
}
COMMANDS = STAGES | TOOLS
"""Name -> the module that is run, what it does."""


def help_text() -> str:
    """What `mpo --help` prints."""

    def lines(commands: dict[str, tuple[str, str]]) -> str:
        return "\n".join(f"  {name:10} {about}" for name, (_, about) in commands.items())

    return (
        "usage: mpo COMMAND [--FLAG VALUE ...]\n\n"
        "Mixed Preference Optimization: DPO on easy preference pairs, PPO on the prompts of hard ones.\n\n"
        f"The stages, in the order of a run:\n{lines(STAGES)}\n\n"
        f"Beside them:\n{lines(TOOLS)}\n\n"
        "mpo COMMAND --help explains its flags. In Python: import mpo; help(mpo)"
    )


def refuse(name: str) -> None:
    """End with one line, which suggests the nearest command."""
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}?" if near else "mpo --help lists all commands"
    print(f"mpo: error: {name.encode(errors='replace').decode()}: unknown command; {hint}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Run the command that the first argument names, as if its script had been started."""
    name, *rest = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(help_text())
        return
    if name not in COMMANDS:
        refuse(name)
    if name == "launch" and len(rest) > 1:  # the number of processes, and a command
        if rest[1] not in COMMANDS:
            refuse(rest[1])
        rest = [rest[0], "-m", "mpo", *rest[1:]]
    sys.argv = [f"mpo {name}", *rest]
    runpy.run_module(COMMANDS[name][0], run_name="__main__")


if __name__ == "__main__":
    main()
