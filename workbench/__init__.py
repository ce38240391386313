"""A Jupyter-first research workbench for LoRA fine-tuning with Apple's MLX."""

import os

from workbench.blas import load_blas

load_blas()  # before anything imports mlx.core
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from workbench.backend import describe_backend
from workbench.models.loading import load_model, load_weights, save_weights

__all__ = ["describe_backend", "load_model", "load_weights", "save_weights"]
