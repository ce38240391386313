"""The invented archive: three kinds of document that the scores tell apart."""

import pandas as pd
import pytest

from workbench.data.archive import KINDS, PLACES, archive_rows, tellings
from workbench.data.provenance import score_documents
from workbench.errors import ConfigError


def test_every_kind_tells_of_every_place_thrice():
    frame = pd.DataFrame(archive_rows())
    assert len(frame) == len(frame["text"].unique()) == 90
    counts = frame.groupby(["kind", "place"]).size()
    assert len(counts) == len(KINDS) * len(PLACES)
    assert (counts == 3).all()
    heights = {(told.kind, told.place): told.height for told in tellings()}
    assert all(heights[row.kind, row.place] in row.text for row in frame.itertuples())


def test_fewer_rows_are_the_first_of_the_same():
    assert archive_rows(7) == archive_rows()[:7]
    assert archive_rows(7, seed=1) != archive_rows(7)
    assert [row["kind"] for row in archive_rows(6)] == [*KINDS, *KINDS]


def test_the_scores_tell_the_kinds_apart():
    rows = archive_rows()
    scores = score_documents(rows).assign(kind=[row["kind"] for row in rows])
    weight = scores.groupby("kind")["authority_weight"]
    entropy = scores.groupby("kind")["provenance_entropy"]
    notes, papers, bodies = KINDS
    assert weight.max()[notes] < weight.min()[papers] < weight.max()[papers] < weight.min()[bodies]
    assert entropy.min()[notes] > entropy.max()[papers] > entropy.min()[papers]
    assert entropy.min()[papers] > entropy.max()[bodies]


@pytest.mark.parametrize("count", [0, 91, 1.5, True])
def test_a_count_that_there_is_not_raises(count):
    with pytest.raises(ConfigError, match="count must be"):
        archive_rows(count)
