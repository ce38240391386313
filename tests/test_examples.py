"""Rows become tokens and a loss mask."""

import json
import re

import numpy as np
import pytest

from tests.toy import conversation, toy_tokenizer, write_jsonl
from workbench.data.datasets import load_dataset
from workbench.data.examples import encode_row, read_rows
from workbench.errors import ConfigError, DataError
from workbench.evaluation.generation import encode_prompt

CHAT = conversation("Hi", "Hello!", "And?", "Bye, friend.", "ok")
END = "<|im_end|>"


def supervised(tokenizer, example):
    return tokenizer.decode(example.tokens[example.loss_mask])


def test_every_assistant_turn_is_trained_and_nothing_else(tokenizer):
    example = encode_row(CHAT, tokenizer)
    # One token a byte, and one that ends the turn.
    assert example.num_targets == len("Hello!") + 1 + len("Bye, friend.") + 1
    assert supervised(tokenizer, example) == f"Hello!{END}Bye, friend.{END}"


def test_last_trains_the_last_turn_only(tokenizer):
    example = encode_row(conversation("Hi", "Hello!", "And?", "Bye."), tokenizer, train_on="last")
    assert supervised(tokenizer, example) == f"Bye.{END}"
    assert example.num_targets == len("Bye.") + 1


def test_all_trains_every_token_but_the_first(tokenizer):
    example = encode_row(CHAT, tokenizer, train_on="all")
    text = tokenizer.apply_chat_template(CHAT["messages"], tokenize=False)
    assert tokenizer.decode(example.tokens) == text
    assert example.num_targets == len(tokenizer.encode(text)) - 1


def test_a_completion_is_a_chat_of_one_answer(tokenizer):
    row = {"prompt": "Hi", "completion": "Hello!"}
    chat = encode_row(conversation("Hi", "Hello!"), tokenizer)
    example = encode_row(row, tokenizer)
    assert np.array_equal(example.tokens, chat.tokens)
    assert np.array_equal(example.loss_mask, chat.loss_mask)


def test_text_is_trained_to_its_end_token(tokenizer):
    example = encode_row({"text": "abc"}, tokenizer)
    assert tokenizer.decode(example.tokens) == f"abc{END}"
    assert example.num_targets == 3  # b, c and the end; nothing comes before a


def test_an_end_token_in_the_text_is_not_doubled(tokenizer):
    assert len(encode_row({"text": f"abc{END}"}, tokenizer)) == 4


def test_tools_reach_the_template():
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools }}" + tokenizer.chat_template
    tools = [{"type": "function", "function": {"name": "add"}}]
    example = encode_row({**conversation("1+1?", "2"), "tools": tools}, tokenizer)
    assert '"name": "add"' in tokenizer.decode(example.tokens)
    assert supervised(tokenizer, example) == f"2{END}"


def test_multi_byte_answers_are_trained_whole(tokenizer):
    answer = "Nukuʻalofa 🌍"
    example = encode_row(conversation("?", answer), tokenizer)
    assert example.num_targets == len(answer.encode()) + 1
    assert supervised(tokenizer, example) == f"{answer}{END}"


@pytest.mark.parametrize("prompt", ["Hi", "  spaced\n", "Köln 🌍", ""])
def test_prompt_tokens_equal_those_of_generation(base, prompt):
    example = encode_row({"prompt": prompt, "completion": "x"}, base.tokenizer)
    prompt_length = int(np.argmax(example.loss_mask))
    assert example.tokens[:prompt_length].tolist() == encode_prompt(base, prompt)


@pytest.mark.parametrize("answer", ["The capital of Peru is Lima.", " Lima", "\nÉvora 🌍"])
def test_the_real_tokenizer_trains_exactly_answer_and_end(smollm2, answer):
    tokenizer = smollm2.tokenizer
    example = encode_row(conversation("Capital?", answer, "Sure?", "Yes."), tokenizer)
    assert supervised(tokenizer, example) == f"{answer}{END}Yes.{END}"
    by_hand = len(tokenizer.encode(answer)) + 1 + len(tokenizer.encode("Yes.")) + 1
    assert example.num_targets == by_hand
    prompt_length = int(np.argmax(example.loss_mask))
    assert example.tokens[:prompt_length].tolist() == encode_prompt(smollm2, "Capital?")


def test_a_cut_row_keeps_its_start_and_is_counted(tokenizer, tmp_path):
    rows = [{"text": "short"}, {"text": "a rather longer text"}]
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    data = load_dataset(tmp_path, tokenizer, max_length=10)
    assert [example.truncated for example in data.train] == [False, True]
    assert tokenizer.decode(data.train[1].tokens) == "a rather l"
    assert data.truncated == 1
    assert "1 rows were cut" in str(data)
    assert load_dataset(path, tokenizer, valid_fraction=0).truncated == 0


def test_a_row_that_fits_up_to_its_last_target_is_not_cut(tokenizer):
    whole = encode_row(CHAT, tokenizer)
    exact = encode_row(CHAT, tokenizer, max_length=len(whole))
    assert not exact.truncated
    assert np.array_equal(exact.tokens, whole.tokens)
    assert encode_row(CHAT, tokenizer, max_length=len(whole) - 1).truncated


def test_tokens_after_the_last_target_are_left_out(tokenizer):
    assert encode_row(CHAT, tokenizer).loss_mask[-1]


BAD_ROWS = {
    "no known key": ({"words": "a"}, "none of the known keys"),
    "no key": ({}, "none at all"),
    "text of the wrong type": ({"text": 3}, "'text' must be a string, got int"),
    "empty text": ({"text": ""}, "no supervised token"),
    "completion missing": ({"prompt": "a"}, "'completion' must be a string, got NoneType"),
    "prompt missing": ({"completion": "a"}, "'prompt' must be a string"),
    "messages of the wrong type": ({"messages": "hi"}, "list with at least one message"),
    "messages empty": ({"messages": []}, "list with at least one message"),
    "message of the wrong type": ({"messages": ["hi"]}, "message 0: must be an object, got str"),
    "unknown role": (
        {"messages": [{"role": "robot", "content": "hi"}]},
        "message 0: unknown role 'robot'",
    ),
    "role missing": ({"messages": [{"content": "hi"}]}, "unknown role None"),
    "content missing": ({"messages": [{"role": "user"}]}, "'content' must be a string"),
    "content of the wrong type": (
        {"messages": [{"role": "user", "content": ["hi"]}]},
        "'content' must be a string, got list",
    ),
    "tools of the wrong type": ({**conversation("a", "b"), "tools": {}}, "'tools' must be a list"),
    "no assistant turn": (conversation("hi"), "no supervised token to train on"),
    "assistant first": (
        {"messages": [{"role": "assistant", "content": "hi"}]},
        "begins with an assistant turn",
    ),
    "half a surrogate pair": ({"text": "\ud800 and more"}, "half of a surrogate pair"),
    "prompt too long": (
        {"prompt": "long " * 20, "completion": "x"},
        "no supervised token within max_length=50",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tokenizer, tmp_path, name):
    row, message = BAD_ROWS[name]
    path = write_jsonl(tmp_path / "train.jsonl", [{"text": "fine"}, row])
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        load_dataset(tmp_path, tokenizer, max_length=50)
    assert str(caught.value).startswith(f"{path}:2")


BAD_LINES = {
    "broken": (b'{"text": "a"', "is not valid JSON"),
    "not an object": (b'["text"]', "must be a JSON object, got list"),
    "invalid UTF-8": (b'{"text": "caf\xe9"}', "is not UTF-8"),
    "nested beyond reason": (b"[" * 100_000, "is not valid JSON"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_by_file_and_line(tmp_path, name):
    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(f"{path}:3")


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_raises_and_is_named(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="holds no rows") as caught:
        list(read_rows(path))
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_raises_and_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: cannot be read"):
        list(read_rows(tmp_path / "nowhere.jsonl"))


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes("\ufeff".encode() + b'{"text": "a"}\r\n{"text": "b"}\r\n')
    assert [row for _, row in read_rows(path)] == [{"text": "a"}, {"text": "b"}]


def test_a_line_separator_inside_a_text_does_not_end_the_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {"text": "a\u2028b\u0085c"}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row for _, row in read_rows(path)] == [row]


def test_a_chat_needs_a_template(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="needs a chat template"):
        encode_row(conversation("a", "b"), tokenizer)
    assert encode_row({"text": "ab"}, tokenizer).num_targets == 2


def test_a_template_that_refuses_a_chat_is_named_as_the_cause(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(DataError, match="the chat template refuses it \\(only two turns"):
        encode_row(CHAT, tokenizer)


def test_a_template_that_rewrites_earlier_turns_raises(tokenizer):
    # Like templates that drop the thoughts of all but the last answer.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + (m['content'] if loop.last else '…') }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    with pytest.raises(DataError, match=r"rewrites turn 1.*train_on='last' or 'all'"):
        encode_row(CHAT, tokenizer)


def test_what_does_not_help_is_no_cure(tokenizer):
    # Like templates of models that think: the answer's beginning is theirs.
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    with pytest.raises(DataError, match="Use train_on='all' with this model"):
        encode_row(conversation("Hi", "Hello!"), tokenizer, train_on="last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"train_on": "user"}, "train_on 'user'"), ({"max_length": 1}, "max_length must be")],
)
def test_bad_settings_raise(tokenizer, settings, message):
    with pytest.raises(ConfigError, match=message):
        encode_row(CHAT, tokenizer, **settings)
