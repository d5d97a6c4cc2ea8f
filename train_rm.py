"""Stage 4: the reward model, a scalar head on the trunk of the SFT model, trained with the Bradley-Terry loss."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo import evaluation
from mpo.config import RMConfig
from mpo.data.batches import Pair, encode, left_out, training_batches
from mpo.data.rows import Row, read_jsonl, read_rows, text_field
from mpo.data.tokenizer import Tokenizer, shared_tokenizer
from mpo.model.checkpoint import load_as_scalar, save_model
from mpo.model.lengths import check_lengths, sequences_of
from mpo.model.llama import ScalarModel
from mpo.model.lora import adapters_of
from mpo.model.scoring import score_all, score_chosen, score_pairs
from mpo.preference.losses import bradley_terry, centring
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json
from mpo.runtime.flags import exact_div
from mpo.runtime.output import counts_text, interval
from mpo.runtime.seeding import generator
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import Stage
from mpo.tools import memory
from mpo.training.loop import train

NORMALISE_ON = 1000  # chosen responses whose scores are brought to mean 0 and standard deviation 1


def normalise(rm: ScalarModel, pairs: list[Pair], batch: int) -> tuple[float, float]:
    """Shift and scale the scores so that chosen responses have mean 0 and standard deviation 1.

    After that a gap, and the price of KL in PPO, do not depend on the scale of the raw scores. (2403.17031 shifts the
    scores; scaling them, too, is common.) A gap times the raw standard deviation is the log-odds of a label.

    Returns the mean and the standard deviation of the raw scores. Raises InputError where the latter is not above 0.
    """
    chosen = score_chosen(rm, pairs[:NORMALISE_ON], batch)
    mean, std = float(chosen.mean()), float(chosen.std())
    if not 0 < std < math.inf:
        raise InputError(
            f"the scores of {len(chosen)} chosen responses have a standard deviation of {std:g}, by which they cannot "
            "be divided; train on more rows, or with another --lr"
        )
    with torch.no_grad():
        rm.score_mean += mean
        rm.score_std *= std
    return mean, std


def held_out(gaps: Tensor, std: float, seed: int) -> dict[str, Any]:
    """How well the reward model predicts held-out labels, from its gaps (N,). A gap times `std` is in log-odds."""
    accuracy = evaluation.bootstrap(((gaps > 0).float() + 0.5 * (gaps == 0)).numpy(), seed)
    return {
        "accuracy": accuracy,
        "log_loss": evaluation.log_loss(gaps * std),
        "calibration_error": evaluation.calibration_error(gaps * std),
        "share_gap_in_0_1": float(((gaps >= 0) & (gaps <= 1)).float().mean()),
        "share_abs_gap_below_1": float((gaps.abs() < 1).float().mean()),
        "histogram": evaluation.histogram(gaps),
    }


Sheet = dict[tuple[str, str], tuple[list[Pair], dict[str, int]]]
"""The probe sheet: (kind of prompt, mistake) -> pairs of a right and a wrong answer, and how many rows were kept."""


def read_sheet(sheet: Path, tokenizer: Tokenizer, config: RMConfig) -> Sheet:
    """Read and tokenise the probe sheet of a data folder; an empty one if the folder has none."""
    groups: dict[tuple[str, str], list[Row]] = {}
    if not sheet.exists():
        return {}
    for where, item in read_jsonl(sheet):
        kind, mistake, prompt, right_answer, wrong_answer = (
            text_field(where, item, k) for k in ("kind", "mistake", "prompt", "right", "wrong")
        )
        groups.setdefault((kind, mistake), []).append(Row(where, prompt, chosen=right_answer, rejected=wrong_answer))
    return {
        group: encode(rows, tokenizer, config.max_prompt, 2 * config.max_response) for group, rows in groups.items()
    }


def probe(rm: ScalarModel, sheet: Sheet, config: RMConfig) -> list[dict[str, Any]]:
    """Score the probe sheet: a right and a wrong answer to each prompt, for each kind of prompt and each mistake.

    It shows the weaknesses of the reward model before PPO exploits them. In the result, `right_above` is the share of
    prompts whose right answer scores higher.
    """
    results = []
    for (kind, mistake), (pairs, counts) in sheet.items():
        right, wrong = score_all(rm, pairs, config.microbatch)
        above = float((right > wrong).float().mean())
        results.append(
            {
                "kind": kind,
                "mistake": mistake,
                "right_above": above,
                "right": float(right.mean()),
                "wrong": float(wrong.mean()),
                "rows": counts,
            }
        )
    return results


def check(config: RMConfig) -> None:
    """Refuse flags that contradict each other."""
    exact_div(config.batch, config.microbatch or 1, "--batch", "--microbatch")
    adapters_of(config, config.model)


def main(config: RMConfig) -> None:
    """Load; train; normalise the scores; measure on held-out pairs and the probe sheet; save."""
    setup_torch(config)
    stage = Stage(config, {"data": config.data, "model": config.model}, config.out, config.overwrite)
    models = [("--model", config.model)]
    tokenizer = shared_tokenizer(models)
    rm = load_as_scalar(config.model, generator(config.seed, "head"), adapters_of(config, config.model))
    config = memory.with_microbatch(config, rm.config)
    splits, counts = {}, {}
    for split in ("train", "test"):
        rows = read_rows(Path(config.data) / f"{split}.jsonl")
        splits[split], counts[split] = encode(rows, tokenizer, config.max_prompt, config.max_response)
        counts[split] |= left_out(splits[split], config.batch) if split == "train" else {}
        check_lengths(models, sequences_of(splits[split]))
        print(f"rm: {split} rows: {counts_text(counts[split])}")
    sheet = read_sheet(Path(config.data) / "probe.jsonl", tokenizer, config)
    for pairs, _ in sheet.values():
        check_lengths(models, sequences_of(pairs))
    if config.use_margin and any(p.row.margin is None for p in splits["train"]):
        raise InputError(f"{config.data}/train.jsonl: not every row has a margin, which --use_margin needs")

    def losses_of(pairs: list[Pair]) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = score_pairs(rm, pairs)
        margin = torch.tensor([p.row.margin for p in pairs]).to(chosen.device) if config.use_margin else 0.0
        losses = bradley_terry(chosen, rejected, margin, config.label_smoothing)
        if config.centring:
            losses = losses + config.centring * centring(chosen, rejected)
        return losses, {"accuracy": (chosen > rejected).float()}

    batches = training_batches(splits["train"], config.batch, config.epochs, config.seed, counts=counts["train"])
    last = train(rm, batches, losses_of, lambda pair: 1.0, config, stage)
    mean, std = normalise(rm, splits["train"], config.microbatch)
    chosen, rejected = score_all(rm, splits["test"], config.microbatch)
    results = held_out(chosen - rejected, std, config.seed)
    print(
        f"rm: held-out accuracy {interval(results['accuracy'], 3)}, log-loss {results['log_loss']:.3f}, "
        f"calibration error {results['calibration_error']:.3f}"
    )
    if sheet:
        probed = probe(rm, sheet, config)
        write_json(stage.out / "probe.json", probed)
        worst = min(probed, key=lambda p: p["right_above"])
        print(
            f"rm: probe sheet: weakest at {worst['kind']}/{worst['mistake']}, where "
            f"{100 * worst['right_above']:.0f} % of the right answers score above the wrong ones"
        )
    save_model(stage.out, rm, tokenizer)
    stage.finish(
        steps=len(batches),
        train_accuracy=last["accuracy"],
        sft_reference_mean=mean,
        sft_reference_std=std,
        held_out=results,
        rows=counts,
    )


if __name__ == "__main__":
    run(main, RMConfig, check, memory.show)
