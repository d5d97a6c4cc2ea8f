"""LLaMA-Factory's steps of the benchmark, run in its own environment: python peer_llamafactory.py CASE THREADS

Runs LLaMA-Factory's own `run_exp` on models, a tokenizer and a data set that are first written to a folder.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
import turns  # before the libraries, which may print something as they are imported

# isort: split
import torch
import workload as w
from peers import Turns, text, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

# LLaMA-Factory imports torchaudio, for data with sound. torchaudio's builds load libraries of CUDA.
sys.modules["torchaudio"] = ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = ModuleSpec("torchaudio", None)
from llamafactory.train.tuner import run_exp


class TurnsWithLoss(Turns):
    """Takes turns, and also reports the loss of a step. A trainer does not tell it to callbacks, so it is noted."""

    def __init__(self):
        compute, self.loss = Trainer.training_step, 0.0

        def training_step(trainer, *args, **kwargs):
            loss = compute(trainer, *args, **kwargs)
            self.loss = float(loss)
            return loss

        Trainer.training_step = training_step

    def on_step_end(self, *args, **kwargs):
        turns.report(self.began, loss=self.loss)


def write_model(folder: Path, seed: int) -> None:
    """A model with the workload's weights, and a tokenizer, in the Hugging Face layout."""
    model = LlamaForCausalLM(LlamaConfig(**w.SHAPE))
    model.load_state_dict({name: torch.from_numpy(value) for name, value in w.weights(seed).items()})
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_pairs(folder: Path, case: str) -> None:
    """The workload's pairs as a data set of LLaMA-Factory. Its template "empty" adds nothing, so EOS is in the text."""
    sides = ("chosen", "rejected")
    rows = [{"prompt": text(r["prompt"])} | {s: f"{text(r[s][:-1])} </s>" for s in sides} for r in w.pairs(w.PAIRS)]
    (folder / "pairs.json").write_text(json.dumps(rows * 200), encoding="utf-8")
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    if case == "sft":
        columns = {"prompt": "prompt", "response": "chosen"}
    info = {"file_name": "pairs.json", "ranking": case == "dpo", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": info}), encoding="utf-8")


def flags(case: str, folder: Path) -> dict:
    """What a user writes in LLaMA-Factory's file of settings."""
    preference = dict(ref_model=str(folder / "ref"), pref_beta=w.BETA, pref_loss="sigmoid")
    return (preference if case == "dpo" else {}) | dict(
        stage=case,
        do_train=True,
        finetuning_type="full",
        model_name_or_path=str(folder / "model"),
        cache_dir=str(folder / "cache"),
        dataset_dir=str(folder),
        dataset="pairs",
        template="empty",
        cutoff_len=w.PROMPT + w.RESPONSE + 8,
        disable_shuffling=True,
        output_dir=str(folder / "out"),
        per_device_train_batch_size=w.PAIRS,
        max_steps=10_000,
        learning_rate=w.LR,
        lr_scheduler_type="constant",
        adam_beta2=0.95,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_gradient_checkpointing=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


if __name__ == "__main__":
    case, (threads,) = turns.arguments("python benchmarks/peer_llamafactory.py CASE THREADS", cases=("sft", "dpo"))
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, seed in (("model", 0), ("ref", 1)):
            write_model(folder / model, seed)
        write_pairs(folder, case)
        run_exp(flags(case, folder), [TurnsWithLoss()])
