"""Reward models from elsewhere and for elsewhere: heads, scales, pads, tokenizers of their own."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo.config import PPOConfig
from mpo.data.batches import Pair, encode, encode_for_each, make_batch
from mpo.data.dialogue import dialogue_text
from mpo.data.rows import Row
from mpo.data.tokenizer import load_tokenizer
from mpo.kernels.functions import Packing
from mpo.model.checkpoint import load_as_scalar, load_model, load_scalar, save_model
from mpo.model.llama import new_score_head, scalar_from
from mpo.model.scoring import rm_tokenizer, score, scorer_between
from mpo.ppo.learner import load_learner
from mpo.runtime.errors import InputError
from mpo.runtime.flags import parse
from mpo.runtime.seeding import generator
from tests.conftest import small_config, small_model
from tests.support import templates
from tests.support.layouts import LAYOUTS, chatml, gemma3, llama_2, llama_3, qwen2, smollm2

ROWS = [
    Row("a", "\n\nHuman: Hi\n\nAssistant:", " Yes.", " No, never: that is what I think."),
    Row("b", "\n\nHuman: What is 2 + 2?\n\nAssistant: 4\n\nHuman: Sure?\n\nAssistant:", " Yes, I am sure.", " 5"),
]
# The token that a reward model's folder names for padding, by the layout that it came in.
PADS = {
    "llama_2": "<unk>",
    "llama_3": "<|end_of_text|>",
    "mistral": "<unk>",
    "chatml": "</s>",
    "yi": "<unk>",
    "smollm2": "<|im_start|>",  # there are but this token and EOS
    "tinyllama": "<unk>",
    "qwen2": "<|endoftext|>",
    "qwen3": "<|endoftext|>",
    "gemma3": "<pad>",
    "gemma3_json": "<pad>",
}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def published(folder, given, template=None):
    """A reward model as another program saves it, from a language model's folder; returns its folder."""
    rm = load_as_scalar(given, generator(3, "head"))
    save_model(folder, rm, load_tokenizer(given))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if not k.startswith("mpo_")}))
    if template:
        (folder / "chat_template.jinja").write_text(template)
    return folder


# --- in transformers -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_batch_scores_the_same_in_transformers_with_the_tokenizer_of_the_folder(layout, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    given = LAYOUTS[layout](tmp_path / "given")
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    ours = load_tokenizer(given)
    save_model(tmp_path / "rm", load_as_scalar(given, generator(3, "head")), ours)
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "rm")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", dtype=torch.float32)
    assert tokenizer.pad_token == PADS[layout]
    assert model.config.pad_token_id == tokenizer.pad_token_id != ours.eos
    again = load_tokenizer(tmp_path / "rm")
    assert again.same_as(ours)
    pairs, _ = encode(ROWS, ours, 200, 100)
    texts = [(pair.prompt, ids) for pair in pairs for ids in (pair.chosen, pair.rejected)]
    assert len({len(p + r) for p, r in texts}) > 2
    expected = score(load_scalar(tmp_path / "rm"), make_batch(texts))
    for side in ("left", "right"):
        tokenizer.padding_side = side
        batch = tokenizer.pad({"input_ids": [p + r for p, r in texts]}, return_tensors="pt")
        scores = model.eval()(**batch).logits[:, 0]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layout", "template", "tail"),
    [
        (qwen2, templates.QWEN, 1),
        (gemma3, templates.GEMMA, 1),
        (smollm2, templates.SMOLLM2, 1),
        (llama_3, templates.LLAMA_3, 0),
        (llama_2, templates.MISTRAL, 0),
    ],
)
def test_a_published_reward_model_scores_what_its_template_writes(layout, template, tail, tmp_path):
    """A line break after the last turn is read, too, as in transformers; one of ours stops at EOS."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    folder = published(tmp_path / "rm", layout(tmp_path / "given"), template)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    talk = [("user", "What is 2 + 2?"), ("assistant", "4"), ("user", "Sure?"), ("assistant", "Yes, I am sure.")]
    listed = [{"role": role, "content": text} for role, text in talk]
    ids = tokenizer.apply_chat_template(listed, tokenize=True, return_dict=False)
    expected = theirs(input_ids=torch.tensor([ids])).logits[0, 0].item()
    reads = rm_tokenizer(str(folder))
    sequence = reads.prompt_ids(dialogue_text(talk[:-1])), reads.response_ids(" Yes, I am sure.")
    assert score(load_scalar(folder), make_batch([sequence])).item() == pytest.approx(expected, abs=1e-4)
    edit_json(folder / "config.json", mpo_score_mean=0.0, mpo_score_std=1.0)
    ours = rm_tokenizer(str(folder))
    assert ours.response_ids(" Yes") == reads.response_ids(" Yes")[: len(reads.response_ids(" Yes")) - tail]


# --- heads and scales ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path, scalar_from(small_model(), generator(0, "head")))
    return tmp_path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"score.weight": torch.ones(2, 24)},
            r"its head gives 2 numbers \(num_labels\); that of a reward model gives 1",
        ),
        (
            {"score.bias": torch.ones(1)},
            "has score.bias, score.weight besides the layers; the head of a reward model must",
        ),
        (
            {"score.weight": None, "score.0.weight": torch.ones(24, 24), "score.2.weight": torch.ones(1, 24)},
            "has score.0.weight, score.2.weight besides the layers; .* one linear layer without bias, score.weight",
        ),
        ({"score.weight": None, "v_head.summary.weight": torch.ones(1, 24)}, "has v_head.summary.weight besides"),
        ({"score.weight": torch.ones(1, 23)}, r"score.weight is \(1, 23\), config.json says \(1, 24\)"),
        ({"score.weight": torch.tensor(1.0)}, "its head gives 0 numbers"),
        ({"score.weight": torch.full((1, 24), torch.nan)}, "numbers that are not finite"),
        ({"score.weight": None}, "is a language model, not a reward model"),
    ],
)
def test_another_kind_of_head_is_refused_by_name(folder, tensors, message):
    weights = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in weights.items() if t is not None}, folder / "model.safetensors")
    with pytest.raises(InputError, match=message) as error:
        load_scalar(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["LlamaForTokenClassification"]},
            "'LlamaForTokenClassification' is not supported for a rew",
        ),
        ({"architectures": "MistralForSequenceClassification"}, "; LlamaForSequenceClassification is"),
        ({"mpo_score_std": 0.0}, "mpo_score_std must be a number above 0, found 0.0"),
        ({"mpo_score_std": float("nan")}, "mpo_score_std must be a number above 0, found nan"),
        ({"mpo_score_std": "2"}, "mpo_score_std must be a number above 0, found '2'"),
        ({"mpo_score_mean": None}, "mpo_score_mean must be a finite number, found None"),
        ({"mpo_score_mean": True}, "mpo_score_mean must be a finite number, found True"),
    ],
)
def test_another_architecture_and_a_damaged_scale_are_refused_by_name(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        load_scalar(folder)
    assert "\n" not in str(error.value)


def test_a_folder_without_architectures_loads(folder):
    edit_json(folder / "config.json", architectures=None)
    load_scalar(folder)


def test_a_reward_model_as_this_project_wrote_it_once_scores_as_before(folder):
    """Its head was not scaled; mean and standard deviation were tensors."""
    weights, ids = load_file(folder / "model.safetensors"), torch.randint(3, 60, (9,))
    raw = load_scalar(folder)(ids, Packing([9]))  # its scale is 0 and 1
    save_file(weights | {"score_mean": torch.tensor(3.0), "score_std": torch.tensor(2.0)}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith(("mpo_", "id2", "label2", "problem"))}
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["MPOScalarModel"]}))
    old = load_scalar(folder)
    torch.testing.assert_close(old(ids, Packing([9])), (raw - 3) / 2)
    torch.testing.assert_close(load_scalar(folder, centred=False)(ids, Packing([9])), raw / 2)
    save_model(folder, old)
    assert set(load_file(folder / "model.safetensors")) == set(weights)
    torch.testing.assert_close(load_scalar(folder)(ids, Packing([9])), (raw - 3) / 2)


# --- a tokenizer of its own ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The tokenizer of a policy without a template, and a reward model whose template ends in a line break."""
    place = tmp_path_factory.mktemp("two")
    writes = load_tokenizer(llama_2(place / "policy"), "none")
    folder = published(place / "rm", qwen2(place / "given"), templates.QWEN)
    return writes, rm_tokenizer(str(folder)), load_scalar(folder).eval()


@torch.no_grad()
def test_finished_and_unfinished_responses_reach_a_reward_model_as_text(two):
    writes, reads, rm = two
    (pairs, judged), counts = encode_for_each(ROWS, [writes, reads], 200, 100)
    assert counts["kept"] == 2
    scorer = scorer_between(writes, reads, pairs, judged)
    responses = [writes.response_ids(" Yes, I am."), writes.response_ids(" Yes, I am.")[:-1], [writes.bos, writes.bos]]
    scores = scorer(rm, make_batch([(pairs[1].prompt, response) for response in responses]))
    begin = reads.prompt_ids(ROWS[1].prompt)
    text = reads.vocabulary.encode("Yes, I am.")
    by_hand = [[*begin, *text, reads.eos, *reads.vocabulary.encode("\n")], [*begin, *text], [*begin, reads.eos]]
    for ids, result in zip(by_hand, scores, strict=True):
        assert result.item() == pytest.approx(rm(torch.tensor(ids), Packing([len(ids)]))[-1].item(), abs=1e-5)


@torch.no_grad()
def test_a_response_that_is_too_long_for_the_reward_model_is_cut(two):
    writes, reads, rm = two
    pairs, judged = (encode(ROWS, tokenizer, 200, 100)[0] for tokenizer in (writes, reads))
    response = writes.response_ids(" Yes" * 600)  # more than its 512 positions
    result = scorer_between(writes, reads, pairs, judged)(rm, make_batch([(pairs[0].prompt, response)]))
    ids = (reads.prompt_ids(ROWS[0].prompt) + reads.vocabulary.encode("Yes" + " Yes" * 599))[:512]
    assert result.item() == pytest.approx(rm(torch.tensor(ids), Packing([512]))[-1].item(), abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "template", "alike"), [(llama_3, templates.LLAMA_3, True), (qwen2, templates.QWEN, False)]
)
def test_ids_are_exchanged_where_a_reward_model_reads_what_the_policy_writes(layout, template, alike, tmp_path):
    """A published model reads QWEN's line break after the last turn, which no policy writes."""
    folder = published(tmp_path / "rm", layout(tmp_path / "given"), template)
    writes, reads = load_tokenizer(folder), rm_tokenizer(str(folder))
    pairs = encode(ROWS, writes, 200, 100)[0]
    assert (scorer_between(writes, reads, pairs, pairs) is score) == alike


def test_only_rows_that_fit_for_every_tokenizer_are_kept_and_each_drop_is_counted_once(two):
    writes, reads, _ = two
    long = Row("c", ROWS[0].prompt, " a", " " + "日" * 30)
    blank = Row("d", ROWS[0].prompt, "", " a")
    rows = [ROWS[0], long, blank, ROWS[1]]
    lengths = [len(tokenizer.response_ids(long.rejected)) for tokenizer in (writes, reads)]
    assert lengths[0] != lengths[1]
    (one, other), counts = encode_for_each(rows, [writes, reads], 200, max(lengths) - 1)
    assert [pair.row.id for pair in one] == [pair.row.id for pair in other] == ["a", "b"]
    assert [type(pair) for pair in one] == [Pair, Pair]
    assert counts == {
        "kept": 2,
        "dropped: empty response": 1,
        f"dropped: a response longer than {max(lengths) - 1} tokens": 1,
    }
    same, _ = encode_for_each(rows, [reads, reads], 200, 500)
    assert same[0] == same[1]


def test_a_critic_for_a_reward_model_with_other_ids_starts_as_the_policy_with_values_of_0(tmp_path):
    given = chatml(tmp_path / "policy")
    rm = published(tmp_path / "rm", qwen2(tmp_path / "given"))
    flags = {"out": "x", "prompts": "x", "model": given, "ref": given, "rm": rm}
    config = parse(PPOConfig, [f"--{name}={value}" for name, value in flags.items()])
    critic = load_learner(config, same_ids=False).critic.model
    ids, trunk = torch.arange(9), load_model(given).model
    assert torch.equal(critic(ids, Packing([9])), torch.zeros(9))
    torch.testing.assert_close(critic.model(ids, Packing([9])), trunk(ids, Packing([9])))
    assert all(p.requires_grad for p in critic.parameters())


def test_a_new_reward_model_has_the_trunk_of_its_language_model_and_a_small_head(tmp_path):
    model = small_model()
    save_model(tmp_path, model)
    rm = load_as_scalar(tmp_path, generator(0, "head"))
    trunk = model.model.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in rm.model.state_dict().items())
    wide = small_config(hidden_size=2000)
    head = new_score_head(wide, generator(0, "head"))["score.weight"]
    assert head.shape == (1, 2000)
    assert head.std().item() == pytest.approx(2001**-0.5, rel=0.06)  # the standard error of a std is 1/sqrt(2 * 2000)
    assert head.mean().item() == pytest.approx(0, abs=4 * 2001**-0.5 / 2000**0.5)
