"""Safetensors files made by hand, right and wrong."""

from __future__ import annotations

import json
import struct

Header = dict[str, object]


def entry(dtype: str, shape: list, start: int, end: int, **more: object) -> dict[str, object]:
    """What a header says of a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


HEADER = {
    "__metadata__": {"format": "mlx"},
    "weight": entry("F32", [2, 3], 0, 24),
    "half": entry("F16", [4], 24, 32),
    "bytes": entry("U8", [3], 32, 35),
    "scalar": entry("F32", [], 35, 39),
}
DATA = struct.pack("<6f4e3Bf", *range(6), *range(4), 7, 8, 9, 1.5)


def pack(header: object, data: bytes = DATA, length: int | None = None) -> bytes:
    """A file: a header (an object, a text or bytes), and the data."""
    if not isinstance(header, str | bytes):
        header = json.dumps(header)
    content = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def with_entry(name: str, **fields: object) -> bytes:
    """The valid file with some fields of a tensor replaced; a field of None is left out."""
    changed = {**HEADER[name], **fields}
    kept = {key: value for key, value in changed.items() if value is not None}
    return pack({**HEADER, name: kept})


def with_text(old: str, new: str) -> bytes:
    """The valid file with a part of its header's text replaced."""
    text = json.dumps(HEADER)
    assert old in text
    return pack(text.replace(old, new, 1))


def renamed(new: str) -> bytes:
    """The valid file with the tensor `weight` renamed, as JSON escapes it."""
    return with_text('"weight"', json.dumps(new))


VALID = pack(HEADER)

MALFORMED: dict[str, tuple[bytes, str]] = {  # what is wrong: the file, and what the error says
    "empty": (b"", "too few"),
    "seven bytes": (VALID[:7], "too few"),
    "a header of no bytes": (bytes(8), "no JSON object"),
    "a header that is not there": (VALID[:8], "ends after 0"),
    "a header one byte too long": (pack(HEADER, b"", len(VALID)), "promises a header"),
    "a huge header": (pack(HEADER, length=1 << 62), "is the most"),
    "the hugest header": (pack(HEADER, length=(1 << 64) - 1), "is the most"),
    "a header beyond the bound": (pack(HEADER, length=100_000_001), "is the most"),
    "a header within the bound, beyond the file": (pack(HEADER, length=99_999_999), "ends after"),
    "a header length one too small": (
        pack(HEADER, length=len(json.dumps(HEADER)) - 1),
        "delimiter",
    ),
    "a header length one too large": (pack(HEADER, length=len(json.dumps(HEADER)) + 1), "no JSON"),
    "cut in the header": (VALID[:60], "ends after"),
    "cut before the data": (VALID[: -len(DATA)], "is cut off"),
    "cut by one byte": (VALID[:-1], "is cut off"),
    "one byte more": (VALID + b"\0", "bytes after its last tensor"),
    "another file behind it": (VALID + VALID, "bytes after its last tensor"),
    "two headers": (pack(json.dumps(HEADER) * 2), "Extra data"),
    "a hole at the start": (with_entry("weight", data_offsets=[4, 28]), "leaves a hole|overlaps"),
    "a hole in the middle": (
        pack({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 3, 5)}, bytes(5)),
        "'b' leaves a hole",
    ),
    "a hole at the end": (pack({"a": entry("U8", [2], 0, 2)}, bytes(3)), "after its last tensor"),
    "data without tensors": (pack({}, b"x"), "after its last tensor"),
    "an overlap of one byte": (
        pack({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 3, 7)}, bytes(7)),
        "'b' overlaps",
    ),
    "two tensors in one place": (
        pack({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 0, 4)}, bytes(4)),
        "'b' overlaps",
    ),
    "a tensor inside another": (
        pack({"a": entry("U8", [8], 0, 8), "b": entry("U8", [2], 2, 4)}, bytes(8)),
        "'b' overlaps",
    ),
    "an empty tensor inside another": (
        pack({"a": entry("U8", [8], 0, 8), "b": entry("U8", [0], 4, 4)}, bytes(8)),
        "'b' overlaps",
    ),
    "an empty tensor beyond the end": (
        pack({"a": entry("U8", [8], 0, 8), "b": entry("U8", [0], 9, 9)}, bytes(8)),
        "'b' leaves a hole",
    ),
    "the end before the start": (with_entry("weight", data_offsets=[24, 0]), "data_offsets"),
    "a negative offset": (with_entry("weight", data_offsets=[-24, 0]), "data_offsets"),
    "an offset that wraps": (with_entry("weight", data_offsets=[2**64, 2**64 + 24]), "hole"),
    "an end beyond the file": (with_entry("scalar", data_offsets=[35, 4000]), "needs 4 bytes"),
    "a tensor beyond the file": (with_entry("scalar", data_offsets=[4000, 4004]), "hole"),
    "offsets with a point": (with_entry("weight", data_offsets=[0.0, 24.0]), "data_offsets"),
    "offsets that are truths": (with_entry("bytes", data_offsets=[False, True]), "data_offsets"),
    "offsets that are texts": (with_entry("weight", data_offsets=["0", "24"]), "data_offsets"),
    "three offsets": (with_entry("weight", data_offsets=[0, 12, 24]), "data_offsets"),
    "one offset": (with_entry("weight", data_offsets=[24]), "data_offsets"),
    "offsets in an object": (with_entry("weight", data_offsets={"0": 24}), "data_offsets"),
    "no offsets": (with_entry("weight", data_offsets=None), "must have dtype, shape and data_off"),
    "no dtype": (with_entry("weight", dtype=None), "must have dtype"),
    "no shape": (with_entry("weight", shape=None), "must have dtype"),
    "one field more": (with_entry("weight", order="F"), "and no more"),
    "an unknown dtype": (with_entry("weight", dtype="F31"), "dtype 'F31'"),
    "a dtype in small letters": (with_entry("weight", dtype="f32"), "dtype 'f32'"),
    "a dtype that MLX lacks": (with_entry("weight", dtype="F64"), "dtype 'F64'"),
    "a dtype of half bytes": (with_entry("bytes", dtype="F4", shape=[6]), "dtype 'F4'"),
    "a dtype that is no text": (with_entry("weight", dtype=32), "dtype '32'"),
    "a dtype that is a list": (with_entry("weight", dtype=["F32"]), "which MLX lacks"),
    "a dtype of another size": (with_entry("weight", dtype="F16"), "needs 12 bytes and has 24"),
    "a shape that is a number": (with_entry("weight", shape=6), "impossible shape"),
    "a shape that is a text": (with_entry("weight", shape="2,3"), "impossible shape"),
    "a shape of null": (with_text('"shape": [2, 3]', '"shape": null'), "impossible shape"),
    "a negative dimension": (with_entry("weight", shape=[-2, -3]), "impossible shape"),
    "a dimension with a point": (with_entry("weight", shape=[2.0, 3]), "impossible shape"),
    "a dimension that is a truth": (with_entry("weight", shape=[True, 6]), "impossible shape"),
    "a dimension beyond int32": (with_entry("weight", shape=[0, 2**31]), "impossible shape"),
    "a dimension beyond int64": (with_entry("weight", shape=[2**64 + 2, 3]), "impossible shape"),
    "a product that wraps to nothing": (
        pack({"a": entry("U8", [65536] * 4, 0, 0)}, b""),
        "needs 18446744073709551616 bytes",
    ),
    "33 dimensions": (with_entry("scalar", shape=[1] * 33), "impossible shape"),
    "100 dimensions": (with_entry("scalar", shape=[1] * 100), "impossible shape"),
    "a shape in a shape": (with_entry("weight", shape=[[2], [3]]), "impossible shape"),
    "a larger shape": (with_entry("weight", shape=[2, 4]), "needs 32 bytes and has 24"),
    "a smaller shape": (with_entry("weight", shape=[2, 2]), "needs 16 bytes and has 24"),
    "a dimension of NaN": (with_text("[2, 3]", "[2, NaN]"), "NaN is no JSON value"),
    "an offset of Infinity": (with_text("[0, 24]", "[0, Infinity]"), "Infinity is no JSON"),
    "an offset of 5000 digits": (with_text("[0, 24]", f"[0, 1{'0' * 5000}]"), "4300"),
    "a tensor twice": (with_text('"half"', '"weight"'), "key 'weight' twice"),
    "a tensor twice, once escaped": (with_text('"half"', '"w\\u0065ight"'), "'weight' twice"),
    "a field twice": (with_text('"shape": [4]', '"dtype": "F16", "shape": [4]'), "'dtype' twice"),
    "metadata twice": (with_text('{"format"', '{"format": "pt", "format"'), "'format' twice"),
    "metadata in a list": (pack({**HEADER, "__metadata__": ["a"]}), "must hold strings"),
    "metadata of numbers": (pack({**HEADER, "__metadata__": {"step": 3}}), "must hold strings"),
    "nested metadata": (pack({**HEADER, "__metadata__": {"a": {"b": "c"}}}), "must hold strings"),
    "metadata of false": (pack({**HEADER, "__metadata__": False}), "must hold strings"),
    "a name of nothing": (renamed(""), "impossible name ''"),
    "a name with NUL": (renamed("we\0ight"), r"impossible name 'we\\x00ight'"),
    "a name of two lines": (renamed("we\night"), "impossible name"),
    "a name that colours terminals": (renamed("\x1b[31mweight"), "impossible name"),
    "a name that turns round": (renamed("we\u202eight"), "impossible name"),
    "a name of half a character": (with_text('"weight"', '"\\ud800"'), "impossible name"),
    "a name of 1025 characters": (renamed("w" * 1025), "impossible name"),
    "an entry that is a list": (pack({**HEADER, "weight": ["F32", [2, 3], [0, 24]]}), "must have"),
    "an entry of null": (pack({**HEADER, "weight": None}), "must have dtype"),
    "a header in a list": (pack(json.dumps([HEADER])), "no JSON object"),
    "a header that is a text": (pack('"weight"'), "no JSON object"),
    "a space before the header": (pack(" " + json.dumps(HEADER)), "no JSON object"),
    "a byte-order mark": (pack(b"\xef\xbb\xbf" + json.dumps(HEADER).encode()), "no JSON object"),
    "NULs as padding": (pack(json.dumps(HEADER) + "\0\0"), "no JSON object"),
    "a comma too many": (with_text("[35, 39]}}", "[35, 39]},}"), "property name"),
    "single quotes": (pack(json.dumps(HEADER).replace('"', "'")), "property name"),
    "a comment": (pack("{/* x */" + json.dumps(HEADER)[1:]), "property name"),
    "not UTF-8": (pack(json.dumps(HEADER).encode().replace(b"weight", b"w\xffight")), "utf-8"),
    "UTF-16": (pack(json.dumps(HEADER).encode("utf-16-le")), "no JSON object"),
    "nested beyond reason": (pack('{"a":' + "[" * 50_000 + "]" * 50_000 + "}"), "nested deeper"),
    "nested a little too deep": (pack('{"a":' + "[" * 80 + "]" * 80 + "}"), "nested deeper"),
    "two million lists": (pack('{"a":[' + "[]," * 2_000_000 + "[]]}"), "more than 2000000"),
}
