"""A Jupyter-first research workbench for LoRA fine-tuning with Apple's MLX."""

import os

from workbench.blas import load_blas
from workbench.machine import map_large_blocks

map_large_blocks()
load_blas()  # before anything imports mlx.core
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from workbench.backend import describe_backend
from workbench.data.capitals import all_capitals
from workbench.data.datasets import load_dataset
from workbench.data.preferences import load_preferences
from workbench.data.provenance import add_provenance, score_documents
from workbench.data.stories import story_corpus
from workbench.data.streams import stream_dataset
from workbench.data.texts import Corpus, read_corpus
from workbench.evaluation.bits_per_byte import bits_per_byte
from workbench.evaluation.choices import ChoiceQuestion, multiple_choice
from workbench.evaluation.generation import generate, stream
from workbench.evaluation.harness import harness_model
from workbench.evaluation.likelihood import log_likelihood
from workbench.evaluation.ngrams import fit_ngrams
from workbench.evaluation.perplexity import perplexity
from workbench.evaluation.scoring import ask_capitals, ask_questions
from workbench.evaluation.suites import read_suites
from workbench.export.adapters import load_adapter, save_adapter
from workbench.export.fuse import fuse
from workbench.export.gguf import export_gguf
from workbench.live.answers import accuracy_table, draw_accuracy
from workbench.live.behaviour import draw_suites
from workbench.live.bits import draw_bits_per_byte
from workbench.live.chart import TrainingChart
from workbench.live.chat import chat
from workbench.live.comparison import draw_heat_map, draw_runs
from workbench.live.panel import LivePanel
from workbench.live.profile import draw_profile
from workbench.live.runs import show_run
from workbench.live.scaling import draw_scaling
from workbench.live.sweep import sweep
from workbench.models.forms import plain_forms
from workbench.models.loading import load_model, load_weights, save_weights
from workbench.models.nanochat import NanoChat
from workbench.models.nanochat_config import NanoChatConfig
from workbench.models.safetensors_header import read_metadata
from workbench.probes.alive import what_is_alive
from workbench.probes.guard import MemoryGuard
from workbench.probes.invariants import check_model
from workbench.probes.leaks import find_leak
from workbench.probes.memory import memory_phase, read_memory, release_memory
from workbench.probes.numerics import check_numerics
from workbench.probes.parameters import changed, fingerprint
from workbench.probes.planner import plan_memory, suggest_settings
from workbench.probes.planning.machine import Machine
from workbench.probes.resuming import check_resume
from workbench.probes.training import check_training
from workbench.runs.deleting import delete_run
from workbench.runs.grids import Between
from workbench.runs.results import record_results
from workbench.runs.store import new_run, read_metrics
from workbench.runs.sweep_result import read_sweep
from workbench.runs.table import best_run, compare_configs, runs
from workbench.tuning.comparison import run_suites
from workbench.tuning.config import StepReport, TrainConfig
from workbench.tuning.dpo import DPOConfig
from workbench.tuning.exporters import to_tensorboard, to_trackio
from workbench.tuning.lora import LoRAConfig, adapter_disabled, add_lora, remove_lora
from workbench.tuning.mlx_lm_writing import write_mlx_lm_yaml
from workbench.tuning.mlx_lm_yaml import MlxLmRun, read_mlx_lm_yaml
from workbench.tuning.modes import set_trainable, untie_head
from workbench.tuning.presets import preset
from workbench.tuning.pretraining import pretrain
from workbench.tuning.profiling import profile_step
from workbench.tuning.provenance import ProvenanceConfig
from workbench.tuning.ranks import join_ranks
from workbench.tuning.scaling import measure_all_reduce, predict_scaling
from workbench.tuning.trainer import Trainer

__all__ = [
    "Between",
    "ChoiceQuestion",
    "Corpus",
    "DPOConfig",
    "LivePanel",
    "LoRAConfig",
    "Machine",
    "MemoryGuard",
    "MlxLmRun",
    "NanoChat",
    "NanoChatConfig",
    "ProvenanceConfig",
    "StepReport",
    "TrainConfig",
    "Trainer",
    "TrainingChart",
    "accuracy_table",
    "adapter_disabled",
    "add_lora",
    "add_provenance",
    "all_capitals",
    "ask_capitals",
    "ask_questions",
    "best_run",
    "bits_per_byte",
    "changed",
    "chat",
    "check_model",
    "check_numerics",
    "check_resume",
    "check_training",
    "compare_configs",
    "delete_run",
    "describe_backend",
    "draw_accuracy",
    "draw_bits_per_byte",
    "draw_heat_map",
    "draw_profile",
    "draw_runs",
    "draw_scaling",
    "draw_suites",
    "export_gguf",
    "find_leak",
    "fingerprint",
    "fit_ngrams",
    "fuse",
    "generate",
    "harness_model",
    "join_ranks",
    "load_adapter",
    "load_dataset",
    "load_model",
    "load_preferences",
    "load_weights",
    "log_likelihood",
    "measure_all_reduce",
    "memory_phase",
    "multiple_choice",
    "new_run",
    "perplexity",
    "plain_forms",
    "plan_memory",
    "predict_scaling",
    "preset",
    "pretrain",
    "profile_step",
    "read_corpus",
    "read_memory",
    "read_metadata",
    "read_metrics",
    "read_mlx_lm_yaml",
    "read_suites",
    "read_sweep",
    "record_results",
    "release_memory",
    "remove_lora",
    "run_suites",
    "runs",
    "save_adapter",
    "save_weights",
    "score_documents",
    "set_trainable",
    "show_run",
    "story_corpus",
    "stream",
    "stream_dataset",
    "suggest_settings",
    "sweep",
    "to_tensorboard",
    "to_trackio",
    "untie_head",
    "what_is_alive",
    "write_mlx_lm_yaml",
]
