"""A policy that is too large for one process is sampled with each layer gathered when its turn comes."""

from __future__ import annotations

import json

import pytest
import torch

from mpo.kernels.reference import KVCache
from tests.support.sampling import CASES, case_name, model_of, sample
from tests.support.scripts import run_script


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """What 2 and 4 processes sample, by the number of processes and the case."""
    work = tmp_path_factory.mktemp("sampling")
    run_script("-m", "tests.support.sampling", work)
    return {count: json.loads((work / f"{count}.json").read_text()) for count in (2, 4)}


@pytest.fixture(scope="module")
def alone():
    """What one process samples from the same models, by the kind of model."""
    return {kind: sample(model_of(kind)) for kind, _ in CASES}


def assert_same_samples(ours, theirs):
    assert ours["responses"] == theirs["responses"]
    for a, b in zip(ours["logps"], theirs["logps"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_layers_gathered_in_turn_give_the_samples_and_log_probs_of_a_policy_gathered_at_once(sampled, count):
    for kind, way in CASES:
        ours, theirs = sampled[count][case_name(kind, way)], sampled[count][case_name(kind, {})]
        if "fp32" in kind:
            assert_same_samples(ours, theirs)
        else:  # adapters that are merged into bf16 weights are rounded with them; gathered in turn, they are not merged
            first = [[logps[0] for logps in results["logps"]] for results in (ours, theirs)]
            assert first[0] == pytest.approx(first[1], abs=0.1)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_samples_and_log_probs_of_one(sampled, alone, count):
    for kind, way in CASES:
        if "fp32" in kind:  # in bf16, products of other rows together are rounded in another way
            assert_same_samples(sampled[count][case_name(kind, way)], alone[kind])


@pytest.mark.parametrize("count", [2, 4])
def test_no_layer_is_whole_when_a_token_is_drawn_unless_all_are(sampled, count):
    for kind, way in CASES:
        assert sampled[count][case_name(kind, way)]["gathered"] == (3 if way.get("whole", True) else 0)


def test_the_rows_of_the_test_end_at_different_steps_and_fill_several_groups_of_prompts(alone):
    """Otherwise no process would have to take part in what only others compute."""
    lengths = [len(response) for response in alone["fp32"]["responses"]]
    assert max(lengths[6:]) < min(max(lengths[i : i + 2]) for i in (0, 2))
    assert len(set(lengths)) > 3


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_sampling_only_some_rows_at_a_time_changes_no_response(alone, rows):
    for whole in (True, False):
        few = sample(model_of("fp32"), rows=rows, whole=whole)
        assert few["responses"] == alone["fp32"]["responses"]


def test_a_cache_that_rows_leave_never_exists_twice():
    cache = KVCache(3, 4, 5, 2, 6, torch.float32, torch.device("cpu"))
    cache.store.normal_()
    before, storage = cache.store.clone(), cache.store.untyped_storage().data_ptr()
    for rows in ([0, 2, 3], [2, 0], [1]):
        cache.take(torch.tensor(rows))
        before = before[:, :, rows]
        assert torch.equal(cache.store, before)
        assert cache.store.untyped_storage().data_ptr() == storage
    cache.take(torch.tensor([0, 0, 0]))
    assert torch.equal(cache.store, before[:, :, [0, 0, 0]])
