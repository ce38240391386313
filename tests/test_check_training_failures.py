"""Batches, arguments, losses and models that are no good: a finding or a clear error each."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from tests.toy import toy_model
from tests.toy_checks import BATCH, adapted, checked, failure
from workbench.errors import ConfigError, DataError
from workbench.probes.training import check_training
from workbench.tuning.losses import plain_loss


def rows(tokens, mask=None):
    """A batch of any arrays."""
    tokens = np.array(tokens)
    return SimpleNamespace(tokens=tokens, loss_mask=np.ones(tokens.shape) if mask is None else mask)


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ([], "no batch"),
        (rows(np.zeros((0, 4), dtype=int)), "nothing to predict"),
        (rows([[5]]), "nothing to predict"),
        (rows([5, 6, 7]), "must both be"),
        (rows([[5, 6, 7]], np.ones((1, 2))), "must both be"),
        (rows([[5, 6, 7]], np.zeros((1, 3))), "no target"),
        (rows([[5, 6, 7]], np.array([[1, 0, 0]])), "no target"),
        (rows([[5, 6, 10**6]]), "row 0, position 2: token id 1000000 is outside"),
        (rows([[5, -1, 6]]), "token id -1 is outside"),
        (rows([[5.0, 6.0, 7.0]]), "whole numbers"),
        (rows([[5, 6, 7]], np.array([[0, 2, 1]])), "True and False"),
        (rows([[5, 6, 7]], np.array([[0, np.nan, 1]])), "True and False"),
        (np.array([[5, 6, 7]]), "has no .tokens"),
        (None, "has no .tokens"),
        ([BATCH, rows([[5, 6]], np.zeros((1, 2)))], "micro-batch 1: has no target"),
    ],
)
def test_a_bad_batch_is_a_clear_error(batch, says):
    with pytest.raises(DataError, match=says):
        checked(batch=batch)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"mode": "qlora"}, "unknown mode 'qlora'"),
        ({"loss_fn": None}, "loss_fn must be a function"),
        ({"step": 3}, "step must be a function"),
        ({"terms": {"a": 3}}, "term 'a' must be a function"),
        ({"model": SimpleNamespace(model=toy_model())}, "Pass its .model"),
    ],
)
def test_a_bad_argument_is_a_clear_error(given, says):
    with pytest.raises(ConfigError, match=says):
        check_training(**{"model": adapted(), "loss_fn": plain_loss, "batch": BATCH, **given})


def raising(*_):
    """A function that is broken."""
    raise RuntimeError("planted <b>")


@pytest.mark.parametrize(
    ("loss_fn", "says"),
    [
        (raising, "RuntimeError: planted"),
        (lambda model, batch: 3.0, "returned float"),
        (lambda model, batch: None, "returned NoneType"),
        (lambda model, batch: model(mx.array(batch.tokens)), "not a scalar"),
        (lambda model, batch: plain_loss(model, batch) * mx.nan, "nan"),
        (lambda model, batch: plain_loss(model, batch) / mx.array(0.0), "inf"),
    ],
)
def test_a_broken_loss_is_a_finding(loss_fn, says):
    report = checked(loss_fn)
    assert says in failure(report, "loss").detail
    assert report.failed_checks == {"loss"}


@pytest.mark.parametrize(
    ("given", "check"),
    [
        ({"step": raising}, "movement"),
        ({"gradients": raising}, "gradients"),
        ({"gradients": lambda model, batches: 3}, "gradients"),
        ({"terms": {"a": raising}}, "loss terms"),
        ({"terms": {"a": lambda model, batch: 0.0}}, "loss terms"),
    ],
)
def test_broken_code_is_a_finding(given, check):
    report = checked(**given)
    assert report.failed_checks == {check}, str(report)


def test_a_broken_model_is_a_finding():
    class Broken(type(toy_model())):
        def __call__(self, tokens, cache=None, padding=None):
            raise RuntimeError("planted")

    model = adapted()
    model.__class__ = Broken
    assert "planted" in failure(checked(model=model), "loss").detail


def test_a_model_with_nan_is_a_finding():
    model = adapted()
    model.model.norm.weight = model.model.norm.weight * mx.nan
    assert "nan" in failure(checked(model=model), "loss").detail


def test_what_is_shown_as_html_is_escaped():
    report = checked(terms={"<script>": lambda model, batch: mx.array(1.0)}, step=raising)
    shown = report._repr_html_()
    assert "<script>" not in shown
    assert "&lt;script&gt;" in shown
    assert "planted &lt;b&gt;" in shown
