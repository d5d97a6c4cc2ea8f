"""The experiments: which cells are run, how verdicts are reached, and that the study agrees with its protocol."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import MISSING, fields, replace

import numpy as np
import pytest

from experiments import ablate, claims, grid, judgement, page
from experiments.grid import Cell, read_results, run_cells
from experiments.judgement import World, collapsed, fall, verdict
from experiments.statistics import Contrast
from experiments.study import FIRST_STAGE, FULL, LAST_STAGES, REDUCED, TRIALS, TUNED, LastStage
from mpo.config import DPOConfig, PPOConfig
from mpo.preference.objective import parse_objective
from mpo.runtime.errors import InputError
from mpo.runtime.files import write_json
from mpo.runtime.flags import parse
from mpo.tools.check import CONFIGS
from tests.support.scripts import ROOT


def cell(policy: str, seed: int = 1, **variables: str) -> Cell:
    return Cell("main", "hh", seed, "", policy, f"runs/x-{seed}", "", variables)


def row(policy: str, seed: int, gold: float, kl: float = 1.0, task: str = "hh", path=None) -> dict:
    point = {"gold": gold, "reward": gold / 2, "kl": kl, "eos": 1.0}
    values = {"golds": [gold - 0.1, gold + 0.1], "rewards": [0.0, 0.0], "kls": [kl, kl], "words": 9.0}
    key = {"grid": "main", "task": task, "seed": seed, "variant": "", "policy": policy}
    where = {"commit": "c", "machine": "m", "seconds": 1.0, "settings": {"prompts": "400"}}
    return key | point | values | where | {"path": path or {}}


# --- the runner -----------------------------------------------------------------------------------


@pytest.fixture
def trained(monkeypatch):
    """Cells are recorded instead of trained. A policy called "broken" fails."""
    calls = []

    def run_cell(one):
        calls.append(one.key)
        if one.policy == "broken":
            raise subprocess.CalledProcessError(2, "the log")
        return row(one.policy, one.seed, 1.0) | {"settings": one.settings}

    monkeypatch.setattr(grid, "run_cell", run_cell)
    return calls


def test_a_finished_cell_is_not_run_again(tmp_path, trained):
    results = tmp_path / "main.jsonl"
    assert run_cells([cell("sft")], results, 1) == 0
    assert run_cells([cell("sft"), cell("dpo"), cell("sft", seed=2)], results, 2) == 0
    assert sorted(k[4] + str(k[2]) for k in trained) == ["dpo1", "sft1", "sft2"]
    assert len(read_results(results)) == 3


def test_what_follows_a_row_sees_it_and_does_not_follow_a_failure(tmp_path, trained):
    results, seen = tmp_path / "main.jsonl", []
    cells = [cell("dpo"), cell("broken", seed=2), cell("sft", seed=3)]
    run_cells(cells, results, 1, lambda: seen.append([r["policy"] for r in read_results(results)]))
    assert seen == [["dpo"], ["dpo", "sft"]]


def test_a_failed_cell_has_no_row_and_does_not_stop_the_others(tmp_path, trained, capsys):
    results = tmp_path / "main.jsonl"
    assert run_cells([cell("broken"), cell("dpo")], results, 1) == 1
    assert [r["policy"] for r in read_results(results)] == ["dpo"]
    assert "FAILED main hh 1  broken: see the log" in capsys.readouterr().err


def test_a_row_made_with_other_flags_is_not_taken_for_this_cell(tmp_path, trained):
    results = tmp_path / "main.jsonl"
    run_cells([cell("dpo", DPO_FLAGS="--steps 320")], results, 1)
    with pytest.raises(InputError, match=r"main hh 1  dpo was run with other flags.*--steps 320.*--steps 4"):
        run_cells([cell("dpo", DPO_FLAGS="--steps 4")], results, 1)


def test_the_stages_that_a_cell_shares_are_made_without_its_flags(tmp_path, trained, monkeypatch):
    """Cells of make ablate share stages that are there: the flags of a cell would otherwise change what all share."""
    made = []
    monkeypatch.setattr(grid, "make", lambda one, targets, log: made.append((one.run, targets)))
    monkeypatch.setattr(ablate, "make", lambda one, targets, log: made.append((one.run, targets, one.variables)))
    flags = ["--grid", "reward", "--seeds", "1", "--make", "QUICK=1", "--out", str(tmp_path)]
    config = parse(ablate.AblateConfig, flags)
    assert ablate.run(ablate.cells_of(config), tmp_path / "rows.jsonl", config) == 0
    assert made == [(f"{tmp_path}/hh-1", "policy-split", {"QUICK": "1"})]
    assert len(trained) == 3
    # make claims has cells whose source is not there yet
    run_cells([replace(cell("mpo"), source="runs/y")], tmp_path / "main.jsonl", 1)
    assert made[1:] == [("runs/y", "policy-rm")]


def test_a_row_says_how_good_its_reward_model_is(tmp_path):
    write_json(
        tmp_path / "manifest.json",
        {"results": {"held_out": {"accuracy": [0.71, 0.69, 0.73]}, "sft_reference_std": 0.5}},
    )
    probed = [("work", "rude", 1.0), ("home", "rude", 0.5), ("work", "repeat", 0.25)]
    write_json(tmp_path / "probe.json", [{"kind": k, "mistake": m, "right_above": share} for k, m, share in probed])
    assert grid.reward_model(tmp_path) == {"accuracy": 0.71, "spread": 0.5, "probe": {"repeat": 0.25, "rude": 0.75}}


# --- the study -------------------------------------------------------------------------------------


def test_the_protocol_describes_the_study():
    page_ = (ROOT / "docs" / "protocol.md").read_text()
    assert "**Reported seeds**: " + ", ".join(map(str, FULL.seeds)) in page_
    assert f"**Tuning seed**: {FULL.tuning_seed}" in page_
    for method in FULL.methods[1:]:
        assert f"{method}" in page_, method
    trials = {tuple(float(x) for x in t.split()[1::2]) for kind in TRIALS.values() for t in kind}
    named = {tuple(map(float, pair)) for pair in re.findall(r"\((\de-\d), (0\.\d+)\)", page_)}
    assert named == trials
    assert "--steps 320" in FULL.dpo_unit
    assert "--iterations 50" in FULL.ppo_unit


def test_the_page_defines_a_unit_and_the_seeds_as_the_study_does():
    terms = (ROOT / "experiments" / "reasons" / "terms.md").read_text()
    assert "320 DPO steps on 32 pairs each, or 50 PPO rollouts of 128 prompts each" in terms
    assert (FULL.dpo_unit.split()[1], FULL.ppo_unit.split()[1]) == ("320", "50")
    assert (DPOConfig.batch, PPOConfig.batch) == (32, 128)
    assert "11, 12, 13, 14 and 15" in terms
    assert FULL.seeds == (11, 12, 13, 14, 15)


def test_the_results_page_has_all_of_its_prose():
    page_ = (ROOT / "docs" / "results.md").read_text()
    for path in (ROOT / "experiments" / "reasons").glob("*.md"):
        assert path.read_text().strip() in page_, f"{path.name}: run python -m experiments.claims --grids page"


def test_the_last_stages_are_those_of_the_schedules():
    edges = re.findall(r"\(call (dpo|ppo), ([^)]+)\)", (ROOT / "Makefile").read_text())
    schedules = {}
    for kind, rest in edges:
        method, model, *ref, rows = (part.strip() for part in rest.split(","))
        schedules[method] = LastStage(kind, model, ref[0] if ref else model, rows)
    assert set(LAST_STAGES) == set(FULL.methods) - {"sft"}
    assert {method: schedules[method] for method in LAST_STAGES} == LAST_STAGES


def test_every_method_has_its_flags():
    settings = {method: f"--lr {i}" for i, method in enumerate(TUNED)}
    for method in FULL.methods[1:]:
        flags = FULL.make_variables(settings, method)
        assert f"{method}_FLAGS" in flags
        if method in FIRST_STAGE:
            assert f"{FIRST_STAGE[method]}_FLAGS" in flags
    assert FULL.make_variables(settings, "dpo-long")["dpo-long_FLAGS"] == "--lr 0 --steps 640"


def test_the_full_grid_has_every_cell_once(tmp_path):
    study = replace(FULL, results=tmp_path)
    write_json(study.settings, {task: dict.fromkeys(TUNED, "--lr 1") for task in study.tasks})
    sizes = {g: claims.grid_cells(study, g) for g in ("main", "noise", "price", "gamma", "pushed")}
    expected = {"main": 190 + 10, "noise": 100, "price": 10, "gamma": 60, "pushed": 40}
    assert {g: len(c) for g, c in sizes.items()} == expected
    for cells in sizes.values():
        assert len({c.key for c in cells}) == len(cells)
        assert len({(c.run, c.policy) for c in cells}) == len(cells)
    assert FULL.methods == ("sft", *TUNED, *FULL.inherited)
    assert list(FULL.tuned) == list(TUNED)
    with pytest.raises(InputError, match="run the tuning first"):
        claims.grid_cells(replace(FULL, results=tmp_path / "none"), "main")


def test_the_reduced_study_has_every_grid_in_few_cells(tmp_path):
    study = replace(REDUCED, results=tmp_path)
    assert list(study.tuned) == ["dpo", "mpo"]
    write_json(study.settings, {"hh": dict.fromkeys(study.tuned, "--lr 1")})
    sizes = {g: len(claims.grid_cells(study, g)) for g in ("main", "noise", "price", "gamma", "pushed")}
    assert sizes == {"main": 5, "noise": 2, "price": 1, "gamma": 1, "pushed": 1}


@pytest.mark.parametrize(
    ("seeds", "message"),
    [("a", "seed a: not a whole"), ("1,,2", "seed '': not a whole"), ("1,-2", "seed -2: must be"), ("1, 1", "twice")],
)
def test_ablate_refuses_seeds_that_are_not_different_whole_numbers(seeds, message):
    with pytest.raises(InputError, match=message) as error:
        ablate.cells_of(parse(ablate.AblateConfig, ["--seeds", seeds]))
    assert str(error.value).startswith(f"--seeds {seeds}: ")


def test_every_setting_of_the_experiments_is_in_the_range_of_its_flag():
    """What the study, its trials and the grids of `make ablate` pass on as flags is accepted."""
    variables = [dict(v) for _, grid_ in ablate.GRIDS.values() for v in grid_.values()]
    variables += [{"DPO_FLAGS": f} for f in TRIALS["dpo"]] + [{"PPO_FLAGS": f} for f in TRIALS["ppo"]]
    for study in (FULL, REDUCED):
        variables += [
            {"DPO_FLAGS": f"{study.dpo_unit} {study.dpo_long}", "PPO_FLAGS": f"{study.ppo_unit} {study.price}"}
        ]
        variables += [{f"{LAST_STAGES[m].kind.upper()}_FLAGS": flags} for m, flags in study.pushed.items()]
        variables += [{"DATA_FLAGS": f"--noise {n}"} for n in study.noise]
        variables += [{"SPLIT_FLAGS": f"--gamma {g}"} for g in study.gammas]
    seen = set()
    for name, flags in (item for v in variables for item in v.items()):
        if cls := {c.__name__.removesuffix("Config").upper() + "_FLAGS": c for c in CONFIGS.values()}.get(name):
            needed = [f"--{f.name}=x" for f in fields(cls) if f.default is MISSING]
            parse(cls, [*needed, *flags.split()])
            seen.add(name)
        elif name == "LOSS":
            parse_objective(flags, 0.5)
    assert seen == {"DATA_FLAGS", "SFT_FLAGS", "RM_FLAGS", "SPLIT_FLAGS", "DPO_FLAGS", "PPO_FLAGS"}


def test_ablate_makes_a_cell_of_each_variant_and_seed():
    config = parse(ablate.AblateConfig, ["--vary", "LOSS", "--values", "sigmoid, ipo", "--seeds", "4,5"])
    cells = ablate.cells_of(config)
    assert [(c.seed, c.variant, c.policy, c.variables) for c in cells] == [
        (seed, loss, "dpo", {"LOSS": loss}) for seed in (4, 5) for loss in ("sigmoid", "ipo")
    ]
    for bad, message in (
        (["--grid", "x"], "expected one of losses"),
        (["--vary", "LOSS", "--values", "ipo"], "two or more values"),
        (["--make", "QUICK"], "VARIABLE=value"),
    ):
        with pytest.raises(InputError, match=message):
            ablate.cells_of(parse(ablate.AblateConfig, bad))


# --- verdicts -------------------------------------------------------------------------------------


def judged_as(value: float) -> Contrast:
    return Contrast((value, value - 0.1, value + 0.1), {1: value})


def test_a_claim_holds_fails_or_is_neither():
    up, down, open_ = judged_as(1.0), judged_as(-1.0), judged_as(0.0)
    assert verdict([{"a": up, "b": up}, {"a": up, "b": up}], 1) == "holds"
    assert verdict([{"a": up, "b": down}, {"a": up, "b": down}], 1) == "fails"
    assert verdict([{"a": up, "b": down}, {"a": up, "b": up}], 1) == "mixed"
    assert verdict([{"a": up}, {"a": open_}], 1) == "mixed"
    assert verdict([{"a": open_}, {"a": open_}], 1) == "open"
    assert verdict([{"a": None}, {"a": None}], 1) == "not run"
    assert verdict([{"a": up}, {"a": None}], 1) == "unfinished"
    assert verdict([{"a": up}, {"a": up}], 2) == "unfinished"


def world(**methods) -> World:
    main = {name.replace("_", "-"): rows for name, rows in methods.items()}
    return World("hh", main, {"0": main}, {"q0.5": main}, {}, {})


def test_paths_run_through_the_first_stage():
    kept = {"80": {"kl": 0.5, "gold": 1.5, "reward": 0.0}}
    w = world(sft=[row("sft", 1, 1.0, 0.0)], dpo=[row("dpo", 1, 2.0, 1.0, path=kept)], mpo=[row("mpo", 1, 3.0, 2.0)])
    assert w.path("mpo", 1) == [(0.0, 1.0), (0.5, 1.5), (1.0, 2.0), (2.0, 3.0)]
    assert w.stages("mpo", 1) == [[(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)], [(1.0, 2.0), (2.0, 3.0)]]
    assert w.stages("dpo", 1) == [[(0.0, 1.0), (0.5, 1.5), (1.0, 2.0)]]
    assert fall([(0.0, 1.0), (1.0, 2.5), (2.0, 2.0)]) == 0.5
    contrast = judgement.equal_kl_contrast(w, ("mpo", "dpo"))
    assert contrast.per_seed == {1: pytest.approx(0.0)}  # at KL 1 both are the same model


def test_only_seeds_that_both_have_are_compared():
    w = world(sft=[row("sft", 1, 1.0), row("sft", 2, 1.0)], dpo=[row("dpo", 1, 2.0)], ppo=[row("ppo", 2, 2.0)])
    assert w.seeds("dpo") == [1]
    assert w.seeds("dpo", "ppo") == []
    assert judgement.gold_contrast(w, ("dpo", "sft")).per_seed == {1: pytest.approx(1.0)}
    assert judgement.gold_contrast(w, ("dpo", "ppo")) is None


def test_noise_is_judged_by_the_difference_in_lost_gold():
    clean = {"mpo": [row("mpo", 1, 3.0)], "ppo-long": [row("ppo-long", 1, 2.0)]}
    noisy = {"mpo": [row("mpo", 1, 2.5)], "ppo-long": [row("ppo-long", 1, 1.0)]}
    w = World("hh", clean, {"0": clean, "0.3": noisy}, {}, {}, {})
    assert judgement.noise_contrast(w, "ppo-long", "0.3").interval[0] == pytest.approx(0.5)  # 1.0 - 0.5


def test_a_collapse_has_its_reasons():
    sft = [row("sft", 1, 1.0)]
    assert collapsed(row("ppo", 1, 1.5), sft) == ""
    assert collapsed(row("ppo", 1, 0.5), sft) == "gold 0.50 below SFT's 1.00"
    assert collapsed(row("ppo", 1, 1.5) | {"eos": 0.5}, sft) == "EOS 50 %"


def test_the_page_is_written_from_the_rows_alone(tmp_path):
    study = replace(REDUCED, results=tmp_path, page=tmp_path / "docs" / "results.md", seeds=(11, 12))
    study = replace(study, methods=FULL.methods, noise_methods=("sft", "dpo-all-long", "ppo-long", "mpo"))
    golds = {"sft": 1.0, "dpo": 2.0, "dpo-all": 1.8, "dpo-hard": 1.2, "mpo": 2.5, "ppo-long": 2.2, "dpo-all-long": 2.1}
    rng = np.random.default_rng(0)
    rows = [row(m, s, g + rng.normal(0, 0.01), kl=i) for s in (11, 12) for i, (m, g) in enumerate(golds.items())]
    (tmp_path / "main.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    probe = {"rude": 0.5, "repeat": 0.9}
    rms = {11: {"accuracy": 0.7, "spread": 1.3, "probe": probe}, 12: {"accuracy": 0.6, "spread": 0.4, "probe": probe}}
    noisy = [row("sft", s, 0.5) | {"grid": "noise", "variant": "0.3", "rm": rms[s]} for s in (12, 11)]
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps(r) + "\n" for r in noisy))
    priced = [row("mpo", s, 0.4) | {"grid": "price"} for s in (11, 12)]
    (tmp_path / "price.jsonl").write_text("".join(json.dumps(r) + "\n" for r in priced))
    write_json(study.settings, {"hh": {"dpo": "--lr 1e-4"}})
    page.write(study)
    text = study.page.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| mpo - dpo-all-long "))
    assert float(line.split("|")[2].split()[0]) == pytest.approx(0.4, abs=0.03)
    assert line.split("|")[3].strip() == "holds"
    sweeps = text[text.index("## Sweeps, hh") :]
    along = next(line for line in sweeps.splitlines() if line.startswith("| mpo - dpo-all-long "))
    assert along.split("|")[2].strip() == line.split("|")[2].strip()  # without noise: the main grid's contrast
    assert along.split("|")[3].strip() == "-"
    assert re.search(
        r"^\| mpo +\| 2.5\S+ .*\| - +\| 0.40 \[.*\|$", sweeps, re.M
    )  # at 0.3 mpo has only a row of the price grid
    assert re.search(r"\| price +\| mpo +\| 11 +\| gold 0.40 below SFT's 0.50", text)
    assert re.search(r"^\| 0.3 +\| 70 60 +\| 1.3 0.4 +\| rude 2 +\|$", sweeps, re.M)
    assert "1. MPO beats its parts" in text
    assert "not run" in text  # the verdict of a claim that has no rows
    assert "| dpo    | lr 1e-4 |" in text
    with pytest.raises(InputError, match="no rows yet"):
        page.write(replace(study, results=tmp_path / "none"))
