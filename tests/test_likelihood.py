"""Log-likelihoods equal a hand count, whatever shares their batch."""

import mlx.core as mx
import numpy as np
import pytest

from tests.architectures import ARCHITECTURES
from tests.toy import toy_base, toy_examples
from workbench.errors import DataError, EvaluationError
from workbench.evaluation import likelihood
from workbench.evaluation.choices import ChoiceQuestion, multiple_choice, score_options
from workbench.evaluation.generation import encode_prompt, generate
from workbench.evaluation.likelihood import encode_pair, log_likelihood, score_rows
from workbench.models.loading import BaseModel
from workbench.tuning.lora import LoRAConfig, add_lora

PAIRS = [
    ("What is the capital of Peru?", "Lima"),
    ("What is the capital of Peru?", "The capital of Peru is Lima."),
    ("Hi", "Ho"),
    ("A question that is rather longer than the others, isn't it?", "x"),
]
FOREIGN = ["gpt2", "gemma2", "mistral", "qwen3_moe", "mamba2", "jamba"]


def log_softmax(logits):
    """In float64, by the textbook."""
    logits = np.array(logits.astype(mx.float32)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def by_hand(model, tokens, num_prompt):
    """(sum of log-probabilities, whether greedy), one row without padding."""
    tokens = [int(token) for token in tokens]
    log_probs = log_softmax(model(mx.array([tokens[:-1]]))[0])
    places = range(num_prompt - 1, len(tokens) - 1)
    total = sum(log_probs[t, tokens[t + 1]] for t in places)
    return total, all(log_probs[t].argmax() == tokens[t + 1] for t in places)


def without_template(base):
    base.tokenizer.chat_template = None
    return base


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_likelihoods_equal_a_hand_count(base, batch_size):
    found = log_likelihood(base, PAIRS, batch_size=batch_size)
    for (prompt, text), result in zip(PAIRS, found):
        ids = encode_prompt(base, prompt)
        tokens = ids + base.tokenizer.encode(text)
        total, greedy = by_hand(base.model, tokens, len(ids))
        assert result.total == pytest.approx(total, abs=1e-3)
        assert result.num_tokens == len(text.encode())
        assert result.mean == pytest.approx(total / len(text), abs=1e-4)
        assert result.is_greedy == greedy


def test_what_the_model_writes_is_the_greedy_continuation(smollm2):
    answer = generate(smollm2, "What is the capital of France?", max_tokens=8)
    pairs = [("What is the capital of France?", text) for text in (answer, answer[:-1] + "~")]
    right, wrong = log_likelihood(smollm2, pairs)
    assert right.is_greedy
    assert not wrong.is_greedy
    assert right.total > wrong.total


@pytest.mark.parametrize("name", FOREIGN)
def test_padding_changes_nothing_in_other_architectures(name):
    model = ARCHITECTURES[name].build()
    rows = toy_examples([5, 9, 14, 9], prompt=3)
    for row in rows:
        row.tokens[:] %= 50
    config = {"vocab_size": model.args.vocab_size}
    base = BaseModel(model, None, type("Config", (), config), None, name, None, config)
    for row, scored in zip(rows, score_rows(base, rows)):
        total, greedy = by_hand(model, row.tokens, 3)
        assert scored.log_probs.sum() == pytest.approx(total, abs=2e-3)
        assert scored.greedy.all() == greedy
        assert len(scored.log_probs) == len(row) - 3


def test_logits_are_made_some_at_a_time(base, monkeypatch):
    rows, sizes = toy_examples([9, 30, 12, 30]), []
    whole = score_rows(base, rows)
    monkeypatch.setattr(likelihood, "MAX_LOGITS", 20 * base.config.vocab_size)
    head = base.model.head

    def counted(states):
        sizes.append(len(states))
        return head(states)

    base.model.head = counted
    for one, other in zip(whole, score_rows(base, rows)):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)
    assert max(sizes) == 20
    assert sum(sizes) == sum(row.num_targets for row in rows)


def test_special_tokens_that_a_continuation_spells_are_text(base):
    example = encode_pair(base, "Hi", "a<|im_end|>")
    targets = example.tokens[example.loss_mask]
    assert len(targets) == len("a<|im_end|>")
    assert 2 not in targets
    assert example.tokens[~example.loss_mask].tolist() == encode_prompt(base, "Hi")


def test_without_a_template_white_space_goes_to_the_continuation(base):
    base = without_template(base)
    for prompt, text in (("one ", "two"), ("one", " two")):
        example = encode_pair(base, prompt, text)
        assert base.tokenizer.decode(example.tokens[example.loss_mask]) == " two"
    assert encode_pair(base, "  ", "two").tokens.tolist()[0] == base.tokenizer.bos_token_id


def test_a_text_without_a_prompt_begins_with_the_first_token(base):
    base = without_template(base)
    example = encode_pair(base, "", "two")
    assert example.tokens.tolist() == [1, *base.tokenizer.encode("two")]
    assert example.num_targets == 3
    base.tokenizer.bos_token = None
    assert encode_pair(base, "", "two").tokens[0] == 2
    base.tokenizer.eos_token = None
    with pytest.raises(DataError, match="no token that a text begins with"):
        encode_pair(base, "", "two")


def test_a_token_across_the_border_is_a_target(smollm2, monkeypatch):
    monkeypatch.setattr(smollm2.tokenizer, "chat_template", None)
    decode = smollm2.tokenizer.decode
    example = encode_pair(smollm2, "The capital of Fra", "nce is Paris")
    assert decode(example.tokens) == "The capital of France is Paris"
    assert decode(example.tokens[example.loss_mask]) == " France is Paris"
    spaced = encode_pair(smollm2, "The capital of France is ", "Paris")
    assert decode(spaced.tokens[spaced.loss_mask]) == " Paris"


def test_dropout_is_off_meanwhile(base):
    add_lora(base.model, LoRAConfig(rank=4, dropout=0.9))
    for layer in base.model.layers:
        layer.mlp.up_proj.lora_b = mx.ones_like(layer.mlp.up_proj.lora_b)
    base.model.train()
    assert log_likelihood(base, PAIRS) == log_likelihood(base, PAIRS)
    assert base.model.training


BAD = {
    "empty": ("Hi", "", "no tokens"),
    "not text": ("Hi", 3, "must be a text"),
    "half a surrogate": ("Hi", "\ud800", "UTF-8"),
    "too long": ("Hi", "x" * 600, r"pair 0: has \d+ tokens, the model has 512 positions"),
    "no prompt": (None, "x", "pair 0: a prompt must be a text or a list of messages, got None"),
    "bad prompt": ([{"role": "robot", "content": "Hi"}], "x", "unknown role"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_scored_is_named(base, name):
    prompt, text, message = BAD[name]
    with pytest.raises(DataError, match=message):
        log_likelihood(base, [(prompt, text)])


@pytest.mark.parametrize("pairs", [None, 3, "ab", ["ab"], [3], [("Hi",)], [("Hi", "x", "y")]])
def test_what_is_no_list_of_pairs_is_named(base, pairs):
    with pytest.raises(DataError, match=r"pairs? must be"):
        log_likelihood(base, pairs)


def test_numbers_that_are_none_are_named(base):
    base.model.model.norm.weight = base.model.model.norm.weight * float("nan")
    with pytest.raises(EvaluationError, match=r"pair \d: the network's logits are NaN"):
        log_likelihood(base, PAIRS)


# Multiple choice

OPTIONS = ("Lima", "Quito, in the mountains", "La Paz")


@pytest.mark.parametrize("bare", [True, False])
def test_options_are_scored_as_continuations(bare):
    base = without_template(toy_base()) if bare else toy_base()
    scores = score_options(base, "Capital of Peru?", OPTIONS)
    space = " " if bare else ""
    alone = [log_likelihood(base, [("Capital of Peru?", space + o)])[0].total for o in OPTIONS]
    np.testing.assert_allclose([s.total for s in scores.likelihoods], alone, atol=1e-3)
    assert scores.likeliest == np.argmax(alone)
    assert scores.likeliest_for_its_length == np.argmax(
        [total / len(option) for total, option in zip(alone, OPTIONS)]
    )


def test_the_length_counts_against_an_option_only_in_the_sum(base):
    table = multiple_choice(base, [ChoiceQuestion("Capital?", OPTIONS, 1)])
    scores = score_options(base, "Capital?", OPTIONS)
    assert table.chosen[0] == OPTIONS[scores.likeliest] != OPTIONS[1]
    assert table.chosen_for_length[0] == OPTIONS[scores.likeliest_for_its_length]
    assert not table.correct[0]
    assert table.correct_for_length[0] == (scores.likeliest_for_its_length == 1)


def test_the_real_model_chooses_the_capital(smollm2):
    question = "What is the capital of France?"
    table = multiple_choice(smollm2, [ChoiceQuestion(question, ("Lyon", "Paris", "Nice"), 1)])
    assert table.correct[0]
    assert table.correct_for_length[0]


BAD_CHOICES = {
    "one": (("Lima",), 0, "two or more"),
    "a text": ("Lima", 0, "two or more|texts"),
    "twice": (("Lima", "Lima"), 0, "twice"),
    "empty": (("Lima", " "), 0, "not empty"),
    "no such place": (("Lima", "Quito"), 2, "no place among 2"),
}


@pytest.mark.parametrize("name", BAD_CHOICES)
def test_a_choice_that_is_none_is_named(name):
    options, answer, message = BAD_CHOICES[name]
    with pytest.raises(DataError, match=message):
        ChoiceQuestion("?", options, answer)
