"""Llama: equal to mlx-lm's, cached or not, padded or not, whole or split into backbone and head."""

import json
import threading

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import llama as mlx_lm_llama

from tests.test_layers import LLAMA3, close
from tests.toy import TOY_CONFIG, VOCAB_SIZE, toy_model
from workbench.errors import ConfigError, WorkbenchError
from workbench.models.llama_config import LlamaConfig

VARIANTS = {
    "tied, grouped heads": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one head a query": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 16},
    "llama3 rope": {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
}
TOKENS = mx.random.randint(0, VOCAB_SIZE, (3, 12), key=mx.random.key(7))


def in_pieces(model, tokens, lengths, capacity=4):
    """Logits of the tokens, fed through a cache in pieces."""
    cache, start, logits = model.make_cache(capacity), 0, []
    for length in lengths:
        logits.append(model(tokens[:, start : start + length], cache))
        start += length
    return mx.concatenate(logits, axis=1)


def of_mlx_lm(model, config):
    """mlx-lm's Llama with the same weights."""
    theirs = mlx_lm_llama.Model(mlx_lm_llama.ModelArgs.from_dict(config))
    theirs.load_weights(tree_flatten(model.parameters()), strict=True)
    return theirs


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_mlx_lms(variant):
    config = {**TOY_CONFIG, **VARIANTS[variant]}
    model = toy_model(**VARIANTS[variant])
    assert close(model(TOKENS), of_mlx_lm(model, config)(TOKENS), 1e-5)


def test_logits_of_the_real_model_equal_mlx_lms(smollm2):
    theirs = of_mlx_lm(smollm2.model, smollm2.raw_config)
    prompt = smollm2.tokenizer("The capital of Peru is Lima, and 1234 is a number.")["input_ids"]
    tokens = mx.array([prompt])
    assert close(smollm2.model(tokens), theirs(tokens), 1e-5)


@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 4, 3], [1, 10, 1]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_equals_uncached(variant, lengths):
    model = toy_model(**VARIANTS[variant])
    assert close(in_pieces(model, TOKENS, lengths), model(TOKENS), 1e-5)


def test_cached_equals_uncached_on_the_real_model(smollm2):
    tokens = mx.array(
        [smollm2.tokenizer("Two plus two is four; the sky is blue.")["input_ids"]] * 2
    )
    pieces = [5, 1, 1, tokens.shape[1] - 7]
    assert close(in_pieces(smollm2.model, tokens, pieces), smollm2.model(tokens), 1e-5)


def test_a_token_changes_no_logits_before_it():
    model, changed = toy_model(), mx.array(TOKENS)
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB_SIZE
    before, after = model(TOKENS), model(changed)
    assert mx.array_equal(before[:, :6], after[:, :6])
    assert mx.all(mx.abs(before - after)[:, 6:].max(axis=-1) > 1e-4)


def padded_left(rows):
    """Rows of unequal length as one batch, and their paddings."""
    width = max(len(row) for row in rows)
    padding = mx.array([width - len(row) for row in rows])
    return mx.stack([mx.array([0] * (width - len(row)) + row) for row in rows]), padding


@pytest.mark.parametrize("lengths", [[9], [4, 5], [1] * 9], ids=str)
def test_left_padding_gives_each_row_the_logits_it_has_alone(lengths):
    model, rows = toy_model(), [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist(), [17]]
    tokens, padding = padded_left(rows)
    cache, start, parts = model.make_cache(), 0, []
    for length in lengths:
        parts.append(model(tokens[:, start : start + length], cache, padding))
        start += length
    logits = mx.concatenate(parts, axis=1)
    assert mx.all(mx.isfinite(logits))
    for row, own in zip(rows, logits):
        assert close(own[-len(row) :], model(mx.array([row]))[0], 1e-5)


@pytest.mark.parametrize("variant", ["tied, grouped heads", "untied"])
def test_the_head_of_the_backbone_is_the_model(variant):
    model = toy_model(**VARIANTS[variant])
    hidden_states = model.backbone(TOKENS)
    assert hidden_states.shape == (3, 12, 32)
    assert mx.array_equal(model.head(hidden_states), model(TOKENS))


def test_head_gradients_from_a_detached_backbone_equal_the_full_models():
    model = toy_model(tie_word_embeddings=False)

    def loss(model, detached):
        hidden_states = model.backbone(TOKENS[:, :-1])
        hidden_states = mx.stop_gradient(hidden_states) if detached else hidden_states
        return nn.losses.cross_entropy(model.head(hidden_states), TOKENS[:, 1:]).mean()

    _, grads = nn.value_and_grad(model, loss)(model, False)
    full = dict(tree_flatten(grads))
    model.freeze()
    model.model.norm.unfreeze()
    model.lm_head.unfreeze()
    _, grads = nn.value_and_grad(model, loss)(model, True)
    head = dict(tree_flatten(grads))
    assert set(head) == {"model.norm.weight", "lm_head.weight"}
    assert len(full) == 2 * 9 + 3
    for name, gradient in head.items():
        assert mx.abs(gradient).max() > 0
        assert close(gradient, full[name], 1e-5)


def test_every_parameter_receives_gradient():
    model = toy_model(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    tokens = mx.arange(VOCAB_SIZE)[None]
    _, grads = nn.value_and_grad(model, lambda m: mx.logsumexp(m(tokens), axis=-1).sum())(model)
    names = {name for name, gradient in tree_flatten(grads) if mx.abs(gradient).max() > 0}
    # softmax does not feel a constant added to every score, so a key bias has none
    assert names >= {n for n, _ in tree_flatten(model.parameters()) if "k_proj.bias" not in n}


def test_the_periods_of_rope_are_no_parameters():
    assert not [name for name, _ in tree_flatten(toy_model().parameters()) if "rope" in name]


def test_an_over_long_input_raises():
    model = toy_model(max_position_embeddings=8)
    with pytest.raises(WorkbenchError, match=r"positions \[0 : 9\].*8"):
        model(TOKENS[:, :9])


def test_a_full_cache_of_the_models_length_raises_on_the_next_token():
    model = toy_model(max_position_embeddings=8)
    cache = model.make_cache()
    model(TOKENS[:, :8], cache)
    with pytest.raises(WorkbenchError, match=r"positions \[8 : 9\]"):
        model(TOKENS[:, 8:9], cache)


def test_a_model_made_on_one_thread_runs_on_another():
    model, found = toy_model(), []
    worker = threading.Thread(target=lambda: found.append(model(mx.array([[1, 2]])).tolist()))
    worker.start()
    worker.join()
    assert found == [model(mx.array([[1, 2]])).tolist()]


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
    ],
)
@pytest.mark.parametrize("value", ["absent", "12", None, -4, 0, True, [8], float("nan")], ids=str)
def test_a_missing_or_wrong_number_is_named(key, value):
    config = {**TOY_CONFIG, key: value}
    if value == "absent":
        del config[key]
    with pytest.raises(ConfigError, match=rf"config\.json: .*{key}"):
        LlamaConfig.from_dict(config)


def test_every_missing_key_is_named_at_once():
    with pytest.raises(ConfigError, match=r"missing hidden_size, .*vocab_size, rms_norm_eps"):
        LlamaConfig.from_dict({"model_type": "llama"})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_key_value_heads": 3}, "key/value heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 8.0}, "head_dim"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_theta": json.loads("Infinity")}, "rope_theta"),
        ({"rms_norm_eps": json.loads("Infinity")}, "rms_norm_eps"),
        ({"rope_scaling": "linear"}, "rope_scaling"),
        ({"rope_parameters": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"max_position_embeddings": "long"}, "max_position_embeddings"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_this_llama_raises(change, named):
    with pytest.raises(ConfigError, match=named):
        LlamaConfig.from_dict({**TOY_CONFIG, **change})


def test_the_rope_of_transformers_5_is_read():
    parameters = {**LLAMA3, "rope_theta": 500_000.0}
    old = {k: v for k, v in TOY_CONFIG.items() if k != "rope_theta"}
    config = LlamaConfig.from_dict({**old, "rope_parameters": parameters})
    assert config.rope_theta == 500_000.0
    assert config.rope_scaling["rope_type"] == "llama3"


def test_all_layers_share_the_rotation_of_a_position():
    """So a token computes it once, however many layers there are."""
    model = toy_model(num_hidden_layers=5)
    assert len({id(layer.self_attn.rope) for layer in model.layers}) == 1
