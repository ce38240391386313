"""The panel's HTML: every number where it belongs, and nobody's text as markup."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from tests.toy_panel import toy_report
from workbench.live.history import History
from workbench.live.outputs import CUT, TITLE_CUT, literal, visible
from workbench.live.samples import SHOWN, Sample, samples_html
from workbench.live.tiles import NOTHING, Status, heading_html, tiles

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; & &amp;",
    "$\\frac{$ and $x$ and \\(y\\)",
    "\x1b[31mred\x1b[0m \x07 \x9b2J \x7f \r",
    "\u202egnirts desrever\u202c \u2066\u2069",
    "a\ud800b",
    "x" * 100_000,
    "\n" * 50,
    "</code></pre></table>",
]


class Reader(HTMLParser):
    """Collects the tags, the text, and its pieces: a formula lies within one of them."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.attributes, self.open = [], "", [], []
        self.pieces = [""]
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.pieces.append("")
        self.attributes += attrs
        self.open += [tag] if tag != "col" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.pieces.append("")

    def handle_data(self, data):
        self.text += data
        self.pieces[-1] += data


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_shown_as_it_is(text):
    reader = Reader(literal(text))
    assert set(reader.tags) == {"span"}
    assert {name for name, _ in reader.attributes} <= {"style", "title"}
    assert reader.text == visible(text)[:CUT] + ("…" if len(visible(text)) > CUT else "")
    assert all(piece in "$\\" or not set(piece) & set("$\\") for piece in reader.pieces)
    assert not reader.open
    literal(text).encode("utf-8")


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_does_no_harm_anywhere_in_the_panel(text):
    status = Status(f"Failed: {text}", 1, 2, 0.0, note=text)
    harmless = Status("Failed: x", 1, 2, 0.0, note="x")
    history = History([toy_report(1)])
    for ours, plain in (
        (heading_html(status, history), heading_html(harmless, history)),
        (samples_html([Sample(1, text, text)]), samples_html([Sample(1, "x", "x")])),
    ):
        tags = [[t for t in Reader(page).tags if t != "span"] for page in (ours, plain)]
        assert tags[0] == tags[1]
        assert "\x1b" not in ours
    json.dumps(heading_html(status, history)).encode("utf-8")


def test_long_text_is_cut_and_its_tooltip_holds_more():
    title = dict(Reader(literal("y" * 10 * TITLE_CUT)).attributes)["title"]
    assert CUT < len(title) <= TITLE_CUT + 1
    assert "title=" not in literal("y" * CUT)


def test_ordinary_text_stays_as_it_is():
    text = "Größe: 3 µm, 北京,\n\tok ✓"
    assert visible(text) == text


def test_table_groups_by_prompt_and_keeps_the_first_and_the_newest():
    samples = [Sample(step, p, f"{p}{step}") for step in range(20) for p in ("one", "two")]
    text = Reader(samples_html(samples)).text
    steps = [0, *range(20 - SHOWN + 1, 20)]
    expected = "".join(p + "".join(f"{s}{p}{s}" for s in steps) for p in ("one", "two"))
    assert text == "promptstepanswer" + expected


def test_each_figure_has_its_tile():
    report = toy_report(
        7, 1.5, learning_rate=0.00025, grad_norm=3.25, tokens_per_second=812.0, valid_loss=1.25,
        active_bytes=110_000_000, cache_bytes=220_000_000, peak_bytes=3_300_000_000,
        process_bytes=4_400_000_000, available_bytes=5_500_000_000,
    )  # fmt: skip
    history = History([report], limit_of=lambda r: 9_900_000_000)
    shown = {name: (value, detail) for name, value, detail in tiles(Status("", 7, 30, 0), history)}
    assert shown["step"][0] == "7 / 30"
    assert shown["train loss"][0] == "1.5000"
    assert shown["validation loss"] == ("1.2500", "best 1.2500 at 7")
    assert shown["learning rate"][0] == "0.00025"
    assert shown["gradient norm"][0] == "3.25"
    assert shown["tokens/s"][0] == "812"
    assert shown["MLX active"][0] == "110 MB"
    assert shown["MLX cache"][0] == "220 MB"
    assert shown["MLX peak"][0] == "3.30 GB"
    assert shown["process"] == ("4.40 GB", "limit 9.90 GB")
    assert shown["available"][0] == "5.50 GB"
    assert shown["leak"][0] == NOTHING, "one reading has no slope"
    page = Reader(heading_html(Status("Training", 7, 30, 0), history)).text
    assert all(value in page and detail in page for value, detail in shown.values())


def test_counters_that_are_missing_are_dashes():
    history = History([toy_report(1, process_bytes=None, available_bytes=None)])
    shown = {name: value for name, value, _ in tiles(Status("", 1, 30, 0), history)}
    assert shown["process"] == shown["available"] == shown["validation loss"] == NOTHING


def test_the_same_tiles_stand_there_before_the_first_step():
    before, after = (tiles(Status("", 0, 30, 0), History(r)) for r in ([], [toy_report(1)]))
    assert [name for name, *_ in before] == [name for name, *_ in after]
    assert {value for _, value, _ in before[1:]} == {NOTHING}


def test_a_leak_is_told():
    grown = [toy_report(s, active_bytes=int(1e9 + 3e6 * s)) for s in range(1, 60)]
    flat = [toy_report(s, active_bytes=int(1e9)) for s in range(1, 60)]
    found, none = (tiles(Status("", 59, 60, 0), History(r))[-1] for r in (grown, flat))
    assert found == ("leak", "+3.00 MB", "a step: leaking")
    assert none == ("leak", "0.00 MB", "a step: flat")


@pytest.mark.parametrize(("done", "share"), [(0, "0.00"), (15, "50.00"), (30, "100.00")])
def test_progress_is_a_share_of_the_steps(done, share):
    page = heading_html(Status("Training", done, 30, 0), History())
    assert re.search(rf'"width:{share}%', page)
    assert f'aria-valuenow="{float(share):.0f}"' in page


def test_time_left_says_what_it_does_not_know():
    assert Status("Training", 1, 2, 7, (61, True)).times() == "0:07 elapsed, about 1:01 left"
    assert Status("Training", 1, 2, 7, (61, False)).times() == "0:07 elapsed, at least 1:01 left"
    assert Status("Training", 1, 2, 7).times() == "0:07 elapsed"
    assert str(Status("Paused", 1, 2, 7, note="n")).endswith("· n")


def test_a_stream_tells_how_much_of_the_epoch_it_has_used():
    def step_tile(**changes):
        return tiles(Status("Training", 1, 2, 0.0), History([toy_report(1, **changes)]))[0]

    assert step_tile() == ("step", "1 / 2", "epoch 1")
    assert step_tile(epoch=3, epoch_share=0.371) == ("step", "1 / 2", "epoch 3, 37% of it")
