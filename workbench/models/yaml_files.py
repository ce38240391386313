"""YAML of other people: bounded in size and depth, without aliases, tags or a key twice."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import yaml

from workbench.errors import FileFormatError
from workbench.models.regular_files import open_regular

MAX_BYTES = 64_000  # PyYAML reads some hundred kilobytes a second
MAX_DEPTH = 16  # lists and mappings inside one another
FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+\Z")


class _Loader(yaml.SafeLoader):
    """Plain values only; 1e-5 is a number, as in YAML 1.2 and in mlx-lm."""

    depth = 0

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has an alias")
        tag = getattr(self.peek_event(), "tag", None)  # given in the text: no plain value
        if tag is not None:
            raise yaml.YAMLError(f"it has the tag {tag[:100]!r}")
        if self.depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested deeper than {MAX_DEPTH}")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name, count in Counter(names).most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"it has the key {name[:100]!r} twice")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(path: str | os.PathLike) -> dict[str, object]:
    """Read a YAML mapping whose keys are strings.

    Raises:
        FileFormatError: absent, not a regular file, too large or too deep, not UTF-8, not YAML,
            with an alias, a tag or a key twice, or not such a mapping.
    """
    path = Path(path)
    with open_regular(path) as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise FileFormatError(f"is larger than {MAX_BYTES} bytes, too much to read", where=path)
    try:
        value = yaml.load(content.decode("utf-8"), _Loader)
    except yaml.YAMLError as error:
        raise FileFormatError(f"is not plain YAML: {_reason(error)}", where=path) from None
    except (ValueError, ArithmeticError) as error:  # UTF-8; a date or a number that is none
        raise FileFormatError(f"is not plain YAML: {str(error)[:200]}", where=path) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FileFormatError("holds no mapping of names to values", where=path)
    return value


def _reason(error: yaml.YAMLError) -> str:
    """The problem and its line, without the context that PyYAML quotes."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    line = f", line {mark.line + 1}" if mark is not None else ""
    return f"{str(problem or error).splitlines()[0][:200]}{line}"
