"""Stage 8: sample every policy on held-out prompts, and compare rewards, win rates, KL, lengths and samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpo import evaluation
from mpo.config import EvalConfig
from mpo.data.batches import Pair, encode_for_each, make_batch
from mpo.data.rows import read_rows
from mpo.data.tokenizer import Tokenizer, shared_tokenizer
from mpo.model.checkpoint import load_model, load_scalar
from mpo.model.generate import Sampling, generate
from mpo.model.lengths import check_lengths
from mpo.model.llama import Llama, ScalarModel
from mpo.model.logprobs import compare
from mpo.model.scoring import Scorer, each_batch, rm_tokenizer, score, score_chosen, scorer_between
from mpo.runtime.entry import run
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json, write_text
from mpo.runtime.manifest import read_manifest
from mpo.runtime.output import counts_text, interval, progress
from mpo.runtime.seeding import generator
from mpo.runtime.setup import setup_torch
from mpo.runtime.stage import Stage
from mpo.tools import memory
from mpo.tools.report import make_report, write_responses
from mpo.world import gold


def policies(text: str) -> dict[str, str]:
    """Read a --policies flag: "sft=runs/hh/sft,dpo=runs/hh/dpo" -> {"sft": "runs/hh/sft", ...}.

    Raises InputError for a text of another form.
    """
    named = {}
    for item in text.split(","):
        name, _, folder = item.partition("=")
        if not name or not folder:
            raise InputError(f"--policies {text}: expected name=folder,name=folder, the baseline first")
        named[name.strip()] = folder.strip()
    return named


def sample(
    name: str,
    policy: Llama,
    base: Llama,
    rm: ScalarModel,
    tokenizer: Tokenizer,
    pairs: Sequence[Pair],
    config: EvalConfig,
    scorer: Scorer = score,
) -> list[dict[str, Any]]:
    """Sample one response to each prompt and measure it. Every policy gets the same random numbers.

    Returns a dict for each response: its text and token ids, reward, KL to `base` in nats, words, tokens, and whether
    it ends in EOS.
    """
    way = memory.way_to_sample(config, policy.config)
    sampling = Sampling(config.max_new, config.temperature, tokenizer.eos, way.whole, way.rows)
    rows = []

    def reward_and_kl(sequences: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        batch = make_batch(sequences)
        kl = compare(policy, base, batch, config.temperature or 1.0).kl.sum(1)
        return torch.stack((scorer(rm, batch), kl), 1)  # (b, 2)

    for start in progress(range(0, len(pairs), config.batch), f"sample {name}", leave=False):
        part = pairs[start : start + config.batch]
        prompts = [p.prompt for p in part]
        draw = generator(config.seed, "eval", start)
        samples = generate(policy, prompts, sampling, draw)
        sequences = list(zip(prompts, samples.responses, strict=True))
        rewards, kl = each_batch(sequences, config.batch, "measure", reward_and_kl).T
        for i, pair in enumerate(part):
            text = tokenizer.decode(samples.responses[i])
            rows.append(
                {
                    "id": pair.row.id,
                    "domain": pair.row.domain,
                    "prompt": pair.row.prompt,
                    "response": text,
                    "ids": samples.responses[i],
                    "reward": float(rewards[i]),
                    "kl": float(kl[i]),
                    "words": len(text.split()),
                    "tokens": len(samples.responses[i]),
                    "finished": samples.finished[i],
                }
            )
    return rows


def dataset_responses(
    rm: ScalarModel, pairs: Sequence[Pair], judged: Sequence[Pair], batch: int
) -> list[dict[str, Any]]:
    """The chosen responses of the data set, measured like those of a policy, except for KL.

    `pairs`, `judged`: the same rows in the ids of the policies, and of the reward model.
    """
    rewards = score_chosen(rm, judged, batch)
    return [
        {
            "id": pair.row.id,
            "domain": pair.row.domain,
            "prompt": pair.row.prompt,
            "response": pair.row.chosen,
            "ids": pair.chosen,
            "reward": float(reward),
            "words": len(pair.row.chosen.split()),
            "tokens": len(pair.chosen),
            "finished": True,
        }
        for pair, reward in zip(pairs, rewards, strict=True)
    ]


def add_gold(responses: list[dict[str, Any]]) -> None:
    """Add the gold reward of the built-in world to each response, and whether it refuses a benign prompt."""
    for r in responses:
        r["gold"] = gold.gold_reward(r["prompt"], r["response"])
        r["refused_benign"] = gold.is_refusal(r["prompt"], r["response"]) if gold.is_benign(r["prompt"]) else None


def summary(
    ours: list[dict[str, Any]], baseline: list[dict[str, Any]], chosen: list[dict[str, Any]], seed: int
) -> dict[str, Any]:
    """All results of one policy, by name: numbers or, with a 95 % interval, (value, low, high).

    `ours`, `baseline` and `chosen` are the responses of this policy, of the first policy and of the data set, in the
    same order of prompts.
    """

    def column(name: str, rows: list[dict[str, Any]] = ours) -> list[float]:
        return [row[name] for row in rows if row.get(name) is not None]

    row: dict[str, Any] = {"reward": evaluation.bootstrap(column("reward"), seed)}
    for judge in ("gold", "reward"):
        if judge not in ours[0]:
            continue
        for name, others in (("sft", baseline), ("chosen", chosen)):
            won = evaluation.wins(column(judge), column(judge, others))
            row[f"{judge}_win_{name}"] = evaluation.bootstrap(won, seed)
            row[f"{judge}_win_{name}_length_controlled"] = evaluation.length_controlled(
                won, column("words"), column("words", others)
            )
    if "gold" in ours[0]:
        row["gold"] = evaluation.bootstrap(column("gold"), seed)
        row["share_of_best"] = row["gold"][0] / gold.BEST
        row["refusals_benign"] = sum(column("refused_benign")) / max(1, len(column("refused_benign")))
    for domain in sorted({row["domain"] for row in ours}):
        inside = [row for row in ours if row["domain"] == domain]
        key = "gold" if "gold" in ours[0] else "reward"
        row[f"{key}/{domain}"] = sum(row[key] for row in inside) / len(inside)
    if "kl" in ours[0]:
        row["kl"] = evaluation.bootstrap(column("kl"), seed)
    row["words"] = sum(column("words")) / len(ours)
    row["eos_rate"] = sum(column("finished")) / len(ours)
    for n in (1, 2):
        row[f"distinct_{n}"] = evaluation.distinct([row["ids"] for row in ours], n)
    return row


def check(config: EvalConfig) -> None:
    """Refuse flags that contradict each other."""
    policies(config.policies)


def main(config: EvalConfig) -> None:
    """Load; sample and measure every policy; compare; write the report."""
    setup_torch(config)
    folders = policies(config.policies)
    inputs = {"data": config.data, "rm": config.rm} | ({"split": config.split} if config.split else {})
    stage = Stage(config, inputs | folders, config.out, config.overwrite)
    first = next(iter(folders.values()))
    samplers, rms = [("--policies", folder) for folder in folders.values()], [("--rm", config.rm)]
    tokenizer, reads = shared_tokenizer(samplers), rm_tokenizer(config.rm)
    rm, base = load_scalar(config.rm), load_model(first)
    base.eval(), rm.eval()
    held_out = read_rows(Path(config.data) / "test.jsonl")
    rows = [held_out[i] for i in evaluation.stratified([r.domain for r in held_out], config.prompts)]
    (pairs, judged), counts = encode_for_each(rows, [tokenizer, reads], config.max_prompt, config.max_response)
    for models, of_models in ((samplers, pairs), (rms, judged)):
        check_lengths(models, ((len(p.prompt), config.max_new) for p in of_models), "--max_new")
    check_lengths(rms, ((len(p.prompt), len(p.chosen)) for p in judged))
    print(f"eval: prompts: {counts_text(counts)}")

    scorer = scorer_between(tokenizer, reads, pairs, judged)
    responses = {
        name: sample(name, load_model(f), base, rm, tokenizer, pairs, config, scorer) for name, f in folders.items()
    }
    responses["chosen"] = dataset_responses(rm, pairs, judged, config.batch)
    if read_manifest(Path(config.data) / "manifest.json")["results"].get("source") == "builtin":
        for answered in responses.values():
            add_gold(answered)
    baseline, chosen = next(iter(responses.values())), responses["chosen"]
    table = {name: summary(answered, baseline, chosen, config.seed) for name, answered in responses.items()}
    for name, answered in responses.items():
        write_responses(stage.out / f"responses-{name}.jsonl", answered)
    write_json(stage.out / "results.json", {"prompts": len(pairs), "policies": table})
    report = make_report(config, table, responses, counts)
    write_text(stage.out / "report.md", report.markdown)
    write_text(stage.out / "report.txt", report.terminal)
    for name, row in table.items():
        gold_reward = f"gold reward {interval(row['gold'])}, " if "gold" in row else ""
        print(f"eval: {name}: {gold_reward}RM reward {interval(row['reward'])}")
    stage.finish(prompts=len(pairs), rows=counts, policies=table)


if __name__ == "__main__":
    run(main, EvalConfig, check, memory.show)
