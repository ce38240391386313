"""Adapters on disk, in mlx-lm's layout or in PEFT's."""

from __future__ import annotations

import os
from pathlib import Path

from workbench.errors import ConfigError, FileFormatError
from workbench.export import mlx_lm_adapter, peft
from workbench.export.attached import CONFIG_NAME, adapter_weights, describe, require_finite
from workbench.export.mlx_lm_adapter import WEIGHTS_NAME
from workbench.export.model_card import adapter_card, read_run, write_card
from workbench.models.loading import BaseModel, require_base
from workbench.tuning.lora import Adapter

__all__ = ["CONFIG_NAME", "WEIGHTS_NAME", "adapter_weights", "load_adapter", "save_adapter"]

LAYOUTS = {"mlx-lm": mlx_lm_adapter, "peft": peft}
PICKLED = "adapter_model.bin"


def save_adapter(
    base: BaseModel,
    folder: str | os.PathLike,
    format: str = "mlx-lm",
    *,
    run_dir: str | os.PathLike | None = None,
) -> Path:
    """Write the attached adapter for other tools, with a model card; returns the folder.

    An older adapter of the same layout is replaced; a README.md that somebody else wrote stays.

    Args:
        base: with a LoRA, rsLoRA or DoRA adapter attached.
        folder: made if needed.
        format: "mlx-lm" for `mlx_lm.generate --adapter-path` and `mlx_lm.fuse`, or "peft" for
            PEFT's `PeftModel.from_pretrained`. rsLoRA is written as the plain scale it comes to.
        run_dir: the run that trained it, for the model card.

    Raises:
        ConfigError: no adapter is attached, or one that the layout cannot describe; or the folder
            holds one of the other layout, or the base model itself.
        WeightsError: the adapter holds NaN or infinity.
        RunError: run_dir holds no run.
        FileFormatError: the folder cannot be written.
    """
    require_base(base)
    if format not in LAYOUTS:
        raise ConfigError(f"unknown format {format!r}", cure=f"Use one of {tuple(LAYOUTS)}.")
    folder, attached = Path(folder), describe(base.model)
    require_finite(adapter_weights(base.model), "the adapter")
    _check_place(base, folder, format)
    card = adapter_card(base, attached, format, read_run(run_dir))
    LAYOUTS[format].write(base, attached, folder)
    write_card(folder, card)
    return folder


def load_adapter(base: BaseModel, folder: str | os.PathLike, *, any_base: bool = False) -> Adapter:
    """Attach an adapter in mlx-lm's layout or PEFT's; one that is attached already is replaced.

    The weights' file name tells the layout: adapters.safetensors is mlx-lm's,
    adapter_model.safetensors PEFT's. It holds what the configuration implies, or nothing changes.
    An adapter that was saved here knows some numbers of its base, and is refused on another one.

    Args:
        base: the model that the adapter was made on, in whatever precision.
        folder: of the adapter.
        any_base: attach it to another base of the same shape as well, with a warning.

    Raises:
        ConfigError: adapter_config.json does not describe a LoRA, rsLoRA or DoRA adapter for this
            model, or needs something that cannot be represented here; names it.
        WeightsError: a tensor is missing, unexpected, misshapen or not finite, or adapts stacked
            experts; or the adapter was made on another base.
        FileFormatError: a file is absent or malformed; weights are pickled; or the folder holds
            both layouts.

    Warns:
        AdapterWarning: the base's numbers are others than the adapter's base had, if little; or an
            adapter from elsewhere names another base model, whose shapes are the same.
    """
    require_base(base)
    folder = Path(folder)
    layouts = [name for name in LAYOUTS if _holds(folder, name)]
    if len(layouts) > 1:
        raise FileFormatError(
            f"holds {' and '.join(LAYOUTS[name].WEIGHTS_NAME for name in layouts)}",
            where=folder,
            cure="One adapter_config.json describes one of them: keep that one.",
        )
    if not layouts and os.path.lexists(folder / PICKLED):
        raise FileFormatError(
            "is pickled: loading it could run anything, so it is never loaded",
            where=folder / PICKLED,
            cure="Save the adapter as adapter_model.safetensors.",
        )
    return LAYOUTS[layouts[0] if layouts else "mlx-lm"].load(base, folder, any_base)


def _check_place(base: BaseModel, folder: Path, layout: str) -> None:
    if os.path.realpath(folder) == os.path.realpath(base.path):
        raise ConfigError(
            "is the base model's own folder",
            where=folder,
            cure="With an adapter_config.json in it, transformers takes it for an adapter: choose "
            "another one.",
        )
    others = [name for name in LAYOUTS if name != layout and _holds(folder, name)]
    if others:
        raise ConfigError(
            f"holds an adapter in the layout of {others[0]}",
            where=folder,
            cure="Both use adapter_config.json: choose another folder.",
        )


def _holds(folder: Path, layout: str) -> bool:
    return os.path.lexists(folder / LAYOUTS[layout].WEIGHTS_NAME)
