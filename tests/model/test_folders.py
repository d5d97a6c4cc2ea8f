"""Where models meet: one tokenizer, room for the longest row, and the same companions in every folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from mpo.config import DPOConfig
from mpo.data.rows import write_rows
from mpo.data.tokenizer import load_tokenizer, train_tokenizer
from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_model, load_scalar, save_model
from mpo.model.llama import Adapters, scalar_from
from mpo.model.lora import adapters_of
from mpo.runtime.files import write_json
from mpo.runtime.flags import parse
from mpo.runtime.seeding import generator
from mpo.world.build import build
from tests.conftest import small_model
from tests.support.layouts import chatml, gemma3, llama_3, mistral, qwen2
from tests.support.scripts import run_script

SHORT = 60  # positions of a model that is too short for the rows


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """Rows, and models `lm` and `rm` with one tokenizer; others are too short, larger, or have another tokenizer."""
    place = tmp_path_factory.mktemp("place")
    splits = build("hh", seed=3, train=16, test=8)
    for split in ("train", "test"):
        write_rows(place / "data" / f"{split}.jsonl", splits[split])
    write_manifest(place / "data", source="elsewhere", task="hh")
    texts = (t for r in build("hh", seed=4, train=200, test=4)["train"] for t in (r.prompt, r.chosen))
    other = train_tokenizer(texts, 600, seed=1)
    assert other.size <= tokenizer.size
    kinds = {
        "": (tokenizer, {}),
        "-short": (tokenizer, {"max_position_embeddings": SHORT}),
        "-window": (tokenizer, {"model_type": "mistral", "sliding_window": SHORT}),
        "-large": (tokenizer, {"hidden_size": 32, "head_dim": 8, "num_hidden_layers": 3}),
        "-other": (other, {}),
    }
    for name, (its_tokenizer, shape) in kinds.items():
        model = small_model(vocab_size=tokenizer.size, **shape)
        save_model(place / f"lm{name}", model, its_tokenizer)
        save_model(place / f"rm{name}", scalar_from(model, generator(1, "head")), its_tokenizer)
        held_out = {"accuracy": (0.5, 0.4, 0.6), "log_loss": 0.7, "calibration_error": 0.1}
        write_manifest(place / f"rm{name}", held_out=held_out)
    return place


def write_manifest(folder, **results):
    """A manifest such as a stage's, for the report of eval.py."""
    write_json(folder / "manifest.json", {"config": {}, "inputs": {}, "outputs": {}, "results": results})


PPO_BARE = "train_ppo.py --iterations 2 --critic_warmup 1 --batch 4 --minibatch 4 --microbatch 4 --max_new 6"
PPO = f"{PPO_BARE} --prompts @/data/train.jsonl"
TRAINING = "--epochs 0.5 --batch 4 --microbatch 4"
EVAL = "eval.py --data @/data --prompts 4 --max_new 40"
# Every place where a stage takes a model that exchanges ids with another; % is the kind of this model.
MEETINGS = [
    f"train_sft.py {TRAINING} --data @/data --tokenizer @/lm --model @/lm%",
    f"train_dpo.py {TRAINING} --data @/data/train.jsonl --model @/lm --ref @/lm%",
    f"train_dpo.py {TRAINING} --data @/data/train.jsonl --model @/lm% --ref @/lm",
    f"{PPO} --model @/lm --ref @/lm% --rm @/rm",
    f"{PPO} --model @/lm% --ref @/lm --rm @/rm",
    f"{EVAL} --policies a=@/lm,b=@/lm% --rm @/rm",
]
# Every place where a reward model reads what another model, or its tokenizer, has written
JUDGED = [
    f"{PPO} --model @/lm --ref @/lm --rm @/rm%",
    "split_data.py --data @/data --rm @/rm,@/rm%",
    f"{EVAL} --policies a=@/lm --rm @/rm%",
]
ALONE = [
    f"train_rm.py {TRAINING} --data @/data --model @/lm%",
    f"train_dpo.py {TRAINING} --data @/data/train.jsonl --model @/lm%",
    "split_data.py --data @/data --rm @/rm%",
]


def run_stage(line, place, kind, out, expect=0):
    words = line.replace("@", str(place)).replace("%", kind).split()
    return run_script(*words, "--threads", 1, "--out", out, expect=expect)


@pytest.mark.parametrize("line", MEETINGS)
def test_a_model_with_another_tokenizer_is_refused_wherever_two_meet(place, tmp_path, line):
    message = run_stage(line, place, "-other", tmp_path / "out", expect=2).stderr.splitlines()[-1]
    one, other = message.split("has another tokenizer than")
    assert ("-other" in one) != ("-other" in other)
    for half in (one, other):
        assert str(place) in half


@pytest.mark.parametrize("line", JUDGED)
def test_a_reward_model_with_another_tokenizer_reads_texts(place, tmp_path, line):
    out = run_stage(line, place, "-other", tmp_path / "out").stdout
    assert (tmp_path / "out" / "manifest.json").exists()
    assert ("has a tokenizer or chat template of its own, and gets responses as text" in out) == ("ppo" in line)


def score_by_hand(folder, prompt, response, end):
    """The centred score of one text by a reward model with its own tokenizer, in plain ids."""
    tokenizer, rm = load_tokenizer(folder), load_scalar(folder)
    ids = [tokenizer.bos, *tokenizer.vocabulary.encode(prompt), *tokenizer.vocabulary.encode(response)]
    ids += [tokenizer.eos] * end
    return rm(torch.tensor(ids), Packing([len(ids)]))[-1].item()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_scores_of_a_reward_model_with_another_tokenizer_are_those_of_the_texts(place, tmp_path):
    run_stage(JUDGED[2], place, "-other", tmp_path / "eval")
    answers = lines_of(tmp_path / "eval" / "responses-a.jsonl")
    assert len(answers) == 4
    for row in answers:
        expected = score_by_hand(place / "rm-other", row["prompt"], row["response"], row["finished"])
        assert row["reward"] == pytest.approx(expected, abs=1e-4)
    for row in lines_of(tmp_path / "eval" / "responses-chosen.jsonl"):
        expected = score_by_hand(place / "rm-other", row["prompt"], row["response"], True)
        assert row["reward"] == pytest.approx(expected, abs=1e-4)
    run_stage(JUDGED[1], place, "-other", tmp_path / "split")
    rows = {row["id"]: row for row in lines_of(place / "data" / "train.jsonl")}
    for scores in lines_of(tmp_path / "split" / "scores.jsonl"):
        row = rows[scores["id"]]
        for response in ("chosen", "rejected"):
            both = [score_by_hand(place / rm, row["prompt"], row[response], True) for rm in ("rm", "rm-other")]
            assert scores[response] == pytest.approx(sum(both) / 2, abs=1e-4)


@pytest.mark.parametrize("line", MEETINGS + JUDGED)
def test_a_model_of_another_size_is_welcome(place, tmp_path, line):
    run_stage(line, place, "-large", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("line", MEETINGS + JUDGED + ALONE)
def test_rows_longer_than_a_model_takes_are_refused_with_the_numbers(place, tmp_path, line):
    message = run_stage(line, place, "-short", tmp_path / "out", expect=2).stderr.splitlines()[-1]
    why = "max_position_embeddings in config.json"
    assert f"-short: takes at most {SHORT} tokens ({why}), but the longest sequence has" in message
    assert message.endswith(f"until they add up to {SHORT}")
    assert not (tmp_path / "out" / "metrics.jsonl").exists()  # before any training


def test_rows_longer_than_a_sliding_window_are_welcome(place, tmp_path):
    run_stage(MEETINGS[2], place, "-window", tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").exists()


def test_the_rows_own_responses_count_where_a_reward_model_scores_them(place, tmp_path):
    line = f"{EVAL} --max_new 1 --policies a=@/lm --rm @/rm%"
    message = run_stage(line, place, "-short", tmp_path / "out", expect=2).stderr.splitlines()[-1]
    assert "-short: takes at most" in message
    assert "lower --max_prompt or --max_response" in message


def test_a_preset_takes_rows_as_long_as_the_flags_allow(place, tmp_path):
    line = f"train_sft.py {TRAINING} --data @/data --tokenizer @/lm --model tiny --max_prompt %"
    for longest, expected in (("640", 1024), ("1500", 1628)):  # with a response of 128
        run_stage(line, place, longest, tmp_path / longest)
        written = json.loads((tmp_path / longest / "config.json").read_text())
        assert written["max_position_embeddings"] == expected


def test_the_probe_sheet_counts_among_the_rows_of_a_reward_model(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "data")
    sheet = {"kind": "fact", "mistake": "long", "prompt": "\n\nHuman: Hi.\n\nAssistant:", "right": " Yes."}
    sheet["wrong"] = " no" * 90
    (tmp_path / "data" / "probe.jsonl").write_text(json.dumps(sheet) + "\n")
    shutil.copytree(place / "lm", tmp_path / "lm")
    config = json.loads((tmp_path / "lm" / "config.json").read_text())
    (tmp_path / "lm" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 150}))
    line = ALONE[0].replace("@", str(tmp_path))
    assert "the longest sequence has 1" in run_stage(line, place, "", tmp_path / "out", expect=2).stderr
    (tmp_path / "data" / "probe.jsonl").unlink()
    run_stage(line, place, "", tmp_path / "out")


def test_chat_says_when_a_model_has_no_room_for_a_prompt(place):
    done = run_script("chat.py", "--model", place / "lm-short", "--max_new", SHORT, expect=2)
    assert f"--max_new {SHORT}: leaves no room for a prompt" in done.stderr


def companions(folder):
    """Every file that is no weight of a model, no config of it and no record of a stage."""
    own = ("config.json", "adapter_config.json", "stage.json", "manifest.json", "metrics.jsonl", "probe.json")
    files = (p for p in folder.iterdir() if p.is_file() and p.suffix != ".safetensors" and p.name not in own)
    return {p.name: p.read_bytes() for p in files}


@pytest.mark.parametrize("layout", [llama_3, chatml, qwen2, gemma3])
def test_every_folder_that_a_stage_writes_a_model_to_has_all_companions(place, tmp_path, layout):
    given = layout(tmp_path / "given")
    expected = companions(given)
    expected["generation_config.json"] = None
    data = (f"--data {place}/data", f"--prompts {place}/data/train.jsonl", f"--data {place}/data/train.jsonl")
    lora = "--lora_rank 1 --max_prompt 320"
    stages = {
        "tokenizer": f"train_tokenizer.py {data[0]} --model {given}",
        "sft": f"train_sft.py {TRAINING} {data[0]} --tokenizer {tmp_path}/tokenizer --model {given} {lora}",
        "rm": f"train_rm.py {TRAINING} {data[0]} --model {tmp_path}/sft --max_prompt 320",
        "dpo": f"train_dpo.py {TRAINING} {data[2]} --model {tmp_path}/sft --steps 2 --keep 1 {lora}",
        "ppo": f"{PPO_BARE} {data[1]} --model {tmp_path}/dpo --ref {tmp_path}/dpo --rm {tmp_path}/rm --keep 1 {lora}",
    }
    for name, line in stages.items():
        run_stage(line, place, "", tmp_path / name)
    folders = "sft sft/adapters rm dpo dpo/step-1 dpo/step-1/adapters dpo/adapters ppo ppo/step-1 ppo/adapters".split()
    for name in folders:
        written = companions(tmp_path / name)
        generation = json.loads(written["generation_config.json"]) if "adapters" not in name else None
        if name == "rm" and layout is llama_3:  # whose tokenizer names no pad token
            tokenizer = json.loads(written["tokenizer_config.json"])
            assert tokenizer.pop("pad_token") == "<|end_of_text|>"
            assert tokenizer == json.loads(expected["tokenizer_config.json"])
            written |= {"tokenizer_config.json": expected["tokenizer_config.json"]}
        assert written | {"generation_config.json": None} == expected, name
        if generation:
            config = json.loads((tmp_path / name / "config.json").read_text())
            assert generation["eos_token_id"] == config["eos_token_id"]
            assert load_tokenizer(given).eos in config["eos_token_id"], name
    tokenizer = companions(tmp_path / "tokenizer")
    assert tokenizer | {"generation_config.json": None} == expected
    for name, base in (("sft", given), ("dpo/step-1", tmp_path / "sft"), ("ppo", tmp_path / "dpo")):
        adapters = json.loads((tmp_path / name / "adapters" / "adapter_config.json").read_text())
        assert adapters["base_model_name_or_path"] == str(base.resolve())


def test_peft_finds_the_base_from_any_folder_and_a_name_that_is_no_folder_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    flags = ["--out=x", "--data=x", "--model=base", "--lora_rank=2"]
    assert adapters_of(parse(DPOConfig, flags), "base").base == str(tmp_path / "base")
    assert adapters_of(parse(DPOConfig, flags), "maker/model").base == "maker/model"


def test_a_folder_that_held_another_model_holds_only_the_new_one(tmp_path):
    """Weights, templates or adapters of two models in one folder would be read as those of one."""
    first = load_model(llama_3(tmp_path / "first"), Adapters(1, 1.0, ("q_proj",), 1, "base"))
    save_model(tmp_path / "out", first, load_tokenizer(tmp_path / "first"), shard_bytes=4000)
    (tmp_path / "out" / "additional_chat_templates").mkdir()
    (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").write_text("")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    second = mistral(tmp_path / "second")
    save_model(tmp_path / "out", load_model(second), load_tokenizer(second))
    left = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert left == {p.name for p in second.iterdir()} | {"notes.txt"}
    save_model(tmp_path / "out", load_model(tmp_path / "first"))
    assert companions(second).items() <= companions(tmp_path / "out").items()  # without a tokenizer, one is left alone
