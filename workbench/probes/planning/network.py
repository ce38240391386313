"""The graph of our Llama's forward pass and loss, on shapes alone.

Operation by operation what `models/llama.py`, `tuning/lora.py` and `tuning/losses.py` make MLX
record. On a CPU, MLX takes norm, rotary embedding and attention apart; on Linux, our networks have
forms of their own there for attention and SwiGLU. On Metal, norm, rotary embedding and
cross-entropy are one operation each, and attention is taken apart while gradients are traced (read
in MLX's source, not measured).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workbench.probes.planning.arrays import FLOAT32, ShapeArray
from workbench.probes.planning.derivatives import Flow, gradients
from workbench.probes.planning.forms import ATTENTION, causal_attention, silu_product
from workbench.probes.planning.graph import Graph
from workbench.probes.planning.losses import GRADIENTS, fused_loss, owner, whole_loss
from workbench.probes.planning.parameters import LAYER_NORMS, Parameters

ACTIVATIONS, LOGITS = "activations", "logits"
Weights = Mapping[str, ShapeArray]  # of one layer, by name


@dataclass(frozen=True)
class Work:
    """One micro-batch."""

    rows: int
    length: int  # positions a row
    supervised: int  # positions with a target, over all rows
    grad_checkpoint: bool = False  # keep each layer's input only, and compute the layer again
    fused_loss: bool = False  # logits in chunks, with the hidden states' gradient made beside them


class Network:
    """Builds the graph of one micro-batch.

    Args:
        parameters: every weight, by name.
        dropout: probability on the adapter's input.
        fused: norm, rotary embedding and cross-entropy are one operation each (Metal).
        fast: attention and SwiGLU in our forms for MLX's CPU backend on Linux.
    """

    def __init__(
        self,
        parameters: Parameters,
        dropout: float = 0.0,
        fused: bool = False,
        fast: bool = False,
    ):
        self.parameters, self.dropout, self.fused, self.fast = parameters, dropout, fused, fast
        self.config, self.itemsize = parameters.model.config, parameters.itemsize
        self.graph = Graph(ACTIVATIONS)
        self.top = self._leaves(parameters.top)
        self.layers = [self._leaves(weights) for weights in parameters.layers]

    def _leaves(self, weights: Weights) -> Weights:
        return {name: self.graph.leaf(w) if w.trains else w for name, w in weights.items()}

    def gradients(self, work: Work) -> list[ShapeArray]:
        """Forward and backward pass: the loss, then a gradient for each trainable parameter."""
        loss = self.loss(work)
        groups = [self.top, *self.layers]
        trained = [weight for group in groups for weight in group.values() if weight.trains]
        found = gradients(self.graph, loss, trained)
        for gradient in map(owner, found):
            gradient.label = GRADIENTS
        return [loss, *found]

    def loss(self, work: Work) -> ShapeArray:
        """Sum of the cross-entropy over the supervised positions."""
        graph, hidden = self.graph, self.config.hidden_size
        tokens = graph.held((work.rows, work.length), FLOAT32, "")
        shape = (work.rows, work.length, hidden)
        embedded = graph.fresh("Gather", shape, self.itemsize, self.top["embed_tokens"], tokens)
        x = graph.same("Squeeze", embedded)
        layer = self._checkpointed if work.grad_checkpoint else self._layer
        for weights in self.layers[:-1]:
            x = layer(x, weights, None)
        ends_early = self.parameters.model.parted and work.supervised < work.rows * work.length
        places = graph.held((work.supervised,), FLOAT32, "") if ends_early else None
        x = layer(x, self.layers[-1], places)
        flat = graph.reshape(x, (x.size // hidden, hidden))
        graph.label = LOGITS
        if work.fused_loss:
            loss = fused_loss(graph, flat, self._head, self.top)
        else:
            loss = whole_loss(graph, self._head(flat, self.top), self.fused)
        graph.label = ACTIVATIONS
        return loss

    def _head(self, x: ShapeArray, weights: Weights) -> ShapeArray:
        label, self.graph.label = self.graph.label, ACTIVATIONS
        normed = self._norm(x, weights["norm"])
        self.graph.label = label
        return self._product(normed, weights.get("lm_head", weights["embed_tokens"]))

    def _layer(self, x: ShapeArray, weights: Weights, places: ShapeArray | None) -> ShapeArray:
        graph = self.graph
        x = graph.add(x, self._attention(self._norm(x, weights[LAYER_NORMS[0]]), weights))
        x = self._at(x, places)
        return graph.add(x, self._mlp(self._norm(x, weights[LAYER_NORMS[1]]), weights))

    def _checkpointed(
        self, x: ShapeArray, weights: Weights, places: ShapeArray | None
    ) -> ShapeArray:
        trained = {name: weight for name, weight in weights.items() if weight.trains}
        output = self._layer(x, weights, places)
        sources = (*trained.values(), x)

        def derivative(graph: Graph, output: ShapeArray, flow: ShapeArray) -> Flow:
            """Compute the layer once more, then its gradients (mx.checkpoint)."""
            again = [graph.leaf(array) for array in graph.after(sources, (output,))]
            given = {**weights, **dict(zip(trained, again))}
            repeated = self._layer(again[-1], given, places)
            return zip(sources, gradients(graph, repeated, again, flow))

        return self.graph.custom(sources, (output,), derivative)[0]

    def _at(self, x: ShapeArray, places: ShapeArray | None) -> ShapeArray:
        """(B, T, D) → (N, D) at the places; as it is without any."""
        if places is None:
            return x
        width = x.shape[-1]
        flat = self.graph.reshape(x, (x.size // width, width))
        shape = (places.shape[0], width)
        return self.graph.fresh("Gather", shape, x.itemsize, flat, places)

    def _norm(self, x: ShapeArray, weight: ShapeArray) -> ShapeArray:
        graph = self.graph
        if self.fused:
            return graph.fresh("RMSNorm", x.shape, x.itemsize, x, weight, donors=(x,))
        wide = graph.cast(x, FLOAT32)
        total = graph.sum_last(graph.unary("Square", wide))
        mean = graph.multiply(total, graph.scalar(total.shape))
        inverse = graph.unary("Rsqrt", graph.add(mean, graph.scalar(mean.shape)))
        scaled = graph.multiply(wide, graph.broadcast(inverse, x.shape))
        scaled = graph.cast(scaled, x.itemsize)
        return graph.multiply(scaled, graph.broadcast(weight, x.shape))

    def _linear(self, x: ShapeArray, weights: Weights, name: str) -> ShapeArray:
        graph = self.graph
        output = self._product(x, weights[f"{name}.weight"])
        if f"{name}.bias" in weights:
            output = graph.add(output, graph.broadcast(weights[f"{name}.bias"], output.shape))
        if f"{name}.lora_a" not in weights:
            return output
        x = self._dropped(x) if self.dropout else x
        narrow = graph.matmul(x, weights[f"{name}.lora_a"])
        narrow = graph.multiply(graph.scalar(narrow.shape), narrow)
        update = graph.matmul(narrow, weights[f"{name}.lora_b"])
        return graph.add(output, graph.cast(update, output.itemsize))

    def _product(self, x: ShapeArray, weight: ShapeArray) -> ShapeArray:
        if self.parameters.bits is None:
            return self.graph.matmul(x, self.graph.swap_last(weight))
        shape = (*x.shape[:-1], weight.shape[0])
        return self.graph.fresh("QuantizedMatmul", shape, x.itemsize, x, weight)

    def _dropped(self, x: ShapeArray) -> ShapeArray:
        graph = self.graph
        bits = graph.fresh("RandomBits", x.shape, FLOAT32)
        uniform = graph.unary("Uniform", bits)
        mask = graph.unary("AsType", graph.unary("Less", uniform, 1), x.itemsize)
        return graph.multiply(graph.multiply(mask, x), graph.scalar(x.shape, x.itemsize))

    def _attention(self, x: ShapeArray, weights: Weights) -> ShapeArray:
        graph, config = self.graph, self.config
        rows, length, _ = x.shape
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        queries = self._rotated(x, weights, "self_attn.q_proj", heads)
        keys = self._rotated(x, weights, "self_attn.k_proj", kv_heads)
        if self.fast:
            values = self._heads(self._linear(x, weights, "self_attn.v_proj"), kv_heads)
            attended = causal_attention(graph, queries, keys, values)
        else:
            attended = self._plain_attention(x, weights, queries, keys)
        joined = graph.reshape(
            graph.transpose(attended, 0, 2, 1, 3), (rows, length, heads * config.head_dim)
        )
        return self._linear(joined, weights, "self_attn.o_proj")

    def _plain_attention(
        self, x: ShapeArray, weights: Weights, queries: ShapeArray, keys: ShapeArray
    ) -> ShapeArray:
        graph, shape = self.graph, queries.shape
        heads, kv_heads = shape[1], keys.shape[1]
        queries = graph.times(queries)
        grouped = heads != kv_heads
        if grouped:
            queries = graph.split(queries, 1, (kv_heads, heads // kv_heads))
            keys = graph.split(keys, 1, (kv_heads, 1))
        label, graph.label = graph.label, ATTENTION
        scores = graph.matmul(queries, graph.swap_last(keys))
        probabilities = graph.unary("Softmax", self._masked(scores))
        graph.label = label
        values = self._heads(self._linear(x, weights, "self_attn.v_proj"), kv_heads)
        if grouped:
            values = graph.split(values, 1, (kv_heads, 1))
        attended = graph.matmul(probabilities, values)
        return graph.reshape(attended, shape)

    def _heads(self, x: ShapeArray, count: int) -> ShapeArray:
        split = self.graph.split(x, 2, (count, x.shape[2] // count))
        return self.graph.transpose(split, 0, 2, 1, 3)

    def _rotated(self, x: ShapeArray, weights: Weights, name: str, heads: int) -> ShapeArray:
        graph, norm = self.graph, name.replace("_proj", "_norm")
        x = self._linear(x, weights, name)
        x = graph.split(x, 2, (heads, self.config.head_dim))
        if norm in weights:
            x = self._norm(x, weights[norm])
        x = graph.transpose(x, 0, 2, 1, 3)
        if self.fused:
            return graph.fresh("RoPE", x.shape, x.itemsize, x)
        *_, length, dims = x.shape
        angles = self._angles(length, dims // 2)
        first, cosine = graph.slice(x, 3, dims // 2), self._table("Cos", angles, x)
        a = graph.spread("Multiply", first, cosine)
        second, sine = graph.slice(x, 3, dims // 2), self._table("Sin", angles, x)
        low = graph.subtract(a, graph.spread("Multiply", second, sine))
        c = graph.spread("Multiply", first, sine)
        high = graph.add(c, graph.spread("Multiply", second, cosine))
        return graph.concatenate((low, high), 3)

    def _angles(self, length: int, count: int) -> ShapeArray:
        graph = self.graph
        positions, offset = graph.fresh("Arange", (length,), FLOAT32), graph.held((), FLOAT32, "")
        positions = graph.spread("Add", positions, graph.unary("AsType", offset))
        positions = graph.reshape(graph.times(positions), (length, 1))
        frequencies = graph.fresh("Divide", (count,), FLOAT32, graph.scalar((count,)))
        shape = (length, count)
        return graph.multiply(
            graph.broadcast(positions, shape), graph.broadcast(frequencies, shape)
        )

    def _table(self, op: str, angles: ShapeArray, x: ShapeArray) -> ShapeArray:
        return self.graph.cast(self.graph.unary(op, angles), x.itemsize)

    def _masked(self, scores: ShapeArray) -> ShapeArray:
        graph, length = self.graph, scores.shape[-1]
        mask = graph.broadcast(graph.visible(length, length), scores.shape)
        low = graph.scalar(scores.shape, scores.itemsize)
        return graph.fresh(
            "Select", scores.shape, scores.itemsize, mask, scores, low, donors=(scores,)
        )

    def _mlp(self, x: ShapeArray, weights: Weights) -> ShapeArray:
        graph = self.graph
        gate = self._linear(x, weights, "mlp.gate_proj")
        if self.fast:
            up = self._linear(x, weights, "mlp.up_proj")
            return self._linear(silu_product(graph, gate, up), weights, "mlp.down_proj")
        gate = graph.multiply(gate, graph.unary("Sigmoid", gate))
        up = self._linear(x, weights, "mlp.up_proj")
        return self._linear(graph.multiply(gate, up), weights, "mlp.down_proj")
