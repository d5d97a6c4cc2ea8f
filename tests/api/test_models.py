"""Models in a notebook: what they generate, score and say of tokens, beside transformers; and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch

import mpo
from mpo.data.tokenizer import load_tokenizer
from mpo.kernels import functions as kernels
from mpo.model.hf_config import read_scale
from mpo.runtime import device, setup
from mpo.runtime.files import read_json
from tests.support import templates
from tests.support.layouts import LAYOUTS

QUESTION, ANSWERS = "What color is grass?", ["It is green.", "It is blue, I think."]
PROMPT = "\n\nHuman: What color is grass?\n\nAssistant:"
ROWS = [
    {"prompt": QUESTION, "chosen": ANSWERS[0], "rejected": ANSWERS[1]},
    {"prompt": "I lost my wallet.", "chosen": "That sounds hard.", "rejected": "Ha!"},
]


@pytest.fixture(scope="module")
def sft(hh_run):
    return mpo.load(hh_run / "sft", device="cpu")


@pytest.fixture(scope="module")
def policy(hh_run):
    return mpo.load(hh_run / "mpo", device="cpu")


@pytest.fixture(scope="module")
def rm(hh_run):
    return mpo.load(hh_run / "rm", device="cpu")


def ids_of(folder, response):
    """The ids of the question, and of a response with EOS, by sentencepiece itself."""
    sp = load_tokenizer(folder).vocabulary.sp
    return [sp.bos_id(), *sp.EncodeAsIds(PROMPT)], [*sp.EncodeAsIds(" " + response), sp.eos_id()]


@pytest.fixture(scope="module")
def theirs(hh_run):
    """transformers' log-probs of a response under a model of the run, over the vocabulary: (R, V)."""
    transformers = pytest.importorskip("transformers")

    def logps(stage, response):
        model = transformers.AutoModelForCausalLM.from_pretrained(hh_run / stage)
        prompt, answer = ids_of(hh_run / stage, response)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0]
        return logits[len(prompt) - 1 : -1].double().log_softmax(-1), answer

    return logps


# --- loading -----------------------------------------------------------------------------------------


def test_config_json_decides_what_a_folder_is(hh_run, policy, rm):
    assert isinstance(policy, mpo.Policy)
    assert isinstance(rm, mpo.RewardModel)
    assert rm.results == read_json(hh_run / "rm" / "manifest.json")["results"]
    assert policy.results["iterations"] == 2
    assert isinstance(mpo.Policy.load(hh_run / "sft", device="cpu"), mpo.Policy)
    assert repr(policy) == f"Policy({hh_run / 'mpo'}: 0.4 M parameters, fp32 on cpu)"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: mpo.load(run), "it is not a model; name one of the models in it: dpo, mpo, rm, sft"),
        (lambda run: mpo.Policy.load(run / "rm"), "rm: is a RewardModel, not a Policy"),
        (lambda run: mpo.RewardModel.load(run / "sft"), "sft: is a Policy, not a RewardModel"),
        (lambda run: mpo.load("org/name"), "org/name: no such folder; to download it from the hub: "),
        (
            lambda run: mpo.load(run / "sft", precision="fp16"),
            "precision='fp16': expected one of fp32, bf16-mixed, bf16",
        ),
        (lambda run: mpo.load(run / "sft", form="chat"), "form='chat': expected one of dialogue, post, text"),
        (lambda run: mpo.load(run / "sft", device="tpu"), "--device tpu: not here"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(hh_run, call, message):
    with pytest.raises(mpo.InputError) as refusal:
        call(hh_run)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


# --- generate ----------------------------------------------------------------------------------------


def test_a_question_is_answered_as_transformers_does(hh_run, sft):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(hh_run / "sft")
    prompt, _ = ids_of(hh_run / "sft", "")
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :]
    expected = load_tokenizer(hh_run / "sft").decode(ids.tolist()).strip()
    assert sft.generate(QUESTION, max_new=12, temperature=0) == expected
    assert sft.generate(PROMPT, max_new=12, temperature=0) == expected  # in the form of the rows already


def test_a_list_gives_a_list_and_a_seed_the_same_answers(policy):
    questions = [QUESTION, "I lost my wallet.", QUESTION]
    answers = policy.generate(questions, max_new=10, seed=5)
    assert answers == policy.generate(questions, max_new=10, seed=5) != policy.generate(questions, max_new=10, seed=6)
    assert answers[0] != answers[2]
    assert policy.generate([]) == []
    greedy = policy.generate(questions, max_new=10, temperature=0)
    assert greedy == [policy.generate(q, max_new=10, temperature=0) for q in questions]


def test_more_prompts_than_are_sampled_at_once_are_answered_alike(policy, monkeypatch):
    questions = [f"What is {n} and {n}?" for n in range(5)]
    expected = policy.generate(questions, max_new=6)
    monkeypatch.setattr("mpo.api.models.ROWS", 2)
    assert policy.generate(questions, max_new=6) == expected


def test_a_text_is_continued_as_it_is_if_the_form_says_so(hh_run, sft):
    text = mpo.load(hh_run / "sft", device="cpu", form="text")
    assert text.generate(PROMPT, max_new=8, temperature=0) == sft.generate(QUESTION, max_new=8, temperature=0)
    assert text.logp(QUESTION, ANSWERS[0]) != pytest.approx(sft.logp(QUESTION, ANSWERS[0]))
    post = mpo.load(hh_run / "sft", device="cpu", form="post")
    written = "SUBREDDIT: r/advice\n\nTITLE: Help\n\nPOST: I fell.\n\nTL;DR:"
    assert post.logp("r/advice | Help | I fell.", "He fell.") == text.logp(written, "He fell.")


def test_a_chat_template_writes_the_dialogue(tmp_path):
    pytest.importorskip("jinja2")
    LAYOUTS["qwen3"](tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(templates.QWEN)
    model = mpo.load(tmp_path / "model", device="cpu")
    tokens = [t.token for t in model.tokens("Hi", "Yes")]
    assert ("".join(tokens[:-1]), tokens[-1]) == ("Yes", "<|im_end|>")
    prompt, _ = model._sequences("Hi", "Yes", 100)[0]
    written = "".join(model.tokenizer.vocabulary.piece(i) for i in prompt)
    assert (
        written.replace("Ġ", " ").replace("Ċ", "\n").endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate("a " * 2000), "prompt 0: too long: the model has room for"),
        (lambda p: p.generate("Hi", max_new=0), "max_new=0: must be at least 1"),
        (lambda p: p.generate("Hi", temperature=-1), "temperature=-1: must be at least 0"),
        (lambda p: p.generate("Hi", max_new=10**6), "leaves no room for a prompt"),
        (lambda p: p.logp(["Hi", "Ho"], ["Yes"]), "2 prompts and 1 responses"),
        (lambda p: p.logp(["Hi"], "Yes"), "several prompts need a list of responses"),
        (lambda p: p.logp("Hi", "yes " * 3000), "tokens, of which the model takes at most"),
        (lambda p: p.pair_logps([ROWS[0], {**ROWS[0], "rejected": ANSWERS[0]}]), "1 same response twice"),
        (lambda p: p.pair_logps([ROWS[0], "text"]), "rows[1]: expected a JSON object, found str"),
        (lambda p: p.pair_logps([ROWS[0], {"prompt": "Hi", "chosen": 3}]), "rows[1]: "),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(policy, call, message):
    with pytest.raises(mpo.InputError) as refusal:
        call(policy)
    assert message in str(refusal.value)


def test_a_dialogue_without_room_loses_its_oldest_turns_and_a_note_says_so(policy, capsys):
    long = (
        "".join(f"\n\nHuman: {'word ' * 60}{i}\n\nAssistant: Yes." for i in range(20)) + "\n\nHuman: Hi\n\nAssistant:"
    )
    assert isinstance(policy.generate(long, max_new=4), str)
    assert "prompt 0: its " in capsys.readouterr().err


# --- log-probs and scores ----------------------------------------------------------------------------


def test_log_probs_of_tokens_are_those_of_transformers(policy, theirs):
    logps, ids = theirs("mpo", ANSWERS[0])
    tokens = policy.tokens(QUESTION, ANSWERS[0])
    assert "".join(t.token for t in tokens) == " It is green.</s>"
    expected = [float(logps[i, token]) for i, token in enumerate(ids)]
    assert [t.logp for t in tokens] == pytest.approx(expected, abs=1e-4)
    assert policy.logp(QUESTION, ANSWERS[0]) == pytest.approx(sum(expected), abs=1e-3)
    both = policy.logp(QUESTION, ANSWERS)
    assert both == pytest.approx([policy.logp(QUESTION, answer) for answer in ANSWERS], abs=1e-4)
    assert both == pytest.approx(policy.logp([QUESTION] * 2, ANSWERS), abs=1e-4)
    assert policy.logp([], []) == []


def test_a_reference_adds_its_log_probs_and_the_exact_kl(policy, sft, theirs):
    (ours, ids), (reference, _) = theirs("mpo", ANSWERS[0]), theirs("sft", ANSWERS[0])
    tokens = policy.tokens(QUESTION, ANSWERS[0], ref=sft)
    assert [t.ref_logp for t in tokens] == pytest.approx([float(reference[i, k]) for i, k in enumerate(ids)], abs=1e-4)
    exact = (ours.exp() * (ours - reference)).sum(1)
    assert [t.kl for t in tokens] == pytest.approx(exact.tolist(), abs=1e-5)
    assert max(t.kl for t in tokens) > 1e-6
    assert [t.kl for t in sft.tokens(QUESTION, ANSWERS[0], ref=sft)] == pytest.approx([0.0] * len(ids), abs=1e-6)


def test_tokens_are_shown_as_a_table(sft):
    header, line, first, *_ = repr(sft.tokens(QUESTION, ANSWERS[0], ref=sft)).splitlines()
    assert header.split() == "| token | logp | ref_logp | kl |".split()
    assert set(line) == {"|", "-"}
    assert first.startswith("| ' It'")


def test_a_reference_with_another_tokenizer_is_refused(sft, tmp_path):
    LAYOUTS["qwen3"](tmp_path / "model")
    with pytest.raises(mpo.InputError, match="has another tokenizer or chat template"):
        sft.tokens("Hi", "Yes", ref=mpo.load(tmp_path / "model", device="cpu"))


def test_scores_are_those_of_transformers_less_the_recorded_mean(hh_run, rm):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hh_run / "rm")
    mean, _ = read_scale(hh_run / "rm" / "config.json")
    expected = []
    for answer in ANSWERS:
        with torch.no_grad():
            prompt, response = ids_of(hh_run / "rm", answer)
            ids = torch.tensor([prompt + response])
            expected.append(float(model(ids).logits[0, 0]) - mean)
    assert rm.score(QUESTION, ANSWERS) == pytest.approx(expected, abs=1e-3)
    assert rm.score(QUESTION, ANSWERS[0]) == pytest.approx(expected[0], abs=1e-3)


def test_gaps_are_differences_of_scores_in_the_order_of_the_rows(rm):
    gaps = rm.gaps(ROWS).tolist()
    expected = [rm.score(r["prompt"], r["chosen"]) - rm.score(r["prompt"], r["rejected"]) for r in ROWS]
    assert gaps == pytest.approx(expected, abs=1e-4)
    split = mpo.split_by_gap(torch.tensor([2.0, 0.3, -2.0]), gamma=1.0)
    assert split.parts == {"easy": [0], "hard": [1], "contradicted": [2]}


def test_pairs_become_what_a_loss_takes(policy, sft):
    pairs = policy.pair_logps(ROWS, ref=sft)
    for name, model in (("", policy), ("ref_", sft)):
        for side in ("chosen", "rejected"):
            expected = [model.logp(row["prompt"], row[side]) for row in ROWS]
            assert getattr(pairs, name + side).tolist() == pytest.approx(expected, abs=1e-3)
    (c, r), (ref_c, ref_r) = ((model.logp(QUESTION, ANSWERS)) for model in (policy, sft))
    d = c - ref_c - (r - ref_r)
    assert mpo.losses.sigmoid(pairs, beta=0.5)[0].item() == pytest.approx(math.log(1 + math.exp(-0.5 * d)), abs=1e-4)
    assert policy.pair_logps(ROWS).ref_chosen.tolist() == [0.0, 0.0]


def test_a_loss_on_pairs_reaches_the_weights(hh_run, sft):
    model = mpo.load(hh_run / "sft", device="cpu")
    with torch.no_grad():
        assert not model.pair_logps(ROWS, ref=sft).chosen.requires_grad
    before = mpo.losses.sigmoid(model.pair_logps(ROWS, ref=sft), beta=1.0).mean().item()
    assert before == pytest.approx(math.log(2), abs=1e-5)
    optimiser = torch.optim.SGD(model.model.parameters(), lr=0.1)
    for _ in range(3):
        loss = mpo.losses.sigmoid(model.pair_logps(ROWS, ref=sft), beta=1.0).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < before - 0.01


def test_rows_in_any_format_are_taken(policy):
    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in ROWS
    ]
    assert policy.pair_logps(messages).chosen.tolist() == policy.pair_logps(ROWS).chosen.tolist()


# --- what is left as it was --------------------------------------------------------------------------


def settings():
    """What a stage changes in its process."""
    places = device.current(), device.weight_dtype(), torch.are_deterministic_algorithms_enabled()
    return *places, torch.get_num_threads(), setup.keeps_denormals(), kernels.rounding()


@pytest.mark.parametrize("precision", ["fp32", "bf16-mixed", "bf16"])
def test_settings_of_torch_are_given_back_after_each_call(hh_run, precision):
    before = settings()
    assert before[4]  # denormals are kept
    policy, rm = (mpo.load(hh_run / stage, device="cpu", precision=precision) for stage in ("sft", "rm"))
    assert settings() == before
    assert policy.model.model.norm.weight.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert isinstance(policy.generate(QUESTION, max_new=3), str)
    assert policy.logp(QUESTION, ANSWERS[0]) < 0
    assert math.isfinite(rm.score(QUESTION, ANSWERS[0]))
    with pytest.raises(mpo.InputError):
        policy.generate("Hi", max_new=0)
    assert settings() == before


def test_models_of_two_precisions_live_beside_each_other(hh_run, sft):
    expected = sft.logp(QUESTION, ANSWERS[0])
    rounded = mpo.load(hh_run / "sft", device="cpu", precision="bf16")
    assert rounded.logp(QUESTION, ANSWERS[0]) == pytest.approx(expected, rel=0.05)
    assert sft.logp(QUESTION, ANSWERS[0]) == expected
    with pytest.raises(mpo.InputError, match="in another precision"):
        sft.tokens(QUESTION, ANSWERS[0], ref=rounded)


def test_a_name_that_the_package_lacks_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'mpo' has no attribute 'lood'; it has load, "):
        mpo.lood  # noqa: B018
