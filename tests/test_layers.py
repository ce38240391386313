"""RoPE, the KV cache, the mask and grouped-query attention, each against an independent formula."""

import math

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.rope_utils import initialize_rope

from tests.toy import toy_model
from workbench.errors import ConfigError, WorkbenchError
from workbench.models.layers import KVCache, causal_mask
from workbench.models.rope import RotaryEmbedding, rope_periods

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def normal(*shape, seed=0):
    """Standard normal numbers."""
    return mx.random.normal(shape, key=mx.random.key(seed))


def close(a, b, tolerance=1e-5):
    """Whether two arrays agree, relative to the largest number."""
    a, b = np.array(a), np.array(b)
    return a.shape == b.shape and np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1e-9)


def rotated(x, base, offset=0, scale=1.0):
    """RoPE from the paper, pair by pair: x (B, H, T, D), half-split."""
    x, out = np.array(x, dtype=np.float64), np.empty(x.shape)
    half = x.shape[-1] // 2
    for t in range(x.shape[2]):
        for i in range(half):
            angle = (offset + t) * scale / base ** (2 * i / x.shape[-1])
            c, s = math.cos(angle), math.sin(angle)
            a, b = x[:, :, t, i], x[:, :, t, i + half]
            out[:, :, t, i], out[:, :, t, i + half] = a * c - b * s, a * s + b * c
    return out


def test_rope_is_the_papers_formula():
    x = normal(2, 3, 7, 8)
    assert close(RotaryEmbedding(8, 1e4, 64, None)(x, 5), rotated(x, 1e4, offset=5))


def test_linear_scaling_divides_the_positions():
    x = normal(1, 2, 9, 8)
    rope = RotaryEmbedding(8, 1e4, 64, {"type": "linear", "factor": 4.0})
    assert close(rope(x, 3), rotated(x, 1e4, offset=3, scale=1 / 4))


@pytest.mark.parametrize("base", [1e4, 5e5])
def test_llama3_periods_are_those_of_the_reference(base):
    expected = []
    for i in range(64):  # Meta's apply_scaling, one frequency after the other
        frequency = 1 / base ** (2 * i / 128)
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            expected.append(1 / frequency)
        elif wavelength > 8192 / 1:
            expected.append(8 / frequency)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected.append(1 / ((1 - smooth) * frequency / 8 + smooth * frequency))
    assert close(rope_periods(128, base, LLAMA3)[0] / mx.array(expected), mx.ones(64))


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
def test_rope_equals_mlx_lms(scaling):
    x = normal(2, 2, 11, 16)
    theirs = initialize_rope(16, 5e5, False, scaling, 64)
    assert close(RotaryEmbedding(16, 5e5, 64, scaling)(x, 17), theirs(x, offset=17))


@pytest.mark.parametrize("offset", [0, 1, 13])
def test_a_slice_is_rotated_as_in_the_full_table(offset):
    rope, x = RotaryEmbedding(8, 1e4, 64, None), normal(1, 2, 20, 8)
    assert close(rope(x[:, :, offset : offset + 5], offset), rope(x)[:, :, offset : offset + 5])


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}, LLAMA3])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_position_alone_is_rotated_as_among_others(scaling, dtype):
    rope, x = RotaryEmbedding(16, 5e5, 8192, scaling), normal(3, 2, 9, 16).astype(dtype)
    for start in (0, 8183):
        whole = rope(x, start)
        for t in (4, 4, 0, 8, 1):  # in any order: no position is answered with another's rotation
            alone = rope(x[:, :, t : t + 1], start + t)
            assert alone.dtype == dtype
            expected = whole[:, :, t : t + 1].astype(mx.float32)
            assert close(alone.astype(mx.float32), expected, 1e-5 if dtype == mx.float32 else 1e-2)


def test_the_gradient_through_a_position_alone_is_the_inverse_rotation():
    rope, x = RotaryEmbedding(8, 1e4, 64, None), normal(1, 2, 1, 8)
    gradient = mx.grad(lambda x: (rope(x, 7) * normal(1, 2, 1, 8, seed=1)).sum())(x)
    pair = mx.concatenate([normal(1, 2, 1, 8, seed=1)] * 2, axis=2)
    plain = mx.grad(lambda x: (rope(x, 7) * pair)[:, :, :1].sum())(mx.concatenate([x, x], axis=2))
    assert close(gradient, plain[:, :, :1])


def test_scores_depend_on_the_distance_alone():
    rope, q, k = RotaryEmbedding(8, 1e4, 512, None), normal(1, 1, 1, 8), normal(1, 1, 1, 8, seed=1)
    scores = [(rope(q, at + 7) * rope(k, at)).sum().item() for at in (0, 5, 300)]
    assert max(scores) - min(scores) < 1e-4
    assert abs((rope(q, 9) * rope(k, 0)).sum().item() - scores[0]) > 1e-3


def test_rope_turns_positions_and_not_heads():
    rope, x = RotaryEmbedding(8, 1e4, 64, None), normal(1, 1, 6, 8)
    assert close(rope(mx.repeat(x, 3, axis=1)), mx.repeat(rope(x), 3, axis=1))


@pytest.mark.parametrize(("offset", "length"), [(0, 65), (60, 5), (64, 1), (-1, 1)])
def test_positions_outside_the_model_raise(offset, length):
    rope = RotaryEmbedding(8, 1e4, 64, None)
    with pytest.raises(WorkbenchError, match=r"outside this model's 64.*Shorten"):
        rope(normal(1, 1, length, 8), offset)


def test_the_last_position_is_allowed():
    assert RotaryEmbedding(8, 1e4, 64, None)(normal(1, 1, 1, 8), 63).shape == (1, 1, 1, 8)


@pytest.mark.parametrize("kind", ["yarn", "longrope", "dynamic", 7])
def test_an_unsupported_scaling_raises_and_is_named(kind):
    with pytest.raises(ConfigError, match=f"rope scaling {kind!r} is not supported"):
        rope_periods(8, 1e4, {"rope_type": kind, "factor": 2.0})


@pytest.mark.parametrize("key", [key for key in LLAMA3 if key != "rope_type"])
@pytest.mark.parametrize("value", [None, 0, -1.0, "8", True, math.nan, math.inf])
def test_a_wrong_number_of_a_scaling_is_named(key, value):
    with pytest.raises(ConfigError, match=f"{key} must be a positive number"):
        rope_periods(8, 1e4, {**LLAMA3, key: value})


def test_llama3_factors_in_the_wrong_order_raise():
    with pytest.raises(ConfigError, match="low_freq_factor"):
        rope_periods(8, 1e4, {**LLAMA3, "low_freq_factor": 4.0})


@pytest.mark.parametrize("capacity", [1, 4, 64])
@pytest.mark.parametrize("lengths", [[1] * 9, [5, 1, 3], [2, 7]])
def test_the_cache_joins_on_the_sequence_axis(capacity, lengths):
    keys, values = normal(2, 3, sum(lengths), 4), normal(2, 3, sum(lengths), 6, seed=1)
    cache, start = KVCache(capacity), 0
    for length in lengths:
        end = start + length
        seen = cache.update_and_fetch(keys[:, :, start:end], values[:, :, start:end])
        assert mx.array_equal(seen[0], keys[:, :, :end])
        assert mx.array_equal(seen[1], values[:, :, :end])
        start = end
    assert cache.offset == sum(lengths)


@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 4), (2, 6, 1, 4), (2, 3, 1, 8), (3, 1, 4)])
def test_the_cache_refuses_keys_or_values_of_another_shape(which, shape):
    cache = KVCache()
    cache.update_and_fetch(normal(2, 3, 5, 4), normal(2, 3, 5, 4))
    pair = [normal(2, 3, 1, 4), normal(2, 3, 1, 4)]
    pair[which] = normal(*shape)
    with pytest.raises(WorkbenchError, match=r"keys|values"):
        cache.update_and_fetch(*pair)
    assert cache.offset == 5


def test_keys_and_values_of_different_lengths_raise():
    with pytest.raises(WorkbenchError, match="must agree"):
        KVCache().update_and_fetch(normal(1, 1, 2, 4), normal(1, 1, 3, 4))


def test_appending_a_token_does_not_copy_the_past():
    cache, token = KVCache(capacity=4096), normal(1, 4, 1, 64)
    for _ in range(3):
        mx.eval(cache.update_and_fetch(token, token))
    mx.eval(cache.keys, cache.values)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(20):
        mx.eval([x[..., -1:, :].sum() for x in cache.update_and_fetch(token, token)])
    assert mx.get_peak_memory() - before < cache.keys.nbytes / 10


def test_the_buffer_doubles_so_that_growth_is_rare():
    cache, token, sizes = KVCache(capacity=2), normal(1, 1, 1, 4), set()
    for _ in range(100):
        cache.update_and_fetch(token, token)
        sizes.add(cache.keys.shape[2])
    assert sorted(sizes) == [2, 4, 8, 16, 32, 64, 128]


def test_kept_rows_go_on_where_they_were():
    keys, values = normal(4, 2, 6, 4), normal(4, 2, 6, 4, seed=1)
    cache, kept = KVCache(capacity=8), mx.array([3, 1])
    cache.update_and_fetch(keys[:, :, :5], values[:, :, :5])
    cache.keep_rows(kept)
    seen = cache.update_and_fetch(keys[kept][:, :, 5:], values[kept][:, :, 5:])
    assert mx.array_equal(seen[0], keys[kept])
    assert mx.array_equal(seen[1], values[kept])


def test_a_query_sees_itself_and_the_past():
    mask = causal_mask(3, offset=2)
    assert mask.tolist() == [[j <= 2 + i for j in range(5)] for i in range(3)]


def test_padding_is_hidden_from_every_token_but_itself():
    mask = causal_mask(4, padding=mx.array([0, 2]))
    assert mask.shape == (2, 1, 4, 4)
    assert mx.array_equal(mask[0, 0], causal_mask(4))
    expected = [[j == i or (2 <= j <= i) for j in range(4)] for i in range(4)]
    assert mask[1, 0].tolist() == expected


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_a_plain_loop_over_heads(kv_heads):
    """Query head h reads key/value head h // (H / KV); softmax(q k / sqrt(D)) v under the mask."""
    attention = toy_model(num_key_value_heads=kv_heads).layers[0].self_attn
    x = normal(2, 6, 32)
    B, T, H, D = 2, 6, 4, 8
    q = rotated(attention.q_proj(x).reshape(B, T, H, D).swapaxes(1, 2), 1e4)
    k = rotated(attention.k_proj(x).reshape(B, T, kv_heads, D).swapaxes(1, 2), 1e4)
    v = np.array(attention.v_proj(x).reshape(B, T, kv_heads, D))
    out = np.zeros((B, T, H, D))
    for b in range(B):
        for h in range(H):
            shared = h // (H // kv_heads)
            for t in range(T):
                scores = k[b, shared, : t + 1] @ q[b, h, t] / math.sqrt(D)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights / weights.sum() @ v[b, : t + 1, shared]
    expected = out.reshape(B, T, H * D) @ np.array(attention.o_proj.weight).T
    assert close(attention(x, "causal"), expected)
