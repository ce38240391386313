"""`check_training` leaves model, optimizer and random state as they were."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

from tests.mutants_updates import right_step
from tests.toy import toy_model
from tests.toy_checks import BATCH, adapted, checked
from workbench.probes.parameters import fingerprint
from workbench.probes.training_checks.preserving import prepared, preserved
from workbench.tuning.losses import plain_loss


def picture(model, optimizer):
    """All that a check could change, as it is now."""
    flags = [(p, set(m._no_grad), m.training) for p, m in model.named_modules()]
    state = {name: np.array(array) for name, array in tree_flatten(optimizer.state)}
    return fingerprint(model), sorted(flags, key=lambda flag: flag[0]), state


def same(one, other):
    """Whether two pictures are equal."""
    state, again = one[2], other[2]
    is_equal = state.keys() == again.keys()
    return one[:2] == other[:2] and is_equal and all((state[n] == again[n]).all() for n in state)


def meddling(model, optimizer):
    """A step that changes whatever it can, in place where it can."""

    def step(batch):
        right_step(model, optimizer, batch)
        model.model.norm.weight += 1.0
        model.unfreeze()
        model.train()
        model.layers.append(model.layers[0])
        model.another = mx.zeros(3)
        model.scale = 3.0
        mx.random.seed(5)
        return 0.0

    return step


def test_everything_is_as_before():
    model, optimizer = adapted(dropout=0.3), optim.AdamW(1e-3)
    model.train()
    right_step(model, optimizer, BATCH)
    before, random = picture(model, optimizer), mx.random.state[0].tolist()
    holds = model.state, optimizer.state, model.layers
    report = checked(model=model, step=meddling(model, optimizer), optimizer=optimizer)
    assert not report.ok
    assert same(before, picture(model, optimizer))
    assert mx.random.state[0].tolist() == random
    assert not hasattr(model, "scale")
    # A compiled step holds on to these objects.
    assert all(a is b for a, b in zip(holds, (model.state, optimizer.state, model.layers)))
    right_step(model, optimizer, BATCH)


@pytest.mark.parametrize("fault", [KeyError("a"), KeyboardInterrupt()])
def test_everything_is_as_before_when_the_loss_raises(fault):
    model, calls = adapted(), []
    before = picture(model, optim.AdamW(1e-3))

    def loss_fn(model, batch):
        calls.append(batch)
        if len(calls) > 5:
            raise fault
        return plain_loss(model, batch)

    if isinstance(fault, Exception):
        assert not checked(loss_fn, model).ok
    else:
        with pytest.raises(KeyboardInterrupt):
            checked(loss_fn, model)
    assert same(before, picture(model, optim.AdamW(1e-3)))


def test_an_optimizer_that_was_never_used_is_still_unused():
    optimizer = optim.AdamW(1e-3)
    checked(optimizer=optimizer)
    assert set(optimizer.state) == {"step", "learning_rate"}
    assert optimizer.step.item() == 0


def test_tied_arrays_stay_one_object():
    model = toy_model()
    model.tied = model.model.norm.weight
    with preserved(model):
        model.model.norm.weight = model.model.norm.weight + 1
    assert model.tied is model.model.norm.weight


def test_half_precision_is_looked_at_in_float32():
    model = toy_model()
    model.set_dtype(mx.bfloat16)
    before = fingerprint(model)
    with prepared(model):
        assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    assert fingerprint(model) == before
    report = checked(model=model, mode="full")
    assert report.status("finite differences") == "ok", str(report)
