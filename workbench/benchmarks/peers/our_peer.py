"""This trainer as a peer."""

from __future__ import annotations

import channel  # first: what is printed from here on goes to stderr

# isort: split
import workbench as wb  # before mlx: it brings the BLAS

# isort: split
import gc
import time
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from workbench.backend import measure_matmul, on_gpu
from workbench.data.datasets import Dataset
from workbench.data.examples import Example
from workbench.evaluation.generation import SamplingConfig, encode_prompt, generate_tokens
from workbench.tuning.losses import mean_loss, plain_loss
from workbench.tuning.ranks import join_ranks


class OurPeer:
    """Answers the conductor's messages."""

    def __init__(self):
        self.base: object = None
        self.job: dict = {}
        self.steps: Iterator[wb.StepReport] | None = None

    def setup(self, path: str) -> dict:
        """Load, attach and prepare, up to the first step."""
        self.job = job = channel.read_job(path)
        self.base = wb.load_model(job["model"], dtype=mx.float32)
        if job["head_only"]:
            self.base.model.freeze()
            self.base.model.lm_head.unfreeze()
        else:
            wb.add_lora(self.base.model, wb.LoRAConfig(**job["lora"]))
            self._require_same_start()
        self.rows = [_example(*row) for row in job["rows"]]
        config = wb.TrainConfig(
            steps=len(job["batches"]),
            micro_batch_size=job["batch_size"],
            seed=job["seed"],
            **job["optimizer"],
            **job["settings"],
        )
        data, ranks = Dataset("benchmark", self.rows), join_ranks()
        trainer = wb.Trainer(self.base, data, config, ranks=ranks)
        for step, wanted in enumerate(job["batches"]):
            (rows,) = trainer.plan.micro_batches(step)
            assert list(rows) == wanted, f"step {step} trains other rows than the peers"
        self.steps = iter(trainer)
        return {"note": f"{trainer.prefix}; {trainer.prompt_sharing}; {job['settings']}"}

    def describe(self) -> dict:
        """What computes here, and how fast a matrix product is."""
        device = mx.device_info().get("device_name", "") or "CPU"
        speed = measure_matmul(512, 0.1)
        return {"device": f"{'GPU' if on_gpu() else 'CPU'} {device}", "matmul_gflops": speed}

    def step(self, first: bool) -> dict:
        """One optimizer update."""
        if first:
            channel.forget_process_peak()
        started = time.perf_counter()
        report = next(self.steps)
        seconds = time.perf_counter() - started
        peaks = {"mlx_peak_bytes": mx.get_peak_memory(), **channel.process_peak()}
        return {"seconds": seconds, "loss": report.loss, **peaks}

    def loss(self) -> dict:
        """Mean loss of the rows that every peer is checked by, in the plain form."""
        rows = [self.rows[number] for number in self.job["check_rows"]]
        return {"loss": mean_loss(self.base.model, rows, len(rows), plain_loss)}

    def load(self, model: str) -> dict:
        """Load a folder, tokenizer included."""
        self.base = None
        gc.collect()
        started = time.perf_counter()
        self.base = wb.load_model(model, dtype=mx.float32)
        return {"seconds": time.perf_counter() - started}

    def generate(self, prompts: list[str], max_tokens: int) -> dict:
        """Answer the prompts together, greedily; tokens are counted."""
        sampling = SamplingConfig(max_tokens=max_tokens)
        started = time.perf_counter()
        encoded = [encode_prompt(self.base, prompt) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in encoded]
        for tokens in generate_tokens(self.base, encoded, sampling):
            for ids, token in zip(answers, tokens):
                ids += [] if token is None else [token]
        texts = [self.base.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "tokens": sum(map(len, answers)), "texts": texts}

    def _require_same_start(self) -> None:
        start = mx.load(self.job["lora_a"])
        for path, module in self.base.model.named_modules():
            if "lora_a" in module:
                assert mx.array_equal(module["lora_a"], start[f"{path}.lora_a"]).item(), path


def _example(tokens: list[int], first_target: int) -> Example:
    loss_mask = np.arange(len(tokens)) >= first_target
    return Example(np.array(tokens, np.int32), loss_mask, "row")


if __name__ == "__main__":
    channel.serve(OurPeer())
