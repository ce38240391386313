"""Generation: equal to mlx-lm, cached, batched, chunked, sampled, streamed."""

import mlx.core as mx
import numpy as np
import pandas as pd
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models import llama, qwen2

from tests.toy import TOY_CONFIG, toy_base
from tests.toy_training import toy_trainer
from workbench.data.datasets import Dataset
from workbench.data.examples import encode_row
from workbench.errors import DataError
from workbench.evaluation import decoding, generation
from workbench.evaluation.generation import (
    SamplingConfig,
    encode_prompt,
    generate,
    generate_tokens,
    stream,
)
from workbench.tuning.lora import LoRAConfig, add_lora

PROMPTS = [
    "What is the capital of Peru?",
    "Hi",
    "Write one sentence about rivers, mountains and the sea, please.",
]

ANSWER = "Köln 🌍, Nukuʻalofa!"

GREEDY = SamplingConfig(max_tokens=24)


def tokens_of(base, ids, sampling=GREEDY):
    return [token for (token,) in generate_tokens(base, [ids], sampling)]


def mlx_lm_tokens(model, ids, eos, max_tokens=24):
    tokens = []
    for token, _ in generate_step(mx.array(ids), model, max_tokens=max_tokens):
        if token in eos:
            break
        tokens.append(token)
    return tokens


def mlx_lm_twin(base):
    """mlx-lm's Llama around the very same arrays."""
    twin = llama.Model(llama.ModelArgs.from_dict(base.raw_config))
    twin.load_weights(tree_flatten(base.model.parameters()))
    return twin


@pytest.fixture
def qwen():
    """A base of an architecture that only mlx-lm knows."""
    base = toy_base()
    config = {**TOY_CONFIG, "model_type": "qwen2"}
    mx.random.seed(3)
    base.model = qwen2.Model(qwen2.ModelArgs.from_dict(config))
    base.config = base.model.args
    return base


@pytest.fixture(scope="module")
def speaker():
    """A toy that has learnt one answer of multi-byte characters by heart."""
    trainer = toy_trainer(
        data=Dataset(
            "one", [encode_row({"prompt": "?", "completion": ANSWER}, toy_base().tokenizer)]
        ),
        full=True,
        steps=60,
    )
    assert list(trainer)[-1].loss < 0.2
    return trainer.base


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_mlx_lm_on_a_toy(seed, prompt):
    base = toy_base(seed)
    ids = encode_prompt(base, prompt)
    expected = mlx_lm_tokens(mlx_lm_twin(base), ids, base.eos_token_ids)
    assert tokens_of(base, ids) == expected
    assert len(set(expected)) > 3


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_equals_mlx_lm_on_the_real_model(smollm2, prompt):
    ids = encode_prompt(smollm2, prompt)
    expected = mlx_lm_tokens(mlx_lm_twin(smollm2), ids, smollm2.eos_token_ids, max_tokens=14)
    assert tokens_of(smollm2, ids, SamplingConfig(max_tokens=14)) == expected
    assert len(expected) > 5


def test_a_batch_of_the_real_model_equals_single_prompts_in_mlx_lm(smollm2):
    encoded = [encode_prompt(smollm2, prompt) for prompt in [*PROMPTS, "Is 2 + 2 = 4? Yes or no."]]
    twin, ends = mlx_lm_twin(smollm2), smollm2.eos_token_ids
    together, sizes = batch_of(smollm2, encoded, SamplingConfig(max_tokens=14))
    assert together == [mlx_lm_tokens(twin, ids, ends, max_tokens=14) for ids in encoded]
    assert sizes[-1] < len(encoded)  # a short answer left the batch


@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_answers_come_in_the_order_of_the_prompts(base, batch_size):
    prompts = ["a long prompt " * 5, "b", "medium prompt", "c", "b"]
    expected = [generate(base, prompt, max_tokens=12) for prompt in prompts]
    assert generate(base, prompts, max_tokens=12, batch_size=batch_size) == expected
    assert len(set(expected)) == 4


def test_cached_equals_uncached(base):
    ids = encode_prompt(base, PROMPTS[0])
    chain = list(ids)
    for _ in range(24):
        chain.append(mx.argmax(base.model(mx.array([chain]))[0, -1]).item())
    answer = tokens_of(base, ids)
    assert answer == chain[len(ids) : len(ids) + len(answer)]
    assert len(answer) == 24 or chain[len(ids) + len(answer)] in base.eos_token_ids


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_changes_no_token(base, monkeypatch, chunk):
    prompts = ["a rather long prompt " * 6, "and one that is shorter " * 3]
    whole = generate(base, prompts, max_tokens=16)
    monkeypatch.setattr(decoding, "PREFILL_CHUNK", chunk)
    assert generate(base, prompts, max_tokens=16) == whole


def test_generation_stops_at_the_end_token(speaker):
    assert generate(speaker, "?", max_tokens=200) == ANSWER
    ids = tokens_of(speaker, encode_prompt(speaker, "?"), SamplingConfig(max_tokens=200))
    assert len(ids) == len(ANSWER.encode())


def test_a_row_that_has_ended_waits_for_the_others(speaker):
    alone = generate(speaker, "something else altogether", max_tokens=60)
    together = generate(speaker, ["?", "something else altogether"], max_tokens=60)
    assert together == [ANSWER, alone]


RAGGED = ["", "a", "four", "a b c", "a much longer prompt " * 9, "z", "some more", "Lima?"]


def with_early_ends(base, encoded, sampling):
    """End tokens chosen so that the rows, decoded alone, end at different steps."""
    base.raw_config["eos_token_id"], base.tokenizer.eos_token = None, None
    free = [tokens_of(base, ids, sampling) for ids in encoded]
    base.raw_config["eos_token_id"] = [free[0][2], free[1][9], free[4][14]]
    return [tokens_of(base, ids, sampling) for ids in encoded]


def batch_of(base, encoded, sampling):
    """Each row's tokens, decoded together; and how many rows the last step computed."""
    rows, sizes = [[] for _ in encoded], []
    choose_rows = generation._choose_rows

    def counted(logits, *args):
        sizes.append(logits.shape[0])
        return choose_rows(logits, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "_choose_rows", counted)
        for step in generate_tokens(base, encoded, sampling):
            for row, token in zip(rows, step):
                row.extend([] if token is None else [token])
    return rows, sizes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.01, decoding.DROP_SHARE, 2.0])
def test_rows_that_end_early_leave_the_batch_and_change_no_token(monkeypatch, share, seed):
    monkeypatch.setattr(decoding, "DROP_SHARE", share)
    base = toy_base(seed)
    encoded = [encode_prompt(base, prompt) for prompt in RAGGED]
    sampling = SamplingConfig(max_tokens=40)
    alone = with_early_ends(base, encoded, sampling)
    assert len({len(tokens) for tokens in alone}) >= 3
    together, sizes = batch_of(base, encoded, sampling)
    assert together == alone
    assert sizes[0] == len(RAGGED)
    assert (sizes[-1] < len(RAGGED)) == (share < 2)
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_samples_do_not_change_when_ended_rows_leave(monkeypatch, top_p):
    base, results = toy_base(), []
    encoded = [encode_prompt(base, prompt) for prompt in RAGGED]
    sampling = SamplingConfig(max_tokens=40, temperature=1.5, top_p=top_p, seed=5)
    with_early_ends(base, encoded, sampling)
    for share in (0.01, decoding.DROP_SHARE, 2.0):
        monkeypatch.setattr(decoding, "DROP_SHARE", share)
        results.append(batch_of(base, encoded, sampling))
    assert results[0][0] == results[1][0] == results[2][0]
    assert results[0][1][-1] < results[2][1][-1] == len(RAGGED)


def test_streaming_yields_whole_characters_that_join_to_the_whole(speaker):
    pieces = list(stream(speaker, "?", max_tokens=200))
    assert "".join(pieces) == ANSWER
    assert len(pieces) > len(ANSWER) // 2
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_streaming_joins_to_the_whole_even_of_noise(base, seed):
    settings = {"max_tokens": 60, "temperature": 3.0, "seed": seed}
    assert "".join(stream(base, "Hi", **settings)) == generate(base, "Hi", **settings)


def test_a_cut_character_is_not_lost(speaker):
    cut = len("Köln ") + 2  # in the middle of the globe
    assert "".join(stream(speaker, "?", max_tokens=cut)) == generate(speaker, "?", max_tokens=cut)


def with_noise(base):
    """With an adapter whose dropout would show."""
    add_lora(base.model, LoRAConfig(rank=4, dropout=0.9))
    for layer in base.model.layers:
        layer.mlp.up_proj.lora_b = mx.ones_like(layer.mlp.up_proj.lora_b)
    return base


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_meanwhile_and_the_mode_comes_back(training):
    base, quiet = with_noise(toy_base()), with_noise(toy_base())
    quiet.model.eval()
    base.model.train(training)
    assert generate(base, "Hi") == generate(quiet, "Hi")
    assert {module.training for _, module in base.model.named_modules()} == {training}
    for _ in stream(base, "Hi"):
        break
    assert base.model.training == training


def test_a_chat_is_answered_like_its_last_question(base):
    chat = [{"role": "user", "content": "Hi"}]
    assert generate(base, chat) == generate(base, "Hi")
    assert generate(base, [chat, "Hi"]) == 2 * [generate(base, "Hi")]
    system = [{"role": "system", "content": "Rhyme."}, *chat]
    assert generate(base, system) != generate(base, "Hi")


def test_without_a_template_a_prompt_is_continued(base):
    base.tokenizer.chat_template = None
    assert encode_prompt(base, "Hi") == base.tokenizer.encode("Hi")
    with pytest.raises(DataError, match="needs a chat template"):
        generate(base, [{"role": "user", "content": "Hi"}])
    with pytest.raises(DataError, match="prompt is empty"):
        generate(base, "")


def test_no_prompts_no_answers(base):
    assert generate(base, []) == []


@pytest.mark.parametrize("kind", [tuple, iter, pd.Series, np.array])
def test_prompts_come_from_whatever_gives_them_in_order(base, kind):
    assert generate(base, kind(PROMPTS), max_tokens=4) == generate(base, PROMPTS, max_tokens=4)


def test_generation_ends_where_the_positions_end(base):
    header = len(encode_prompt(base, ""))
    prompt = "x" * (512 - header - 5)
    base.raw_config["eos_token_id"], base.tokenizer.eos_token = None, None
    assert len(tokens_of(base, encode_prompt(base, prompt))) == 5
    alone = [generate(base, p, max_tokens=20) for p in (prompt, "short")]
    assert generate(base, [prompt, "short"], max_tokens=20) == alone


@pytest.mark.parametrize("count", [512, 600])
def test_a_prompt_longer_than_the_positions_raises(base, count):
    with pytest.raises(DataError, match=r"prompt has \d+ tokens, the model has room for 512"):
        generate(base, "x" * count)


def test_ids_outside_the_vocabulary_raise(base):
    base.tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="token id 259 is outside the vocabulary of 259"):
        generate(base, "a <new> word")


BAD_PROMPTS = {
    "unknown role": ([{"role": "robot", "content": "Hi"}], "unknown role 'robot'"),
    "no content": ([{"role": "user"}], "'content' must be a string"),
    "half a surrogate": ("\ud800", "surrogate"),
    "a number": (3, "prompts must be a text or a list, got 3"),
    "no prompt": (None, "prompts must be a text or a list, got None"),
    "a list of numbers": ([3], "a prompt must be a text or a list of messages, got 3"),
    "no messages": ([[]], "at least one message"),
    "a message alone": ({"role": "user", "content": "Hi"}, "a text or a list, got {"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_a_bad_prompt_raises(base, name):
    prompt, message = BAD_PROMPTS[name]
    with pytest.raises(DataError, match=message):
        generate(base, prompt)


def test_another_architecture_of_mlx_lm_generates(qwen):
    for prompt in PROMPTS:
        ids = encode_prompt(qwen, prompt)
        assert tokens_of(qwen, ids) == mlx_lm_tokens(qwen.model, ids, qwen.eos_token_ids)


def test_another_architecture_generates_in_batches(qwen):
    prompts = ["aa", "b", "cc", "ddd", "e"]  # lengths may not be mixed
    expected = [generate(qwen, prompt, max_tokens=8) for prompt in prompts]
    assert generate(qwen, prompts, max_tokens=8) == expected
    assert len(set(expected)) > 1


def test_another_architecture_keeps_its_ended_rows(qwen):
    qwen.raw_config["eos_token_id"], qwen.tokenizer.eos_token = None, None
    encoded = [encode_prompt(qwen, prompt) for prompt in ("aa", "bz", "Q!")]
    free = [tokens_of(qwen, ids) for ids in encoded]
    qwen.raw_config["eos_token_id"] = free[0][-1]
    alone = [tokens_of(qwen, ids) for ids in encoded]
    assert all(alone)
    assert len({len(tokens) for tokens in alone}) == 3
    together, sizes = batch_of(qwen, encoded, GREEDY)
    assert together == alone
    assert set(sizes) == {3}


def test_a_batch_ends_once_every_answer_is_done(base, monkeypatch):
    sampling = SamplingConfig(max_tokens=40)
    encoded = [encode_prompt(base, prompt) for prompt in ("Hi", "What?", "Ho")]
    whole = generation.generate_answers(base, encoded, sampling, 8)
    assert min(map(len, whole)) > 20
    done = generation.generate_answers(base, encoded, sampling, 8, lambda ids: len(ids) >= 5)
    assert done == [tokens[:5] for tokens in whole]
    first = generation.generate_answers(
        base, encoded, sampling, 8, lambda ids: ids[0] == whole[0][0]
    )
    assert first[0] == whole[0]  # the others go on, and it with them
