"""Stories whose answers must be read, and texts of one's own."""

import itertools

import pytest

from workbench.data import stories as grammar
from workbench.data.stories import HELD_OUT_SHARE, is_held_out, stories, story_corpus
from workbench.data.text_tokenizers import byte_tokenizer
from workbench.errors import ConfigError


def some(count, **options):
    """The first stories."""
    return list(itertools.islice(stories(**options), count))


def test_a_text_is_made_on_demand_and_depends_on_its_seed_alone():
    corpus = story_corpus(30_000, 5_000, seed=3)
    assert corpus == story_corpus(30_000, 5_000, seed=3)
    assert corpus.train != story_corpus(30_000, 5_000, seed=4).train
    for text, size in ((corpus.train, 30_000), (corpus.held_out, 5_000)):
        assert size - 1_500 < len(text.encode()) <= size
        assert text.isascii()
        assert text.startswith(grammar.BEGIN)
        assert text.endswith(grammar.END)
    assert story_corpus(40_000, 5_000, seed=3).train.startswith(corpus.train)


def test_what_is_held_out_stands_nowhere_in_the_training_text():
    train, held_out = some(800), some(200, held_out=True)
    trained = "".join(story.text for story in train)
    named = [t for s in held_out for t in s.turns if t.kind in ("place", "holder", "given")]
    assert len(named) > 300
    for turn in named:
        assert turn.answer not in trained, turn


def test_one_combination_in_five_is_held_out_and_every_word_is_trained():
    pairs = list(itertools.product(grammar.NAMES, grammar.NOUNS, grammar.COLOURS))
    share = sum(map(is_held_out, pairs)) / len(pairs)
    assert share == pytest.approx(1 / HELD_OUT_SHARE, abs=0.02)
    train, held_out = (
        {word for story in some(count, held_out=kept) for word in story.told.split()}
        for count, kept in ((800, False), (200, True))
    )
    assert train >= held_out


def read_answer(turn, sentences):
    """The answer to a question, read from what was told."""
    if turn.kind == "retold":
        return " ".join(f"{sentence}." for sentence in sentences)
    if turn.kind == "count":
        fruit = turn.question.split()[2]
        told = [words for words in map(str.split, sentences) if words[-1] == fruit]
        numbers = [
            grammar.NUMBERS.index(w) for words in told for w in words if w in grammar.NUMBERS
        ]
        return f"{told[0][0]} has {grammar.NUMBERS[sum(numbers)]} {fruit}."
    thing = turn.question.strip("?").removesuffix(" now").rpartition(" the ")[2]
    last = [sentence for sentence in sentences if f"the {thing}" in sentence][-1]
    if turn.kind == "place":
        return f"The {thing} is {last.partition(f'{thing} ')[2]}."
    return f"{(last.split()[-1] if ' gives ' in last else last.split()[0])} has the {thing}."


@pytest.mark.parametrize("held_out", [False, True])
def test_every_answer_can_be_read_from_what_was_told_and_only_there(held_out):
    kinds = set()
    for story in some(300, held_out=held_out):
        sentences = story.told.rstrip(".").split(". ")
        assert len(set(sentences)) == len(sentences)
        for turn in story.turns:
            kinds.add(turn.kind)
            assert turn.answer == read_answer(turn, sentences), story.told
        assert len({turn.question for turn in story.turns}) == len(story.turns)
    assert kinds == {"place", "holder", "given", "count", "retold"}


def test_a_story_is_a_chat_as_the_template_writes_it():
    tokenizer = byte_tokenizer()
    for story in some(30):
        assert tokenizer.apply_chat_template(story.messages, tokenize=False) == story.text
        roles = [message["role"] for message in story.messages]
        assert roles == ["user", "assistant"] * len(story.turns)
        for number, (asked, answer, kind) in enumerate(story.questions):
            assert asked == story.messages[: 2 * number + 1]
            assert (answer, kind) == (story.turns[number].answer, story.turns[number].kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_bytes": 1_000_001}, "num_bytes must be at most 1000000"),
        ({"held_out_bytes": 1_999}, "held_out_bytes must be a whole number from 2000"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_a_size_or_seed_out_of_range_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        story_corpus(**{"num_bytes": 5_000, "held_out_bytes": 5_000, **settings})
