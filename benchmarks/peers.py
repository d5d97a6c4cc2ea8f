"""The peers' cases of the benchmark, run in the peers' own environments: python peers.py CASE THREADS

NAME-bf16 is the case NAME as the peer computes it in bf16: its trainers by autocast, generation with weights in bf16.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
import turns
import workload as w
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, TrainerCallback

BF16 = False  # set below, by the case


class Turns(TrainerCallback):
    """Makes a trainer wait for its turn before each optimiser step."""

    def on_step_begin(self, *args, **kwargs):
        if not hasattr(self, "began"):
            turns.ready()
        self.began = turns.wait()

    def on_step_end(self, *args, **kwargs):
        turns.report(self.began)


def tokenizer():
    """A tokenizer with one word for each id, "w<i>" for id i. The trainers take texts only, so they need one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "</s>", "<pad>"]
    words = {names[i] if i < 4 else f"w{i}": i for i in range(w.SHAPE["vocab_size"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def text(ids: list[int]) -> str:
    """The text that the tokenizer turns back into these ids."""
    return " ".join(f"w{i}" for i in ids)


def lora(task: str):
    """peft's adapters of the workload, or None. `task`: peft's name for what the model does."""
    if not w.LORA:
        return None
    from peft import LoraConfig

    return LoraConfig(r=w.LORA, lora_alpha=16, target_modules=list(w.TARGETS), lora_dropout=0.0, task_type=task)


def rows():
    """The workload's pairs as texts, repeated 200 times."""
    from datasets import Dataset

    texts = []
    for row in w.pairs(w.PAIRS) * 200:
        prompt, chosen, rejected = (text([i for i in row[k] if i > 3]) for k in ("prompt", "chosen", "rejected"))
        texts.append({"prompt": prompt + " ", "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(texts)


def common(folder: str) -> dict:
    """Arguments that trl's trainers share."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=w.PAIRS,
        learning_rate=w.LR,
        max_steps=10_000,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=w.DEVICE == "cpu",
        bf16=BF16,
        gradient_checkpointing=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def sft() -> None:
    """trl's SFTTrainer, on the chosen responses; prompts count for nothing, as here."""
    from trl import SFTConfig, SFTTrainer

    data = rows().rename_column("chosen", "completion").remove_columns("rejected")
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(**common(folder), max_length=w.PROMPT + w.RESPONSE + 8, completion_only_loss=True)
        trainer = SFTTrainer(
            LlamaForCausalLM(LlamaConfig(**w.SHAPE)),
            args=config,
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=lora("CAUSAL_LM"),
            callbacks=[Turns()],
        )
        trainer.train()


def dpo() -> None:
    """trl's DPOTrainer. With adapters, the reference is the policy without them."""
    from trl import DPOConfig, DPOTrainer

    policy = LlamaForCausalLM(LlamaConfig(**w.SHAPE))
    ref = None if w.LORA else LlamaForCausalLM(LlamaConfig(**w.SHAPE))
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(**common(folder), beta=w.BETA, max_length=w.PROMPT + w.RESPONSE + 8)
        trainer = DPOTrainer(
            policy,
            ref,
            args=config,
            train_dataset=rows(),
            processing_class=tokenizer(),
            peft_config=lora("CAUSAL_LM"),
            callbacks=[Turns()],
        )
        trainer.train()


def reward() -> None:
    """trl's RewardTrainer."""
    from trl import RewardConfig, RewardTrainer

    rm = LlamaForSequenceClassification(LlamaConfig(**w.SHAPE, num_labels=1))
    with tempfile.TemporaryDirectory() as folder:
        config = RewardConfig(**common(folder), max_length=w.PROMPT + w.RESPONSE + 8)
        trainer = RewardTrainer(
            rm,
            args=config,
            train_dataset=rows(),
            processing_class=tokenizer(),
            peft_config=lora("SEQ_CLS"),
            callbacks=[Turns()],
        )
        trainer.train()


class Iterations(TrainerCallback):
    """Makes PPOTrainer wait for its turn before each iteration. It announces only the end of an iteration."""

    def on_train_begin(self, *args, **kwargs):
        turns.ready()
        self.began = turns.wait()

    def on_step_end(self, *args, **kwargs):
        turns.report(self.began)
        self.began = turns.wait()


def ppo() -> None:
    """trl's PPOTrainer (0.23.1), with four models and rollouts by transformers' `generate`."""
    from datasets import Dataset
    from trl import PPOConfig, PPOTrainer

    policy, ref = (LlamaForCausalLM(LlamaConfig(**w.SHAPE)) for _ in range(2))
    rm, critic = (LlamaForSequenceClassification(LlamaConfig(**w.SHAPE, num_labels=1)) for _ in range(2))
    for model in (policy, ref):
        model.generation_config.pad_token_id = w.SHAPE["pad_token_id"]
    data = Dataset.from_list([{"input_ids": ids} for ids in w.tokens(w.ROLLOUT, w.PROMPT)] * 200)
    with tempfile.TemporaryDirectory() as folder:
        config = PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=w.ROLLOUT,
            gradient_accumulation_steps=1,
            local_rollout_forward_batch_size=w.ROLLOUT,
            num_ppo_epochs=w.EPOCHS,
            num_mini_batches=w.MINIBATCHES,
            response_length=w.RESPONSE,
            temperature=1.0,
            learning_rate=w.LR,
            total_episodes=10_000 * w.ROLLOUT,
            num_sample_generations=0,
            stop_token_id=-1,  # no token ends a response
            save_strategy="no",
            report_to=[],
            use_cpu=w.DEVICE == "cpu",
            bf16=BF16,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
        )
        trainer = PPOTrainer(
            args=config,
            processing_class=tokenizer(),
            model=policy,
            ref_model=ref,
            reward_model=rm,
            value_model=critic,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[Iterations()],
        )
        trainer.train()


def generation() -> None:
    """transformers' `generate`, sampling from the whole distribution."""
    policy = LlamaForCausalLM(LlamaConfig(**w.SHAPE)).eval().to(w.DEVICE, torch.bfloat16 if BF16 else torch.float32)
    prompts = torch.tensor(w.tokens(w.ROLLOUT, w.PROMPT)).to(w.DEVICE)
    lengths = dict(min_new_tokens=w.RESPONSE, max_new_tokens=w.RESPONSE)
    with torch.no_grad():
        turns.serve(
            lambda: policy.generate(
                prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, top_p=1.0, **lengths
            )
        )


if __name__ == "__main__":
    cases = {"sft": sft, "dpo": dpo, "reward": reward, "generate": generation, "ppo": ppo}
    case, (threads,) = turns.arguments(
        "python benchmarks/peers.py CASE THREADS", cases=[*cases, *(f"{c}-bf16" for c in cases)]
    )
    if w.DEVICE == "cuda" and not torch.cuda.is_available():
        sys.exit(f"the peer's torch {torch.__version__} reaches no GPU")
    BF16 = case.endswith("-bf16")
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cases[case.removesuffix("-bf16")]()
