"""Every weight of a network by name, on shapes alone: what is held, what trains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from workbench.machine import LARGE_BLOCK_BYTES
from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.dimensions import Model
from workbench.probes.planning.graph import Graph

WEIGHTS, ADAPTER = "weights", "adapter"
TABLE = "embed_tokens"
LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
MODES = ("lora", "head", "full")


@dataclass(frozen=True)
class Adapted:
    """Where an adapter stands, and its size."""

    rank: int
    modules: frozenset[str]  # names inside a layer, such as "self_attn.q_proj"
    first_layer: int


@dataclass
class Parameters:
    """The weights of a network, of which some train.

    Args:
        model: its dimensions.
        mode: "lora", "head" or "full".
        adapted: where the adapter stands; None but in mode "lora".
        itemsize: bytes of a number of the base weights.
        bits: of a quantised weight; None if they are plain.
    """

    model: Model
    mode: str
    adapted: Adapted | None
    itemsize: int = FLOAT32
    bits: int | None = None
    top: dict[str, ShapeArray] = field(default_factory=dict)
    layers: list[dict[str, ShapeArray]] = field(default_factory=list)
    held: dict[str, int] = field(default_factory=dict)  # bytes by part

    def __post_init__(self):
        config, self._graph = self.model.config, Graph()
        self.held = {WEIGHTS: 0, ADAPTER: 0}
        matrix = (config.vocab_size, config.hidden_size)
        tied, head = config.tie_word_embeddings, self.mode != "lora"
        self.top[TABLE] = self._weight(
            matrix, self.mode == "full" or (tied and self.mode == "head"), quantised=True
        )
        for layer in range(config.num_hidden_layers):
            self.layers.append(dict(self._layer(layer)))
        self.top["norm"] = self._weight((config.hidden_size,), head)
        if not tied:
            self.top["lm_head"] = self._weight(matrix, head, quantised=True)

    @property
    def trainable(self) -> list[ShapeArray]:
        """Arrays that receive a gradient, in the order of the network's modules."""
        after = {name: array for name, array in self.top.items() if name != TABLE}
        groups = [{TABLE: self.top[TABLE]}, *self.layers, after]
        return [array for group in groups for array in group.values() if array.trains]

    def gradient(self, array: ShapeArray) -> ShapeArray:
        """A trainable array's gradient, as it lies: by columns for W in a product with Wᵀ."""
        made = self._graph.held(array.shape, array.itemsize, "")
        if len(array.shape) == 2 and array.label == WEIGHTS and array is not self.top[TABLE]:
            made.strides = (1, array.shape[0])
        return made

    @property
    def base_weights(self) -> list[ShapeArray]:
        """The arrays that are read from a file."""
        groups = [self.top, *self.layers]
        return [array for group in groups for array in group.values() if array.label == WEIGHTS]

    @property
    def trainable_bytes(self) -> int:
        """Bytes of what trains."""
        return sum(array.nbytes for array in self.trainable)

    @property
    def large_trainable_bytes(self) -> int:
        """Bytes of what trains, in arrays that the C library maps one by one."""
        return sum(array.nbytes for array in self.trainable if array.nbytes >= LARGE_BLOCK_BYTES)

    def _layer(self, layer: int) -> Iterator[tuple[str, ShapeArray]]:
        full = self.mode == "full"
        for name, (rows, columns) in self.model.linear_shapes.items():
            yield f"{name}.weight", self._weight((rows, columns), full, quantised=True)
            if name in self.model.biased:
                yield f"{name}.bias", self._weight((rows,), full)
            adapted = self.adapted
            if adapted and layer >= adapted.first_layer and name in adapted.modules:
                for part, shape in (("a", (columns, adapted.rank)), ("b", (adapted.rank, rows))):
                    yield f"{name}.lora_{part}", self._adapter(shape)
        for name, size in self.model.norm_sizes.items():
            yield name, self._weight((size,), full)

    def _weight(self, shape: tuple[int, ...], trains: bool, quantised: bool = False) -> ShapeArray:
        array = self._graph.held(shape, self.itemsize, WEIGHTS, trains)
        self.held[WEIGHTS] += array.nbytes
        if quantised and self.bits:
            # Scales and biases, one of each a group, are as wide as the weights were.
            packed = (
                array.size * self.bits // 8
                + 2 * self.itemsize * array.size // self.model.group_size
            )
            self.held[WEIGHTS] += packed - array.nbytes
        return array

    def _adapter(self, shape: tuple[int, int]) -> ShapeArray:
        array = self._graph.held(shape, FLOAT32, ADAPTER, trains=True)
        self.held[ADAPTER] += array.nbytes
        return array
