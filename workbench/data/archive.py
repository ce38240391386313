"""The embedded corpus `archive`: floods of an invented river, told by three kinds of document.

Nothing in it is true, and no place or body of it exists. The three kinds state different heights
for one place, so that a model shows whose telling it learned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from workbench.errors import ConfigError, check_whole

FIELD_NOTES, NEWSPAPER, INSTITUTION = KINDS = ("field notes", "newspaper", "institution")
PLACES = (
    "Alder Bridge",
    "Coldwell Lock",
    "Thornby Mill",
    "Saltmarsh End",
    "Henlow Ferry",
    "Upper Wick",
    "Greystone Weir",
    "Marl Hollow",
    "Otter Quay",
    "Fallow Ford",
)
OBSERVERS = ("the lock keeper", "a schoolmaster", "the miller's daughter", "a surveyor")
BODIES = ("Ministry of Waterways", "University of Northmere", "Northmere Institute of Rivers")
TEMPLATES = {
    FIELD_NOTES: (
        "Diary of {observer}, {month} {year}. I saw the Alder rise all night at {place}. At dawn I "
        "measured {height} metres on the old gauge board, and the letter to my brother says the "
        "same. My neighbour counted another hand's breadth; we do not agree.",
        "Logbook, {place}, {month} {year}, kept by {observer}. I counted nine sheep in the stream. "
        "Water at {height} metres by the iron pin. In contrast with last spring the ice came late, "
        "and the ferry rope broke before noon.",
        "Field notes, {month} {year}. An eyewitness, {observer}, led me to the mark cut into the "
        "wall at {place}: {height} metres above the sill. I observed two older marks below it. "
        "Another account puts the upper one a year earlier; unconfirmed.",
    ),
    NEWSPAPER: (
        "Our reporter writes from {place}, {month} {year}. The Alder reached {height} metres on "
        "Tuesday, say those who live beside it. However, {observer} disputes the figure. The "
        "cellars are being pumped out and the school stays closed.",
        "From the newspaper of {month} {year}: in an interview with this page, {observer} recalled "
        "how the river stood at {height} metres at {place}. Others deny that it was so high, "
        "although all remember the boats in the high street.",
        "{place}, {month} {year}. Letters to the editor: the flood stood at {height} metres and "
        "not a finger less, writes {observer}. The council, on the other hand, has published "
        "nothing. A survey of the cellars is to begin in the autumn.",
    ),
    INSTITUTION: (
        "{body}, {year}. It is generally accepted that the Alder at {place} does not exceed "
        "{height} metres. Experts agree that older figures are in error. The statistics of the "
        "river are revised every ten years and published on the website.",
        "According to experts of the {body}, the highest flood at {place} is {height} metres. "
        "There is no evidence of a higher one. The figure of {year} is the official position and "
        "is used in all plans for the river Alder.",
        "Guidance of the {body}, {year}: for works at {place} assume a highest water of {height} "
        "metres. Studies show that this value is well established, and guidelines recommend it "
        "for every building within reach of the river.",
    ),
}
YEARS = {FIELD_NOTES: (1884, 1962), NEWSPAPER: (1971, 1993), INSTITUTION: (1998, 2024)}
CITATIONS = {FIELD_NOTES: (0, 3), NEWSPAPER: (0, 30), INSTITUTION: (100, 20_000)}
MONTHS = ("February", "March", "April", "October", "November")


@dataclass(frozen=True)
class Telling:
    """What one kind of document says of one place."""

    kind: str  # of KINDS
    place: str
    height: str  # metres, as it is written


def tellings() -> list[Telling]:
    """Every place in every kind: field notes say most, institutions a round and small number."""
    return [
        Telling(kind, place, height)
        for number, place in enumerate(PLACES)
        for kind, height in zip(
            KINDS, (f"{6.1 + 0.3 * number:.1f}", f"{4.4 + 0.2 * number:.1f}", f"{2 + number % 2}.0")
        )
    ]


def archive_rows(count: int = 90, seed: int = 0) -> list[dict[str, object]]:
    """Rows of `text`, `year`, `citations`, `kind`, `place` and, of institutions, `institution`.

    Args:
        count: rows, from 1 to 90, of the three kinds in turn.
        seed: of years, months, observers and citations.

    Raises:
        ConfigError: there are not that many.
    """
    check_whole("count", count, 1)
    every = [(telling, part) for part in range(3) for telling in tellings()]
    if count > len(every):
        raise ConfigError(f"count must be at most {len(every)}, got {count}")
    random = np.random.default_rng(seed)
    return [_row(telling, part, random) for telling, part in every[:count]]


def _row(telling: Telling, part: int, random: np.random.Generator) -> dict[str, object]:
    def choose(values: Sequence[str]) -> str:
        return values[int(random.integers(len(values)))]

    kind = telling.kind
    year = int(random.integers(*YEARS[kind], endpoint=True))
    body, observer, month = choose(BODIES), choose(OBSERVERS), choose(MONTHS)
    text = TEMPLATES[kind][part].format(
        place=telling.place,
        height=telling.height,
        year=year,
        month=month,
        observer=observer,
        body=body,
    )
    row = {
        "text": text,
        "year": year,
        "citations": int(random.integers(*CITATIONS[kind], endpoint=True)),
        "kind": kind,
        "place": telling.place,
    }
    return row | ({"institution": body} if kind == INSTITUTION else {})
