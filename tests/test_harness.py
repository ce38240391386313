"""lm-evaluation-harness runs its tasks on our models, with the numbers of its own."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tests.test_likelihood import by_hand
from tests.toy import toy_base, write_jsonl
from workbench.errors import ConfigError, DataError, EvaluationError
from workbench.evaluation.generation import generate
from workbench.evaluation.harness import harness_model
from workbench.evaluation.likelihood import encode_pair

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: extra [harness]"
)
PAIRS = [("The capital of Peru is", " Lima"), ("Hi ", "Ho"), ("", "A text")]


def asked(*arguments):
    """A request, as the harness makes it."""
    return SimpleNamespace(args=arguments)


def test_without_the_package_the_extra_is_named(base, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "workbench.evaluation.harness_model", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluationError, match=r"not installed.*\[harness\]"):
        harness_model(base)


@needs_harness
def test_likelihoods_equal_a_hand_count():
    base = toy_base()
    found = harness_model(base, batch_size=2).loglikelihood([asked(*pair) for pair in PAIRS])
    for (context, text), (total, greedy) in zip(PAIRS, found):
        context, text = context.rstrip(), context[len(context.rstrip()) :] + text
        before = base.tokenizer.encode(context) or [base.tokenizer.bos_token_id]
        tokens = before + base.tokenizer.encode(text)
        expected, is_greedy = by_hand(base.model, tokens, len(before))
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == is_greedy


@needs_harness
@pytest.mark.parametrize("prompt", ["The capital of Peru is", "one ", "x"])
def test_a_continuation_begins_where_the_harness_has_it(prompt):
    base = toy_base()
    base.tokenizer.chat_template = None
    context, continuation = harness_model(base)._encode_pair(prompt, "two")
    example = encode_pair(base, prompt, "two")
    assert example.tokens[example.loss_mask].tolist() == continuation
    assert example.tokens[~example.loss_mask].tolist() == context


@needs_harness
def test_a_context_that_is_too_long_loses_its_beginning():
    base = toy_base()
    model = harness_model(base)
    long, short = "x" * 600 + "The end is", ("x" * 600 + "The end is near")[-513:-5]
    (total, _), (expected, _) = model.loglikelihood([asked(long, " near"), asked(short, " near")])
    assert total == pytest.approx(expected, abs=1e-3)
    with pytest.raises(DataError, match=r"has 600 tokens to score; 1 to 512 can be"):
        model.loglikelihood([asked("x", "y" * 600)])


@needs_harness
@pytest.mark.parametrize("length", [1, 40, 512, 700, 1300])
def test_a_whole_text_is_scored_token_by_token(length):
    base = toy_base()
    text = "".join(np.random.default_rng(0).choice(list("abcdef "), length))
    (found,) = harness_model(base).loglikelihood_rolling([asked(text)])
    ids = [base.tokenizer.bos_token_id, *base.tokenizer.encode(text)]
    expected = 0.0
    for start in range(0, len(ids) - 1, 512):
        end = min(start + 513, len(ids))
        begin = min(start, max(0, end - 513))
        expected += by_hand(base.model, ids[begin:end], start - begin + 1)[0]
    assert found == pytest.approx(expected, rel=1e-5)


@needs_harness
def test_texts_end_at_the_stop_sequences():
    base = toy_base()
    base.tokenizer.chat_template = None
    model = harness_model(base, batch_size=2)
    whole = generate(base, "Hi", max_tokens=30)
    prompts = ["Hi", "What is the capital of Peru?", "Ho"]
    plain = {"until": [], "max_gen_toks": 30}
    assert model.generate_until([asked(p, plain) for p in prompts]) == generate(
        base, prompts, max_tokens=30
    )
    place = next(n for n in range(4, 30) if whole[n] not in whole[:n])
    stops = [whole[place], whole[3 : place + 1], "never there"]  # two that end at once
    settings = {"until": stops, "max_gen_toks": 30, "do_sample": False}
    found = model.generate_until([asked("Hi", settings), asked("Ho", plain)])
    assert found[0] == whole[:3]
    assert found[1] == generate(base, "Ho", max_tokens=30)


@needs_harness
def test_a_prompt_that_is_too_long_loses_its_beginning():
    base = toy_base()
    base.tokenizer.chat_template = None
    settings = {"until": [], "max_gen_toks": 12}
    tail = "What is the capital of Peru? " * 20
    (found,) = harness_model(base).generate_until([asked("y" * 300 + tail, settings)])
    assert found == generate(base, ("y" * 300 + tail)[-500:], max_tokens=12)


@needs_harness
@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_beams": 4}, "asks for 'num_beams'"), ({"max_gen_toks": 512}, "leave no room")],
)
def test_what_cannot_be_generated_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        harness_model(toy_base()).generate_until([asked("Hi", {"until": ["."], **settings})])


TASK = {"dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
ROWS = [
    {"q": "What is the capital of France?", "o": ["Lyon", "Paris", "Nice"], "a": 1},
    {"q": "What is the capital of Italy?", "o": ["Rome", "Milan", "Turin"], "a": 0},
    {"q": "What is the capital of Peru?", "o": ["Quito", "La Paz", "Lima"], "a": 2},
]


def tasks(folder):
    """A task of each kind, from a local file."""
    data = str(write_jsonl(folder / "rows.jsonl", ROWS))
    common = {
        **TASK,
        "dataset_kwargs": {"data_files": {"test": data}, "cache_dir": str(folder / "cache")},
    }
    question = "Question: {{q}}\nAnswer:"
    choice = {
        **common,
        "task": "local_choice",
        "output_type": "multiple_choice",
        "doc_to_text": question,
        "doc_to_choice": "{{o}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    written = {
        **common,
        "task": "local_text",
        "output_type": "generate_until",
        "doc_to_text": question,
        "doc_to_target": "{{o[a]}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    }
    rolling = {
        **common,
        "task": "local_rolling",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }
    return [choice, written, rolling]


def evaluated(model, folder, monkeypatch, **settings):
    """Results and samples of the real harness, which may not reach for the network."""
    import lm_eval

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(folder / "cache"))
    settings = {"bootstrap_iters": 0, **settings}
    return lm_eval.simple_evaluate(model, tasks=tasks(folder), **settings)


def told(found):
    """Every sample's own numbers."""
    return {
        task: [sample["filtered_resps"] for sample in samples]
        for task, samples in found["samples"].items()
    }


@needs_harness
@pytest.mark.long
def test_the_real_harness_runs_its_tasks_on_a_toy(tmp_path, monkeypatch):
    base = toy_base()
    found = evaluated(harness_model(base), tmp_path, monkeypatch)
    assert set(found["results"]) == {"local_choice", "local_text", "local_rolling"}
    prompt = "Question: What is the capital of France?\nAnswer:"
    before = base.tokenizer.encode(prompt)
    for option, (total, _) in zip(ROWS[0]["o"], told(found)["local_choice"][0]):
        tokens = before + base.tokenizer.encode(" " + option)
        assert total == pytest.approx(by_hand(base.model, tokens, len(before))[0], abs=1e-3)
    assert found["results"]["local_rolling"]["bits_per_byte,none"] > 0


@needs_harness
@pytest.mark.long
def test_the_real_model_gets_the_harness_own_numbers(smollm2, tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="HFLM needs torch: extra [benchmarks]")
    import torch
    from lm_eval.models.huggingface import HFLM
    from mlx.utils import tree_flatten
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = dict(tree_flatten(smollm2.model.parameters()))
    model = LlamaForCausalLM(LlamaConfig(**smollm2.raw_config))
    tensors = {name: torch.tensor(np.array(array)) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    theirs = HFLM(pretrained=model.eval(), tokenizer=smollm2.tokenizer, device="cpu", batch_size=1)
    expected = evaluated(theirs, tmp_path, monkeypatch)
    found = evaluated(harness_model(smollm2), tmp_path, monkeypatch)
    compare(told(found), told(expected))
    assert found["results"]["local_choice"]["acc,none"] >= 2 / 3
    for task, results in expected["results"].items():
        for name, value in results.items():
            if isinstance(value, float):
                # Logits of the two differ by up to 6e-5 each; a perplexity adds up many.
                assert found["results"][task][name] == pytest.approx(value, rel=1e-3), (task, name)


def compare(ours, theirs):
    assert ours["local_text"] == theirs["local_text"]
    for mine, other in zip(ours["local_choice"], theirs["local_choice"]):
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
        np.testing.assert_allclose([t for t, _ in mine], [t for t, _ in other], atol=2e-3)
