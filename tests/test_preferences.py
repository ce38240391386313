"""Preference rows become two answers to one prompt, and only the answers are targets."""

import numpy as np
import pandas as pd
import pytest
from tokenizers import models

from tests.toy import conversation, toy_tokenizer, write_jsonl
from workbench.data.examples import encode_row
from workbench.data.preferences import encode_pair, load_preferences
from workbench.errors import DataError

END = "<|im_end|>"
ROW = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}
PROMPT = [{"role": "user", "content": "Hi"}]
WHOLE = {
    "chosen": conversation("Hi", "Hello!")["messages"],
    "rejected": conversation("Hi", "Go away.")["messages"],
}
FORMS = {
    "texts": ROW,
    "messages": {
        "prompt": PROMPT,
        "chosen": WHOLE["chosen"][1:],
        "rejected": WHOLE["rejected"][1:],
    },
    "a list and texts": {**ROW, "prompt": PROMPT},
    "whole chats": WHOLE,
    "whole chats beside the prompt's text": {**WHOLE, "prompt": "Hi"},
    "whole chats beside the prompt": {**WHOLE, "prompt": PROMPT},
    "one of each": {"prompt": "Hi", "chosen": WHOLE["chosen"], "rejected": "Go away."},
}


def supervised(tokenizer, example):
    return tokenizer.decode(example.tokens[example.loss_mask])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_row_gives_the_same_pair(form, tokenizer):
    pair = encode_pair(FORMS[form], tokenizer)
    for side, answer in (("chosen", "Hello!"), ("rejected", "Go away.")):
        example = getattr(pair, side)
        alone = encode_row({"prompt": "Hi", "completion": answer}, tokenizer)
        assert np.array_equal(example.tokens, alone.tokens)
        assert supervised(tokenizer, example) == f"{answer}{END}"
    assert pair.num_targets == len("Hello!") + 1 + len("Go away.") + 1
    assert len(pair) == len(pair.rejected) > len(pair.chosen)


def test_earlier_turns_belong_to_the_prompt(tokenizer):
    prompt = conversation("Hi", "Hello!", "And?")["messages"]
    pair = encode_pair({"prompt": prompt, "chosen": "Yes.", "rejected": "No."}, tokenizer)
    assert supervised(tokenizer, pair.chosen) == f"Yes.{END}"
    assert supervised(tokenizer, pair.rejected) == f"No.{END}"
    assert "Hello!" in tokenizer.decode(pair.chosen.tokens)


def test_special_tokens_that_an_answer_spells_are_text(tokenizer):
    row = {**ROW, "rejected": f"Go{END}<|im_start|>user"}
    pair = encode_pair(row, tokenizer)
    ends = (pair.rejected.tokens == tokenizer.eos_token_id).sum()
    assert ends == (pair.chosen.tokens == tokenizer.eos_token_id).sum()
    assert pair.num_spelled == 2
    assert "2 special tokens in messages are text" in str(load_preferences([row], tokenizer))
    acting = encode_pair(row, tokenizer, allow_special_tokens=True)
    assert (acting.rejected.tokens == tokenizer.eos_token_id).sum() == ends + 1


def test_tools_reach_the_template():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "add"}}]
    pair = encode_pair({**ROW, "tools": tools}, tokenizer)
    assert all('"name": "add"' in tokenizer.decode(side.tokens) for side in pair.sides)


def test_sources_are_those_of_other_data(tokenizer, tmp_path):
    rows = [{**ROW, "chosen": f"answer {n}"} for n in range(20)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    sets = [load_preferences(s, tokenizer, limit=9) for s in (path, rows, pd.DataFrame(rows))]
    texts = [[supervised(tokenizer, p.chosen) for p in s.train + s.valid] for s in sets]
    assert texts[0] == texts[1] == texts[2]
    tokens = sum(len(side) for pair in sets[0].train for side in pair.sides)
    assert f"pairs.jsonl: train 9 pairs, {tokens} tokens" in str(sets[0])
    assert "valid 2 pairs" in str(sets[0])


def test_a_cut_that_leaves_a_part_of_the_answers_is_counted(tokenizer):
    length = len(encode_pair(ROW, tokenizer).chosen)
    data = load_preferences([ROW], tokenizer, max_length=length)
    assert data.truncated == 1
    assert data.train[0].rejected.truncated
    assert "1 pairs were cut to max_length" in str(data)


BAD = {
    "no chosen": ({"prompt": "Hi", "rejected": "b"}, "row: has no 'chosen'.*'prompt', 'chosen'"),
    "no rejected": ({"prompt": "Hi", "chosen": "b"}, "row: has no 'rejected'"),
    "an empty answer": ({**ROW, "rejected": ""}, "row: 'rejected' is an empty answer"),
    "an empty last message": (
        {**WHOLE, "chosen": conversation("Hi", "")["messages"]},
        "row: 'chosen' is an empty answer",
    ),
    "another kind of row": ({"text": "a"}, "has no 'chosen'"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "has no 'prompt', and 'chosen' is no chat"),
    "equal sides": ({**ROW, "rejected": "Hello!"}, "are the same answer"),
    "equal chats": ({**WHOLE, "rejected": WHOLE["chosen"]}, "are the same answer"),
    "another prompt in a side": (
        {**WHOLE, "chosen": conversation("Ho", "Hello!")["messages"]},
        r"the prompt differs between 'chosen' and 'rejected' \(message 0\)",
    ),
    "a longer prompt in a side": (
        {**WHOLE, "chosen": conversation("Hi", "a", "b", "c")["messages"]},
        r"the prompt differs .*\(message 1\)",
    ),
    "a prompt that is not the chat's": ({**WHOLE, "prompt": "Ho"}, "chosen: the chat's prompt is"),
    "a chat that ends with the user": (
        {"prompt": "Hi", "chosen": conversation("Hi", "a", "b")["messages"], "rejected": "b"},
        "chosen: the chat's prompt is not",
    ),
    "whole chats that end with the user": (
        {side: conversation("Hi", "a", side)["messages"] for side in ("chosen", "rejected")},
        "chosen: must end with the assistant's answer",
    ),
    "an answer to nothing": (
        {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")},
        "chosen: must end with the assistant's answer to something",
    ),
    "a number": ({**ROW, "chosen": 3}, "'chosen' must be a text or a list of messages, got int"),
    "a number in a chat": (
        {**ROW, "rejected": [{"role": "assistant", "content": 3}]},
        "rejected, message 0: 'content' must be a string",
    ),
    "no messages": ({**ROW, "rejected": []}, "rejected: 'messages' must be a list"),
    "no prompt messages": ({**ROW, "prompt": []}, "prompt: 'messages' must be a list"),
    "a prompt that is a number": ({**ROW, "prompt": 3}, "'prompt' must be a string, got int"),
    "half of a surrogate pair": ({**ROW, "chosen": "\ud800"}, "half of a surrogate pair"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_pair_is_named(case, tokenizer):
    row, says = BAD[case]
    with pytest.raises(DataError, match=says):
        encode_pair(row, tokenizer)


def test_a_bad_row_of_a_source_is_named_by_its_number(tokenizer):
    rows = [ROW, ROW, {"prompt": "Hi", "chosen": "a", "rejected": None}]
    with pytest.raises(DataError, match=r"^row 2: has no 'rejected'"):
        load_preferences(pd.DataFrame(rows), tokenizer)


def test_a_cut_that_loses_an_answer_is_refused(tokenizer):
    start = int(np.flatnonzero(encode_pair(ROW, tokenizer).chosen.loss_mask)[0])
    with pytest.raises(DataError, match=r"chosen: has no supervised token within.*Raise max_len"):
        encode_pair(ROW, tokenizer, max_length=start)


def test_a_cut_that_makes_the_sides_equal_is_refused(tokenizer):
    row = {**ROW, "chosen": "Well, yes.", "rejected": "Well, no."}
    start = int(np.flatnonzero(encode_pair(row, tokenizer).chosen.loss_mask)[0])
    with pytest.raises(DataError, match="are the same within max_length"):
        encode_pair(row, tokenizer, max_length=start + len("Well, "))


def test_an_answer_that_merges_with_the_prompts_end_is_refused():
    tokenizer = toy_tokenizer()
    vocab = {**tokenizer.get_vocab(), "ĊĊ": len(tokenizer)}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")])
    encode_pair({**ROW, "chosen": "a\n\n\nb"}, tokenizer)
    with pytest.raises(DataError, match="change the tokens of the prompt before them"):
        encode_pair({**ROW, "chosen": "\n\na"}, tokenizer)
