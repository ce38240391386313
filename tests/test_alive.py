"""What is alive, by name."""

import mlx.core as mx
import pytest

from tests.toy_training import toy_trainer
from workbench.errors import ConfigError
from workbench.probes.alive import what_is_alive


def test_arrays_are_named_once_and_sorted_by_size():
    trainer = toy_trainer()
    list(trainer)
    report = what_is_alive(
        adapter=trainer.model.trainable_parameters(),
        parameters=trainer.model.parameters(),
        optimizer=trainer.optimizer.state,
    )
    table = report.table
    assert table["bytes"].is_monotonic_decreasing
    assert set(table.kind) == {"adapter", "parameters", "optimizer"}
    assert not table[table.kind == "parameters"].name.str.contains("lora_").any()
    # AdamW keeps two moments of each trainable tensor, its step and its learning rate.
    assert report.by_kind["optimizer"] == 2 * report.by_kind["adapter"] + 8 + 4
    assert report.named_bytes == table["bytes"].sum()


def test_what_has_no_name_is_counted():
    trees = {"parameters": toy_trainer().model.parameters()}
    mx.eval(trees)
    before = what_is_alive(**trees).unnamed_bytes
    stray = mx.zeros(1_000_000)
    mx.eval(stray)
    assert what_is_alive(**trees).unnamed_bytes - before == 4_000_000
    assert what_is_alive(**trees, stray=[stray]).unnamed_bytes == before


def test_names_are_escaped():
    report = what_is_alive(batch={"<b>$x$": mx.zeros(3)})
    assert "<b>" in str(report)
    assert "&lt;b&gt;" in report._repr_html_()
    assert "<b>" not in report._repr_html_()


def test_no_array_is_refused():
    with pytest.raises(ConfigError, match=r"batch holds no mx\.array"):
        what_is_alive(batch=[1, 2])
