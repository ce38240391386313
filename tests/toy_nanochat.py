"""Toy nanochat GPTs, their twins in mlx-lm, and the network once more in NumPy."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import nanochat as theirs

from tests.toy import VOCAB_SIZE, toy_tokenizer
from workbench.models.loading import BaseModel, save_weights
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig
from workbench.models.report import compare

NANO_CONFIG = {
    "model_type": "nanochat",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": VOCAB_SIZE,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "eos_token_id": 2,
}


def toy_nanochat(seed: int = 0, **changes: object) -> NanoChat:
    """A two-layer nanochat GPT with random weights, none of them zero."""
    model = NanoChat(NanoChatConfig.from_dict({**NANO_CONFIG, **changes}))
    key, randomised = mx.random.key(seed), []
    for name, parameter in tree_flatten(model.parameters()):
        key, own = mx.random.split(key)
        randomised.append((name, 0.3 * mx.random.normal(parameter.shape, key=own)))
    model.update(tree_unflatten(randomised))
    mx.eval(model.parameters())
    return model


def nanochat_base(seed: int = 0, **changes: object) -> BaseModel:
    """A toy with its tokenizer, as `load_model` would return it."""
    model = toy_nanochat(seed, **changes)
    parameters = dict(tree_flatten(model.parameters()))
    report, raw_config = compare(parameters, parameters), {**NANO_CONFIG, **changes}
    return BaseModel(model, toy_tokenizer(), model.config, report, "nano", Path("nano"), raw_config)


def save_nanochat_folder(folder: Path, seed: int = 0, **changes: object) -> Path:
    """A model folder: config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    base = nanochat_base(seed, **changes)
    (folder / "config.json").write_text(json.dumps(base.raw_config))
    save_weights(base.model, folder / "model.safetensors")
    base.tokenizer.save_pretrained(folder)
    return folder


def mlx_lm_twin(model: NanoChat) -> theirs.Model:
    """mlx-lm's nanochat around the very same arrays."""
    twin = theirs.Model(theirs.ModelArgs.from_dict(vars(model.config)))
    twin.load_weights(tree_flatten(model.parameters()), strict=True)
    return twin


def by_hand(model: NanoChat, tokens: np.ndarray, cap: float = 15.0) -> np.ndarray:
    """Logits (B, T, V) of tokens (B, T) in float64, head by head and pair by pair."""
    config = model.config
    weights = {n: np.array(w, np.float64) for n, w in tree_flatten(model.parameters())}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    x = _norm(weights["transformer.wte.weight"][tokens])
    for number in range(config.num_hidden_layers):
        own = {n: weights[f"transformer.h.{number}.{n}.weight"] for n in LINEAR}
        entering, joined = _norm(x), []
        q, k, v = (entering @ own[f"attn.{name}"].T for name in ("c_q", "c_k", "c_v"))
        for head in range(heads):
            queries = _norm(_rotated(_head(q, head, config), config.rope_theta))
            keys = _norm(_rotated(_head(k, head * groups // heads, config), config.rope_theta))
            joined.append(_attend(queries, keys, _head(v, head * groups // heads, config)))
        x = x + np.concatenate(joined, axis=-1) @ own["attn.c_proj"].T
        inner = np.maximum(_norm(x) @ own["mlp.c_fc"].T, 0) ** 2
        x = x + inner @ own["mlp.c_proj"].T
    return cap * np.tanh(_norm(x) @ weights["lm_head.weight"].T / cap)


LINEAR = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _norm(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5)


def _head(x: np.ndarray, head: int, config: NanoChatConfig) -> np.ndarray:
    return x[..., head * config.head_dim : (head + 1) * config.head_dim]


def _rotated(x: np.ndarray, base: float) -> np.ndarray:
    """nanochat's apply_rotary_emb: y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[-2])[:, None] / base ** (np.arange(half) / half)
    first, second, cos, sin = x[..., :half], x[..., half:], np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos + second * sin, second * cos - first * sin], axis=-1)


def _attend(queries: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(queries.shape[-1])
    scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    chances = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return chances / chances.sum(axis=-1, keepdims=True) @ values
