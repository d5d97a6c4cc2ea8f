"""Sample from sharded models in 2 and in 4 processes, in every way: python -m tests.support.sampling WORK

Writes WORK/<processes>.json: for each case of CASES what `sample` returns. test_in_turn.py compares it with the samples
of one process. The processes are forked from this one, so that torch is imported only once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed.fsdp

from mpo.model import generate as generation
from mpo.model.generate import Sampling, generate
from mpo.model.llama import Adapters, Llama, cast_weights
from mpo.model.lora import TARGETS, adapted, attach
from mpo.runtime import distributed
from mpo.runtime.seeding import generator
from tests.conftest import small_model
from tests.support.crashes import wait
from tests.support.group import free_port

EOS = 2
# Those of the first half are longer, so that its processes compute more groups of prompts; two prompts are equal.
PROMPTS = [[1, 5, 9, 30, 31, 32], [1, 7, 7, 8, 9], [1, 40, 41, 42, 43, 44, 45], [1, 8, 8], [1, 20], [1, 20], [1, 3]]
# The weights of the model, and how they are sampled from. Rounded to bf16, other rows at a time would be other numbers.
CASES: list[tuple[str, dict[str, Any]]] = [
    ("fp32", {}),
    ("fp32", {"whole": False}),
    ("fp32", {"whole": False, "rows": 1}),
    ("fp32, adapters", {}),
    ("fp32, adapters", {"whole": False}),
    ("bf16, adapters", {}),
    ("bf16, adapters", {"whole": False}),
]


def case_name(kind: str, way: dict[str, Any]) -> str:
    """The name of a case in the results."""
    return f"{kind}: {way}"


def model_of(kind: str) -> Llama:
    """A model that often samples EOS, so that the rows of a process, and the processes, end at different steps."""
    model = small_model(tie_word_embeddings=False, num_hidden_layers=3)
    with torch.no_grad():
        model.lm_head.weight[EOS] = model.lm_head.weight.mean(0) + 0.5 * model.lm_head.weight.std(0)
    if "bf16" in kind:
        cast_weights(model, torch.bfloat16)
    if "adapters" in kind:
        attach(model, Adapters(2, 4.0, TARGETS, 1, ""))
        draw = generator(1, "adapters")
        for layer in adapted(model).values():
            for part in (layer.lora_A, layer.lora_B):
                part.weight = torch.nn.Parameter(torch.empty(part.weight.shape).normal_(0, 0.5, generator=draw))
    return model.eval()


def sample(model: Llama, **way: Any) -> dict[str, Any]:
    """The responses and log-probs, and the most layers that were gathered at once when a token was drawn."""
    gathered, draw = [0], generation.next_tokens

    def counting(*args: Any) -> Any:
        whole = [not hasattr(block.mlp.up_proj.weight, "full_tensor") for block in model.model.blocks]
        gathered[0] = max(gathered[0], sum(whole))
        return draw(*args)

    prefill, generation.PREFILL, generation.next_tokens = generation.PREFILL, 6, counting
    samples = generate(model, PROMPTS, Sampling(12, 0.9, EOS, **way), generator(3, "test"))
    generation.PREFILL, generation.next_tokens = prefill, draw
    return {"responses": samples.responses, "logps": samples.logps, "gathered": gathered[0]}


def work(rank: int, count: int, port: str, out: Path) -> None:
    """What each process does."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    distributed.start(sharded=True)
    models = {kind: distributed.shard(model_of(kind)) for kind, _ in CASES}
    results = {case_name(kind, way): sample(models[kind], **way) for kind, way in CASES}
    if distributed.is_main():
        (out / f"{count}.json").write_text(json.dumps(results))
    distributed.leave()


def main() -> None:
    """Run every case."""
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    for count in (2, 4):
        port, children = free_port(), []
        for rank in range(count):
            child = os.fork()
            if not child:
                try:
                    work(rank, count, port, out)
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            children.append(child)
        if any(statuses := [wait(child) for child in children]):
            sys.exit(f"{count} processes ended with {statuses}")


if __name__ == "__main__":
    main()
