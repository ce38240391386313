"""What every peer is given: the same float32 weights, rows, batches and adapter."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import mlx.core as mx
import numpy as np
from filelock import FileLock, Timeout

from workbench.benchmarks.workloads import OUR_SETTINGS, SEVEN, Workload
from workbench.blas import cache_folder
from workbench.data.batches import BatchPlan
from workbench.data.capitals import TRAIN_PHRASINGS, all_capitals
from workbench.data.datasets import load_dataset
from workbench.errors import BenchmarkError, ConfigError
from workbench.export.adapters import adapter_weights
from workbench.models.files import write_json, write_safetensors
from workbench.models.llama import Llama
from workbench.models.loading import BaseModel, load_model, save_weights
from workbench.probes.memory import release_memory
from workbench.tuning.lora import LoRAConfig, add_lora

LORA = LoRAConfig(rank=8, alpha=16, target_modules=SEVEN)
CHECK_ROWS = 8  # whose loss every peer is checked by
OPTIMIZER = {"weight_decay": 0.01, "max_grad_norm": 0.0, "schedule": "constant"}


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder in the cache, empty and ours alone; removed at the end.

    Raises:
        BenchmarkError: another benchmark is running; timings of both would be worthless.
    """
    folder = cache_folder() / "benchmark"
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise BenchmarkError(
            "another benchmark is running on this machine", cure="Wait until it has ended."
        ) from None
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed one left
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


class Materials:
    """Files for the peers, made in a folder when they are first asked for.

    Args:
        folder: where they go; 0.6 GB for SmolLM2, 1.3 GB with an untied head.
        source: name or place of a Llama-family model.
        layers: of it that are used, from the first; None for all.
    """

    def __init__(self, folder: Path, source: str, layers: int | None = None):
        self.folder, self.source, self.layers = folder, source, layers

    def write_job(self, workload: Workload, seed: int = 0) -> Path:
        """Everything that a peer must know about a workload, as a JSON file."""
        rows = self._rows(workload)
        plan = BatchPlan(tuple(len(row) for row, _ in rows), workload.batch_size, seed=seed)
        steps = range(workload.epochs * plan.steps_per_epoch)
        batches = [[int(row) for row in plan.micro_batches(step)[0]] for step in steps]
        job = {
            "model": str(self.model(untied=workload.head_only)),
            "lora_a": str(self.folder / "lora_a.safetensors"),
            "lora": self._lora(workload),
            "head_only": workload.head_only,
            "rows": rows,
            "batches": batches,
            "batch_size": workload.batch_size,
            "check_rows": batches[0][: CHECK_ROWS if workload.kind == "chat" else 1],
            "max_length": max(len(row) for row, _ in rows) + (32 if workload.kind == "chat" else 0),
            "optimizer": {"learning_rate": workload.learning_rate, **OPTIMIZER},
            "grad_checkpoint": workload.grad_checkpoint,
            "settings": OUR_SETTINGS.get(workload.name, {}),
            "seed": seed,
        }
        path = self.folder / f"{workload.name}.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        return path

    def model(self, untied: bool = False) -> Path:
        """The folder with the weights, in Hugging Face's layout."""
        folder = self.folder / ("untied" if untied else "model")
        if not folder.exists():
            self._write_model(folder, untied)
        return folder

    def _write_model(self, folder: Path, untied: bool) -> None:
        base = load_model(self.source, dtype=mx.float32)
        if not isinstance(base.model, Llama):
            raise ConfigError(f"{self.source!r} is no Llama: the peers share that architecture")
        config = _shorten(base, self.layers)
        config |= {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
        folder.mkdir()
        base.tokenizer.save_pretrained(folder)
        if untied and config["tie_word_embeddings"]:
            config["tie_word_embeddings"] = False
            base.model.lm_head = base.model.model.embed_tokens
        write_json(folder / "config.json", config)
        save_weights(base.model, folder / "model.safetensors")
        if not untied:
            add_lora(base.model, LORA)
            start = adapter_weights(base.model).items()
            fresh = {name: array for name, array in start if name.endswith("lora_a")}
            write_safetensors(self.folder / "lora_a.safetensors", fresh)
        del base
        release_memory()

    def _lora(self, workload: Workload) -> dict[str, object]:
        count = workload.num_layers
        if count is not None and self.layers is not None:
            count = min(count, max(1, self.layers - 1))  # one layer at least stays as it is
        given = asdict(LORA) | {"target_modules": list(workload.targets), "num_layers": count}
        return {key: given[key] for key in ("rank", "alpha", "target_modules", "num_layers")}

    def _rows(self, workload: Workload) -> list[tuple[list[int], int]]:
        """(tokens, number of the first supervised one) of each row."""
        tokenizer = self._tokenizer()
        if workload.kind == "chat":
            data = load_dataset("capitals", tokenizer, limit=workload.rows)
            return [(e.tokens.tolist(), int(np.argmax(e.loss_mask))) for e in data.train]
        pairs = [c.row(phrasing) for c in all_capitals() for phrasing in TRAIN_PHRASINGS]
        text = " ".join(f"{pair['prompt']} {pair['completion']}" for pair in pairs)
        ids, size = tokenizer.encode(text), workload.length + 1
        ids *= 1 + size * workload.rows // len(ids)
        return [(ids[size * row : size * (row + 1)], 1) for row in range(workload.rows)]

    def _tokenizer(self) -> object:
        from workbench.models.tokenizers import load_tokenizer

        return load_tokenizer(self.model())


def _shorten(base: BaseModel, layers: int | None) -> dict[str, object]:
    """Keep the first layers of a network; returns the config.json that describes it."""
    config = dict(base.raw_config)
    if layers is not None:
        base.model.model.layers = base.model.layers[:layers]
        config["num_hidden_layers"] = len(base.model.layers)
    return config
