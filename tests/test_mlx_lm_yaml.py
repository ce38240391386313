"""mlx_lm.lora's YAML: there and back, mlx-lm's own rates and losses, every bad file by name."""

import inspect
import json
import os
import random
import subprocess
import sys

import mlx.optimizers as optim
import pytest
import yaml
from mlx_lm import lora as mlx_lm_lora

from tests.toy import save_toy_folder, toy_model, write_jsonl
from workbench.data.datasets import load_dataset
from workbench.errors import ConfigError, FileFormatError, SettingsWarning
from workbench.export.adapters import save_adapter
from workbench.models.loading import load_model
from workbench.tuning.config import TrainConfig
from workbench.tuning.lora import LoRAConfig, add_lora
from workbench.tuning.mlx_lm_settings import DEFAULTS, ELSEWHERE, OPTIONS
from workbench.tuning.mlx_lm_writing import write_mlx_lm_yaml
from workbench.tuning.mlx_lm_yaml import MlxLmRun, read_mlx_lm_yaml
from workbench.tuning.schedules import learning_rate_at
from workbench.tuning.trainer import Trainer

TEXT = "a text of 31 tokens and one end"  # 32 with the token that ends it
RECORDER = """
import json, sys
from mlx_lm import lora
from mlx_lm.tuner import callbacks

class Recorder(callbacks.TrainingCallback):
    def __init__(self, log_dir, **kwargs):
        self.file = open(log_dir + ".jsonl", "w")
    def on_train_loss_report(self, info):
        print(json.dumps(info), file=self.file, flush=True)

callbacks.SUPPORT_CALLBACK["recorder"] = Recorder
for config, adapter in zip(sys.argv[1::2], sys.argv[2::2]):
    own = ["--report-to", "recorder", "--resume-adapter-file", adapter]
    sys.argv = ["lora", "--config", config, *own]
    lora.main()
"""


def trainers(**settings):
    """Settings as a run that mlx-lm can make."""
    return TrainConfig(**{"steps": 6, "max_grad_norm": 0.0, "schedule": "constant", **settings})


RUNS = {  # settings with which both trainers do the same
    "sgd, warm cosine": {
        "optimizer": "sgd", "schedule": "cosine", "learning_rate": 0.3, "warmup_steps": 3,
        "min_learning_rate": 0.01, "momentum": 0.5, "weight_decay": 0.0,
    },
    "adam as it is there": {
        "optimizer": "adam", "schedule": "linear", "learning_rate": 0.01, "decay_steps": 4,
        "warmup_steps": 2, "warmup_from": 0.0, "bias_correction": False, "weight_decay": 0.0,
    },
    "adamw, corrected": {"learning_rate": 0.01, "schedule": "cosine", "decay_steps": 9},
    "adafactor": {"optimizer": "adafactor", "learning_rate": 0.01, "weight_decay": 0.0},
    "muon": {"optimizer": "muon", "learning_rate": 0.01, "warmup_steps": 4},
}  # fmt: skip


def command(*arguments, cwd):
    """A Python program in a process of its own."""
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "MLX_DISABLE_COMPILE": "1"}
    settings.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
        env=settings, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def both_trained(tmp_path_factory):
    """Name → (our reports, mlx-lm's), each from the same adapter, on the same two rows a step."""
    folder, arguments, ours = tmp_path_factory.mktemp("both"), [], {}
    save_toy_folder(folder / "model")
    write_jsonl(folder / "rows" / "train.jsonl", [{"text": TEXT}, {"text": TEXT[::-1]}])
    for number, (name, settings) in enumerate(RUNS.items()):
        lora = LoRAConfig(rank=4, alpha=10.0, target_modules=("self_attn.q_proj", "mlp.up_proj"))
        train = trainers(micro_batch_size=1, grad_accum_steps=2, **settings)
        adapter = folder / f"adapter{number}"
        run = MlxLmRun(
            train, lora, str(folder / "model"), str(folder / "rows"), str(adapter), len(TEXT) + 1
        )
        write_mlx_lm_yaml(folder / f"{number}.yaml", run)
        run = read_mlx_lm_yaml(folder / f"{number}.yaml")
        base = load_model(run.model)
        data = load_dataset(run.data, base.tokenizer, max_length=run.max_length)
        add_lora(base.model, run.lora)
        start = save_adapter(base, folder / f"start{number}") / "adapters.safetensors"
        ours[name] = list(Trainer(base, data, run.train))
        arguments += [folder / f"{number}.yaml", start]
    command("-c", RECORDER, *arguments, cwd=folder)
    logs = [(folder / f"adapter{number}.jsonl").read_text() for number in range(len(RUNS))]
    theirs = [[json.loads(line) for line in log.splitlines()] for log in logs]
    return {name: (ours[name], rows) for name, rows in zip(ours, theirs)}


@pytest.mark.parametrize("name", RUNS)
def test_mlx_lm_trains_with_our_yaml_at_our_rates_and_losses(both_trained, name):
    ours, theirs = both_trained[name]
    assert [row["iteration"] for row in theirs] == [2, 4, 6, 8, 10, 12]
    rates = [report.learning_rate for report in ours]
    assert [row["learning_rate"] for row in theirs] == pytest.approx(rates, rel=1e-6, abs=1e-9)
    losses = [report.loss for report in ours]
    assert [row["train_loss"] for row in theirs] == pytest.approx(losses, rel=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-3, "nothing was learned: any two losses are close"


def test_the_command_line_trains_with_our_yaml_alone(tmp_path):
    save_toy_folder(tmp_path / "model")
    for split in ("train", "valid"):
        write_jsonl(tmp_path / "rows" / f"{split}.jsonl", [{"text": TEXT}] * 4)
    train = trainers(steps=3, micro_batch_size=2, valid_every=2, checkpoint_every=2)
    run = MlxLmRun(train, LoRAConfig(rank=4), "model", "rows", "out", 64)
    write_mlx_lm_yaml(tmp_path / "run.yaml", run)
    command("-m", "mlx_lm", "lora", "--config", "run.yaml", cwd=tmp_path)
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["iters"] == 3
    assert saved["lora_parameters"] == {"rank": 4, "scale": 4.0, "dropout": 0.0}
    assert (tmp_path / "out" / "0000002_adapters.safetensors").exists()


def random_run(seed):
    """A run that both sides can say; fields that it has no use for have their defaults."""
    pick = random.Random(seed)
    optimizer, schedule = pick.choice([*OPTIONS]), pick.choice(["constant", "linear", "cosine"])
    steps, warmup = pick.randint(5, 400), pick.choice([0, 2, 3, 40])
    train = {
        "optimizer": optimizer,
        "schedule": schedule,
        "steps": steps,
        "seed": pick.randint(0, 9),
    }
    train["learning_rate"] = 10 ** pick.uniform(-7, 0)
    if schedule != "constant":
        train["min_learning_rate"] = train["learning_rate"] * pick.choice([0, 0.1, 1 / 3])
        train["decay_steps"] = pick.choice([None, 2, steps + 7])
    if warmup:
        train["warmup_steps"] = warmup
        train["warmup_from"] = pick.choice([None, 0.0, train["learning_rate"] / 7])
    if optimizer.startswith("adam"):
        train["adam_betas"] = (pick.choice([0.8, 0.9]), 0.99)
        train["adam_epsilon"] = pick.choice([1e-8, 3e-6])
        train["bias_correction"] = pick.choice([True, False])
    train["weight_decay"] = 0.0 if optimizer == "adam" else pick.choice([0.0, 0.1])
    if optimizer in ("sgd", "muon"):
        train["momentum"] = pick.choice([0.0, 0.93])
    train["grad_accum_steps"], train["micro_batch_size"] = pick.randint(1, 5), pick.randint(1, 9)
    train["valid_every"] = pick.choice([0, 1, 3])
    train["checkpoint_every"] = pick.choice([0, 4])
    train["grad_checkpoint"] = pick.choice([True, False])
    rank = pick.randint(1, 200)
    keys = pick.choice(["all-linear", ("self_attn.q_proj", "mlp.down_proj")])
    lora = LoRAConfig(
        rank, pick.choice([1.0, 16.0, 7.3, 1e-3]), pick.choice([0.0, 0.05]), keys,
        pick.choice([None, 1, 16]), train["seed"], use_dora=pick.choice([True, False]),
    )  # fmt: skip
    names = (pick.choice(["a/b", "#x: {y}", "ñ 'q'"]), pick.choice(["rows", "- 1e5", "null"]))
    run = MlxLmRun(trainers(**train), pick.choice([lora, lora, None]), *names, "~", 77)
    return run


@pytest.mark.parametrize("seed", range(60))
def test_what_is_written_is_read_back(tmp_path, seed):
    run = random_run(seed)
    write_mlx_lm_yaml(tmp_path / "run.yaml", run)
    again = read_mlx_lm_yaml(tmp_path / "run.yaml")
    assert again == run
    if run.lora is not None:
        assert again.lora.scale == pytest.approx(run.lora.scale, rel=1e-15)
    theirs = yaml.load((tmp_path / "run.yaml").read_text(), mlx_lm_lora.yaml_loader)
    if theirs.get("lr_schedule"):
        schedule = mlx_lm_lora.build_schedule(theirs["lr_schedule"])
        for step in range(0, run.train.steps, max(1, run.train.steps // 9)):
            assert float(schedule(step)) == pytest.approx(rate_of(again.train, step), rel=2e-5)


def rate_of(train, step):
    """Learning rate of an update by a configuration."""
    return learning_rate_at(
        step, schedule=train.schedule, peak=train.learning_rate, floor=train.min_learning_rate,
        warmup_steps=train.warmup_steps, total_steps=train.steps, decay_steps=train.decay_steps,
        warmup_from=train.warmup_from,
    )  # fmt: skip


def read(tmp_path, text):
    """A YAML of this text, read."""
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    return read_mlx_lm_yaml(tmp_path / "run.yaml")


def test_the_example_of_mlx_lm_is_read_and_what_differs_is_said(tmp_path):
    run = read(tmp_path, EXAMPLE)
    assert (run.lora.rank, run.lora.alpha, run.lora.scale) == (8, 160.0, 20.0)
    assert run.lora.target_modules == ("self_attn.q_proj", "self_attn.v_proj")
    assert run.train.steps == 333
    assert run.train.valid_every == 67
    assert (run.train.warmup_steps, run.train.warmup_from) == (101, 1e-7)
    assert (run.train.learning_rate, run.train.min_learning_rate) == (1e-5, 1e-7)
    assert run.train.decay_steps == 1000
    assert run.train.bias_correction is False
    assert run.train_on == "last"
    with pytest.warns(SettingsWarning) as caught:
        assert TrainConfig.from_mlx_lm(tmp_path / "run.yaml") == run.train
    assert all(note in str(caught[0].message) for note in run.notes)
    assert caught[0].filename == __file__
    for said in (
        "scale 20 with rank 8 is alpha 160",
        "learning_rate is not used",
        "first steps of adamw are not corrected",
        "1000 iterations are 333 steps of 3; the last 1 make no update",
        "steps_per_eval 200 iterations is taken as 67 steps",
        "report_to has no effect here",
    ):
        assert any(said in note for note in run.notes), said


EXAMPLE = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
data: "/path/to/training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
grad_accumulation_steps: 3
val_batches: 25
learning_rate: 1e-4
report_to: wandb
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
max_seq_length: 2048
mask_prompt: true
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
"""


def test_an_empty_mapping_is_mlx_lms_defaults(tmp_path):
    run = read(tmp_path, "{}")
    assert (run.model, run.train.steps, run.train.learning_rate) == ("Qwen/Qwen3-0.6b", 1000, 1e-5)
    assert "mlx-lm's own: model Qwen" in run.notes[0]


def test_our_tables_are_those_of_the_installed_mlx_lm_and_mlx():
    theirs = mlx_lm_lora.CONFIG_DEFAULTS
    assert {*DEFAULTS, *ELSEWHERE} >= {*theirs, *vars(mlx_lm_lora.build_parser().parse_args([]))}
    for name, value in DEFAULTS.items():
        assert name == "optimizer_config" or theirs[name] == value, name
    classes = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD, "muon": optim.Muon,
               "adafactor": optim.Adafactor}  # fmt: skip
    assert {*OPTIONS} == {*theirs["optimizer_config"]} == {*classes}
    for name, kind in classes.items():
        parameters = inspect.signature(kind).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.name != "learning_rate"}
        defaults = {n: tuple(d) if isinstance(d, list) else d for n, d in defaults.items()}
        assert defaults == OPTIONS[name], name


BAD = {
    "wandb: x": "unknown key 'wandb'",
    "lora_layers: 8": "unknown key 'lora_layers'.*Did you mean 'lora_parameters'",
    "lora_parameters: {rank: 8, alpha: 16, dropout: 0}": "unknown key 'alpha'.*alpha / rank",
    "lora_parameters: {rank: 8, scale: 2}": "needs dropout",
    "lora_parameters: {rank: 8.5, scale: 2, dropout: 0}": "rank must be a whole number",
    "lora_parameters: {rank: 8, scale: .nan, dropout: 0}": "scale must be a number",
    "lora_parameters: {rank: 8, scale: 0, dropout: 0}": "alpha must be above 0",
    "lora_parameters: {rank: 8, scale: 1e308, dropout: 0}": "is not finite",
    "lora_parameters: {rank: 8, scale: 1, dropout: 1}": r"dropout must be in \[0, 1\)",
    "lora_parameters: {rank: 8, scale: 1, dropout: 0, keys: q_proj}": "keys must be names",
    "lora_parameters: [8]": "lora_parameters must be a mapping",
    "iters: 1e3": "iters must be a whole number from 1, got 1000.0",
    "iters: yes": "iters must be a whole number",
    "iters: 2\ngrad_accumulation_steps: 3": "no update would be made",
    "batch_size: 0": "batch_size must be a whole number from 1",
    "num_layers: 0": "num_layers must be -1",
    "learning_rate: fast": "learning_rate must be a number",
    "learning_rate: -1e-5": "learning_rate must be a number, finite, from 0",
    "mask_prompt: 1": "mask_prompt must be true or false",
    "data: [a]": "data must be text",
    "model: ''": "model must be text",
    "optimizer: lion": "unknown optimizer 'lion'",
    "optimizer: adafactor": "adafactor is made with scale_parameter False here",
    "optimizer: sgd\noptimizer_config: {sgd: {nesterov: true}}": "nesterov False here",
    "optimizer_config: {adam: {beta: 1}}": "unknown key 'beta' in optimizer_config: adam",
    "optimizer_config: {adam: {betas: [0.9, 1.0]}}": "adam_betas must be two numbers",
    "optimizer_config: {adam: 3}": "adam must be a mapping",
    "fine_tune_type: full": "last 16 layers has no equal",
    "fine_tune_type: ia3": "unknown fine_tune_type 'ia3'",
    "lr_schedule: {name: step_decay, arguments: [1, 1, 1]}": "'step_decay' has no equal here",
    "lr_schedule: {name: [a], arguments: [1e-5, 10]}": r"\['a'\]\" has no equal here",
    f"lora_parameters: {{rank: 1{'0' * 400}, scale: 2, dropout: 0}}": "rank must be .* to 65536",
    f"iters: 1{'0' * 401}\nsave_every: 1{'0' * 400}": "must be a whole number from 1 to",
    "seed: 18446744073709551616": "seed must be a whole number from 0 to",
    f"lr_schedule: {{name: cosine_decay, arguments: [1, 1{'0' * 400}]}}": "steps must be",
    "lr_schedule: {name: cosine_decay, arguments: 3}": "arguments of cosine_decay must be",
    "lr_schedule: {name: cosine_decay, arguments: [1, 0]}": "steps must be a whole number from 1",
    "lr_schedule: {name: linear_schedule, arguments: [0.1, 0.2, 5]}": "rises from 0.1 to 0.2",
    "lr_schedule: {name: cosine_decay, arguments: [1, 9], warmup: -1}": "warmup must be",
    "lr_schedule: {name: cosine_decay, arguments: [1, 9], warmup: 2, warmup_init: 2}": "above",
    "lr_schedule: {name: cosine_decay, arguments: [1, 9], warm: 2}": "unknown key 'warm' in lr_s",
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_setting_names_the_file_and_the_key(tmp_path, text):
    with pytest.raises(ConfigError, match=rf"(?s)run\.yaml: .*{BAD[text]}"):
        read(tmp_path, text)


NOT_PLAIN = {
    "an alias": "data: &x a\nmodel: *x",
    "nested": "lora_parameters: " + "[" * 40_000,
    "nested deeper": "lora_parameters: " + "{a: " * 40,
    "larger than": "data: " + "x" * 70_000,
    "the tag .*os.system": "data: !!python/object/apply:os.system ['true']",
    "the tag .*bool": "train: !!bool maybe",
    "the tag .*timestamp": "seed: !!timestamp xx",
    "the tag .*map": "seed: !!map [1, 2]",
    "the tag .*set": "seed: !!set [a]",
    "the tag '!'": "seed: ! 3",
    "the tag .*binary": "? !!binary a\n: 3",
    "'iters' twice": "iters: 1\niters: 2",
    "no mapping": "- iters",
    "mapping of names": "1: 2",
    "found another document": "a: 1\n---\nb: 2",
    "special characters": "data: \0",
    "day is out of range|must be in range": "data: 2020-02-31",
    "digits": "iters: " + "9" * 5000,
    "not plain YAML": "data: 'a",
}


@pytest.mark.parametrize("message", NOT_PLAIN)
def test_what_is_no_plain_yaml_is_refused(tmp_path, message):
    with pytest.raises(FileFormatError, match=message):
        read(tmp_path, NOT_PLAIN[message])
    (tmp_path / "run.yaml").write_bytes(b"data: \xff")
    with pytest.raises(FileFormatError, match="utf-8"):
        read_mlx_lm_yaml(tmp_path / "run.yaml")


def test_an_absent_file_and_a_pipe_are_named(tmp_path):
    with pytest.raises(FileFormatError, match=r"run\.yaml: cannot be read"):
        read_mlx_lm_yaml(tmp_path / "run.yaml")
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(FileFormatError, match="not a regular file"):
        read_mlx_lm_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("settings", "lora", "message"),
    [
        ({"steps": None}, {}, "steps must be given"),
        ({"optimizer": "lion"}, {}, "no optimizer 'lion'"),
        ({"schedule": "wsd"}, {}, "no schedule 'wsd'"),
        ({"lora_plus_ratio": 4.0}, {}, "no lora_plus_ratio"),
        ({"warmup_steps": 1}, {}, "shortest warm-up is of 2 updates"),
        ({}, {"target_modules": ["q_proj"]}, "whole paths inside a layer"),
    ],
)
def test_what_mlx_lm_cannot_say_is_an_error_and_nothing_is_written(
    tmp_path, settings, lora, message
):
    run = MlxLmRun(trainers(**settings), LoRAConfig(**lora))
    with pytest.raises(ConfigError, match=message):
        write_mlx_lm_yaml(tmp_path / "run.yaml", run)
    assert [*tmp_path.iterdir()] == []


def test_settings_that_are_no_run_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"must be an MlxLmRun, got TrainConfig.*wb\.MlxLmRun"):
        write_mlx_lm_yaml(tmp_path / "run.yaml", trainers())
    assert [*tmp_path.iterdir()] == []


def test_a_network_makes_whole_paths_of_names_and_the_notes_stand_in_the_file(tmp_path):
    lora = LoRAConfig(
        rank=4, alpha=4, target_modules=["q_proj", "up_proj"], use_rslora=True, seed=1
    )
    train = trainers(max_grad_norm=1.0, on_bad_step="skip", patience=3, grad_accum_steps=2)
    notes = write_mlx_lm_yaml(tmp_path / "run.yaml", MlxLmRun(train, lora), toy_model())
    run = read_mlx_lm_yaml(tmp_path / "run.yaml")
    assert {*run.lora.target_modules} == {"self_attn.q_proj", "mlp.up_proj"}
    assert run.lora.scale == 2.0
    text = (tmp_path / "run.yaml").read_text()
    assert all(f"# {note}\n" in text for note in notes)
    for word in ("clip", "skip", "early", "alike", "seed", "rsLoRA"):
        assert any(word in note for note in notes), word


def test_a_run_that_mlx_lm_cannot_mask_is_refused():
    with pytest.raises(ConfigError, match="train_on must be 'all' or 'last'"):
        MlxLmRun(trainers(), train_on="assistant")
