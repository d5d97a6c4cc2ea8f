"""Stage 5: score every training pair with the reward model, and split the pairs by their reward gap."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mpo import evaluation
from mpo.config import SplitConfig
from mpo.data.batches import Pair, encode_for_each
from mpo.data.rows import read_rows, write_rows
from mpo.model.checkpoint import load_scalar
from mpo.model.lengths import check_lengths, sequences_of
from mpo.model.scoring import rm_tokenizer, score_all
from mpo.preference.split import Split, assign, control, gap_over_uncertainty, parse_gamma, split_by_gap, threshold
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_text
from mpo.runtime.manifest import hash_tree
from mpo.runtime.output import counts_text
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import Stage
from mpo.tools import memory
from mpo.tools.report import split_text

CONTROLS = ("random", "inverted")  # splits into parts of the same sizes, for comparison (preference/split.py)


def score_lines(pairs: Sequence[Pair], chosen: Tensor, rejected: Tensor, split: Split) -> Iterator[str]:
    """Yield the scores of each of N pairs as a line of JSON. `chosen`, `rejected`: (K, N), from K reward models."""
    part_of = {i: name for name, index in split.parts.items() for i in index}
    gaps = (chosen - rejected).T.tolist()
    for i, pair in enumerate(pairs):
        item = {
            "id": pair.row.id,
            "chosen": round(float(chosen[:, i].mean()), 5),
            "rejected": round(float(rejected[:, i].mean()), 5),
            "part": part_of[i],
        }
        if len(chosen) > 1:
            item["gaps"] = [round(gap, 5) for gap in gaps[i]]
        yield json.dumps(item) + "\n"


def check(config: SplitConfig) -> None:
    """Refuse flags that contradict each other."""
    parse_gamma(config.gamma)
    if config.by == "uncertainty" and len(config.rm.split(",")) < 2:
        raise InputError("--by uncertainty: needs two or more reward models: --rm folder,folder")


def main(config: SplitConfig) -> None:
    """Load, score, split, write."""
    setup_torch(config)
    folders = config.rm.split(",")
    inputs = {"data": config.data} | {"rm" if i == 0 else f"rm-{i + 1}": f for i, f in enumerate(folders)}
    stage = Stage(config, inputs, config.out, config.overwrite)
    tokenizers = [rm_tokenizer(folder) for folder in folders]  # each reward model reads the rows with its own
    models = [load_scalar(folder, centred=False) for folder in folders]  # each scores on its own normalised scale
    config = memory.with_microbatch(config, models[0].config)
    rows = read_rows(Path(config.data) / "train.jsonl")
    encoded, counts = encode_for_each(rows, tokenizers, config.max_prompt, config.max_response)
    for folder, of_rm in zip(folders, encoded, strict=True):
        check_lengths([("--rm", folder)], sequences_of(of_rm))
    print(f"split: rows: {counts_text(counts)}")
    scores = [score_all(rm, of_rm, config.microbatch) for rm, of_rm in zip(models, encoded, strict=True)]
    pairs = encoded[0]
    chosen, rejected = (torch.stack(s) for s in zip(*scores, strict=True))  # (K, N) each
    gaps = (chosen - rejected).mean(0)
    log_odds = ((chosen - rejected) * torch.stack([rm.score_std.cpu() for rm in models])[:, None]).mean(0)

    criterion = gaps if config.by == "gap" else gap_over_uncertainty(chosen - rejected)
    split = split_by_gap(criterion, threshold(criterion, config.gamma))
    uses = {"easy": config.easy, "hard": config.hard, "contradicted": config.contradicted}
    splits = {".": split} | {kind: control(split, criterion, kind, config.seed) for kind in CONTROLS}
    sizes = {name: len(index) for name, index in split.parts.items()}
    for kind, version in splits.items():
        for_dpo, for_ppo = assign(version, [p.row for p in pairs], log_odds, uses)
        write_rows(stage.out / kind / "pairs.jsonl", for_dpo)
        write_rows(stage.out / kind / "prompts.jsonl", for_ppo)
        if kind == ".":
            sizes |= {"pairs": len(for_dpo), "prompts": len(for_ppo)}
    for name, index in split.parts.items():
        write_rows(stage.out / f"{name}.jsonl", (pairs[i].row for i in index))
    write_text(stage.out / "scores.jsonl", "".join(score_lines(pairs, chosen, rejected, split)))
    share = float(((gaps >= 0) & (gaps <= 1)).float().mean())
    print(f"split: {split_text(split.gamma, sizes, share)}")
    stage.finish(
        gamma=split.gamma,
        sizes=sizes,
        share_gap_in_0_1=share,
        share_abs_gap_below_1=float((gaps.abs() < 1).float().mean()),
        histogram=evaluation.histogram(gaps),
        rm_sha256={f: hash_tree(Path(f)) for f in folders} if len(folders) > 1 else hash_tree(Path(folders[0])),
        rows=counts,
    )


if __name__ == "__main__":
    run(main, SplitConfig, check, memory.show)
