"""Drop every tensor of a model and read it from the disk again (against memory that creeps)."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from workbench.errors import TrainingError
from workbench.models.loading import BaseModel, load_model
from workbench.probes.memory import release_memory
from workbench.probes.parameters import fingerprint
from workbench.tuning.lora_layers import LoRALinear


def reload_frozen(base: BaseModel, optimizer: optim.Optimizer) -> None:
    """Empty a model and its optimizer, release the memory, and read the frozen weights again.

    The modules stay the same objects, so that whoever holds the model goes on with it. What trains
    is left at zero, as is the optimizer's state: they are to be restored from a checkpoint.

    Raises:
        TrainingError: the files of the base model are gone, or are not what was loaded.
    """
    model = base.model
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    dtype = _floating_dtype(model)
    before = {n: digest for n, digest in fingerprint(model).items() if n not in trainable}
    if before and not base.path.exists():
        raise TrainingError(
            f"the base model cannot be reloaded: {base.path} is gone",
            cure="Load the model from files that stay, or set reload_every and "
            "reload_above_bytes to 0.",
        )
    model.update(tree_map(_placeholder, model.parameters()))
    optimizer.state = tree_map(_placeholder, optimizer.state)
    release_memory()
    if not before:  # all of it trains, and comes back from the checkpoint
        return
    loaded = load_model(base.path, dtype=dtype, quantise=base.quantise)
    fresh = dict(tree_flatten(loaded.model.parameters()))
    del loaded
    inner = {f"{path}.linear." for path, m in model.named_modules() if isinstance(m, LoRALinear)}
    frozen = {name: fresh[_plain_name(name, inner)] for name in before}
    model.update(tree_unflatten(list(frozen.items())))
    del fresh, frozen
    after = {n: digest for n, digest in fingerprint(model).items() if n not in trainable}
    if after != before:
        raise TrainingError(
            f"the files of the base model in {base.path} are not what was loaded",
            cure="The newest checkpoint is whole; go on from it with the right files.",
        )


def _placeholder(array: mx.array) -> mx.array:
    """The same shape and type, in the memory of one number."""
    return mx.broadcast_to(mx.zeros((), dtype=array.dtype), array.shape)


def _plain_name(name: str, inner: set[str]) -> str:
    """A parameter's name without the adapter around its layer."""
    path, _, leaf = name.rpartition(".")
    return f"{path.removesuffix('.linear')}.{leaf}" if f"{path}." in inner else name


def _floating_dtype(model: nn.Module) -> mx.Dtype | None:
    kinds = {array.dtype for _, array in tree_flatten(model.parameters())}
    floating = [kind for kind in kinds if mx.issubdtype(kind, mx.floating)]
    return floating[0] if len(floating) == 1 else None
