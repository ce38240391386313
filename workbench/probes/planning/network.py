"""The graph of our Llama's forward pass and loss, on shapes alone.

Operation by operation what `models/llama.py`, `tuning/lora.py` and `tuning/losses.py` make MLX
record. On a CPU, MLX takes norm, rotary embedding and attention apart; on Metal, norm, rotary
embedding and cross-entropy are one operation each, and attention is taken apart while gradients
are traced (read in MLX's source, not measured).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from workbench.probes.planning.derivatives import gradients
from workbench.probes.planning.graph import FLOAT32, Graph, ShapeArray
from workbench.probes.planning.parameters import LAYER_NORMS, Parameters

ACTIVATIONS, ATTENTION, LOGITS, GRADIENTS = "activations", "attention", "logits", "gradients"
LOGITS_BYTES = 32_000_000  # that the fused loss computes together, in float32
FEWEST, MOST = 64, 1024  # positions of a chunk: fewer make slow products, more save nothing
Weights = Mapping[str, ShapeArray]  # of one layer, by name


@dataclass(frozen=True)
class Work:
    """One micro-batch."""

    rows: int
    length: int  # positions a row
    supervised: int  # positions with a target, over all rows
    grad_checkpoint: bool = False  # keep each layer's input only, and compute the layer again
    fused_loss: bool = False  # logits in chunks, with the hidden states' gradient made beside them


def chunk_positions(vocab_size: int) -> int:
    """Supervised positions whose logits the fused loss computes together: a multiple of 64."""
    fitting = LOGITS_BYTES // (4 * vocab_size)
    return max(FEWEST, min(MOST, fitting // FEWEST * FEWEST))


class Network:
    """Builds the graph of one micro-batch.

    Args:
        parameters: every weight, by name.
        dropout: probability on the adapter's input.
        fused: norm, rotary embedding and cross-entropy are one operation each (Metal).
    """

    def __init__(self, parameters: Parameters, dropout: float = 0.0, fused: bool = False):
        self.parameters, self.dropout, self.fused = parameters, dropout, fused
        self.config, self.itemsize = parameters.model.config, parameters.itemsize
        self.graph = Graph(ACTIVATIONS)

    def gradients(self, work: Work) -> list[ShapeArray]:
        """Forward and backward pass: the loss, then a gradient for each trainable parameter."""
        loss = self.loss(work)
        found = gradients(self.graph, loss, self.parameters.trainable)
        for gradient in found:
            while gradient.base is not None:
                gradient = gradient.base
            gradient.label = GRADIENTS
        return [loss, *found]

    def loss(self, work: Work) -> ShapeArray:
        """Sum of the cross-entropy over the supervised positions."""
        graph, hidden = self.graph, self.config.hidden_size
        tokens = graph.held((work.rows, work.length), FLOAT32, "")
        shape = (work.rows, work.length, hidden)
        embedded = graph.fresh(
            "Gather", shape, self.itemsize, self.parameters.top["embed_tokens"], tokens
        )
        x = graph.same("Squeeze", embedded)
        for weights in self.parameters.layers:
            x = self._checkpointed(x, weights) if work.grad_checkpoint else self._layer(x, weights)
        flat = graph.reshape(x, (work.rows * work.length, hidden))
        if self.parameters.model.parted:
            places = graph.held((work.supervised,), FLOAT32, "")
            flat = graph.fresh("Gather", (work.supervised, hidden), x.itemsize, flat, places)
        if not work.fused_loss:  # which takes the norm by chunks as well
            flat = self._norm(flat, self.parameters.top["norm"])
        graph.label = LOGITS
        loss = self._fused_loss(flat) if work.fused_loss else self._cross_entropy(flat)
        graph.label = ACTIVATIONS
        return loss

    def _layer(self, x: ShapeArray, weights: Weights) -> ShapeArray:
        graph = self.graph
        attended = self._attention(self._norm(x, weights[LAYER_NORMS[0]]), weights)
        x = graph.add(x, attended)
        return graph.add(x, self._mlp(self._norm(x, weights[LAYER_NORMS[1]]), weights))

    def _checkpointed(self, x: ShapeArray, weights: Weights) -> ShapeArray:
        trained = {name: weight for name, weight in weights.items() if weight.trains}
        output = self._layer(x, weights)
        made = self.graph.same("Checkpoint", output, *trained.values(), x)
        made.options = (self._again, x, weights, trained)
        return made

    def _again(self, output, flow, x: ShapeArray, weights: Weights, trained: Weights):
        """Compute a layer once more, then its gradients (mx.checkpoint)."""
        again = {name: self.graph.same("Depends", w, output) for name, w in trained.items()}
        again_x = self.graph.same("Depends", x, output)
        repeated = self._layer(again_x, {**weights, **again})
        wanted = [array for array in (*again.values(), again_x) if array.trains]
        found = gradients(self.graph, repeated, wanted, flow)
        sources = [array for array in (*trained.values(), x) if array.trains]
        return list(zip(sources, found))

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
        update = graph.matmul(graph.matmul(x, weights[f"{name}.lora_a"]), weights[f"{name}.lora_b"])
        update = graph.multiply(update, graph.scalar(update.shape))
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
        queries = graph.multiply(graph.scalar(queries.shape, queries.itemsize), queries)
        keys = self._rotated(x, weights, "self_attn.k_proj", kv_heads)
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
        if grouped:
            attended = graph.reshape(attended, (rows, heads, length, config.head_dim))
        joined = graph.reshape(
            graph.transpose(attended, 0, 2, 1, 3), (rows, length, heads * config.head_dim)
        )
        return self._linear(joined, weights, "self_attn.o_proj")

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
        angles = graph.fresh("Multiply", (length, dims // 2), FLOAT32)
        half = (*x.shape[:-1], dims // 2)
        first, cosine = graph.slice_last(x, dims // 2), self._table("Cos", angles, x, half)
        a = graph.multiply(first, cosine)
        second, sine = graph.slice_last(x, dims // 2), self._table("Sin", angles, x, half)
        low = graph.subtract(a, graph.multiply(second, sine))
        high = graph.add(graph.multiply(first, sine), graph.multiply(second, cosine))
        return graph.fresh("Concatenate", x.shape, x.itemsize, low, high)

    def _table(self, op: str, angles: ShapeArray, x: ShapeArray, shape) -> ShapeArray:
        table = self.graph.cast(self.graph.unary(op, angles), x.itemsize)
        return self.graph.broadcast(table, shape)

    def _masked(self, scores: ShapeArray) -> ShapeArray:
        graph, length = self.graph, scores.shape[-1]
        causal = graph.fresh("GreaterEqual", (length, length), 1)
        mask = graph.broadcast(causal, scores.shape)
        low = graph.scalar(scores.shape, scores.itemsize)
        return graph.fresh(
            "Select", scores.shape, scores.itemsize, mask, scores, low, donors=(scores,)
        )

    def _mlp(self, x: ShapeArray, weights: Weights) -> ShapeArray:
        graph = self.graph
        gate = self._linear(x, weights, "mlp.gate_proj")
        gate = graph.multiply(gate, graph.unary("Sigmoid", gate))
        up = self._linear(x, weights, "mlp.up_proj")
        return self._linear(graph.multiply(gate, up), weights, "mlp.down_proj")

    @property
    def _output_weight(self) -> ShapeArray:
        top = self.parameters.top
        return top.get("lm_head", top["embed_tokens"])

    def _cross_entropy(self, x: ShapeArray) -> ShapeArray:
        graph, count = self.graph, x.shape[0]
        logits = graph.cast(self._product(x, self._output_weight), FLOAT32)
        targets = graph.held((count, 1), FLOAT32, "")
        if self.fused:
            losses = graph.fresh("CrossEntropy", (count, 1), FLOAT32, logits, targets)
        else:
            highest = graph.broadcast(graph.fresh("Max", (count, 1), FLOAT32, logits), logits.shape)
            highest.trains = False  # MLX stops the gradient there
            logits = graph.subtract(logits, highest)
            total = graph.fresh("LogSumExp", (count, 1), FLOAT32, logits)
            score = graph.fresh("GatherAxis", (count, 1), FLOAT32, logits, targets)
            losses = graph.subtract(total, score)
        return graph.sum_last(graph.reshape(losses, (1, count)))

    def _fused_loss(self, x: ShapeArray) -> ShapeArray:
        """Chunk after chunk: the loss, and the gradient of the chunk's hidden states."""
        graph, weight, total, slopes = self.graph, self._output_weight, None, []
        chunk = chunk_positions(weight.shape[0])
        for start in range(0, x.shape[0], chunk):
            size = min(chunk, x.shape[0] - start)
            part = graph.view("Slice", x, (size, x.shape[1]), x.strides, dense=False)
            if slopes:
                part = graph.same("Depends", part, total, slopes[-1])
            targets = graph.held((size, 1), FLOAT32, "")
            normed = self._norm(part, self.parameters.top["norm"])
            logits = graph.cast(self._product(normed, weight), FLOAT32)
            score = graph.fresh("GatherAxis", (size, 1), FLOAT32, logits, targets)
            losses = graph.subtract(graph.fresh("LogSumExp", (size, 1), FLOAT32, logits), score)
            loss = graph.sum_last(graph.reshape(losses, (1, size)))
            total = loss if total is None else graph.add(total, loss)
            chances = graph.unary("Softmax", logits)
            slope = graph.fresh(
                "Scatter", logits.shape, FLOAT32, chances, targets, donors=(chances,)
            )
            slope = graph.cast(graph.multiply(graph.scalar(slope.shape), slope), x.itemsize)
            pulled = graph.fresh("Matmul", part.shape, x.itemsize, slope, weight)
            slopes += gradients(graph, normed, [part], pulled)
        slope = graph.fresh("Concatenate", x.shape, x.itemsize, *slopes)
        made = graph.same("FusedLoss", total, slope, x)
        made.options = (x, graph.same("FusedLoss", slope, x, total))
        return made
