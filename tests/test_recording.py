"""Recording changes nothing, hears everything, and leaves no trace."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.toy import toy_model
from workbench.models.stand_ins import intercepted
from workbench.probes.recording import recorded

TOKENS = mx.array([[5, 6, 7, 8]])


def modules(model):
    return [(path, id(module)) for path, module in model.named_modules()]


def test_outputs_are_those_of_the_silent_network():
    model = toy_model()
    plain, before = model(TOKENS), modules(model)
    with recorded(model) as heard:
        assert mx.array_equal(model(TOKENS), plain)
    assert modules(model) == before
    paths = [call.path for call in heard]
    assert paths[0] == "model.embed_tokens"
    assert paths[-1] == "model.norm"
    assert set(paths) | {"", "model"} == {path for path, _ in model.named_modules()}
    assert paths.index("model.layers.0.self_attn.q_proj") < paths.index("model.layers.0.self_attn")


def test_inputs_and_results_are_the_arrays_that_flowed():
    model = toy_model()
    with recorded(model, ["model.layers.0.mlp", "model.layers.0.mlp.down_proj"]) as heard:
        model(TOKENS)
    inner, outer = heard
    assert inner.path.endswith("down_proj")
    assert mx.array_equal(inner.result, outer.result)
    again = model.layers[0].mlp(outer.inputs)
    assert mx.allclose(again, outer.result)


def test_an_error_in_the_network_leaves_no_recorder_behind():
    model = toy_model()
    before = modules(model)

    def fail(module, x):
        raise RuntimeError("stop")

    failing = {"model.norm": fail}
    with pytest.raises(RuntimeError, match="stop"), recorded(model), intercepted(model, failing):
        model(TOKENS)
    assert modules(model) == before


def test_a_replaced_call_reaches_the_rest_of_the_network():
    model = toy_model()
    plain = model(TOKENS)
    with intercepted(model, {"model.norm": lambda norm, x: norm(x) * 2}):
        assert mx.allclose(model(TOKENS), 2 * plain, atol=1e-4)
    assert mx.array_equal(model(TOKENS), plain)


def test_inputs_by_keyword_are_found_and_replaced():
    model = toy_model()
    norm, x = model.model.norm, mx.ones((1, 2, 32))
    with recorded(model, ["model.norm"]) as heard:
        model.model.norm(x=x)
    assert heard[0].inputs is x
    args, kwargs = heard[0].with_inputs(2 * x)
    assert mx.array_equal(norm(*args, **kwargs), norm(2 * x))
