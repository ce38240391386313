"""Models, tokenizers and arguments that are no good: a finding or a clear error each."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.toy import toy_model, toy_tokenizer
from workbench.errors import ConfigError
from workbench.models.llama import Llama
from workbench.probes.invariants import check_model


class Raises(Llama):
    def __call__(self, tokens, cache=None):
        raise RuntimeError("<b>no</b>")


class ReturnsNaN(Llama):
    def __call__(self, tokens, cache=None):
        return super().__call__(tokens, cache) * mx.nan


class ReturnsTuple(Llama):
    def __call__(self, tokens, cache=None):
        return super().__call__(tokens, cache), cache


class ReturnsText(Llama):
    def __call__(self, tokens, cache=None):
        return "logits"


class ReturnsWholeNumbers(Llama):
    def __call__(self, tokens, cache=None):
        return super().__call__(tokens, cache).astype(mx.int32)


class RaisesWithCache(Llama):
    def __call__(self, tokens, cache=None):
        if cache is not None:
            raise ValueError("no cache, please")
        return super().__call__(tokens)


class RaisesBackwards(Llama):
    def __call__(self, tokens, cache=None):
        return _no_way_back(super().__call__(tokens, cache))


def _no_way_back(x: mx.array) -> mx.array:
    function = mx.custom_function(lambda x: x * 1.0)

    @function.vjp
    def refuse(primals, cotangents, outputs):
        raise RuntimeError("no way back")

    return function(x)


def of_class(kind: type[Llama]) -> Llama:
    model = toy_model()
    model.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("kind", "heading", "says"),
    [
        (Raises, "output", "RuntimeError: <b>no</b>"),
        (ReturnsNaN, "finite", "NaN"),
        (ReturnsText, "output", "returned str"),
        (ReturnsWholeNumbers, "dtype", "int32"),
        (RaisesWithCache, "cache", "no cache, please"),
        (RaisesBackwards, "gradients", "no way back"),
    ],
)
def test_a_model_that_misbehaves_is_a_finding(kind, heading, says):
    report = check_model(of_class(kind))
    details = [f.detail for f in report.failures if f.check == heading]
    assert details
    assert says in details[0]
    assert says.replace("<b>", "&lt;b&gt;").replace("</b>", "&lt;/b&gt;") in report._repr_html_()
    assert "<b>no</b>" not in report._repr_html_()


def test_a_tuple_is_taken_apart_and_mentioned():
    report = check_model(of_class(ReturnsTuple))
    assert report.ok, report
    assert "tuple of 2" in report.findings[0].detail


def test_without_logits_the_other_checks_do_not_pass():
    report = check_model(of_class(Raises))
    assert report.failed_checks == {"output"}
    assert {f.status for f in report.findings[1:]} == {"not applicable"}


def test_a_tokenizer_of_another_model_is_found():
    report = check_model(toy_model(vocab_size=200), toy_tokenizer())
    assert report.failed_checks == {"tokenizer"}


def test_what_is_not_a_model_is_refused():
    with pytest.raises(ConfigError, match=r"mlx\.nn\.Module.*function"):
        check_model(lambda tokens: tokens)


def test_headings_can_be_left_out_but_not_in_silence():
    report = check_model(toy_model(), skip=["gradients"])
    assert report.status("gradients") == "not applicable"
    with pytest.raises(ConfigError, match=r"gradient.*causality"):
        check_model(toy_model(), skip=["gradient"])
