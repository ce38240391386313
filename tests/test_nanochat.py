"""nanochat's GPT: each property of it, and equal to mlx-lm's on the same weights."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from tests.test_layers import close
from tests.test_llama import padded_left
from tests.toy import VOCAB_SIZE
from tests.toy_folders import weights_of
from tests.toy_nanochat import by_hand, mlx_lm_twin, nanochat_base, toy_nanochat
from workbench.errors import DataError, WorkbenchError
from workbench.evaluation.generation import SamplingConfig, encode_prompt, generate, generate_tokens
from workbench.models import layers
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig

VARIANTS = {
    "grouped heads": {},
    "one head a query": {"num_key_value_heads": 4},
    "one key/value head": {"num_key_value_heads": 1},
    "another theta": {"rope_theta": 500.0},
    "wider heads": {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1},
}
TOKENS = mx.random.randint(0, VOCAB_SIZE, (3, 12), key=mx.random.key(7))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}


def fresh(seed=0, **changes):
    """A network as nanochat starts it."""
    mx.random.seed(seed)
    model = NanoChat(NanoChatConfig(**{**SIZES, "vocab_size": VOCAB_SIZE, **changes}))
    mx.eval(model.parameters())
    return model


# Equal to mlx-lm's, and to the formulas


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_mlx_lms_and_the_formulas(variant):
    model = toy_nanochat(**VARIANTS[variant])
    logits = model(TOKENS)
    assert logits.dtype == mx.float32
    assert close(logits, mlx_lm_twin(model)(TOKENS), 1e-5)
    assert close(logits, by_hand(model, np.array(TOKENS)), 1e-5)


def in_pieces(model, cache, lengths):
    """Logits of TOKENS, fed through a cache in pieces."""
    start, logits = 0, []
    for length in lengths:
        logits.append(model(TOKENS[:, start : start + length], cache=cache))
        start += length
    return mx.concatenate(logits, axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 4, 3], [1, 10, 1]], ids=str)
def test_cached_equals_uncached_and_mlx_lms(variant, lengths):
    model = toy_nanochat(**VARIANTS[variant])
    twin = mlx_lm_twin(model)
    ours = in_pieces(model, model.make_cache(4), lengths)
    assert close(ours, model(TOKENS), 1e-5)
    assert close(ours, in_pieces(twin, make_prompt_cache(twin), lengths), 1e-5)


def test_far_positions_equal_mlx_lms():
    model = toy_nanochat()
    twin, tokens = mlx_lm_twin(model), mx.tile(TOKENS, (1, 40))
    cache, theirs = model.make_cache(), make_prompt_cache(twin)
    for start, end in ((0, 450), (450, 479), (479, 480)):
        ours = model(tokens[:, start:end], cache=cache)
        assert close(ours, twin(tokens[:, start:end], cache=theirs), 1e-5)
    assert close(ours, model(tokens)[:, -1:], 1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_text_equals_mlx_lms(seed):
    base = nanochat_base(seed)
    ids = encode_prompt(base, "What is the capital of Peru?")
    sampling = SamplingConfig(max_tokens=24)
    ours = [token for (token,) in generate_tokens(base, [ids], sampling)]
    theirs = []
    for token, _ in generate_step(mx.array(ids), mlx_lm_twin(base.model), max_tokens=24):
        if token in base.eos_token_ids:
            break
        theirs.append(token)
    assert ours == theirs
    assert len(set(ours)) > 3


def test_a_batch_is_decoded_as_each_prompt_alone():
    """Rows of other lengths, longer than a chunk of the prefill, padded on the left."""
    base, prompts = nanochat_base(1), ["Hi", "a word " * 40, "rivers and the sea", "Hi"]
    expected = [generate(base, prompt, max_tokens=10) for prompt in prompts]
    assert generate(base, prompts, max_tokens=10) == expected
    assert len(set(expected)) == 3


@pytest.mark.parametrize("lengths", [[9], [4, 5], [1] * 9], ids=str)
def test_left_padding_gives_each_row_the_logits_it_has_alone(lengths):
    model, rows = toy_nanochat(), [TOKENS[0, :9].tolist(), TOKENS[1, :4].tolist(), [17]]
    tokens, padding = padded_left(rows)
    cache, start, parts = model.make_cache(), 0, []
    for length in lengths:
        part = tokens[:, start : start + length]
        parts.append(model(part, cache=cache, padding=padding))
        start += length
    for row, own in zip(rows, mx.concatenate(parts, axis=1)):
        assert close(own[-len(row) :], model(mx.array([row]))[0], 1e-5)


# Each property


def test_parameters_are_matrices_under_mlx_lms_names():
    """So there are no biases, and no norm has a weight."""
    model = toy_nanochat()
    shapes = {name: array.shape for name, array in weights_of(model).items()}
    assert shapes == {n: a.shape for n, a in tree_flatten(mlx_lm_twin(model).parameters())}
    assert len(shapes) == 2 * 6 + 2
    assert all(name.endswith(".weight") and len(shape) == 2 for name, shape in shapes.items())


def test_key_value_heads_serve_neighbouring_query_heads():
    grouped, full = toy_nanochat(), toy_nanochat(num_key_value_heads=4)
    weights = weights_of(grouped)
    for name in weights:
        if name.endswith(("c_k.weight", "c_v.weight")):
            split = weights[name].reshape(2, 8, 32)  # (KV, head_dim, D)
            weights[name] = mx.repeat(split, 2, axis=0).reshape(32, 32)
    full.load_weights(list(weights.items()))
    assert close(grouped(TOKENS), full(TOKENS), 1e-5)


def test_queries_and_keys_are_normalised_after_they_are_rotated(monkeypatch):
    model, seen = toy_nanochat(), []
    plain = layers.attend

    def attend(queries, keys, values, scale, mask):
        seen.append((queries, keys))
        return plain(queries, keys, values, scale, mask)

    monkeypatch.setattr(layers, "attend", attend)
    expected = model(TOKENS)
    layer = model.layers[0]
    entering = mx.fast.rms_norm(model.embed(TOKENS), None, 1e-5)
    for found, projection, heads in zip(seen[0], (layer.attn.c_q, layer.attn.c_k), (4, 2)):
        rotated = layer.attn.rope(projection(entering).reshape(3, 12, heads, 8).swapaxes(1, 2))
        assert mx.array_equal(found, mx.fast.rms_norm(rotated, None, 1e-5))
        assert mx.allclose(mx.square(found).mean(axis=-1), mx.array(1.0), atol=1e-3)
    for each in model.layers:  # so their size does not count
        each.attn.c_q.weight, each.attn.c_k.weight = (
            50 * w for w in (each.attn.c_q.weight, each.attn.c_k.weight)
        )
    assert close(model(TOKENS), expected, 1e-3)


def test_the_feed_forward_layer_squares_what_is_positive():
    layer = toy_nanochat().layers[0].mlp
    x = mx.random.normal((5, 32), key=mx.random.key(1))
    inner = np.maximum(np.array(x) @ np.array(layer.c_fc.weight).T, 0) ** 2
    assert close(layer(x), inner @ np.array(layer.c_proj.weight).T)


def test_the_head_is_not_the_embedding():
    model, before = toy_nanochat(), toy_nanochat()(TOKENS)
    absent = next(t for t in range(VOCAB_SIZE) if t not in TOKENS.flatten().tolist())
    model.transformer.wte.weight[absent] += 1
    assert mx.array_equal(model(TOKENS), before)
    model.lm_head.weight[absent] += 1
    moved = mx.abs(model(TOKENS) - before).max(axis=(0, 1))
    assert [t for t, change in enumerate(moved.tolist()) if change] == [absent]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_logits_are_capped_at_15_in_float32(dtype):
    model = toy_nanochat()
    model.lm_head.weight = 40 * model.lm_head.weight
    model.set_dtype(dtype)
    states = model.backbone(TOKENS)
    raw = model.lm_head(mx.fast.rms_norm(states, None, 1e-5)).astype(mx.float32)
    logits = model(TOKENS)
    assert logits.dtype == mx.float32
    assert mx.abs(raw).max() > 60
    assert 14.9 < mx.abs(logits).max() <= 15
    assert close(logits, 15 * np.tanh(np.array(raw) / 15))


def test_the_head_of_the_backbone_is_the_model():
    model = toy_nanochat()
    assert mx.array_equal(model.head(model.backbone(TOKENS)), model(TOKENS))


def test_a_position_too_far_raises():
    with pytest.raises(WorkbenchError, match=r"positions \[0 : 12\].*8"):
        toy_nanochat(max_position_embeddings=8)(TOKENS)


# The loss


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model, targets = toy_nanochat(), np.array(TOKENS)[:, ::-1].copy()
    targets[0, 3:], targets[2, 0] = -1, -1
    logits = by_hand(model, np.array(TOKENS))
    total, count = 0.0, 0
    for row in range(3):
        for t in range(12):
            if targets[row, t] != -1:
                chances = np.exp(logits[row, t]) / np.exp(logits[row, t]).sum()
                total, count = total - math.log(chances[targets[row, t]]), count + 1
    loss = model(TOKENS, mx.array(targets))
    assert loss.shape == ()
    assert count == 36 - 10
    assert loss.item() == pytest.approx(total / count, rel=1e-5)
    assert model(TOKENS, mx.full((3, 12), -1)).item() == 0


def test_no_target_is_shifted():
    model = toy_nanochat()
    logits = model(TOKENS)
    best = mx.argmax(logits, axis=-1)
    lowest = (mx.logsumexp(logits, axis=-1) - logits.max(axis=-1)).mean().item()
    assert model(TOKENS, best).item() == pytest.approx(lowest, rel=1e-5)
    assert model(TOKENS, mx.roll(best, 1, axis=1)).item() > lowest + 1


@pytest.mark.parametrize("shape", [(3, 11), (2, 12), (12,), (3, 12, 1)])
def test_targets_of_another_shape_raise(shape):
    with pytest.raises(DataError, match=r"targets \(.*misaligned with tokens \(3, 12\)") as caught:
        toy_nanochat()(TOKENS, mx.zeros(shape, mx.int32))
    assert str(shape) in str(caught.value)


NO_IDS = {
    "a list": lambda ids: ids.tolist(),
    "a NumPy array": np.array,
    "floats": lambda ids: ids.astype(mx.float32),
    "truth values": lambda ids: ids > 0,
}


@pytest.mark.parametrize("name", NO_IDS)
def test_what_are_no_ids_is_named(name):
    model, wrong = toy_nanochat(), NO_IDS[name](TOKENS)
    with pytest.raises(DataError, match=r"^tokens must be .*mx\.array"):
        model(wrong)
    with pytest.raises(DataError, match=r"^targets must be .*model\(tokens, cache=…\)"):
        model(TOKENS, wrong)
    with pytest.raises(DataError, match=r"^targets must be an array of ids, got a list"):
        model(TOKENS, model.make_cache())  # as mlx-lm calls its models


@pytest.mark.parametrize("shape", [(), (12,), (3, 4, 5), (0, 5), (3, 0)])
def test_tokens_that_are_no_rows_are_named(shape):
    tokens = mx.zeros(shape, mx.int32)
    for targets in (None, tokens):
        with pytest.raises(DataError, match=r"^tokens must be \(B, T\) from 1, got \("):
            toy_nanochat()(tokens, targets)


def test_a_target_outside_the_vocabulary_makes_the_loss_nan():
    targets = mx.array(TOKENS)
    targets[1, 1] = VOCAB_SIZE
    assert math.isnan(toy_nanochat()(TOKENS, targets).item())


# The start


def test_first_weights_are_nanochats():
    model = fresh(hidden_size=64)
    bound = math.sqrt(3 / 64)
    for name, weight in weights_of(model).items():
        if name.endswith("c_proj.weight"):
            assert not weight.any().item(), name
        elif name.startswith("transformer.h."):
            assert 0.95 * bound < mx.abs(weight).max().item() <= bound, name
            assert mx.std(weight).item() == pytest.approx(1 / 8, rel=0.05), name
    assert mx.std(model.transformer.wte.weight).item() == pytest.approx(1, rel=0.05)
    assert mx.std(model.lm_head.weight).item() == pytest.approx(0.001, rel=0.05)
    loss = model(TOKENS, mx.roll(TOKENS, -1, axis=1)).item()
    assert loss == pytest.approx(math.log(VOCAB_SIZE), abs=0.02)


def test_the_start_follows_the_seed():
    one, same, other = (weights_of(fresh(seed)) for seed in (3, 3, 4))
    assert all(mx.array_equal(one[name], same[name]) for name in one)
    drawn = [name for name in one if "c_proj" not in name]
    assert not any(mx.array_equal(one[name], other[name]) for name in drawn)


def gradients(model):
    """Of the loss on a row that has every token, by name."""
    tokens = mx.arange(VOCAB_SIZE)[None]
    step = nn.value_and_grad(model, lambda m: m(tokens, mx.roll(tokens, 3, axis=1)))
    return dict(tree_flatten(step(model)[1]))


def test_every_parameter_gets_gradient_once_the_layers_lead_back():
    """At the start, what stands before a c_proj of zeros gets none; after one step, all do."""
    model = fresh(num_key_value_heads=2)
    first = gradients(model)
    without = {name for name, gradient in first.items() if not gradient.any().item()}
    before = ("c_q.weight", "c_k.weight", "c_v.weight", "c_fc.weight")
    assert without == {name for name in first if name.endswith(before)}
    moved = {name: weight - 10.0 * first[name] for name, weight in weights_of(model).items()}
    model.load_weights(list(moved.items()))
    second = gradients(model)
    assert second.keys() == weights_of(model).keys()
    assert all(mx.abs(gradient).max().item() > 0 for gradient in second.values())
    rows = mx.abs(second["transformer.wte.weight"]).max(axis=-1)
    assert rows.min().item() > 0


def test_gradients_are_the_slopes_of_the_loss():
    model, targets, h = toy_nanochat(), mx.roll(TOKENS, -1, axis=1), 1e-2
    step = nn.value_and_grad(model, lambda m: m(TOKENS, targets))
    for name, gradient in tree_flatten(step(model)[1]):
        weight = weights_of(model)[name]
        way = gradient / mx.linalg.norm(gradient)
        found = []
        for sign in (1, -1):
            model.load_weights([(name, weight + sign * h * way)], strict=False)
            found.append(model(TOKENS, targets).item())
        model.load_weights([(name, weight)], strict=False)
        slope = (found[0] - found[1]) / (2 * h)
        assert slope == pytest.approx(mx.linalg.norm(gradient).item(), rel=0.02), name
