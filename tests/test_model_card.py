"""Model cards: valid front matter, names that stay text, and nothing claimed that nobody saw."""

import json

import pytest
import yaml
from huggingface_hub import ModelCard

import workbench as wb
from tests.toy import save_toy_folder, toy_base
from tests.toy_adapters import adapted
from tests.toy_training import toy_trainer
from workbench.errors import RunError
from workbench.export.model_card import card, read_run

EVIL = "x`\n---\nlicense: mit\n# <script>alert(1)</script> [a](javascript:b) | *b*"


def front_matter(text):
    """The YAML between the first two lines of dashes."""
    start, front, rest = ("\n" + text).split("\n---\n", 2)
    assert start == ""
    return yaml.safe_load(front), rest


def run_folder(folder, **config):
    folder.mkdir()
    settings = {"train": {"steps": 60, "learning_rate": 1e-3}, "model": "toy", "data": "capitals"}
    (folder / "config.json").write_text(json.dumps({**settings, **config}))
    rows = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 0.25, "valid_loss": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("layout", ["mlx-lm", "peft"])
def test_an_adapters_card_says_what_it_is(tmp_path, layout):
    run = run_folder(tmp_path / "run")
    wb.save_adapter(adapted(), tmp_path / "adapter", format=layout, run_dir=run)
    loaded = ModelCard.load(tmp_path / "adapter/README.md")
    assert loaded.data.base_model == "toy"
    assert loaded.data.library_name == {"mlx-lm": "mlx", "peft": "peft"}[layout]
    assert "lora" in loaded.data.tags
    assert "datasets" not in loaded.data.to_dict()  # "capitals" is no id of a hub
    assert "license" not in loaded.data.to_dict()  # nobody knows it
    assert "- rank: 3" in loaded.text
    assert "training loss of 0.25 " in loaded.text
    assert "validation loss was 0.5 " in loaded.text
    assert r"| learning\_rate | 0.001 |" in loaded.text
    assert "Nobody measured, for this card, how well" in loaded.text


def test_a_base_that_is_one_file_is_to_be_a_folder_first(tmp_path):
    base = adapted()
    for path, said in ((tmp_path, False), (tmp_path / "model.gguf", True)):
        path.touch()
        base.path = path
        wb.save_adapter(base, tmp_path / "adapter")
        assert ("wb.fuse" in (tmp_path / "adapter/README.md").read_text()) == said


def test_without_a_run_nothing_is_said_of_the_training(tmp_path):
    wb.fuse(adapted(), tmp_path / "fused")
    text = (tmp_path / "fused/README.md").read_text()
    assert "how it was trained is not known here" in text
    assert "loss" not in text


def test_a_quantised_exports_card_says_what_rounding_did(tmp_path):
    fused = wb.fuse(adapted(), tmp_path / "fused", quantise={"bits": 8, "group_size": 32})
    front, text = front_matter((tmp_path / "fused/README.md").read_text())
    assert front["tags"][-1] == "8-bit"
    assert str(fused.drift) in text


def test_settings_that_a_run_went_on_with_are_said(tmp_path):
    list(toy_trainer(run_dir=tmp_path / "run", steps=2))
    trainer = toy_trainer(run_dir=tmp_path / "run", steps=4, allow_changes=True)
    list(trainer)
    wb.save_adapter(trainer.base, tmp_path / "adapter", run_dir=tmp_path / "run")
    text = (tmp_path / "adapter/README.md").read_text()
    assert "| steps | 2 |" in text
    assert "went on with other settings:\n\n- after step 2: steps is 4, was 2\n" in text


@pytest.mark.parametrize("state", ['{"changes": 3}', '{"changes": [3, {"step": 1}]}', "no JSON"])
def test_a_state_that_says_no_changes_adds_nothing(tmp_path, state):
    checkpoint = run_folder(tmp_path / "run") / "checkpoints/step-000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(state)
    wb.save_adapter(adapted(), tmp_path / "adapter", run_dir=tmp_path / "run")
    assert "other settings" not in (tmp_path / "adapter/README.md").read_text()


def test_names_of_strangers_stay_text(tmp_path):
    base = toy_base()
    base.name = EVIL
    run = read_run(run_folder(tmp_path / "run", data=EVIL, train={EVIL: EVIL}))
    text = card(base, "title", {"name": EVIL}, "use", "mlx", [EVIL], run)
    front, rest = front_matter(text)
    assert front["base_model"] == " ".join(EVIL.split())
    assert "license" not in front
    assert "<script>" not in rest
    assert "](javascript" not in rest
    assert not any(line.startswith("# <") or line == "---" for line in rest.splitlines())
    (row,) = [line for line in rest.splitlines() if line.startswith("| x")]
    assert row.replace(r"\|", "").count("|") == 3


def test_the_license_is_the_base_models(tmp_path):
    folder = save_toy_folder(tmp_path / "base")
    (folder / "README.md").write_text("---\ntags:\n- a\nlicense: apache-2.0\n---\nlicense: mit\n")
    wb.fuse(wb.load_model(folder), tmp_path / "fused")
    front, _ = front_matter((tmp_path / "fused/README.md").read_text())
    assert front["license"] == "apache-2.0"
    assert front["base_model"] == "base"  # and not where it lies on this machine


def test_a_dataset_of_a_hub_is_named(tmp_path):
    run = read_run(run_folder(tmp_path / "run", data="org/some-data"))
    front, _ = front_matter(card(toy_base(), "t", {}, "u", "mlx", [], run))
    assert front["datasets"] == ["org/some-data"]


def test_a_card_of_somebody_else_stays_and_ours_is_replaced(tmp_path):
    wb.save_adapter(adapted(), tmp_path / "a")
    ours = (tmp_path / "a/README.md").read_text()
    wb.save_adapter(adapted(wb.LoRAConfig(rank=7)), tmp_path / "a")
    assert "- rank: 7" in (tmp_path / "a/README.md").read_text() != ours
    (tmp_path / "a/README.md").write_text("# mine")
    wb.save_adapter(adapted(), tmp_path / "a")
    assert (tmp_path / "a/README.md").read_text() == "# mine"


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no run"):
        wb.save_adapter(adapted(), tmp_path / "a", run_dir=tmp_path)
    assert not (tmp_path / "a").exists()
