"""Tokenizers that are made here give back every text, and are saved with a model."""

import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Metaspace

from workbench.data import text_tokenizers
from workbench.data.examples import encode_row
from workbench.data.stories import story_corpus
from workbench.data.text_tokenizers import (
    BYTE_TOKENS,
    SPECIAL,
    blocks,
    byte_tokenizer,
    make_tokenizer,
    train_bpe,
)
from workbench.errors import ConfigError, DataError
from workbench.models.tokenizers import load_tokenizer

TEXTS = ["The cat.", "  two\n\n lines\t", "Bär 🍎 日本語", "a\x00b\r\n", "x" * 300, "don't!"]
CHAT = [
    {"role": "user", "content": "Who has it?"},
    {"role": "assistant", "content": "Mia has it."},
]


@pytest.fixture(scope="module")
def corpus():
    return story_corpus(60_000, 5_000)


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request, corpus):
    return make_tokenizer(request.param, corpus.train)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert max(ids) < len(tokenizer)
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_single_bytes_are_single_bytes():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == BYTE_TOKENS == 260
    assert [len(tokenizer.encode(text)) for text in TEXTS] == [len(t.encode()) for t in TEXTS]


def test_pairs_are_learnt_from_the_text_and_shorten_it(corpus):
    small, large = (train_bpe(corpus.train, size) for size in (300, 600))
    lengths = [len(tokenizer.encode(corpus.held_out)) for tokenizer in (small, large)]
    assert len(small) == 300
    assert len(large) <= 600
    assert lengths[1] < lengths[0] < len(corpus.held_out.encode())
    assert large.encode(" behind the drum") == [
        large.convert_tokens_to_ids(word) for word in ("Ġbehind", "Ġthe", "Ġdrum")
    ]
    assert train_bpe("aaaa bbbb " * 9, 10_000).vocab_size < 300  # no more words to merge


def test_the_same_text_gives_the_same_tokenizer(corpus):
    one, two = (train_bpe(corpus.train, 500) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    other = train_bpe(corpus.held_out, 500)
    assert one.backend_tokenizer.to_str() != other.backend_tokenizer.to_str()


def random_text(seed, length=3000):
    """Words, blanks of many kinds, special tokens and letters of several bytes, in any order."""
    pieces = ["a", "don't", "Bär", "日本", "🍎", "12", "...", " ", "  ", "\n", "\n\n", "\t", "\r\n"]
    pieces += ["\u00a0", "\u2028", "\x1c", "\u180e", "'s", "<|", *SPECIAL]
    return "".join(np.random.default_rng(seed).choice(pieces, length))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_text_in_blocks_has_the_tokens_of_the_whole(tokenizer, size, monkeypatch):
    monkeypatch.setattr(text_tokenizers, "BLOCK", size)
    for text in (*TEXTS, *map(random_text, range(20))):
        parts = list(blocks(text, tokenizer))
        assert "".join(parts) == text
        how = {"add_special_tokens": False, "split_special_tokens": False}
        tokens = [token for part in parts for token in tokenizer.encode(part, **how)]
        assert tokens == tokenizer.encode(text, **how)
    parts = list(blocks("word " * 1000, tokenizer))
    assert max(map(len, parts)) <= size + len("word ")


def test_a_text_is_cut_for_tokenizers_that_allow_it_alone(monkeypatch):
    monkeypatch.setattr(text_tokenizers, "BLOCK", 5)
    changes = [
        lambda own: own.backend_tokenizer.add_special_tokens([AddedToken("two words")]),
        lambda own: own.backend_tokenizer.add_special_tokens([AddedToken("<eats>", rstrip=True)]),
        lambda own: setattr(own.backend_tokenizer, "pre_tokenizer", Metaspace()),
        lambda own: setattr(own.backend_tokenizer, "pre_tokenizer", ByteLevel()),
        lambda own: setattr(own.backend_tokenizer, "normalizer", NFC()),
    ]
    for change in changes:
        tokenizer = byte_tokenizer()
        assert list(blocks("a text with blanks", tokenizer)) == ["a text", " with blanks"]
        change(tokenizer)
        assert list(blocks("a text with blanks", tokenizer)) == ["a text with blanks"]


def test_pairs_are_those_of_the_whole_text_whatever_the_blocks(corpus, monkeypatch):
    text = corpus.train[:20_000] + random_text(3)
    whole = train_bpe(text, 400).backend_tokenizer.to_str()
    monkeypatch.setattr(text_tokenizers, "BLOCK", 100)
    assert train_bpe(text, 400).backend_tokenizer.to_str() == whole


def test_special_tokens_are_one_token_and_never_part_of_another(tokenizer):
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3]
    for token in SPECIAL:
        assert len(tokenizer.encode(f"a{token}b", split_special_tokens=False)) == 3
    inner = [token for token in tokenizer.get_vocab() if token not in SPECIAL]
    assert not [token for token in inner if "|" in token and len(token) > 1]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin|>", "<|end|>")


def test_a_chat_is_written_with_them_and_answers_are_its_targets(tokenizer):
    example = encode_row({"messages": CHAT}, tokenizer)
    assert tokenizer.decode(example.tokens) == (
        "<|begin|><|user|>Who has it?<|end|><|assistant|>Mia has it.<|end|>"
    )
    assert tokenizer.decode(example.tokens[example.loss_mask]) == "Mia has it.<|end|>"
    spelled = encode_row({"prompt": "<|end|>", "completion": "x"}, tokenizer)
    assert spelled.num_spelled == 1
    assert (spelled.tokens == tokenizer.eos_token_id).sum() == 2
    with pytest.raises(DataError, match="the roles are user and assistant"):
        encode_row({"messages": [{"role": "system", "content": "x"}, *CHAT]}, tokenizer)


def test_it_is_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 0)
    for text in (*TEXTS, tokenizer.apply_chat_template(CHAT, tokenize=False)):
        assert loaded.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("words", "text"), "unknown tokenizer 'words'"),
        (("bytes", "text", 512), "single bytes make 260 tokens"),
        (("bpe", "text", 259), "vocab_size must be a whole number from 260"),
        (("bpe", "text", 10**12), "vocab_size must be at most"),
        (("bpe", "text", 300.0), "vocab_size must be a whole number"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        make_tokenizer(*settings)
