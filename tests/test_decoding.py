"""What is kept of a prompt: the next one that begins alike computes its own end only."""

import pytest
from mlx.utils import tree_map

from tests.toy import toy_base
from tests.toy_architectures import small_base
from workbench.evaluation import decoding
from workbench.evaluation.decoding import KeptPrompt
from workbench.evaluation.generation import SamplingConfig, generate_tokens
from workbench.live.chat import chat

FIRST = [5, 9, 90, 33, 7, 64, 20]
SIX = SamplingConfig(max_tokens=6)


@pytest.fixture
def computed(monkeypatch):
    """Numbers of tokens that went through the network at once."""
    lengths, forward = [], decoding.BatchDecoder._forward

    def counted(self, tokens):
        lengths.append(tokens.shape[1])
        return forward(self, tokens)

    monkeypatch.setattr(decoding.BatchDecoder, "_forward", counted)
    return lengths


def answer(base, ids, kept=None):
    return [token for (token,) in generate_tokens(base, [ids], SIX, kept)]


def endless(base):
    base.raw_config["eos_token_id"], base.tokenizer.eos_token = None, None
    return base


@pytest.mark.parametrize("name", ["ours", "qwen2", "gemma3_text", "mamba"])
def test_a_prompt_that_goes_on_is_answered_as_without_a_memory(name, computed):
    base, kept = endless(toy_base() if name == "ours" else small_base(name)), KeptPrompt()
    ids, known = FIRST, 0
    for more in ([11, 12], [13], [14, 15, 16]):
        del computed[:]
        said = answer(base, ids, kept)
        assert computed[0] == len(ids) - known
        assert said == answer(base, ids)
        known = len(ids) + len(said) - 1  # the last token of an answer is not computed
        ids = [*ids, *said, *more]


@pytest.mark.parametrize(("name", "forgets"), [("ours", True), ("qwen2", True), ("mamba", False)])
def test_another_end_is_forgotten_or_begun_anew(name, forgets, computed):
    base, kept = endless(toy_base() if name == "ours" else small_base(name)), KeptPrompt()
    answer(base, FIRST, kept)
    other = [*FIRST[:4], 50, 51]
    expected = answer(base, other)
    del computed[:]
    assert answer(base, other, kept) == expected
    assert computed[0] == (2 if forgets else len(other))
    assert answer(base, FIRST[:3], kept) == answer(base, FIRST[:3])  # all of it is known
    assert answer(base, [96, 95], kept) == answer(base, [96, 95])  # nothing of it is


def test_other_weights_begin_anew(computed):
    base, kept = endless(toy_base()), KeptPrompt()
    answer(base, FIRST, kept)
    base.model.update(tree_map(lambda array: 1.5 * array, base.model.parameters()))
    expected = answer(base, FIRST)
    del computed[:]
    assert answer(base, FIRST, kept) == expected
    assert computed[0] == len(FIRST)


def test_after_a_failure_nothing_is_kept(computed, monkeypatch):
    base, kept = endless(toy_base()), KeptPrompt()
    answer(base, FIRST, kept)
    longer = [*FIRST, 20, 21]

    def fails(hidden_states):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(base.model, "head", fails)
        with pytest.raises(RuntimeError, match="planted"):
            answer(base, longer, kept)
    expected = answer(base, longer)
    del computed[:]
    assert answer(base, longer, kept) == expected
    assert computed[0] == len(longer)


def test_a_chat_computes_each_message_once(computed):
    base = toy_base()
    chat(base, ["one?"], max_tokens=6)
    first = sum(computed)
    del computed[:]
    talk = chat(base, ["one?", "two?"], max_tokens=6)
    whole = base.tokenizer.apply_chat_template(talk.messages())["input_ids"]
    assert first < sum(computed) <= len(whole)
