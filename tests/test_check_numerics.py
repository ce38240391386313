"""NaN, infinity, overflow and underflow: each planted fault is found and named by path."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path

import workbench as wb
from tests.toy_folders import A_WEIGHT
from tests.toy_training import toy_trainer
from workbench.errors import ConfigError

PLANTED = {  # fault: a number that has it → what is found
    "nan": (float("nan"), ["nan"]),
    "inf": (float("inf"), ["inf", "overflow"]),
    "-inf": (-float("inf"), ["inf", "overflow"]),
    "overflow": (-1.001e6, ["overflow"]),
    "underflow": (-0.9e-6, ["underflow"]),
}
FLAGS = ("has_nan", "has_inf", "has_overflow", "has_underflow")


def planted(array: mx.array, place: tuple[int, ...], number: float) -> mx.array:
    """A copy with one other number."""
    changed = np.array(array.astype(mx.float32))
    changed[place] = number
    return mx.array(changed).astype(array.dtype)


def with_planted(tree: object, path: str, place: tuple[int, ...], number: float) -> object:
    """A tree in which one array has one other number."""
    return tree_map_with_path(lambda p, a: planted(a, place, number) if p == path else a, tree)


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_in_one_array_is_found_with_its_place(name):
    number, kinds = PLANTED[name]
    report = wb.check_numerics(planted(mx.ones((3, 4)), (2, 1), number))
    assert [fault.kind for fault in report.faults] == kinds
    assert {(f.path, f.first, f.count, f.total) for f in report.faults} == {
        ("the array", (2, 1), 1, 12)
    }
    found = {
        kind
        for kind, flag in zip(("nan", "inf", "overflow", "underflow"), FLAGS)
        if getattr(report, flag)
    }
    assert found == set(kinds)
    assert not report.ok


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_in_a_network_is_named_by_its_path(base, name):
    number, kinds = PLANTED[name]
    clean = wb.check_numerics(base.model, smallest=1e-12)
    assert clean.ok
    assert "20 arrays: all finite" in str(clean)
    base.model.update(with_planted(base.model.parameters(), A_WEIGHT, (7, 3), number))
    report = wb.check_numerics(base.model, smallest=1e-6)
    for kind in kinds:
        assert A_WEIGHT in report.paths(kind)
    assert f"{A_WEIGHT}: {kinds[0]} at [7, 3], 1 of 2,048" in str(report)
    assert A_WEIGHT in set(report.table()["path"])
    assert A_WEIGHT in report._repr_html_()


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_in_nested_gradients_and_in_an_optimizer_is_named(name):
    number, kinds = PLANTED[name]
    tree = {"layers": [{"a": mx.ones(3)}, {"a": planted(mx.ones(3), (1,), number)}]}
    assert {fault.path for fault in wb.check_numerics(tree).faults} == {"layers.1.a"}
    trainer = toy_trainer(steps=1)
    list(trainer)
    paths = [path for path, _ in tree_flatten(trainer.optimizer.state) if path.endswith("lora_b.m")]
    state = with_planted(trainer.optimizer.state, paths[0], (0, 0), number)
    assert paths[0] in wb.check_numerics(state).paths(kinds[0])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_the_bounds_themselves_and_zero_are_let_pass(dtype):
    edges = mx.array([0.0, -0.0, 1.0, -1.0]).astype(dtype)
    assert wb.check_numerics(edges, largest=1.0, smallest=1.0).ok
    assert wb.check_numerics(mx.array([1e6, -1e6, 1e-6, -1e-6])).ok
    assert wb.check_numerics(mx.array([1e-9]), smallest=0).ok


def test_whole_numbers_and_empty_arrays_have_no_such_faults():
    tree = {"ids": mx.array([2**31 - 1]), "mask": mx.array([True]), "none": mx.zeros((0, 4))}
    assert wb.check_numerics({**tree, "step": np.array([5]), "number": 3.0}).ok


def test_numpy_arrays_are_seen_as_mlx_would_hold_them():
    report = wb.check_numerics({"x": np.array([1.0, 1e300]), "y": np.ones(2, np.float16)})
    assert report.paths("inf") == ["x"]


def test_thousands_of_faults_are_counted_and_a_few_listed():
    report = wb.check_numerics({f"w{n:03}": mx.full((4,), float("nan")) for n in range(100)})
    assert len(report.faults) == 100
    assert str(report).count("\n") == 21
    assert "… and 80 more: see .table()" in str(report)


@pytest.mark.parametrize(
    ("tree", "settings", "message"),
    [
        ({"a": ["text"]}, {}, "a.0 is no array, but a str"),
        (None, {}, "this is no array, but a NoneType"),
        (mx.ones(2), {"largest": float("nan")}, "largest must be a number"),
        (mx.ones(2), {"smallest": -1}, "smallest must be a number"),
        (mx.ones(2), {"largest": 1, "smallest": 2}, "smallest 2 is above largest 1"),
    ],
)
def test_what_is_no_array_and_bad_bounds_are_named(tree, settings, message):
    with pytest.raises(ConfigError, match=message):
        wb.check_numerics(tree, **settings)


def test_an_unknown_kind_is_named():
    with pytest.raises(ConfigError, match="unknown kind 'NaN'"):
        wb.check_numerics(mx.ones(2)).paths("NaN")
