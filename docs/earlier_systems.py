"""The README's table of what earlier systems claimed and what the committed notebooks measured.

`python docs/earlier_systems.py` writes it anew. Every figure is read out of a notebook's recorded
output, so that the table says what the last executed runs said.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- earlier systems: written by docs/earlier_systems.py -->", "<!-- end -->"
VERDICT = "nbval-check-output"
KINDS = "(?:count|given|holder|place|retold)"  # of questions in notebook 11


@dataclass(frozen=True)
class Row:
    """A claim, and where a notebook recorded what became of it here."""

    system: str
    claim: str
    notebook: str  # its name without the ending
    here: str  # with {names} of its verdict, of `found` or of `summed`
    found: tuple[tuple[str, str], ...] = ()  # name, pattern with one group in its outputs
    summed: tuple[tuple[str, str], ...] = ()  # likewise, of a whole number in every line

    def line(self) -> str:
        """The row of the table."""
        values = recorded(self.notebook, self.found, self.summed)
        here = re.sub(r"\{(.+?)\}", lambda match: str(values[match[1]]), self.here)
        name = self.notebook.partition("_")[0]
        return (
            f"| {self.system} | {self.claim} | {here} | [{name}](notebooks/{self.notebook}.ipynb) |"
        )


ROWS = (
    Row(
        "a Rust port of Llama on MLX, its run of 50 steps on Llama 3.1 8B",
        "7.66 s a step; the process grew by 2.0 GB a step, from 36.7 to 134.9 GB",
        "05_watch_memory",
        "memory of a right run: {right run}; a planted leak of 2 MB a step: found as "
        "{found, MB a step}. That run is planned, not measured here: {peak} of arrays",
        (("peak", r"arrays at the peak +([\d.]+ GB)"),),
    ),
    Row(
        "the same, head only",
        "128 gradient tensors become 3",
        "03_isolate_gradients",
        "{tensors}; equal to the whole model's: {its gradients are the whole model's}",
        (("tensors", r"'(\d+ gradients → \d+): "),),
    ),
    Row(
        "the same, its fixes",
        "a run can be resumed",
        "06_survive",
        "killed and resumed, losses equal to the last bit: {losses equal to the last bit}, "
        "tensors: {tensors equal to the last bit}; steps missing or doubled: "
        "{steps missing or doubled on disk}",
    ),
    Row(
        "the same, its gradient fix",
        "a provenance loss trains the model to distrust",
        "10_provenance",
        "norms of its gradient: {norms of the additive term's gradient}; parameters that it moved: "
        "{parameters that it moved}",
    ),
    Row(
        "a Rust nanochat GPT",
        "trains and talks",
        "11_nanochat",
        "{ours} bits a byte of text that it never saw, where {order}-grams of bytes need {grams}; "
        "whole sentences, and {right} right answers to {asked} questions",
        (
            ("ours", r"network ([\d.]+) \("),
            ("order", r"(\d+)-grams of bytes"),
            ("grams", r"n-grams ([\d.]+): "),
        ),
        (("right", rf"(?m)^{KINDS} +\d+ +(\d+)$"), ("asked", rf"(?m)^{KINDS} +(\d+) +\d+$")),
    ),
    Row(
        "a Python LoRA trainer with a geography demo",
        "loss from 8.95 to below 2.0, coherent answers",
        "00_quickstart",
        "loss {losses}; right answers in generated text: {before} % → {after} %, in words never "
        "trained {other} %",
        (
            ("losses", r"'loss ([\d.]+ → [\d.]+)"),
            ("before", r"answers are right: (\d+) %"),
            ("after", r"(?s)after \(%\).*?capital of X\? +(\d+)"),
            ("other", r"(?s)after \(%\).*?called\? +(\d+)"),
        ),
    ),
    Row(
        "all five",
        "a correct causal language model: shift, mask, cache, heads, norms",
        "02_check_slicing",
        "broken models and trainings that the checks let through: "
        "{broken models that slipped through}",
    ),
)


def recorded(
    notebook: str,
    patterns: tuple[tuple[str, str], ...],
    summed: tuple[tuple[str, str], ...] = (),
) -> dict[str, object]:
    """What a committed notebook's verdict and outputs say."""
    cells = nbformat.read(ROOT / "notebooks" / f"{notebook}.ipynb", as_version=4).cells
    values, everything = {}, []
    for cell in (cell for cell in cells if cell.cell_type == "code"):
        for output in cell.outputs:
            text = output.get("data", {}).get("text/plain", output.get("text", ""))
            everything.append(text)
            if VERDICT in cell.metadata.get("tags", []) and text.startswith("{"):
                values |= ast.literal_eval(text)
    for name, pattern in patterns:
        values[name] = re.search(pattern, "\n".join(everything))[1]
    for name, pattern in summed:
        values[name] = sum(map(int, re.findall(pattern, "\n".join(everything))))
    return values


def table() -> str:
    """The table as Markdown."""
    head = "| an earlier system | its claim or promise | recorded here | notebook |"
    return "\n".join([head, "|---|---|---|---|", *(row.line() for row in ROWS)])


def with_table(readme: str) -> str:
    """The README's text with the table between its two marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
