"""torchtune's steps of the benchmark, run in its own environment: python peer_torchtune.py CASE THREADS

Runs the training loops of torchtune's own recipes, full_dpo_distributed and full_finetune_single_device, on its own
model, loss and collation. Only their set-up is replaced: it reads a checkpoint, a tokenizer and a data set from files,
and shards the DPO model among GPUs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

sys.path.insert(0, str(Path(__file__).parent))
import turns  # before the libraries, which may print something as they are imported

# isort: split
import torch
import torchtune
import workload as w
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler
from torchtune.data import CROSS_ENTROPY_IGNORE_IDX, padded_collate_dpo, padded_collate_sft
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama2 import llama2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.rlhf.loss import DPOLoss
from torchtune.training import DummyProfiler


def recipe(name: str) -> ModuleType:
    """The module of a recipe. torchtune installs recipes as files that cannot be imported by name."""
    path = Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.training.cleanup_before_training = lambda: None  # it empties the cache of a GPU
    return module


def model(seed: int):
    """torchtune's Llama 2 of the workload's shape and weights."""
    s = w.SHAPE
    made = llama2(
        vocab_size=s["vocab_size"],
        num_layers=s["num_hidden_layers"],
        num_heads=s["num_attention_heads"],
        num_kv_heads=s["num_key_value_heads"],
        embed_dim=s["hidden_size"],
        intermediate_dim=s["intermediate_size"],
        max_seq_len=s["max_position_embeddings"],
        norm_eps=s["rms_norm_eps"],
    )
    values = {name: torch.from_numpy(value) for name, value in w.weights(seed).items()}
    sizes = s["num_attention_heads"], s["num_key_value_heads"], s["hidden_size"]
    made.load_state_dict(hf_to_tune(values, *sizes))
    return made


def sequence(row: dict, side: str) -> dict:
    """A prompt and its response, with labels for the response alone, in torchtune's form."""
    prompt, response = row["prompt"], row[side]
    return {"tokens": prompt + response, "labels": [CROSS_ENTROPY_IGNORE_IDX] * len(prompt) + response}


class Loader(StatefulDataLoader):
    """torchtune's loader of batches. It waits for its turn before a batch, and reports when the next one is wanted."""

    loss = 0.0  # the last one that the recipe logged

    def __iter__(self):
        batches = super().__iter__()
        turns.ready()
        while True:
            began = turns.wait()
            yield next(batches)
            turns.report(began, loss=self.loss)

    def log_dict(self, payload: dict, step: int) -> None:
        """What a recipe calls to log the numbers of a step."""
        self.loss = float(payload["loss"])


def train(kind: type, rows: list, collate, **more) -> None:
    """Make a recipe of this kind, give it the attributes that its set-up would have made, and start training."""
    data = rows * 1000
    pad = dict(padding_idx=w.SHAPE["pad_token_id"], ignore_idx=CROSS_ENTROPY_IGNORE_IDX)
    loader = Loader(
        data,
        batch_size=w.PAIRS,
        sampler=StatefulDistributedSampler(data, num_replicas=1, rank=0, shuffle=False),
        drop_last=True,
        collate_fn=partial(collate, **pad),
    )
    policy = model(0).train()
    if chunks := getattr(more["_loss_fn"], "num_output_chunks", 0):
        policy.set_num_output_chunks(chunks)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=w.LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    made = kind.__new__(kind)
    made.__dict__.update(
        _device=torch.device("cpu"),
        _model=policy,
        _optimizer=optimiser,
        _optimizer_in_bwd=False,
        _lr_scheduler=None,
        _dataloader=loader,
        _sampler=loader.sampler,
        _metric_logger=loader,
        _log_every_n_steps=1,
        _log_peak_memory_stats=False,
        _gradient_accumulation_steps=1,
        _steps_per_epoch=len(loader),
        _profiler=DummyProfiler(),
        profiler_profile_memory=False,
        activations_handling_ctx=contextlib.nullcontext(),
        max_steps_per_epoch=None,
        epochs_run=0,
        total_epochs=1,
        global_step=0,
        **more,
    )
    made.train()


def dpo() -> None:
    """The recipe full_dpo_distributed in one process, with nothing sharded."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    kind = recipe("full_dpo_distributed").FullDPORecipeDistributed
    sides, fields = ("chosen", "rejected"), {"input_ids": "tokens", "labels": "labels"}
    rows = [
        {f"{side}_{new}": sequence(row, side)[old] for side in sides for new, old in fields.items()}
        for row in w.pairs(w.PAIRS)
    ]
    ref = model(1).requires_grad_(False).eval()
    more = dict(_ref_model=ref, _loss_fn=DPOLoss(beta=w.BETA), world_size=1, rank=0, _is_rank_zero=True)
    more["_clip_grad_norm"] = None  # the recipe clips sharded gradients alone
    train(kind, rows, padded_collate_dpo, **more)


def sft() -> None:
    """The recipe full_finetune_single_device on the chosen responses."""
    kind = recipe("full_finetune_single_device").FullFinetuneRecipeSingleDevice
    rows = [sequence(row, "chosen") for row in w.pairs(w.PAIRS)]
    loss = CEWithChunkedOutputLoss()
    nothing = torch.full((w.PAIRS, 1), loss.ignore_index)
    train(
        kind,
        rows,
        padded_collate_sft,
        _loss_fn=loss,
        _compile=False,
        ignore_labels_cache=nothing,
        _clip_grad_norm=1.0,
    )


if __name__ == "__main__":
    cases = {"sft": sft, "dpo": dpo}
    case, (threads,) = turns.arguments("python benchmarks/peer_torchtune.py CASE THREADS", cases=cases)
    torch.set_num_threads(threads)
    cases[case]()
