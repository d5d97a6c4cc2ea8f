"""LoRA adapters: new ones change nothing, they can be switched off or merged, and the base is never trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mpo.kernels import functions as kernels
from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_as_scalar, load_model, load_scalar, save_model
from mpo.model.generate import Sampling, generate
from mpo.model.llama import Adapters
from mpo.model.lora import TARGETS, BaseModel, critic_on, switched_off
from mpo.runtime.seeding import generator
from mpo.training.optimisers import make_optimiser
from tests.conftest import SMALL, small_model
from tests.support.scripts import run_script

IDS, PACKING = torch.arange(3, 60), Packing([30, 20, 7], [-1, 0, 0])


def with_adapters(folder, rank=3, alpha=6.0, targets=TARGETS, trained=True):
    """A saved model with adapters. If `trained`, they have random values instead of their initial ones."""
    model = load_model(folder, Adapters(rank, alpha, targets, 1, str(folder)))
    if trained:
        draw = torch.Generator().manual_seed(5)
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.data.normal_(0, 0.3, generator=draw)
    return model


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path / "base", small_model())
    return tmp_path / "base"


def test_new_adapters_change_nothing_and_are_all_that_is_trained(folder):
    base, model = load_model(folder), with_adapters(folder, trained=False)
    assert torch.equal(model(IDS, PACKING), base(IDS, PACKING))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".lora_" in n}
    assert len(trained) == 2 * 7 * 2  # A and B of seven matrices in two layers
    model(IDS, PACKING).square().sum().backward()
    make_optimiser(model, 0.1, 0.0).step()
    assert not torch.equal(model(IDS, PACKING), base(IDS, PACKING))
    with switched_off(model):
        assert torch.equal(model(IDS, PACKING), base(IDS, PACKING))
    assert torch.equal(BaseModel(model)(IDS, PACKING), base(IDS, PACKING))


@pytest.mark.skipif("cpu" not in kernels.IMPLEMENTATIONS, reason="the compiled kernels are not built")
def test_with_adapters_no_gradient_is_computed_that_nobody_needs(folder, monkeypatch):
    """Neither of a frozen weight, nor of the first layer's input, which the frozen embedding would not use."""
    from mpo.kernels.cpu import head

    model, right = with_adapters(folder, rank=8), set[int]()

    def matmul(a, b, bf16=False):
        right.add(b.data_ptr())
        return plain(a, b, bf16)

    plain = head.matmul
    ids, packing = IDS.repeat(2), Packing([60, 40, 14], [-1, 0, 0])  # enough rows for the compiled product
    loss = model(ids, packing).square().sum()
    monkeypatch.setattr(head, "matmul", matmul)
    loss.backward()
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    inputs = {names[address] for address in right if address in names}  # gradients in an input: dy times a weight
    first, second = ({n for n in inputs if n.startswith(f"model.layers.{i}.")} for i in (0, 1))
    read_the_input = tuple(f"model.layers.0.self_attn.{n}_proj." for n in "qkv")
    assert not {n for n in first if n.startswith(read_the_input) and not n.endswith("lora_B.weight")}
    assert {f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkvo"} < second
    assert len(second) == 3 * 7  # the frozen weight, A and B of seven matrices each
    assert all(p.grad is None for n, p in model.named_parameters() if ".lora_" not in n)


def test_an_adapter_adds_the_product_of_its_matrices(folder):
    """For one matrix and one token: W x + alpha / r * B (A x), by loops in float64."""
    model = with_adapters(folder, rank=2, alpha=5.0, targets=("up_proj",))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(24, generator=torch.Generator().manual_seed(2))
    W, A, B = (w.tolist() for w in (layer.weight, layer.lora_A.weight, layer.lora_B.weight))
    inner = [sum(a * float(v) for a, v in zip(row, x, strict=True)) for row in A]
    expected = [
        sum(w * float(v) for w, v in zip(row, x, strict=True))
        + 2.5 * sum(b * i for b, i in zip(b_row, inner, strict=True))
        for row, b_row in zip(W, B, strict=True)
    ]
    assert layer(x[None])[0].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_merged_model_computes_and_samples_the_same(folder, tmp_path):
    model = with_adapters(folder)
    save_model(tmp_path / "merged", model)
    merged = load_model(tmp_path / "merged")
    torch.testing.assert_close(merged(IDS, PACKING), model(IDS, PACKING), rtol=0, atol=1e-4)
    prompts, sampling = [[1, 5, 9], [1, 7]], Sampling(8, 1.0, 2)
    one, other = (generate(m, prompts, sampling, generator(3, "x")) for m in (model, merged))
    assert one.responses == other.responses


def test_peft_computes_the_same_logits_from_the_saved_adapters(folder, tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = with_adapters(folder, rank=4, alpha=10.0)
    save_model(tmp_path / "out", model)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters").eval()
    ids = torch.randint(0, 61, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.logits(ids), rtol=0, atol=2e-4)
        assert not torch.allclose(theirs(ids).logits, load_model(folder).logits(ids), atol=0.1)


def test_a_critic_shares_the_policys_base_and_starts_with_values_of_0(folder):
    policy = with_adapters(folder)
    critic = critic_on(policy, policy.adapters)
    assert torch.equal(critic(IDS, PACKING), torch.zeros(len(IDS)))
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}
    assert shared == {p.data_ptr() for n, p in policy.model.named_parameters() if ".lora_" not in n}
    before = [p.clone() for p in policy.parameters()]
    critic.score.weight.data.fill_(0.1)
    critic(IDS, PACKING).sum().backward()
    make_optimiser(critic, 0.1, 0.1).step()
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


def test_a_reward_model_with_adapters_is_saved_merged(folder, tmp_path):
    rm = load_as_scalar(folder, generator(0, "head"), Adapters(2, 4.0, TARGETS, 1, str(folder)))
    assert rm.score.weight.requires_grad
    for name, p in rm.named_parameters():
        if ".lora_B" in name:
            p.data.fill_(0.1)
    save_model(tmp_path / "rm", rm)
    torch.testing.assert_close(load_scalar(tmp_path / "rm")(IDS, PACKING), rm(IDS, PACKING), rtol=0, atol=1e-4)


LORA = ("--lora_rank", 2, *SMALL)


def test_the_reward_model_dpo_and_ppo_can_train_adapters(hh_run, tmp_path):
    data = ("--data", hh_run / "data")
    run_script("train_rm.py", *data, "--model", hh_run / "sft", "--out", tmp_path / "rm", "--epochs", 0.5, *LORA)
    pairs = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft")
    run_script("train_dpo.py", *pairs, "--out", tmp_path / "dpo", "--lr", 0.01, *LORA)
    base, merged = (load_file(f / "model.safetensors") for f in (hh_run / "sft", tmp_path / "dpo"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed == {n for n in base if n.split(".")[-2] in TARGETS}
    prompts = ("--prompts", hh_run / "split" / "prompts.jsonl", "--rm", tmp_path / "rm")
    models = ("--model", tmp_path / "dpo", "--ref", tmp_path / "dpo")
    sizes = ("--lora_rank", 2, "--iterations", 2, "--batch", 8, "--minibatch", 4, "--microbatch", 2, "--max_new", 10)
    for more in (
        (),
        ("--shared_critic", "true"),
        ("--kl_in", "loss", "--kl_estimator", "exact", "--lora_targets", "q_proj"),
    ):
        out = tmp_path / "mpo" / str(len(more))
        run_script("train_ppo.py", *prompts, *models, *sizes, "--critic_warmup", 0, "--threads", 1, "--out", out, *more)
        assert (out / "adapters" / "adapter_model.safetensors").exists()


def test_an_unknown_target_is_refused(hh_run, tmp_path):
    flags = ("--data", hh_run / "split" / "pairs.jsonl", "--model", hh_run / "sft", "--out", tmp_path / "x")
    done = run_script("train_dpo.py", *flags, *LORA, "--lora_targets", "q_proj,c_proj", expect=2)
    assert done.stderr.splitlines()[-1].startswith("train_dpo.py: error: --lora_targets q_proj,c_proj: 'c_proj' is not")
