"""A network from random numbers: the same trainer, runs that go on, and a folder in the end."""

import math

import mlx.core as mx
import numpy as np
import pytest

import workbench as wb
from tests.toy import TOY_CONFIG
from workbench.data.stories import story_corpus
from workbench.data.text_tokenizers import BYTE_TOKENS, make_tokenizer
from workbench.data.texts import Corpus
from workbench.errors import ConfigError, DataError, RunError
from workbench.evaluation.bits_per_byte import bits_per_byte, loss_in_bits
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig
from workbench.tuning.pretraining import pretrain

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
VOCAB = 400
QUICK = {"micro_batch_size": 8, "optimizer": "muon", "learning_rate": 0.02, "momentum": 0.95}


@pytest.fixture(scope="module")
def corpus():
    return story_corpus(40_000, 4_000)


def toy_pretraining(corpus, steps=4, *, vocab_size=VOCAB, settings=None, **arguments):
    """A trainer of a nanochat GPT with two layers."""
    model = NanoChatConfig(**SIZES, vocab_size=vocab_size)
    config = wb.TrainConfig(steps=steps, **{**QUICK, **(settings or {})})
    return pretrain(corpus, **{"model": model, "config": config, **arguments})


def test_it_learns_and_the_held_out_text_costs_fewer_bits(corpus):
    trainer = toy_pretraining(corpus, 40, settings={"valid_every": 20})
    before = bits_per_byte(trainer.base, corpus.held_out)
    reports = list(trainer)
    after = bits_per_byte(trainer.base, corpus.held_out)
    assert reports[0].loss == pytest.approx(math.log(VOCAB), abs=0.05)
    assert before.value == pytest.approx(
        math.log2(VOCAB) * before.num_tokens / before.num_bytes, rel=0.01
    )
    assert after.value < 0.6 * before.value
    # Validation reads each window by itself, so it is near, and not the same.
    tokens = sum(row.num_targets for row in trainer.data.valid)
    assert tokens == after.num_tokens
    in_windows = loss_in_bits(reports[-1].valid_loss, tokens) / after.num_bytes
    assert in_windows == pytest.approx(after.value, rel=0.1)


def test_all_of_it_trains_and_a_seed_makes_the_same_network(corpus):
    trainer = toy_pretraining(corpus)
    base, fresh = trainer.base, wb.fingerprint(trainer.model)
    assert isinstance(base.model, NanoChat)
    assert base.report.complete
    assert wb.fingerprint(toy_pretraining(corpus).model) == fresh
    assert wb.fingerprint(toy_pretraining(corpus, seed=1).model) != fresh
    list(trainer)
    assert len(wb.changed(fresh, wb.fingerprint(trainer.model))) == len(fresh)
    assert isinstance(wb.generate(base, "Who has the red ball?", max_tokens=5), str)


@pytest.mark.parametrize("settings", [{}, {"reload_every": 2}, {"optimizer": "adamw"}])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(corpus, tmp_path, settings):
    def trainer_of(folder, seed=0):
        run_dir = tmp_path / folder
        return toy_pretraining(corpus, 6, settings=settings, run_dir=run_dir, seed=seed)

    whole = trainer_of("whole")
    losses = [report.loss for report in whole]
    stopped = trainer_of("parts")
    for report in stopped:
        if report.step == 3:
            break
    second = trainer_of("parts")
    assert second.steps_done == 3
    assert [report.loss for report in second] == losses[3:]
    assert wb.fingerprint(second.model) == wb.fingerprint(whole.model)


def test_another_text_or_network_is_not_the_same_run(corpus, tmp_path):
    list(toy_pretraining(corpus, 2, run_dir=tmp_path / "run"))
    other = Corpus("other", corpus.train[:-2_000], corpus.held_out)
    with pytest.raises(RunError, match="training data is another"):
        toy_pretraining(other, 2, run_dir=tmp_path / "run")
    with pytest.raises(RunError, match="what trains is another"):
        toy_pretraining(corpus, 2, run_dir=tmp_path / "run", vocab_size=VOCAB + 8)


def test_other_heads_rotations_or_first_weights_are_not_the_same_run(corpus, tmp_path):
    run_dir = tmp_path / "run"
    list(toy_pretraining(corpus, 2, run_dir=run_dir))
    for name, value, was in (("num_attention_heads", 4, 2), ("rope_theta", 5e4, 1e4)):
        sizes = {**SIZES, "vocab_size": VOCAB, name: value}
        with pytest.raises(RunError, match=f"{name} is {value:.0f}, was {was:.0f}"):
            toy_pretraining(corpus, 2, run_dir=run_dir, model=NanoChatConfig(**sizes))
    with pytest.raises(RunError, match="seed of the first weights is 1, was 0"):
        toy_pretraining(corpus, 2, run_dir=run_dir, seed=1)
    assert toy_pretraining(corpus, 2, run_dir=run_dir).finished


def test_the_tokenizer_is_learnt_from_the_training_text_alone(corpus):
    trainer = toy_pretraining(corpus)
    alone = make_tokenizer("bpe", corpus.train, VOCAB)
    own = trainer.base.tokenizer.backend_tokenizer.to_str()
    assert own == alone.backend_tokenizer.to_str()


def test_without_a_model_the_network_has_as_many_rows_as_there_are_tokens(corpus):
    for kind, size in (("bytes", BYTE_TOKENS), ("bpe", 300)):
        wanted = None if kind == "bytes" else size
        trainer = pretrain(corpus, tokenizer=kind, vocab_size=wanted)
        assert trainer.base.config.vocab_size == len(trainer.base.tokenizer) == size
        assert {len(row) for row in trainer.data.train[:-1]} == {257}


def test_a_file_of_ones_own_and_another_network_will_do(corpus, tmp_path):
    path = tmp_path / "own.txt"
    path.write_text(corpus.train[:5_000])
    config = LlamaConfig.from_dict({**TOY_CONFIG, "vocab_size": BYTE_TOKENS})
    training = wb.TrainConfig(steps=3, learning_rate=1e-2, micro_batch_size=4)
    trainer = pretrain(path, model=config, tokenizer="bytes", window=32, config=training)
    assert isinstance(trainer.model, Llama)
    assert trainer.data.name == "own.txt"
    assert {len(row) for row in trainer.data.train[:-1]} == {33}
    losses = [report.loss for report in trainer]
    assert losses[-1] < losses[0]


def test_it_is_written_as_a_folder_that_this_and_mlx_lm_load(corpus, tmp_path):
    from mlx_lm.utils import load

    trainer = toy_pretraining(corpus, 8, run_dir=tmp_path / "run")
    list(trainer)
    base = trainer.base
    wb.fuse(base, tmp_path / "model", run_dir=tmp_path / "run")
    tokens = mx.array(trainer.data.valid[0].tokens[None, :-1])
    logits = np.array(base.model(tokens))
    ours = wb.load_model(tmp_path / "model")
    assert isinstance(ours.model, NanoChat)
    assert np.array_equal(np.array(ours.model(tokens)), logits)
    theirs, words = load(str(tmp_path / "model"))
    np.testing.assert_allclose(np.array(theirs(tokens)), logits, atol=1e-5)
    assert words.eos_token_ids == set(base.eos_token_ids)
    for tokenizer in (ours.tokenizer, words):
        chat = [{"role": "user", "content": "Who has the red ball?"}]
        asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        assert asked == "<|begin|><|user|>Who has the red ball?<|end|><|assistant|>"
        assert tokenizer.encode(asked) == base.tokenizer.encode(asked)


def test_a_panel_shows_it(corpus):
    trainer = toy_pretraining(corpus, 2)
    wb.LivePanel(trainer)
    assert "nanochat from scratch" in str(trainer.base.name)


BAD = {
    "rows": ({"vocab_size": 300, "tokenizer": "bytes"}, "260 tokens, not 300"),
    "few rows": ({"model": NanoChatConfig(**SIZES, vocab_size=300), "vocab_size": 380}, "has 300"),
    "positions": ({"window": 65, "model": NanoChatConfig(**SIZES, vocab_size=300)}, "window is 65"),
    "kind": ({"tokenizer": "words"}, "unknown tokenizer 'words'"),
    "model": ({"model": {"hidden_size": 8}}, "must be a NanoChatConfig or a LlamaConfig, got a d"),
    "seed": ({"seed": -1}, "seed"),
    "a huge seed": ({"seed": 2**64}, "seed"),
    "text": ({"text": ["a", "b"]}, r"wb\.Corpus"),
    "no file": ({"text": "no-such-file.txt"}, "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_pretrained_is_named(corpus, name):
    arguments, message = BAD[name]
    with pytest.raises((ConfigError, DataError), match=message):
        pretrain(**{"text": corpus, **arguments})
