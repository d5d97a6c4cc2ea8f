"""Every stage as a user runs it, end to end and tiny; the same seed gives the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpo.data.batches import encode
from mpo.data.rows import read_rows
from mpo.data.tokenizer import load_tokenizer
from mpo.model.checkpoint import load_scalar
from mpo.model.scoring import score_all
from mpo.runtime.files import read_json, sha256
from tests.conftest import SMALL, STORIES, needs_stories, run_pipeline
from tests.support.scripts import ROOT, run_script


def weights(run: Path) -> dict[str, str]:
    return {s: sha256(run / s / "model.safetensors") for s in ("sft", "rm", "dpo", "mpo")}


def test_every_artefact_is_there_and_says_where_it_comes_from(hh_run):
    for name in ("data", "tokenizer", "sft", "rm", "split", "dpo", "mpo", "eval"):
        manifest = read_json(hh_run / name / "manifest.json")
        assert manifest["outputs"], name
        assert manifest["config"]["seed"] == 1
    split = read_json(hh_run / "split" / "manifest.json")["results"]
    assert split["rm_sha256"]["model.safetensors"] == sha256(hh_run / "rm" / "model.safetensors")
    sizes = split["sizes"]
    assert sizes["pairs"] == sizes["easy"]
    assert sizes["prompts"] == sizes["hard"] + sizes["contradicted"]
    assert sizes["pairs"] + sizes["prompts"] == split["rows"]["kept"]


def test_the_first_losses_are_what_theory_says(hh_run):
    assert read_json(hh_run / "dpo" / "manifest.json")["results"]["first_loss"] == pytest.approx(0.6931, abs=1e-3)
    first = json.loads((hh_run / "mpo" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["kl_exact"] == pytest.approx(0, abs=1e-5)  # policy and reference start equal
    assert first["kl_k3"] == pytest.approx(0, abs=1e-5)
    sft = json.loads((hh_run / "sft" / "metrics.jsonl").read_text().splitlines()[0])
    assert sft["loss"] == pytest.approx(6.2, abs=0.3)  # ln 500 before any step


def test_the_report_shows_the_table_the_gaps_and_the_samples(hh_run):
    report = (hh_run / "eval" / "report.md").read_text()
    for part in ("| policy", "gold reward", "MPO", "By kind of prompt", "Reward gap", "Probe sheet", "Samples"):
        assert part in report
    results = read_json(hh_run / "eval" / "results.json")
    assert results["policies"]["sft"]["gold_win_sft"] == [0.5, 0.5, 0.5]
    assert results["policies"]["sft"]["kl"][0] == pytest.approx(0, abs=1e-4)


def test_the_reward_is_normalised_on_sft_references(hh_run):
    tokenizer = load_tokenizer(hh_run / "rm")
    pairs, _ = encode(read_rows(hh_run / "data" / "train.jsonl"), tokenizer, 384, 128)
    chosen, _ = score_all(load_scalar(hh_run / "rm"), pairs, 16)
    assert chosen.mean().item() == pytest.approx(0, abs=1e-3)
    assert chosen.std().item() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_transformers_gives_the_scores_of_the_split_and_with_the_recorded_mean_the_rewards_of_the_evaluation(hh_run):
    """From the texts alone, in padded batches, with the tokenizer and the model of the folder."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hh_run / "rm")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hh_run / "rm").eval()

    def scores_of(texts):
        ids = [tokenizer(p).input_ids + tokenizer(r, add_special_tokens=False).input_ids for p, r in texts]
        batch = tokenizer.pad({"input_ids": [[*row, tokenizer.eos_token_id] for row in ids]}, return_tensors="pt")
        return model(**batch).logits[:, 0].tolist()

    def lines_of(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    rows = {row["id"]: row for row in lines_of(hh_run / "data" / "train.jsonl")}
    split = lines_of(hh_run / "split" / "scores.jsonl")[:20]
    for name in ("chosen", "rejected"):
        theirs = scores_of([(rows[row["id"]]["prompt"], rows[row["id"]][name]) for row in split])
        assert theirs == pytest.approx([row[name] for row in split], abs=1e-4)
    evaluated = lines_of(hh_run / "eval" / "responses-chosen.jsonl")
    theirs = scores_of([(row["prompt"], row["response"]) for row in evaluated])
    assert [score - model.config.mpo_score_mean for score in theirs] == pytest.approx(
        [row["reward"] for row in evaluated], abs=1e-4
    )


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(hh_run, tmp_path):
    run_pipeline(tmp_path / "again", "hh")
    assert weights(tmp_path / "again") == weights(hh_run)
    same = "responses-mpo.jsonl"
    assert sha256(tmp_path / "again" / "eval" / same) == sha256(hh_run / "eval" / same)
    other = tmp_path / "other"
    common = ("--data", hh_run / "data", "--tokenizer", hh_run / "tokenizer", "--epochs", 0.5, *SMALL)
    run_script("train_sft.py", "--out", other, "--seed", 2, *common)
    assert sha256(other / "model.safetensors") != weights(hh_run)["sft"]


def test_tldr_runs_too(tmp_path):
    run_pipeline(tmp_path, "tldr")
    assert "TL;DR:" in (tmp_path / "eval" / "report.md").read_text()


@pytest.mark.parametrize(
    "flags",
    [
        "--loss simpo:beta=10+0.1*sft",  # without a reference
        "--loss kto --steps 3 --keep 2",
        "--loss 0.8*ipo_mean+0.2*bco_pair --microbatch 4",
    ],
)
def test_dpo_variants(hh_run, tmp_path, flags):
    out, rows = tmp_path / "out", hh_run / "split" / "pairs.jsonl"
    run_script("train_dpo.py", "--data", rows, "--model", hh_run / "sft", "--out", out, *SMALL, *flags.split())
    kept = [p.name for p in sorted(out.glob("step-*/model.safetensors"))]
    assert len(kept) == (2 if "--keep 2" in flags else 0)
    assert read_json(out / "manifest.json")["results"]["steps"] >= 3


@pytest.mark.parametrize(
    "flags",
    [
        "--advantage rloo --group 2",
        "--advantage grpo --group 4 --kl_in loss --kl_estimator k3",
        "--advantage dr_grpo --group 4 --kl_in loss --kl_estimator exact",
        "--advantage reinforce++",
        "--shared_critic true --precision bf16-mixed",
        "--kl_estimator exact --limit 10 --kl_target 1 --keep 1",
    ],
)
def test_ppo_variants(hh_run, tmp_path, flags):
    out = tmp_path / "out"
    models = ("--model", hh_run / "dpo", "--ref", hh_run / "sft", "--rm", hh_run / "rm")
    sizes = ("--iterations", 2, "--batch", 8, "--minibatch", 4, "--microbatch", 2, "--max_new", 10, "--threads", 1)
    prompts = ("--prompts", hh_run / "split" / "prompts.jsonl")
    warmup = ("--critic_warmup", 0)
    run_script("train_ppo.py", *prompts, *models, "--out", out, *sizes, *warmup, *flags.split())
    first, _ = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert ("explained_variance" in first) == ("--advantage" not in flags)
    assert first["ratio"] == pytest.approx(1, abs=0.05)
    assert first["policy_grad_norm"] > 0


def test_the_microbatch_of_ppo_changes_nothing_but_rounding(hh_run, tmp_path):
    models = ("--model", hh_run / "dpo", "--ref", hh_run / "sft", "--rm", hh_run / "rm")
    sizes = ("--iterations", 1, "--batch", 8, "--minibatch", 8, "--max_new", 10, "--critic_warmup", 0)
    found = []
    for size in (1, 8):
        flags = ("--prompts", hh_run / "split" / "prompts.jsonl", *models, *sizes, "--microbatch", size)
        run_script("train_ppo.py", *flags, "--out", tmp_path / str(size), "--threads", 1)
        found.append(json.loads((tmp_path / str(size) / "metrics.jsonl").read_text()))
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=2e-5)


def test_an_ensemble_splits_by_its_doubt(hh_run, tmp_path):
    data = ("--data", hh_run / "data")
    flags = ("--label_smoothing", 0.1, "--centring", 0.01, "--epochs", 0.5, "--seed", 2, *SMALL)
    run_script("train_rm.py", *data, "--model", hh_run / "sft", "--out", tmp_path / "rm-2", *flags)
    rms = f"{hh_run / 'rm'},{tmp_path / 'rm-2'}"
    uses = ("--easy", "smooth", "--contradicted", "flip", "--hard", "drop")
    out = tmp_path / "split"
    run_script("split_data.py", *data, "--rm", rms, "--by", "uncertainty", *uses, "--out", out)
    scores = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert all(len(s["gaps"]) == 2 for s in scores)
    for s in scores:  # the mean over its standard error, |difference| / 2, decides
        mean, doubt = sum(s["gaps"]) / 2, abs(s["gaps"][0] - s["gaps"][1]) / 2
        s["z"] = mean / doubt
    gamma = read_json(out / "manifest.json")["results"]["gamma"]
    assert all((s["part"] == "easy") == (s["z"] >= gamma) for s in scores if abs(abs(s["z"]) - gamma) > 0.05)
    pairs = read_rows(out / "pairs.jsonl")
    assert {r.noise is not None for r in pairs} == {True, False}  # smoothed easy ones, flipped contradicted ones
    done = run_script(
        "train_dpo.py", "--data", out / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "d", expect=2
    )
    assert "carry label noise, which --loss sigmoid ignores" in done.stderr
    cdpo = ("--loss", "cdpo", *SMALL)
    run_script("train_dpo.py", "--data", out / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "d", *cdpo)


def test_a_linked_stage_is_never_written_through(hh_run, tmp_path):
    """`make hh FROM=...` links folders; a stage that is redone gets one of its own."""
    (tmp_path / "dpo").symlink_to(hh_run / "dpo")
    before = weights(hh_run)["dpo"]
    data = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft")
    run_script("train_dpo.py", *data, "--out", tmp_path / "dpo", "--overwrite", "true", "--steps", 1, *SMALL)
    assert not (tmp_path / "dpo").is_symlink()
    assert weights(hh_run)["dpo"] == before
    assert sha256(tmp_path / "dpo" / "model.safetensors") != before


def test_chat_answers(hh_run):
    command = [sys.executable, "chat.py", "--model", str(hh_run / "mpo"), "--max_new", "5"]
    done = subprocess.run(command, cwd=ROOT, input="Hi there.\n\nBye.\n", capture_output=True, text=True, check=True)
    assert done.stdout.count("> ") == 4


@needs_stories
def test_sft_starts_from_a_real_checkpoint(hh_run, tmp_path):
    run_script("train_tokenizer.py", "--data", hh_run / "data", "--model", STORIES, "--out", tmp_path / "tokenizer")
    common = ("--data", hh_run / "data", "--tokenizer", tmp_path / "tokenizer", "--epochs", 0.2, *SMALL)
    run_script("train_sft.py", "--model", STORIES, "--out", tmp_path / "sft", *common)
    config = read_json(tmp_path / "sft" / "config.json")
    assert (config["hidden_size"], config["vocab_size"]) == (64, 512)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("train_dpo.py", ["--data", "{run}/split/easy.jsonl", "--model", "{run}/sft", "--loss", "x"], "--loss x"),
        ("train_dpo.py", ["--data", "{run}/data/probe.jsonl", "--model", "{run}/sft"], "probe.jsonl:1: field"),
        ("train_rm.py", ["--data", "{run}/data", "--model", "{run}/sft", "--use_margin", "true"], "has a margin"),
        ("train_sft.py", ["--data", "{run}/data", "--tokenizer", "{run}/tokenizer", "--model", "x"], "nor a preset"),
        ("train_rm.py", ["--data", "{run}/data", "--model", "{run}/tokenizer"], "config.json: no such file"),
        ("split_data.py", ["--data", "{run}/data", "--rm", "{run}/rm", "--gamma", "big"], "--gamma big"),
        ("eval.py", ["--data", "{run}/data", "--rm", "{run}/rm", "--policies", "sft"], "expected name=folder"),
        (
            "train_dpo.py",
            ["--data", "{run}/split/easy.jsonl", "--model", "{run}/sft", "--batch", "0"],
            "--batch 0: must be at least 1",
        ),
        (
            "train_ppo.py",
            ["--prompts", "x", "--model", "x", "--ref", "x", "--rm", "x", "--temperature", "0"],
            "--temperature",
        ),
        (
            "train_ppo.py",
            ["--prompts", "x", "--model", "x", "--ref", "x", "--rm", "x", "--advantage", "rloo"],
            "set --group to 2",
        ),
        (
            "train_ppo.py",
            [*"--prompts x --model x --ref x --rm x --iterations 3".split()],
            "--critic_warmup 3: leaves none of the 3 iterations to the policy",
        ),
        (
            "train_ppo.py",
            [*"--prompts x --model x --ref x --rm x --kl_target 1 --batch 128 --kl_horizon 25.6".split()],
            "--kl_horizon 25.6: must be above a fifth of --batch 128",  # 0.2 * 128 / 25.6 = 1: all of the price
        ),
        (
            "train_dpo.py",
            ["--data", "{run}/split/easy.jsonl", "--model", "{run}/sft", "--loss", "aot", "--microbatch", "8"],
            "set --microbatch to --batch",
        ),
        (
            "train_dpo.py",
            ["--data", "{run}/split/easy.jsonl", "--model", "{run}/sft", "--loss", "simpo", "--ref", "{run}/sft"],
            "needs no reference",
        ),
        ("split_data.py", ["--data", "{run}/data", "--rm", "{run}/rm", "--by", "uncertainty"], "two or more reward"),
        ("prepare_data.py", ["--data", "x.jsonl", "--noise", "0.1"], "--noise 0.1"),
        ("prepare_data.py", ["--test", "0"], "the built-in world has no end"),
        # Besides 4 special pieces, 256 bytes and 7 strings, each letter of the texts needs a piece.
        ("train_tokenizer.py", ["--data", "{run}/data", "--vocab", "280"], "--vocab 280: the characters of the texts"),
        ("prepare_data.py", ["--data", "{run}/eval"], "expected the layout of HH-RLHF"),
    ],
)
def test_bad_input_is_one_line(hh_run, tmp_path, script, flags, message):
    flags = [f.format(run=hh_run) for f in flags]
    done = run_script(script, *flags, "--out", tmp_path / "out", expect=2)
    assert message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_row_without_any_noise_is_refused_for_a_loss_that_would_be_infinite(hh_run, tmp_path):
    """EXO's target [1-e, e] has e = 0, and the divergence from it is infinite."""
    lines = (hh_run / "split" / "easy.jsonl").read_text().splitlines()[:8]
    rows = [json.loads(line) | {"noise": 0.0 if i == 5 else 0.1} for i, line in enumerate(lines)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--data", file, "--model", hh_run / "sft", *SMALL, "--out", tmp_path / "out")
    done = run_script("train_dpo.py", *flags, "--loss", "sigmoid+0.5*exo_pair", expect=2)
    assert f"row {rows[5]['id']} has a noise of 0, for which --loss exo_pair is infinite" in done.stderr
