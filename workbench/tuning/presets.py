"""Whole runs under one name: the model, the adapter, how to train – and whether it fits, first."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from workbench.data.datasets import Dataset, load_dataset
from workbench.errors import ConfigError, MemoryWarning
from workbench.models.loading import BaseModel, Quantise, load_model
from workbench.models.quantisation import given_settings
from workbench.probes.planner import plan_memory
from workbench.probes.planning.machine import Machine
from workbench.probes.planning.plan import MemoryPlan
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.trainer import Trainer

LLAMA_8B = {  # config.json of Llama 3.1 8B, as far as a plan needs it
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
}


@dataclass(frozen=True)
class Preset:
    """Settings of a whole run."""

    name: str
    about: str  # where the settings come from
    model: str  # for `load_model`
    dimensions: Mapping[str, object]  # of its config.json: a plan needs no file
    lora: LoRAConfig
    train: TrainConfig
    max_length: int  # tokens of a row that are kept

    def plan(self, machine: Machine | None = None, quantise: Quantise = None) -> MemoryPlan:
        """Peak memory by part and whether it fits, before a byte is fetched.

        Args:
            machine: that it shall run on; None for this one.
            quantise: as for `load_model`.

        Raises:
            ConfigError: MLX has no such quantisation.
        """
        asked = quantise is not None and quantise is not True
        return plan_memory(
            self.dimensions,
            lora=self.lora,
            micro_batch_size=self.train.micro_batch_size,
            grad_accum_steps=self.train.grad_accum_steps,
            grad_checkpoint=self.train.grad_checkpoint,
            length=self.max_length,
            optimizer=self.train.optimizer,
            bits=given_settings(quantise)["bits"] if asked else None,
            machine=machine,
        )

    def trainer(
        self,
        data: object = "capitals",
        run_dir: str | os.PathLike | None = None,
        *,
        base: BaseModel | None = None,
        force: bool = False,
        quantise: Quantise = None,
        **trainer_arguments: object,
    ) -> Trainer:
        """Plan; then load the model and the rows, attach the adapter, and be ready to train.

        Args:
            data: a source for `load_dataset`, or a `Dataset`.
            run_dir: as for `Trainer`.
            base: another model than the preset's, which is then neither planned nor loaded.
            force: load although the plan says that it does not fit.
            quantise: as for `load_model`, which is planned, too: {"bits": 4}.
            trainer_arguments: further ones of `Trainer`: objective, observers, allow_changes, …

        Raises:
            ConfigError: it does not fit this machine; nothing was fetched.
            TypeError: `Trainer` has no such argument; nothing was fetched.

        Warns:
            MemoryWarning: it is forced, or fits with a margin below 20 %.
        """
        inspect.signature(Trainer).bind(base, data, self.train, run_dir, **trainer_arguments)
        if base is None:
            self._judge(self.plan(quantise=quantise), force)
            base = load_model(self.model, quantise=quantise)
        elif quantise is not None:
            what = "quantise is for the preset's own model, and a base is given"
            raise ConfigError(what, cure="Load the base quantised: load_model(…, quantise=…).")
        add_lora(base.model, self.lora)
        if not isinstance(data, Dataset):
            data = load_dataset(data, base.tokenizer, max_length=self.max_length)
        return Trainer(base, data, self.train, run_dir, **trainer_arguments)

    def _judge(self, plan: MemoryPlan, force: bool) -> None:
        if plan.fits and plan.roomy:
            return
        verdict = f"{self.name}: {plan.summary}"
        if not plan.fits and not force:
            cure = "; ".join(str(advice) for advice in plan.advice)
            cure = cure.replace("bits=4", 'quantise={"bits": 4}')  # as `trainer` calls it
            raise ConfigError(verdict, cure=cure or "It needs a larger machine.")
        warnings.warn(verdict, MemoryWarning, stacklevel=3)


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="llama-3.1-8b-rank2",
            about="the 50 steps of an earlier system: 7.66 s each, its process grew from 36.7 to "
            "134.9 GB",
            model="meta-llama/Llama-3.1-8B-Instruct",
            dimensions=LLAMA_8B,
            lora=LoRAConfig(
                rank=2,
                alpha=4,
                target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
                num_layers=16,
            ),
            train=TrainConfig(
                steps=50,
                micro_batch_size=2,
                grad_accum_steps=8,
                learning_rate=5e-5,
                warmup_steps=100,
                max_grad_norm=1.0,
                weight_decay=0.01,
                adam_betas=(0.9, 0.999),
                adam_epsilon=1e-8,
            ),
            max_length=512,
        ),
    )
}


def preset(name: str) -> Preset:
    """The settings of a whole run by their name.

    Raises:
        ConfigError: there is no such preset; names those that there are.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}", cure=f"Use one of {', '.join(PRESETS)}.")
    return PRESETS[name]
