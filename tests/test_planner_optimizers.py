"""Every optimizer of the trainer is planned as it is: its state, its update, its names."""

from __future__ import annotations

import inspect

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from tests.planner_grid import OPTIMIZED, SHAPES, Case, _prepared, optimizer_grid, toy_subject
from tests.planner_models import MODEL, mac, planned
from workbench.errors import ConfigError
from workbench.probes.planner import plan_memory
from workbench.probes.planning.network import Network
from workbench.probes.planning.optimizers import OPTIMIZERS
from workbench.probes.planning.parameters import MODES
from workbench.tuning import config
from workbench.tuning.optimizers import make_optimizer

PROPORTIONS = ("toy", "deep", "wide", "words", "heads")
SOME = [c for c in OPTIMIZED if c.settings["mode"] == "full"] + [
    Case("toy", rows=2, length=16, settings={"mode": "lora", "optimizer": name})
    for name in ("adafactor", "muon")
]
SOME.append(Case("deep", 2, 16, settings={"mode": "full", "optimizer": "adafactor"}))


def assert_within_bars(errors):
    """Those of the planner's grid; and little is above what is said to be the fullest moment."""
    assert errors.abs().median() <= 0.05, errors
    assert errors.max() <= 0.15, errors
    assert errors.min() >= -0.08, errors  # small buffers that are used again may be larger


@pytest.fixture(scope="module")
def grid():
    return optimizer_grid(SOME)


@pytest.mark.parametrize("peak", ["whole", "update"])
def test_every_optimizer_is_within_the_bars(grid, peak):
    assert_within_bars(grid.set_index("configuration")[f"{peak}_error"])


@pytest.mark.long
@pytest.mark.parametrize("shape", PROPORTIONS)
def test_so_is_each_in_every_mode_and_in_other_proportions(shape):
    cases = [Case(shape, c.rows, c.length, c.lora, c.settings) for c in OPTIMIZED]
    grid = optimizer_grid(cases)
    assert_within_bars(
        grid.set_index("configuration").update_error
    )  # the whole peak is that of loading for some


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_as_large_as_the_optimizers_own(name, mode):
    base = toy_subject("words")
    optimizer = make_optimizer(config.TrainConfig(optimizer=name))
    with _prepared(Case("words", settings={"mode": mode}), base):
        optimizer.init(base.model.trainable_parameters())
    state = sum(array.nbytes for _, array in tree_flatten(optimizer.state) if array.ndim)
    plan = planned(base.config, mode=mode, optimizer=name)
    for phase in ("forward and backward", "update"):
        assert plan.phases[phase].parts["optimizer"] == state


def test_the_names_and_the_default_are_the_trainers():
    assert OPTIMIZERS == config.OPTIMIZERS
    default = inspect.signature(plan_memory).parameters["optimizer"].default
    assert default == config.TrainConfig().optimizer == OPTIMIZERS[0]
    assert planned().settings["optimizer"] == default


@pytest.mark.parametrize("name", ["rmsprop", "AdamW", "", None, ["adamw"]])
def test_another_name_is_refused_with_those_that_there_are(name):
    with pytest.raises(ConfigError, match=r"(?s)unknown optimizer.*adamw.*adafactor.*muon"):
        planned(optimizer=name)


def test_less_state_needs_less_memory():
    settings = {"mode": "full", "micro_batch_size": 1, "length": 8}
    peaks = [
        planned(optimizer=name, **settings).peak_bytes for name in ("adafactor", "sgd", "adamw")
    ]
    assert peaks == sorted(set(peaks))
    assert planned(optimizer="sgd").request != planned().request
    assert ", sgd" in planned(optimizer="sgd").summary
    assert "adamw" not in planned().summary


def test_muon_leaves_tables_and_vectors_to_adamw():
    of_head = [planned(mode="head", optimizer=name).phases for name in ("muon", "adamw")]
    assert of_head[0] == of_head[1]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_planned_for_a_gpu_and_for_narrow_weights(name):
    for machine, dtype in ((mac(64), "bfloat16"), (mac(64), "float32")):
        plan = planned(machine=machine, dtype=dtype, mode="full", optimizer=name)
        assert plan.phases["update"].total_bytes > plan.resident_bytes


@pytest.mark.parametrize("shape", ["toy", "words"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_lie_as_the_backward_pass_makes_them(shape, mode):
    request = planned({**MODEL, **SHAPES[shape]}, mode=mode).request
    parameters = request.parameters()
    made = Network(parameters, 0.0, request.gpu, request.fast_forms).gradients(request.work)[1:]
    groups = [parameters.top, *parameters.layers]
    trained = [array for group in groups for array in group.values() if array.trains]
    assert len(made) == len(trained) == len(parameters.trainable)
    for array, gradient in zip(trained, made):
        assert parameters.gradient(array).row_contiguous == gradient.row_contiguous


def test_parameters_train_in_the_order_of_the_modules():
    base = toy_subject("words")
    with _prepared(Case("words", settings={"mode": "full"}), base):
        real = [a.shape for _, a in tree_flatten(base.model.trainable_parameters())]
    parameters = planned(base.config, mode="full").request.parameters()
    assert [array.shape for array in parameters.trainable] == real
    assert all(array.itemsize == mx.float32.size for array in parameters.trainable)
