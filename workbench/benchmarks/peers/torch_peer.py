"""transformers and PEFT as a peer: the plain loop of their documentation.

The argument is the dtype of the weights: float32 or bfloat16.
"""

from __future__ import annotations

import channel  # first: what is printed from here on goes to stderr

# isort: split
import gc
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

DTYPE = getattr(torch, sys.argv[1])
IGNORED = -100  # the label that transformers does not count


class TorchPeer:
    """Answers the conductor's messages."""

    def __init__(self):
        self.job: dict = {}
        self.device = _device()
        if self.device == "cpu":
            torch.set_num_threads(channel.usable_cores())

    def setup(self, path: str) -> dict:
        """Load, attach and prepare, up to the first step."""
        self.job = job = channel.read_job(path)
        model = self._load(job["model"])
        model.config.use_cache = False
        model.requires_grad_(False)
        if job["head_only"]:
            model.lm_head.requires_grad_(True)
        else:
            model = self._attach(model, **job["lora"])
        if job["grad_checkpoint"]:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        options = job["optimizer"]
        self.optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=options["learning_rate"],
            weight_decay=options["weight_decay"],
        )
        self.model, self.steps = model.train(), iter(job["batches"])
        return {"note": f"{torch.get_num_threads()} threads"}

    def describe(self) -> dict:
        """What computes here, and how fast a matrix product is."""
        a, seconds = torch.randn(512, 512, device=self.device, dtype=DTYPE), []
        for _ in range(4):
            started = time.perf_counter()
            (a @ a)[0, 0].item()
            seconds.append(time.perf_counter() - started)
        speed = 2 * 512**3 / statistics.median(seconds) / 1e9
        name = torch.cuda.get_device_name() if self.device == "cuda" else self.device.upper()
        return {"device": name, "matmul_gflops": speed}

    def step(self, first: bool) -> dict:
        """One optimizer update."""
        if first:
            channel.forget_process_peak()
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._mean_loss(next(self.steps))
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        self._wait()
        return {"seconds": time.perf_counter() - started, "loss": value, **channel.process_peak()}

    @torch.no_grad()
    def loss(self) -> dict:
        """Mean loss of the rows that every peer is checked by."""
        return {"loss": self._mean_loss(self.job["check_rows"]).item()}

    def load(self, model: str) -> dict:
        """Load a folder, tokenizer included."""
        self.model = None
        gc.collect()
        started = time.perf_counter()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.tokenizer.padding_side = "left"
        self.model = self._load(model).eval()
        self._wait()
        return {"seconds": time.perf_counter() - started}

    def generate(self, prompts: list[str], max_tokens: int) -> dict:
        """Answer the prompts together, greedily; tokens are counted."""
        started = time.perf_counter()
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        encoded = self.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        ).to(self.device)
        output = self.model.generate(**encoded, max_new_tokens=max_tokens, do_sample=False)
        answers = output[:, encoded["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        seconds = time.perf_counter() - started
        ended = self.tokenizer.eos_token_id
        tokens = sum(ids.index(ended) if ended in ids else len(ids) for ids in answers.tolist())
        return {"seconds": seconds, "tokens": tokens, "texts": texts}

    def _load(self, folder: str) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE).to(self.device)

    def _attach(
        self,
        model: torch.nn.Module,
        rank: int,
        alpha: float,
        target_modules: list[str],
        num_layers: int | None,
    ) -> torch.nn.Module:
        count = model.config.num_hidden_layers
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=target_modules,
            layers_to_transform=list(range(count))[-(num_layers or count) :],
        )
        model, start = get_peft_model(model, config), load_file(self.job["lora_a"])
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_A." in name:
                    path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
                    parameter.copy_(start[f"{path}.lora_a"].T)
        return model

    def _mean_loss(self, rows: list[int]) -> torch.Tensor:
        """Padded to the longest row; transformers shifts the labels itself."""
        rows = [self.job["rows"][number] for number in rows]
        length = max(len(tokens) for tokens, _ in rows)
        tokens, labels = torch.zeros(2, len(rows), length, dtype=torch.long)
        labels += IGNORED
        mask = torch.zeros_like(tokens)
        for place, (ids, first) in enumerate(rows):
            tokens[place, : len(ids)] = torch.tensor(ids)
            labels[place, first : len(ids)] = torch.tensor(ids[first:])
            mask[place, : len(ids)] = 1
        batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
        return self.model(**{name: array.to(self.device) for name, array in batch.items()}).loss

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        elif self.device == "mps":
            torch.mps.synchronize()


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


if __name__ == "__main__":
    channel.serve(TorchPeer())
