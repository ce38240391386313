"""Whether a run fits, what would make it fit, and how a plan says so."""

from __future__ import annotations

import dataclasses

import pytest

from tests.planner_models import BASIC, FOUR_LAYERS, GB, LLAMA_8B, MODEL, ROOMY, mac, planned
from workbench.errors import ConfigError
from workbench.probes.planner import plan_memory, suggest_settings
from workbench.probes.planning.advice import with_settings
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.plan import MARGIN
from workbench.probes.planning.request import AdapterSettings
from workbench.tuning.lora import LoRAConfig

# Fitting


@pytest.mark.parametrize("settings", [{}, {"mode": "full"}, {"mode": "head"}, {"supervised": 0.3}])
def test_advice_fits_with_the_margin(settings):
    config = {**MODEL, "vocab_size": 20_000, "hidden_size": 256, "intermediate_size": 1024}
    wanted = {"micro_batch_size": 64, "length": 256, **settings}
    need = planned(config, cache_limit_bytes=0, **wanted).process_bytes
    machine = Machine("too small", 2 * need, available_bytes=int(0.9 * need))
    plan = planned(config, machine, **wanted)
    assert not plan.fits
    assert plan.advice
    for advice in plan.advice:
        settled = {**plan.settings, **advice.settings}
        lora = {k: settled.pop(k, d) for k, d in dataclasses.asdict(AdapterSettings()).items()}
        again = plan_memory(config, lora=LoRAConfig(**lora), machine=machine, **settled)
        assert again.process_bytes == advice.plan.process_bytes
        assert again.margin >= MARGIN - 1e-9


def test_advice_is_as_mild_as_it_can_be():
    wanted = {"micro_batch_size": 16, "length": 1024, "cache_limit_bytes": 0}
    plan = planned(FOUR_LAYERS, mac(32), **wanted)
    by_rows = [
        a for a in plan.advice if set(a.settings) == {"micro_batch_size", "grad_accum_steps"}
    ]
    (advice,) = by_rows
    size = advice.settings["micro_batch_size"]
    assert size * advice.settings["grad_accum_steps"] >= 16
    one_more = {"micro_batch_size": size + 1, "grad_accum_steps": -(-16 // (size + 1))}
    assert not with_settings(plan, one_more).roomy


def test_several_changes_are_advised_together_if_one_is_not_enough():
    plan = planned(FOUR_LAYERS, mac(7), micro_batch_size=8, length=512)
    (advice,) = plan.advice
    assert advice.plan.roomy
    assert advice.settings["bits"] == 4
    for name in set(advice.settings) - {"grad_accum_steps"}:
        rest = {k: v for k, v in advice.settings.items() if k != name}
        assert not with_settings(plan, rest).roomy, name


def test_four_bits_are_advised_on_a_cpu_too_if_they_are_enough():
    box = Machine("Linux box", 16 * GB, available_bytes=15 * GB)
    plan = planned(LLAMA_8B, box, micro_batch_size=1, length=64)
    (advice,) = plan.advice
    assert advice.settings == {"bits": 4}
    assert not plan.fits
    assert advice.plan.roomy


def test_a_hopeless_machine_is_told_so():
    plan = planned(LLAMA_8B, Machine("tiny", GB, available_bytes=GB))
    assert plan.advice == ()
    assert "smaller model" in str(plan)


def test_a_thin_margin_is_warned_of():
    need = planned(cache_limit_bytes=0).process_bytes
    thin = Machine("thin", 2 * need, available_bytes=int(need / 0.9))
    plan = planned(machine=thin, cache_limit_bytes=0)
    assert plan.fits
    assert not plan.roomy
    assert "Warning" in str(plan)
    assert "Warning" not in str(planned())


@pytest.mark.parametrize("machine", [mac(8), mac(24), mac(64), Machine("Linux", 32 * GB)])
def test_suggested_settings_fit_and_can_be_planned_again(machine):
    plan = suggest_settings(FOUR_LAYERS, machine)
    assert plan.roomy
    again = dict(plan.settings)
    lora = {k: again.pop(k) for k in dataclasses.asdict(AdapterSettings())}
    repeated = plan_memory(FOUR_LAYERS, lora=LoRAConfig(**lora), machine=machine, **again)
    assert repeated.process_bytes == plan.process_bytes


def test_more_memory_is_never_suggested_less_work():
    plans = [suggest_settings(LLAMA_8B, mac(size)) for size in (24, 64, 192)]
    rows = [plan.request.micro_batch_size for plan in plans]
    assert rows == sorted(rows)
    assert plans[0].request.bits == 4
    assert plans[-1].request.bits is None
    assert plans[-1].request.micro_batch_size == 8


def test_a_machine_that_is_too_small_gets_the_smallest_plan():
    plan = suggest_settings(LLAMA_8B, Machine("Linux box", 16 * GB))
    assert not plan.fits
    assert plan.request.micro_batch_size == 1


def test_a_leak_limits_the_steps():
    plan = planned(LLAMA_8B, mac(128), leak_bytes_per_step=2 * GB)
    after = plan.process_bytes - plan.cache_bytes + plan.safe_steps * 2 * GB
    usable = (1 - MARGIN) * plan.machine.budget_bytes
    assert after <= usable < after + 2 * GB
    assert planned().safe_steps is None
    larger = planned(LLAMA_8B, mac(192), leak_bytes_per_step=2 * GB)
    assert larger.safe_steps > plan.safe_steps


def test_llama_8b_as_it_was_trained_before():
    adapter = LoRAConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    settings = {"lora": adapter, "micro_batch_size": 2, "length": 512, "grad_accum_steps": 8}
    wide = planned(LLAMA_8B, mac(128), **settings)
    packed = planned(LLAMA_8B, mac(128), bits=4, **settings)
    # The earlier run began at 36.7 GB: in 16 bit, weights alone are 16 GB.
    assert 16 * GB < wide.peak_bytes < 36.7 * GB
    saved = wide.parts["weights"] - packed.parts["weights"]
    assert saved == pytest.approx(wide.parts["weights"] * (1 - 4.5 / 16), rel=0.01)
    assert wide.peak_bytes - packed.peak_bytes == pytest.approx(saved, rel=0.05)


def test_a_machine_that_tells_nothing_must_be_described(monkeypatch):
    monkeypatch.setattr("workbench.probes.planning.machine.machine_memory", lambda: None)
    with pytest.raises(ConfigError, match="Describe it"):
        plan_memory(MODEL, **BASIC)


def test_this_machine_is_described():
    here = Machine.here()
    assert 0 < here.budget_bytes <= here.total_bytes
    assert plan_memory(MODEL, **BASIC).machine.total_bytes == here.total_bytes


# What it says


def test_names_are_escaped():
    config = {**MODEL, "_name_or_path": "<script>alert(1)</script>"}
    machine = dataclasses.replace(ROOMY, name="<b>box</b>")
    shown = planned(config, machine)._repr_html_()
    assert "<script>" not in shown
    assert "<b>box" not in shown
    assert "&lt;script&gt;" in shown


def test_text_and_html_say_the_same():
    plan = planned(FOUR_LAYERS, mac(7), micro_batch_size=8, leak_bytes_per_step=GB)
    for remark in (plan.summary, *plan.remarks):
        assert remark in str(plan)
    assert plan._repr_html_().count("<li>") == len(plan.remarks)
    assert any("not measured" in note for note in plan.notes)
