"""Pretraining: a network that starts from random numbers learns a text, with the same trainer."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workbench.data.stories import story_corpus
from workbench.data.text_tokenizers import make_tokenizer
from workbench.data.texts import Corpus, read_corpus, text_dataset
from workbench.errors import ConfigError, check_seed, check_whole
from workbench.models.llama import Llama
from workbench.models.llama_config import LlamaConfig
from workbench.models.loading import BaseModel
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig
from workbench.models.report import compare
from workbench.tuning.config import TrainConfig
from workbench.tuning.modes import set_trainable
from workbench.tuning.trainer import Trainer

ModelConfig = NanoChatConfig | LlamaConfig
NETWORKS = {NanoChatConfig: NanoChat, LlamaConfig: Llama}
LONGEST_WINDOW = 256  # targets of a row, unless another number is asked for
NOWHERE = Path(os.devnull, "from-scratch")  # no file can be there, and nobody exports to it
DEFAULT_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LONGEST_WINDOW,
}
DEFAULT_TRAINING = {
    "steps": 1000,
    "micro_batch_size": 4,
    "optimizer": "muon",
    "learning_rate": 0.02,
    "schedule": "linear",
    "warmup_steps": 10,
    "momentum": 0.95,
    "adam_betas": (0.8, 0.95),
    "weight_decay": 0.0,
    "valid_every": 100,
    "checkpoint_every": 250,
}


def pretrain(
    text: Corpus | str | os.PathLike | None = None,
    *,
    model: ModelConfig | None = None,
    tokenizer: str = "bpe",
    vocab_size: int | None = None,
    window: int | None = None,
    config: TrainConfig | None = None,
    run_dir: str | os.PathLike | None = None,
    seed: int = 0,
) -> Trainer:
    """A trainer of a network with fresh weights on a text, ready to be iterated.

    Nothing has been trained yet: `for report in trainer`, or `wb.LivePanel(trainer)`. Its `base`
    is like a loaded model: `wb.generate` asks it, `wb.fuse` writes it as a folder. With the folder
    of a run that was stopped, and the same arguments, the run goes on.

    Args:
        text: a file in UTF-8, 64 MB at most, of which a byte takes 15 bytes of memory (180 if it
            has no blanks); a `Corpus`; None for generated stories (`story_corpus`).
        model: a network's dimensions; None for a nanochat GPT of half a million numbers.
        tokenizer: `bpe`, learnt from the training text, or `bytes`.
        vocab_size: tokens at most; None for the rows of `model`, and without one 1024 of `bpe`.
        window: targets of a row; None for all positions of the network, 256 at most.
        config: how to train; None for 1000 updates of 4 rows by Muon.
        run_dir: as for `Trainer`.
        seed: of the first weights, of the stories, and, without a `config`, of the order of rows.

    Raises:
        DataError: the text cannot be read or is too small.
        ConfigError: a setting is out of range, or the network has too few rows or positions.
        RunError: the folder's run is another.
    """
    check_seed("seed", seed)
    corpus = _corpus(text, seed)
    words = _tokenizer(tokenizer, corpus.train, model, vocab_size)
    model = model or NanoChatConfig(**DEFAULT_SIZES, vocab_size=len(words))
    data = text_dataset(corpus, words, _window(window, model.max_position_embeddings))
    config = config or TrainConfig(**DEFAULT_TRAINING, seed=seed)
    return Trainer(fresh_model(model, words, seed), data, config, run_dir)


def fresh_model(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> BaseModel:
    """A network with random weights in float32, all of which train; sets MLX's random state."""
    mx.random.seed(seed)
    model = NETWORKS[type(config)](config)
    set_trainable(model, "full")
    parameters = dict(tree_flatten(model.parameters()))
    mx.eval(parameters)
    model.eval()
    name = f"{config.model_type} from scratch"
    report = compare(parameters, parameters, source=name, notes=["random weights"])
    raw_config = dataclasses.asdict(config)
    return BaseModel(model, tokenizer, config, report, name, NOWHERE, raw_config, seed=seed)


def _tokenizer(
    kind: str, text: str, model: ModelConfig | None, vocab_size: int | None
) -> PreTrainedTokenizerFast:
    """A tokenizer that the network, if one is given, has rows for."""
    if model is None:
        return make_tokenizer(kind, text, vocab_size)
    if type(model) not in NETWORKS:
        known = " or a ".join(each.__name__ for each in NETWORKS)
        raise ConfigError(f"model must be a {known}, got a {type(model).__name__}")
    if vocab_size is None and kind == "bpe":
        vocab_size = model.vocab_size
    words = make_tokenizer(kind, text, vocab_size)
    if len(words) > model.vocab_size:
        raise ConfigError(f"{len(words)} tokens, but the network has {model.vocab_size} rows")
    return words


def _window(targets: int | None, positions: int) -> int:
    """Targets of a row, which are no more than the network has positions."""
    if targets is None:
        return min(positions, LONGEST_WINDOW)
    check_whole("window", targets, 2)
    if targets > positions:
        raise ConfigError(f"window is {targets}, the network has room for {positions} positions")
    return targets


def _corpus(text: Corpus | str | os.PathLike | None, seed: int) -> Corpus:
    if isinstance(text, Corpus):
        return text
    if text is None:
        return story_corpus(seed=seed)
    if isinstance(text, str | os.PathLike):
        return read_corpus(text)
    raise ConfigError(
        f"text must be a file's path, a Corpus or None, got a {type(text).__name__}",
        cure="wb.Corpus('my text', train, held_out) holds texts of your own.",
    )
