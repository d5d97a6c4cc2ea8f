"""A run of a model with a chat template: its stages and chat write one form, and other programs stop where it stops."""

from __future__ import annotations

import json

import pytest

import train_sft
import train_tokenizer
from mpo.config import SFTConfig, TokenizerConfig
from mpo.data.rows import Row, write_rows
from mpo.data.tokenizer import load_tokenizer
from mpo.data.tokenizer_files import RECORD
from mpo.runtime.flags import parse
from tests.support import templates
from tests.support.layouts import LAYOUTS
from tests.test_chat import chat

PROMPT = "\n\nHuman: Hi {}\n\nAssistant:"


def run(stage, config, **flags):
    stage.main(parse(config, [f"--{name}={value}" for name, value in flags.items()]))


@pytest.fixture
def start(tmp_path):
    """A base model whose tokenizer has another EOS than its template, and a data folder."""
    LAYOUTS["qwen3"](tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(templates.QWEN)
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": 400}')
    for split in ("train", "test"):
        rows = [Row(f"{i}", PROMPT.format(i), " Yes.", " No.") for i in range(4)]
        write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
    (tmp_path / "data" / "manifest.json").write_text(
        json.dumps({"stage": "data", "config": {}, "inputs": {}, "outputs": {}, "results": {"prompt_form": "dialogue"}})
    )
    return tmp_path


@pytest.mark.parametrize("template", ["auto", "none"])
def test_every_stage_writes_the_form_that_the_tokenizer_stage_recorded(start, template, capsys):
    model, data, tokenizer = start / "model", start / "data", start / "tokenizer"
    run(train_tokenizer, TokenizerConfig, data=data, model=model, template=template, out=tokenizer)
    assert ("ends a turn with <|im_end|>" in capsys.readouterr().out) == (template == "auto")
    sizes = {"batch": 4, "microbatch": 4, "epochs": 1, "threads": 1}
    run(train_sft, SFTConfig, data=data, tokenizer=tokenizer, model=model, out=start / "sft", **sizes)
    assert (start / "sft" / RECORD).exists() == (template == "none")
    written = load_tokenizer(start / "sft")
    assert (written.turns is not None) == (template == "auto")
    assert written.vocabulary.piece(written.eos) == ("<|im_end|>" if template == "auto" else "<|endoftext|>")
    stops = [400, 402] if template == "auto" else 400
    for name in ("config.json", "generation_config.json"):
        assert json.loads((start / "sft" / name).read_text())["eos_token_id"] == stops
    assert (start / "sft" / "chat_template.jinja").read_text() == templates.QWEN


def test_chat_writes_the_dialogue_with_the_template_and_says_what_it_refuses(start):
    done = chat(start / "model", b"Hi\n<|im_end|>\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n> ") == 3
    refusing = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}" + templates.QWEN
    (start / "model" / "chat_template.jinja").write_text(refusing)
    done = chat(start / "model", b"Hi\nHo\n")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"(the chat template refuses the messages: enough)") == 1
