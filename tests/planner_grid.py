"""Planned against measured: real training steps over a grid of settings.

The notebook shows the table; the tests hold its bars.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pandas as pd
from mlx.utils import tree_flatten

from tests.toy import TOY_CONFIG, toy_base
from workbench.data.datasets import Dataset
from workbench.data.examples import Example
from workbench.models.loading import BaseModel, load_model
from workbench.probes.planner import plan_memory
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.parameters import MODES
from workbench.probes.planning.plan import MemoryPlan
from workbench.tuning import update
from workbench.tuning.config import OPTIMIZERS, TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora, remove_lora
from workbench.tuning.trainer import Trainer

REAL = "smollm2-135m"
TRAINING = (
    "grad_accum_steps",
    "grad_checkpoint",
    "fused_loss",
    "optimizer",
)  # settings of TrainConfig
STEPS = 2  # the optimizer's state is there from the second step on
CLOSE, TRIALS = 1.05, 4  # a peak further below the plan than this is measured again
MACHINE = Machine("a CPU", 10**12)
MEGA = 1e6
SHAPES = {  # toys of several proportions
    "toy": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "vocab_size": 2000,
    },
    "deep": {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 256,
        "num_hidden_layers": 12,
        "vocab_size": 500,
    },
    "wide": {
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "vocab_size": 300,
    },
    "words": {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "vocab_size": 20000,
        "tie_word_embeddings": False,
    },
    "heads": {
        "hidden_size": 128,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "vocab_size": 500,
    },
}
FOREIGN = ("qwen2", "qwen3")  # toys in the first shape, built by mlx-lm


@dataclass(frozen=True)
class Case:
    """One configuration: a model, and arguments of `plan_memory`."""

    model: str  # a name in SHAPES or FOREIGN, or REAL
    rows: int = 4
    length: int = 64
    lora: Mapping[str, object] = field(default_factory=dict)
    settings: Mapping[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        changes = ", ".join(f"{k}={v}" for k, v in {**self.lora, **self.settings}.items())
        return f"{self.model} {self.rows} × {self.length}" + (f", {changes}" if changes else "")


SMALL = (  # seconds
    Case("toy"),
    Case("toy", lora={"rank": 32}),
    Case("toy", lora={"target_modules": ["q_proj", "v_proj"]}),
    Case("toy", lora={"num_layers": 1}),
    Case("toy", lora={"dropout": 0.1}),
    Case("toy", settings={"supervised": 0.25}),
    Case("toy", settings={"mode": "head"}),
    Case("toy", settings={"mode": "full"}),
    Case("toy", settings={"grad_accum_steps": 3}),
    Case("toy", rows=2, length=96, settings={"grad_checkpoint": True}),
    Case("qwen3"),
    Case("wide"),
    Case("words"),
    Case("words", settings={"fused_loss": False}),
    Case("words", rows=6, length=100, settings={"mode": "full"}),  # two chunks and blocks
    Case("toy", rows=3, length=200),
    Case("toy", rows=2, length=130, settings={"mode": "head"}),
    Case("heads", rows=9, length=450),  # attention makes its probabilities again
    Case("heads", rows=9, length=450, settings={"grad_checkpoint": True}),
)
LARGE = (  # a minute
    Case("toy", rows=8),
    Case("toy", rows=2, length=192),
    Case("toy", length=96, settings={"grad_checkpoint": True, "mode": "full"}),
    Case("toy", settings={"bits": 4}),
    Case("toy", settings={"dtype": "bfloat16"}),
    Case("qwen2", length=96),
    Case("deep"),
    Case("deep", length=128, settings={"grad_checkpoint": True}),
    Case("wide", rows=1, length=16, settings={"mode": "full"}),
    Case("words", settings={"mode": "head", "supervised": 0.5}),
    Case("words", rows=12),
    Case("words", rows=8, length=128),
    Case("words", rows=8, length=128, settings={"mode": "head"}),
    Case("words", rows=16, length=128, settings={"mode": "full", "grad_checkpoint": True}),
    Case("words", rows=5, length=100, settings={"mode": "full", "grad_accum_steps": 2}),
    Case("words", settings={"mode": "full", "fused_loss": False}),
    Case("wide", rows=2, length=200),
    Case("deep", rows=2, length=150),
    Case("toy", rows=2, length=500, settings={"grad_checkpoint": True}),
    Case(REAL, rows=1, length=32),
    Case(REAL, rows=2, length=64),
    Case(REAL, rows=4, length=32, lora={"num_layers": 4}),
    Case(REAL, rows=1, length=192),
    Case(REAL, rows=1, length=64, lora={"rank": 64}),
    Case(REAL, rows=1, length=64, lora={"target_modules": ["q_proj", "v_proj"]}),
    Case(REAL, rows=1, length=128, settings={"supervised": 0.3}),
    Case(REAL, rows=1, length=32, settings={"grad_accum_steps": 2}),
    Case(REAL, rows=1, length=96, settings={"grad_checkpoint": True}),
    Case(REAL, rows=2, length=96, settings={"fused_loss": False}),
    Case(REAL, rows=2, length=160, settings={"supervised": 0.5}),
    Case(REAL, rows=2, length=32, settings={"mode": "head"}),
)
OPTIMIZED = tuple(  # few tokens, so that the update is what counts
    Case("toy", rows=2, length=16, settings={"mode": mode, "optimizer": name})
    for mode in MODES
    for name in OPTIMIZERS
)


def planner_grid(small: bool = True, base: BaseModel | None = None) -> pd.DataFrame:
    """Plan and measure a grid of configurations.

    Args:
        small: a few toys only; else more of them, and SmolLM2.
        base: SmolLM2 in float32, if it is loaded already. It comes back without an adapter.

    Returns:
        One row a configuration: configuration, planned_mb, measured_mb, error (of the measured).
    """
    base = base if small or base is not None else load_model(REAL, dtype=mx.float32)
    rows = []
    for case in SMALL if small else SMALL + LARGE:
        subject = base if case.model == REAL else toy_subject(case.model)
        planned = planned_for(case, subject).peak_bytes
        measured, _ = highest_peaks(case, subject, (planned, 0))
        rows.append((str(case), planned / MEGA, measured / MEGA, planned / measured - 1))
        del subject
    return pd.DataFrame(rows, columns=["configuration", "planned_mb", "measured_mb", "error"])


def toy_subject(name: str) -> BaseModel:
    """A toy with random weights, by its name in SHAPES or FOREIGN."""
    if name in SHAPES:
        return toy_base(**SHAPES[name])
    library = importlib.import_module(f"mlx_lm.models.{name}")
    settings = {**TOY_CONFIG, **SHAPES["toy"], "model_type": name}
    settings["head_dim"] = settings["hidden_size"] // settings["num_attention_heads"]
    model = library.Model(library.ModelArgs.from_dict(settings))
    return dataclasses.replace(toy_base(), model=model, config=model.args)


def planned_for(case: Case, base: BaseModel) -> MemoryPlan:
    """The plan of a configuration; it sees the dimensions only."""
    return plan_memory(
        base.config,
        lora=LoRAConfig(**case.lora),
        micro_batch_size=case.rows,
        length=case.length,
        machine=MACHINE,
        **case.settings,
    )


def optimizer_grid(cases: Sequence[Case]) -> pd.DataFrame:
    """Toys with several optimizers: the whole peak, and that of clipping and update alone.

    Returns:
        One row a configuration: configuration, whole_error, update_error (of the measured).
    """
    rows = []
    for case in cases:
        subject = toy_subject(case.model)
        plan = planned_for(case, subject)
        planned = plan.peak_bytes, plan.phases["update"].total_bytes
        measured = highest_peaks(case, subject, planned)
        rows.append((str(case), *(p / m - 1 for p, m in zip(planned, measured))))
    return pd.DataFrame(rows, columns=["configuration", "whole_error", "update_error"])


def highest_peaks(case: Case, base: BaseModel, planned: tuple[int, int]) -> tuple[int, int]:
    """The highest of up to four peaks; others only where they are well below the plan.

    The plan is of the fullest moment that can be. How full it gets depends on how far MLX's main
    thread happens to be ahead of the thread that computes: the same two steps differ by 15 %.
    """
    peaks = measure_peaks(case, base)
    for _ in range(TRIALS - 1):
        if all(plan <= CLOSE * peak for plan, peak in zip(planned, peaks)):
            break
        whole, update_alone = map(max, peaks, measure_peaks(case, base))
        peaks = whole, update_alone
    return peaks


def measure_peaks(case: Case, base: BaseModel) -> tuple[int, int]:
    """Largest number of bytes in arrays over two updates, without what others hold.

    Returns:
        That of everything, and that of the last clipping and update alone.
    """
    with _prepared(case, base), _parted_at_clipping() as peaks:
        settings = {name: case.settings[name] for name in TRAINING if name in case.settings}
        config = TrainConfig(steps=STEPS, micro_batch_size=case.rows, **settings)
        data = Dataset(
            "random", _examples(case, base, STEPS * config.grad_accum_steps * case.rows), []
        )
        gc.collect()
        mx.clear_cache()
        own = sum(array.nbytes for _, array in tree_flatten(base.model.parameters()))
        others = mx.get_active_memory() - own
        *_, last = (report.peak_bytes for report in Trainer(base, data, config))
        return max(*peaks, last) - others, last - others


@contextlib.contextmanager
def _parted_at_clipping() -> Iterator[list[int]]:
    """Count peaks from each clipping on; yields a list that takes in those before."""
    clip, peaks = update.clip_by_global_norm, []

    def parted(*args: object) -> tuple[dict, mx.array]:
        peaks.append(mx.get_peak_memory())
        mx.reset_peak_memory()
        return clip(*args)

    with mock.patch.object(update, "clip_by_global_norm", parted):
        yield peaks


def _examples(case: Case, base: BaseModel, count: int) -> list[Example]:
    random, length = np.random.default_rng(0), case.length + 1
    targets = max(1, round(case.length * case.settings.get("supervised", 1.0)))
    mask = np.arange(length) >= length - targets
    vocab = base.config.vocab_size
    return [
        Example(random.integers(0, vocab, length, dtype=np.int32), mask, f"random row {row}")
        for row in range(count)
    ]


@contextlib.contextmanager
def _prepared(case: Case, base: BaseModel) -> Iterator[None]:
    """The network with what trains in the case, and as it was afterwards."""
    model, mode = base.model, case.settings.get("mode", "lora")
    if "bits" in case.settings:  # a toy is used once: it may stay so
        nn.quantize(model, bits=case.settings["bits"])
    if "dtype" in case.settings:
        model.set_dtype(getattr(mx, case.settings["dtype"]))
    mx.eval(model.parameters())
    if mode == "lora":
        add_lora(model, LoRAConfig(**case.lora))
    elif mode == "full":
        model.unfreeze()
    else:
        model.freeze()
        model.model.norm.unfreeze()
        (model.model.embed_tokens if "lm_head" not in model else model.lm_head).unfreeze()
    try:
        yield
    finally:
        remove_lora(model)
        model.freeze()
