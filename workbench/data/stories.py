"""Small talk about small stories, written by a grammar: plain words, and answers that must be read.

A user tells who has what, where something was put and how many there are, and asks; the assistant
answers. An answer hangs on a sentence that stands many words before it, so that whoever sees the
last few letters only can but guess. The words are ours; nothing is taken from any text.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from workbench.data.text_tokenizers import BEGIN, END
from workbench.data.texts import Corpus
from workbench.errors import ConfigError, check_whole

NAMES = (
    "Mia", "Tom", "Ben", "Ann", "Leo", "Eva", "Sam", "Ida",
    "Max", "Zoe", "Kim", "Jon", "Amy", "Ned", "Lea", "Tim",
)  # fmt: skip
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
NOUNS = (
    "ball", "key", "cup", "hat", "book", "lamp", "coin", "bell", "ring", "drum", "kite", "boat",
    "card", "doll", "shoe", "spoon", "brush", "clock", "flute", "rope", "stone", "mask", "plate",
    "sock",
)  # fmt: skip
PLACES = (
    "in the kitchen", "on the shelf", "under the bed", "behind the door",
    "on the table", "in the garden", "under the stairs", "near the window",
    "in the drawer", "on the roof", "beside the tree", "by the river",
)  # fmt: skip
FRUITS = ("apples", "plums", "pears", "figs", "nuts", "eggs")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FILLERS = (
    "It is a warm day.", "The rain has stopped.", "A dog barks.", "The wind is cold.",
    "Somebody sings.", "It is getting late.", "The sun is low.", "Nobody is in a hurry.",
)  # fmt: skip
RETELL = "Tell me all of it again."
RETOLD_SHARE = 0.6  # of the stories, in which that is asked, too
HELD_OUT_SHARE = 5  # one in so many combinations is never trained
MAX_BYTES = 1_000_000


@dataclass(frozen=True)
class Fact:
    """Sentences that say one thing, and a question about it."""

    kind: str  # place, holder, given or count
    sentences: tuple[str, ...]
    question: str
    answer: str
    combinations: tuple[tuple[str, ...], ...]  # of words, which are either trained or held out


@dataclass(frozen=True)
class Turn:
    """A question, and the one right answer."""

    kind: str  # of its fact, or retold
    question: str
    answer: str


@dataclass(frozen=True)
class Story:
    """What a user tells, and questions about it in the order in which they are asked."""

    told: str
    turns: tuple[Turn, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation; the first question follows what is told, in one message."""
        said = []
        for number, turn in enumerate(self.turns):
            question = turn.question if number else f"{self.told} {turn.question}"
            said.append({"role": "user", "content": question})
            said.append({"role": "assistant", "content": turn.answer})
        return said

    @property
    def text(self) -> str:
        """The conversation as the chat template of `text_tokenizers` writes it."""
        turns = (f"<|{m['role']}|>{m['content']}{END}" for m in self.messages)
        return BEGIN + "".join(turns)

    @property
    def questions(self) -> list[tuple[list[dict[str, str]], str, str]]:
        """(messages up to a question, its answer, its kind) of every turn."""
        messages = self.messages
        return [
            (messages[: 2 * number + 1], turn.answer, turn.kind)
            for number, turn in enumerate(self.turns)
        ]


def story_corpus(num_bytes: int = 900_000, held_out_bytes: int = 60_000, seed: int = 0) -> Corpus:
    """Stories to train on, and stories of other combinations.

    Who has which thing, what lies where and who counts what: a combination of words that the
    held-out stories speak of stands in no story of the training text.

    Args:
        num_bytes, held_out_bytes: sizes that are not exceeded, 2 kB to 1 MB.
        seed: of every choice.

    Raises:
        ConfigError: a number is out of range.
    """
    check_whole("seed", seed, 0)
    for name, size in (("num_bytes", num_bytes), ("held_out_bytes", held_out_bytes)):
        check_whole(name, size, 2_000)
        if size > MAX_BYTES:
            raise ConfigError(f"{name} must be at most {MAX_BYTES}, got {size}")
    parts = (_text(num_bytes, seed, False), _text(held_out_bytes, seed, True))
    return Corpus(f"stories, seed {seed}", *parts)


def stories(seed: int = 0, *, held_out: bool = False) -> Iterator[Story]:
    """An endless row of stories, of trained or of held-out combinations."""
    draw = random.Random(f"stories {seed} {held_out}")
    while True:
        yield _story(draw, held_out)


def is_held_out(words: Sequence[str]) -> bool:
    """Whether a combination of words is kept from the training text: one in five is."""
    return zlib.crc32("|".join(words).encode()) % HELD_OUT_SHARE == 0


def _text(size: int, seed: int, held_out: bool) -> str:
    parts, length = [], 0
    for story in stories(seed, held_out=held_out):
        length += len(story.text)  # all of it is ASCII
        if length > size:
            return "".join(parts)
        parts.append(story.text)


def _story(draw: random.Random, held_out: bool) -> Story:
    """Some facts, told in parts that alternate, and questions about all of them."""
    facts, used = [], set()
    for _ in range(draw.randint(2, 3)):
        facts.append(_drawn(draw, draw.choice(MAKERS), used, held_out))
    order = [number for number, fact in enumerate(facts) for _ in fact.sentences]
    draw.shuffle(order)
    left = [list(fact.sentences) for fact in facts]
    told = [left[number].pop(0) for number in order]
    told.insert(draw.randint(0, len(told)), draw.choice(FILLERS))
    asked = [Turn(fact.kind, fact.question, fact.answer) for fact in facts]
    if draw.random() < RETOLD_SHARE:
        asked.append(Turn("retold", RETELL, " ".join(told)))
    draw.shuffle(asked)
    return Story(" ".join(told), tuple(asked))


def _drawn(draw: random.Random, make: Maker, used: set[str], held_out: bool) -> Fact:
    """A fact whose every combination is held out, or trained, in words that are not used yet."""
    while True:
        name, other = draw.sample([name for name in NAMES if name not in used], 2)
        noun, fruit = (draw.choice([w for w in ws if w not in used]) for ws in (NOUNS, FRUITS))
        fact = make(draw, name, other, noun, fruit)
        if all(is_held_out(words) == held_out for words in fact.combinations):
            used |= {name, other, noun, fruit}
            return fact


def _place(draw: random.Random, name: str, _: str, noun: str, __: str) -> Fact:
    thing, place = f"{draw.choice(COLOURS)} {noun}", draw.choice(PLACES)
    return Fact(
        "place",
        (f"{name} puts the {thing} {place}.",),
        f"Where is the {thing}?",
        f"The {thing} is {place}.",
        ((thing, place),),
    )


def _holder(draw: random.Random, name: str, _: str, noun: str, __: str) -> Fact:
    thing = f"{draw.choice(COLOURS)} {noun}"
    said = f"{name} has the {thing}."
    return Fact("holder", (said,), f"Who has the {thing}?", said, ((name, thing),))


def _given(draw: random.Random, name: str, other: str, noun: str, _: str) -> Fact:
    thing = f"{draw.choice(COLOURS)} {noun}"
    return Fact(
        "given",
        (f"{name} has the {thing}.", f"{name} gives the {thing} to {other}."),
        f"Who has the {thing} now?",
        f"{other} has the {thing}.",
        ((name, thing), (other, thing)),
    )


def _count(draw: random.Random, name: str, _: str, __: str, fruits: str) -> Fact:
    first, more = draw.randint(2, 5), draw.randint(2, 5)
    return Fact(
        "count",
        (f"{name} has {NUMBERS[first]} {fruits}.", f"{name} finds {NUMBERS[more]} more {fruits}."),
        f"How many {fruits} does {name} have?",
        f"{name} has {NUMBERS[first + more]} {fruits}.",
        ((name, NUMBERS[first], NUMBERS[more], fruits),),
    )


Maker = Callable[[random.Random, str, str, str, str], Fact]
MAKERS = (_place, _place, _holder, _given, _count)  # a kind named twice is drawn twice as often
