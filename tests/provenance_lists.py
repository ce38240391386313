"""A small word file, and texts of which its words are known."""

import json

LISTS = {
    "institutions": {"who": 0.35, "town council": 0.1, "U.S. Department": 0.3, "bureau": 0},
    "source_types": {"letter": ["letter", "letters"], "map": ["map"], "book": ["text-book"]},
    "primary_sources": ["I saw", "diary", "field notes", "affidavit", "ledger"],
    "consensus": ["experts agree", "it is known", "settled"],
    "variety": ["however", "others deny", "by contrast", "disputed", "on the other hand", "unsure"],
}
FILLER = "Plain filler that none of these lists has a word of, and nothing else besides. "


def write_lists(path, **changes):
    """The word file, with some of its keys replaced; None takes a key out."""
    content = {key: value for key, value in {**LISTS, **changes}.items() if value is not None}
    path.write_text(json.dumps(content), encoding="utf-8")
    return path
