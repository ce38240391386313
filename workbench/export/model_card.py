"""Model cards: README.md beside an export, with the YAML front matter that model hubs read.

A card says what is known: what was made of which model, how it was trained where a run folder
says so, and what nobody measured. Names come from files and users; they are escaped.
"""

from __future__ import annotations

import contextlib
import html
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from workbench.errors import RunError, WorkbenchError
from workbench.export.attached import Attached
from workbench.models.files import read_json, replacing
from workbench.models.loading import BaseModel
from workbench.models.regular_files import open_regular
from workbench.models.sources import HUB_ID, PACKAGED_MODELS, hub_name
from workbench.runs.store import CONFIG_NAME, METRICS_NAME, read_rows
from workbench.tuning.checkpoints import STATE_NAME, list_checkpoints

CARD_NAME = "README.md"
MARK = "<!-- model card written by mlx-lora-workbench; it is replaced when the export is -->"
MAX_CARD_BYTES = 1_000_000
MAX_SHOWN = 200  # characters of one name or value
LICENSE = re.compile(rb"^license:[ \t]*[\"']?([A-Za-z0-9][\w.-]{0,60})[\"']?[ \t]*$", re.MULTILINE)
MARKDOWN = re.compile(r"([\\`*_\[\]()!|~$#])")


Run = Mapping[str, object]


def adapter_card(base: BaseModel, attached: Attached, layout: str, run: Run | None) -> str:
    """The card of an adapter in mlx-lm's or PEFT's layout; `run` is what `read_run` read."""
    kind = "DoRA" if attached.use_dora else "LoRA"
    uses = {
        "mlx-lm": "mlx_lm.generate --model <base model> --adapter-path <this folder>",
        "peft": "peft.PeftModel.from_pretrained(<base model>, <this folder>)",
    }
    facts = {
        "method": kind,
        "rank": attached.rank,
        "scale of the update": f"{attached.scale:g}",
        "adapted modules": ", ".join(attached.names),
        "adapted layers": f"the last {attached.num_layers} of {attached.total}",
        "layout": layout,
    }
    use = uses[layout]
    if base.path.is_file():  # a GGUF file, which neither tool takes for an adapter's base
        use = f"# <base model>: a folder, written of the base by wb.fuse before the adapter\n{use}"
    title = f"A {kind} adapter for {escaped_name(base)}"
    tags = [kind.lower(), "adapter", *(["mlx"] if layout == "mlx-lm" else [])]
    library = "mlx" if layout == "mlx-lm" else "peft"
    return card(base, title, facts, use, library, tags, run)


def card(
    base: BaseModel,
    title: str,
    facts: Mapping[str, object],
    use: str,
    library: str,
    tags: Iterable[str],
    run: Run | None = None,
    measured: Iterable[str] = (),
) -> str:
    """A model card's text.

    Args:
        base: the model that the export was made of.
        title: the first line, as Markdown.
        facts: what the export is, by name; values are escaped here.
        use: what loads it.
        library, tags: for the front matter.
        run: the run that trained it, as `read_run` read it; None where there is none.
        measured: sentences of ours on what was measured while exporting.
    """
    data = str(run["data"]) if run else ""
    front = ModelCardData(
        base_model=_plain(_name(base)),
        datasets=[data] if HUB_ID.fullmatch(data) else None,
        library_name=library,
        license=_license(base),
        pipeline_tag="text-generation",
        tags=["mlx-lora-workbench", *tags],
    )
    known = [f"- {name}: {_text(value)}" for name, value in facts.items()]
    lines = ["---", front.to_yaml(), "---", MARK, "", f"# {title}", "", *known, ""]
    lines += ["## Use", "", "```", use, "```", "", "## Training", "", *_training(run), ""]
    lines += ["## Measured", "", *[f"- {sentence}" for sentence in measured]]
    lines += ["- Nobody measured, for this card, how well or how safely the model answers.", ""]
    return "\n".join(lines)


def write_card(folder: Path, text: str) -> bool:
    """Write README.md, unless there is one that somebody else wrote; returns whether it did.

    Raises:
        FileFormatError: the folder cannot be written.
    """
    path = folder / CARD_NAME
    if os.path.lexists(path):
        with contextlib.suppress(WorkbenchError, OSError), open_regular(path, inside=folder) as old:
            if MARK.encode() in old.read(MAX_CARD_BYTES):
                path.unlink()
        if os.path.lexists(path):
            return False
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return True


def escaped_name(base: BaseModel) -> str:
    """The base model's name as Markdown text."""
    return _text(_name(base))


def _name(base: BaseModel) -> str:
    """The base model's name on the hub; of a place on this machine, its last part only."""
    if base.name in PACKAGED_MODELS:
        return hub_name(base.name)
    is_place = os.path.isabs(os.path.expanduser(base.name)) or os.path.exists(base.name)
    return Path(base.name).name if is_place else base.name


def _license(base: BaseModel) -> str | None:
    """Of a built-in model, or what the front matter of the base model's own card says."""
    if base.name in PACKAGED_MODELS:
        return PACKAGED_MODELS[base.name].license.lower()
    with contextlib.suppress(WorkbenchError, OSError):
        with open_regular(base.path / CARD_NAME, inside=base.path) as file:
            start, front, *_ = (*file.read(MAX_CARD_BYTES).split(b"---\n", 2), b"", b"")
        found = LICENSE.search(front) if not start.strip() else None
        return found[1].decode() if found else None
    return None


def read_run(folder: str | os.PathLike | None) -> Run | None:
    """What a run folder says of a training: model, data, settings, metrics, and later changes.

    None of no folder.

    Raises:
        RunError: the folder holds no run.
    """
    if folder is None:
        return None
    folder = Path(folder)
    try:
        config = read_json(folder / CONFIG_NAME)
    except WorkbenchError as error:
        raise RunError(f"holds no run ({error.what})", where=folder) from None
    train = config.get("train")
    rows = read_rows(folder, METRICS_NAME) if (folder / METRICS_NAME).exists() else []
    return {
        "model": config.get("model"),
        "data": config.get("data"),
        "train": train if isinstance(train, dict) else {},
        "rows": rows,
        "changes": _changes(folder),
    }


def _changes(folder: Path) -> list[tuple[object, str]]:
    """Steps after which a run went on with other settings, and what was other."""
    changes: object = None
    with contextlib.suppress(WorkbenchError):
        for checkpoint in list_checkpoints(folder)[:1]:
            changes = read_json(checkpoint / STATE_NAME).get("changes")
    known = [c for c in changes if isinstance(c, dict)] if isinstance(changes, list) else []
    lists = [(c.get("step"), c.get("differences")) for c in known]
    return [(step, "; ".join(map(str, what))) for step, what in lists if isinstance(what, list)]


def _training(run: Run | None) -> list[str]:
    if run is None:
        return ["No run was given when this was written: how it was trained is not known here."]
    rows = run["rows"]
    lines = [f"Trained from {_text(run['model'])} on the data set {_text(run['data'])}."]
    steps = [row for row in rows if isinstance(row.get("loss"), int | float)]
    if steps:
        last = steps[-1]
        lines.append(
            f"The last of {len(steps)} recorded steps had a training loss of {last['loss']:.4g} "
            "nats a token."
        )
    valid = [row["valid_loss"] for row in rows if isinstance(row.get("valid_loss"), int | float)]
    if valid:
        lines.append(f"The last validation loss was {valid[-1]:.4g} nats a token.")
    lines += ["", "| setting | value |", "|---|---|"]
    lines += [f"| {_text(k)} | {_text(v)} |" for k, v in run["train"].items()]
    later = [f"- after step {_text(step)}: {_text(what)}" for step, what in run["changes"]]
    return [*lines, "", "It went on with other settings:", "", *later] if later else lines


def _plain(value: object) -> str:
    """One printable line of bounded length."""
    line = " ".join(str(value).split())
    return "".join(char if char.isprintable() else "?" for char in line)[:MAX_SHOWN]


def _text(value: object) -> str:
    """A value as Markdown text that is nothing but text."""
    return MARKDOWN.sub(r"\\\1", html.escape(_plain(value), quote=False))
