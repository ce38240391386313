"""Agreement with real PEFT, in both directions, on any base: what the tests of it share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten

import workbench as wb
from tests.process import ROOT
from workbench.models.loading import BaseModel

HAS_PEFT = all(importlib.util.find_spec(name) for name in ("torch", "peft"))
needs_peft = pytest.mark.skipif(
    not HAS_PEFT, reason="PEFT and torch are not installed: pip install -e '.[benchmarks]'"
)
KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rsDoRA": {"use_rslora": True, "use_dora": True},
}


def run_jobs(jobs: Sequence[Mapping[str, object]], folder: Path) -> None:
    """Run jobs of `peft_jobs` in one process that has torch."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "tests.peft_jobs", str(folder / "jobs.json")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


def move(base: BaseModel, noise: float) -> None:
    """Move an adapter as far as training would; DoRA's lengths stay near the base's."""

    def moved(path, array):
        random = noise * mx.random.normal(array.shape, key=mx.random.key(sum(path.encode())))
        array = array * (1 + random) if path.endswith(".m") else array + random
        return array.astype(mx.float32)  # what files keep of it, whatever the base computes in

    base.model.update(tree_map_with_path(moved, base.model.trainable_parameters()))


class PlainNorm(nn.RMSNorm):
    """MLX's own computes in float32 whatever it is given."""

    def __call__(self, x: mx.array) -> mx.array:
        return x * mx.rsqrt(x.square().mean(axis=-1, keepdims=True) + self.eps) * self.weight


def widen(base: BaseModel) -> None:
    """Compute in float64 from here on: slow, and nearly without rounding."""
    norms = [(path, m) for path, m in base.model.named_modules() if isinstance(m, nn.RMSNorm)]
    plain = [(path, PlainNorm(len(norm.weight), norm.eps)) for path, norm in norms]
    base.model.update_modules(tree_unflatten(plain))
    for (_, norm), (_, new) in zip(norms, plain):
        new.weight = norm.weight
    base.model.update(tree_map(lambda array: array.astype(mx.float64), base.model.parameters()))


def logits_of(base: BaseModel, prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Our logits (T, V) of each prompt."""
    return [np.array(base.model(mx.array([ids]))[0]) for ids in prompts]


def dtype_of(base: BaseModel) -> str:
    """What the base computes in, in the words of torch and numpy."""
    ((_, array), *_) = tree_flatten(base.model.parameters())
    return str(array.dtype).rpartition(".")[2]


class Gap(NamedTuple):
    """Differences of logits over all positions and the vocabulary."""

    largest: float
    rms: float  # root mean square


def gap_of(ours: Sequence[np.ndarray], theirs: Mapping[str, np.ndarray]) -> Gap:
    """How far our logits are from those of a job."""
    gaps = np.concatenate([np.abs(a - theirs[f"arr_{n}"]).ravel() for n, a in enumerate(ours)])
    return Gap(float(gaps.max()), float(np.sqrt(np.square(gaps).mean())))


def difference(base: BaseModel, prompts: Sequence[Sequence[int]], logits: Path | str) -> Gap:
    """How far our logits are from those in the file."""
    return gap_of(logits_of(base, prompts), np.load(logits))


def both_ways(
    base: BaseModel,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    work: Path,
    kinds: Mapping[str, Mapping[str, object]],
    noise: float,
    shape: Mapping[str, object],
) -> dict[tuple[str, str], Gap]:
    """Differences of logits by kind and direction.

    Args:
        base: our model of `folder`, without an adapter; PEFT computes in its dtype.
        prompts: token ids; work: an empty folder; kinds: settings that differ by name.
        noise: how far the adapters are moved.
        shape: PEFT's settings that all kinds share: r, lora_alpha, target_modules.
    """
    common = {"base": str(folder), "prompts": prompts, "noise": noise, "dtype": dtype_of(base)}
    jobs, asked = [{**common, "logits": str(work / "base.npz")}], {}
    for kind, settings in kinds.items():
        ours, theirs = work / f"ours-{kind}", work / f"theirs-{kind}"
        config = wb.LoRAConfig(
            rank=shape["r"],
            alpha=shape["lora_alpha"],
            target_modules=shape["target_modules"],
            **settings,
        )
        wb.add_lora(base.model, config)
        move(base, noise)
        wb.save_adapter(base, ours, format="peft")
        asked[kind] = logits_of(base, prompts)
        jobs.append({**common, "adapter": str(ours), "logits": f"{ours}.npz"})
        made = {**shape, **settings, "task_type": "CAUSAL_LM"}
        jobs.append({**common, "make": made, "adapter": str(theirs), "logits": f"{theirs}.npz"})
    run_jobs(jobs, work)
    found = {}
    for kind in kinds:
        theirs = np.load(work / f"ours-{kind}.npz")
        found[kind, "ours → PEFT"] = gap_of(asked[kind], theirs)
        wb.load_adapter(base, work / f"theirs-{kind}")
        found[kind, "PEFT → ours"] = difference(base, prompts, work / f"theirs-{kind}.npz")
        assert np.abs(theirs["arr_0"] - np.load(work / "base.npz")["arr_0"]).max() > 0.1, kind
    return found
