"""A model's dimensions for the planner, read from whatever describes it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from workbench.errors import ConfigError
from workbench.models.files import read_json
from workbench.models.llama_config import LlamaConfig

PARTED = ("llama", "mistral")  # loaded as our Llama, whose loss computes supervised logits only
LIKE_LLAMA = (*PARTED, "qwen2", "qwen3")
GROUP_SIZE = 64  # MLX's default
MOST_LAYERS = 1000  # the plan's time grows with them
NAME_LENGTH = 60  # characters of a name that are shown
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok")


@dataclass(frozen=True)
class Model:
    """A network of Llama's kind."""

    config: LlamaConfig
    name: str
    file_dtype: str | None  # of the weights on disk, if the config says
    file_bits: int | None  # of quantised weights on disk; None if they are plain
    group_size: int  # numbers that share a scale, if the weights are quantised

    @property
    def parted(self) -> bool:
        """Whether logits are computed at supervised positions only."""
        return self.config.model_type in PARTED

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of each linear layer inside a layer, by name."""
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return {
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, queries),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    @property
    def biased(self) -> frozenset[str]:
        """Linear layers that have a bias."""
        config, names = self.config, list(self.linear_shapes)
        if config.model_type == "qwen2":
            return frozenset(names[:3])
        attention = names[:4] if config.attention_bias else []
        return frozenset([*attention, *(names[4:] if config.mlp_bias else [])])

    @property
    def norm_sizes(self) -> dict[str, int]:
        """Features of each norm inside a layer."""
        hidden, head = self.config.hidden_size, self.config.head_dim
        sizes = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
        if self.config.model_type == "qwen3":
            sizes |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
        return sizes


def read_model(source: object) -> Model:
    """Read a model's dimensions.

    Args:
        source: a LlamaConfig or another object with its fields, a config.json as a mapping, or
            the path of one or of its folder.

    Raises:
        ConfigError: a number is missing or impossible, or the family cannot be predicted.
        FileFormatError: the file is missing or not JSON.
    """
    name = ""
    if isinstance(source, str | os.PathLike):
        name, source = _read_file(Path(source))
    if isinstance(source, Mapping):
        described = source
    elif hasattr(source, "__dict__"):
        described = vars(source)  # ours, or the arguments of a network that mlx-lm built
    else:
        raise ConfigError(
            f"cannot read a model's dimensions from {type(source).__name__}",
            cure="Give base.config, a config.json as a dict, or the path of a model folder.",
        )
    _require_like_llama(described)
    _require_few(described)
    # Stretched positions cost nothing, and a mapping could not be hashed.
    config = dataclasses.replace(LlamaConfig.from_dict(described), rope_scaling=None)
    packing = described.get("quantization")
    packing = packing if isinstance(packing, Mapping) else {}
    dtype = described.get("torch_dtype") or described.get("dtype")
    name = name or str(described.get("_name_or_path") or config.model_type)
    return Model(
        config,
        " ".join(name.split())[:NAME_LENGTH],
        dtype if isinstance(dtype, str) else None,
        _whole(packing.get("bits")),
        _whole(packing.get("group_size")) or GROUP_SIZE,
    )


def _require_few(described: Mapping[str, object]) -> None:
    layers = described.get("num_hidden_layers")
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise ConfigError(
            f"num_hidden_layers {layers} is more than any network has", where="config.json"
        )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _read_file(path: Path) -> tuple[str, Mapping[str, object]]:
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json":
        raise ConfigError(
            "is neither a model folder nor a config.json",
            where=path,
            cure="Of a model by its name, or of a .gguf file, give base.config.",
        )
    return path.resolve().parent.name, read_json(path)


def _require_like_llama(described: Mapping[str, object]) -> None:
    kind = described.get("model_type", "llama")
    experts = [key for key in EXPERTS if described.get(key)]
    if kind in LIKE_LLAMA and not experts:
        return
    why = f" with {experts[0]} {described[experts[0]]!r}" if experts else ""
    raise ConfigError(
        f"the memory of a {kind!r} network{why} cannot be predicted",
        where="config.json: model_type",
        cure=f"The plan follows dense networks of these kinds: {', '.join(LIKE_LLAMA)}. "
        "Measure one step instead: wb.memory_phase.",
    )
