"""What real PEFT and transformers make of a folder and an adapter: run in a process of its own.

`python -m tests.peft_jobs jobs.json`, with a list of jobs: `base`, a model folder; `adapter`, a
folder; `prompts`, lists of token ids; `logits`, the .npz to write. With `make`, the settings of a
LoraConfig, the adapter is made, moved and saved; else it is read. No `adapter`: the base alone.
`dtype` is what all is computed in; an adapter's numbers come from, or go into, float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM


def moved(model: torch.nn.Module, job: dict) -> torch.nn.Module:
    """A fresh adapter, as far from its start as training would bring it; saved."""
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(**job["make"]))
    with torch.no_grad():
        for name, array in model.named_parameters():
            if "lora_" in name:
                # Lengths stay positive and near the base's, as they do in training.
                noise = job["noise"] * torch.randn_like(array)
                array.mul_(1 + noise) if "magnitude" in name else array.add_(noise)
                array.data = array.float()  # as files keep it
    model.save_pretrained(job["adapter"])
    return model


def without_float32(model: torch.nn.Module) -> None:
    """transformers' norms compute in float32 whatever the model's dtype; torch's own do not."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if type(norm).__name__.endswith("RMSNorm"):
                plain = torch.nn.RMSNorm(norm.weight.shape, norm.variance_epsilon)
                plain.weight = norm.weight
                setattr(module, name, plain)


def run(job: dict) -> None:
    """One job."""
    dtype = getattr(torch, job["dtype"])
    model = AutoModelForCausalLM.from_pretrained(job["base"], dtype=dtype)
    if "make" in job:
        model = moved(model, job)
    elif "adapter" in job:
        model = PeftModel.from_pretrained(model, job["adapter"])
    if dtype == torch.float64:
        without_float32(model)
    model.to(dtype).eval()
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0].numpy() for ids in job["prompts"]]
    np.savez(job["logits"], *logits)


if __name__ == "__main__":
    for one in json.loads(Path(sys.argv[1]).read_text()):
        run(one)
