"""mlx-lm's own trainer as a peer: its train(), its loss, its batches, its LoRA layers.

With the path of a BLAS as argument, that library takes the place of the wheel's own.
"""

from __future__ import annotations

import ctypes
import sys

import channel

if len(sys.argv) > 1:
    ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train
from mlx_lm.tuner.utils import linear_to_lora_layers


class MlxLmPeer(TrainingCallback):
    """Answers the conductor's messages; between two steps from inside mlx-lm's train()."""

    def __init__(self):
        self.job: dict = {}
        self.started = 0.0

    def setup(self, path: str) -> dict:
        """Load, attach and prepare, up to the first step."""
        self.job = job = channel.read_job(path)
        self.model, self.tokenizer = mlx_lm.load(job["model"])
        self.model.freeze()
        if job["head_only"]:
            self.model.lm_head.unfreeze()
        else:
            self._attach(**job["lora"])
        mx.eval(self.model.parameters())
        return {"note": "grad_checkpoint" if job["grad_checkpoint"] else ""}

    def describe(self) -> dict:
        """What computes here, and how fast a matrix product is."""
        on_gpu = mx.default_device().type == mx.gpu
        device = mx.device_info().get("device_name", "") or "CPU"
        a, seconds = mx.random.normal((512, 512)), []
        mx.eval(a @ a)
        for _ in range(3):
            started = time.perf_counter()
            mx.eval(a @ a)
            seconds.append(time.perf_counter() - started)
        speed = 2 * 512**3 / statistics.median(seconds) / 1e9
        return {"device": f"{'GPU' if on_gpu else 'CPU'} {device}", "matmul_gflops": speed}

    def step(self, first: bool) -> dict:
        """Begin mlx-lm's training; later steps are asked for in on_train_loss_report."""
        assert first, "the training has ended"
        channel.forget_process_peak()
        mx.clear_cache()
        mx.reset_peak_memory()
        job, options = self.job, dict(self.job["optimizer"])
        options.pop("max_grad_norm"), options.pop("schedule")
        with tempfile.TemporaryDirectory() as folder:
            args = TrainingArgs(
                batch_size=job["batch_size"],
                iters=len(job["batches"]) + 1,
                steps_per_report=1,
                steps_per_save=10**9,
                max_seq_length=job["max_length"],
                adapter_file=os.path.join(folder, "adapters.safetensors"),
                grad_checkpoint=job["grad_checkpoint"],
            )
            optimizer = optim.AdamW(**options, bias_correction=True)
            self.started = time.perf_counter()
            train(
                model=self.model,
                optimizer=optimizer,
                train_dataset=[[job["rows"][row] for row in rows] for rows in job["batches"]],
                args=args,
                iterate_batches=in_order,
                training_callback=self,
            )
        raise RuntimeError("more steps were asked for than there are batches")

    def on_train_loss_report(self, train_info: dict) -> None:
        """Report a step to the conductor, and wait until it asks for the next."""
        seconds = time.perf_counter() - self.started
        peaks = {"mlx_peak_bytes": mx.get_peak_memory(), **channel.process_peak()}
        channel.reply({"seconds": seconds, "loss": train_info["train_loss"], **peaks})
        while (message := channel.receive())["do"] != "step":
            channel.answer(message, self)
        self.started = time.perf_counter()

    def loss(self) -> dict:
        """Mean loss of the rows that every peer is checked by; padding does not count."""
        rows = [self.job["rows"][number] for number in self.job["check_rows"]]
        length = max(len(tokens) for tokens, _ in rows)
        tokens = mx.array([tokens + [0] * (length - len(tokens)) for tokens, _ in rows])
        places = mx.arange(1, length)[None]
        first = mx.array([first for _, first in rows])[:, None]
        lengths = mx.array([len(tokens) for tokens, _ in rows])[:, None]
        wanted = (places >= first) & (places < lengths)
        losses = nn.losses.cross_entropy(self.model(tokens[:, :-1]), tokens[:, 1:])
        return {"loss": ((losses * wanted).sum() / wanted.sum()).item()}

    def load(self, model: str) -> dict:
        """Load a folder, tokenizer included."""
        self.model = self.tokenizer = None
        gc.collect()
        started = time.perf_counter()
        self.model, self.tokenizer = mlx_lm.load(model)
        mx.eval(self.model.parameters())
        return {"seconds": time.perf_counter() - started}

    def generate(self, prompts: list[str], max_tokens: int) -> dict:
        """Answer the prompts together, greedily; tokens are counted."""
        started = time.perf_counter()
        encoded = [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
        if len(prompts) == 1:
            pieces = list(
                mlx_lm.stream_generate(
                    self.model, self.tokenizer, encoded[0], max_tokens=max_tokens
                )
            )
            texts = ["".join(piece.text for piece in pieces)]
            tokens = pieces[-1].generation_tokens
        else:
            answer = mlx_lm.batch_generate(
                self.model, self.tokenizer, encoded, max_tokens=max_tokens
            )
            texts, tokens = answer.texts, answer.stats.generation_tokens
        return {"seconds": time.perf_counter() - started, "tokens": tokens, "texts": texts}

    def _attach(
        self, rank: int, alpha: float, target_modules: list, num_layers: int | None
    ) -> None:
        keys = {
            name
            for name, _ in self.model.layers[0].named_modules()
            if name.rpartition(".")[2] in target_modules
        }
        config = {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(self.model, num_layers or len(self.model.layers), config)
        start = mx.load(self.job["lora_a"])
        for path, module in self.model.named_modules():
            if "lora_a" in module:
                module.lora_a = start[f"{path}.lora_a"]


def in_order(dataset: list, max_seq_length: int, **_: object) -> Iterator[tuple]:
    """mlx-lm's own padded batches, of the rows and in the order that every peer gets."""
    for rows in dataset:
        yield from iterate_batches(rows, len(rows), max_seq_length)


if __name__ == "__main__":
    channel.serve(MlxLmPeer())
