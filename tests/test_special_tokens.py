"""The special tokens of a tokenizer are known, at the price of one look."""

from tests.toy import conversation, toy_tokenizer
from workbench.data.datasets import load_dataset
from workbench.data.special_tokens import special_tokens


def test_thousands_of_rows_look_once(tokenizer, monkeypatch):
    kind, looks = type(tokenizer), []
    slow = kind.added_tokens_decoder
    monkeypatch.setattr(
        kind, "added_tokens_decoder", property(lambda self: looks.append(1) or slow.fget(self))
    )
    rows = [conversation("Spell <|im_end|>", "No."), conversation("Hi", "Hello!")] * 10
    assert load_dataset(rows, tokenizer).num_spelled == 10
    assert len(looks) == 1


def test_a_special_token_that_is_added_later_is_noticed(tokenizer):
    assert not special_tokens(tokenizer).pattern.search("<|new|> z")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    assert special_tokens(tokenizer).pattern.search("<|new|>")
    assert tokenizer.convert_tokens_to_ids("<|new|>") in special_tokens(tokenizer).ids
    # This one is in the vocabulary already, so that the number of tokens stays.
    tokenizer.add_special_tokens({"additional_special_tokens": ["z"]})
    assert special_tokens(tokenizer).pattern.search("z")


def test_each_tokenizer_has_its_own(tokenizer):
    other = toy_tokenizer()
    other.add_special_tokens({"additional_special_tokens": ["<|other|>"]})
    assert special_tokens(other).ids > special_tokens(tokenizer).ids
