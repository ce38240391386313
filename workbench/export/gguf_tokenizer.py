"""A byte-level BPE tokenizer as GGUF's metadata has it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from workbench.errors import TokenizerError
from workbench.models.tokenizers import ways_to_cut

SPECIAL_IDS = ("bos", "eos", "unk", "pad")
CURE = "Export a folder with wb.fuse, which keeps any tokenizer, and convert that."


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer."""

    cut: str  # llama.cpp's name of how text is cut before merges
    tokens: list[str]  # one for each row of the embedding
    types: list[int]
    merges: list[str]
    ids: dict[str, int] = field(default_factory=dict)  # of special tokens: bos, eos, unk, pad
    adds: dict[str, bool] = field(default_factory=dict)  # bos, eos: whether encoding adds it
    chat_template: str | None = None

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it all as metadata."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for name, number in self.ids.items():
            getattr(writer, f"add_{name}_token_id")(number)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: object
) -> Vocabulary:
    """What GGUF needs of a tokenizer.

    Args:
        tokenizer: of the tokenizers library, with a byte-level BPE.
        vocab_size: rows of the embedding; those beyond the tokens are called [PADn], unused.
        source: the model, for messages.

    Raises:
        TokenizerError: another kind, or one that cuts text in a way that llama.cpp has no name for.
    """
    state, cut = _checked_state(tokenizer, source)
    tokens = {number: token for token, number in tokenizer.get_vocab().items()}
    types = {
        added["id"]: TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        for added in state["added_tokens"]
    }
    numbers = range(vocab_size)
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL_IDS}
    encoded = tokenizer.encode("a")
    return Vocabulary(
        cut=cut,
        tokens=[tokens.get(n, f"[PAD{n}]") for n in numbers],
        types=[
            int(types.get(n, TokenType.NORMAL) if n in tokens else TokenType.UNUSED)
            for n in numbers
        ],
        merges=[m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]],
        ids={name: number for name, number in ids.items() if number is not None},
        adds={"bos": encoded[0] == ids["bos"], "eos": encoded[-1] == ids["eos"]},
        chat_template=_template(tokenizer),
    )


def _checked_state(tokenizer: PreTrainedTokenizerBase, source: object) -> tuple[dict, str]:
    """What the tokenizers library writes of it, and llama.cpp's name of how it cuts text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    model, cut = state.get("model", {}), _name_of_cut(state)
    if model.get("type") != "BPE" or state.get("normalizer") is not None or cut is None:
        raise TokenizerError(
            f"a {model.get('type')} tokenizer that cuts text in its own way has no name in "
            f"llama.cpp; known here are {', '.join(ways_to_cut())}",
            where=source,
            cure=CURE,
        )
    if not model["merges"]:
        raise TokenizerError("has no merges, which llama.cpp needs", where=source, cure=CURE)
    return state, cut


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def _name_of_cut(state: dict) -> str | None:
    """llama.cpp's name of a tokenizer's way to cut text, if it has one."""
    empty = Tokenizer(models.BPE())
    for name, cut in ways_to_cut().items():
        empty.pre_tokenizer = cut
        known = json.loads(empty.to_str())["pre_tokenizer"]
        if _essence(known) == _essence(state.get("pre_tokenizer")):
            return name
    return None


def _essence(cut: object) -> object:
    """Without trim_offsets, which moves no token."""
    if isinstance(cut, dict):
        return {key: _essence(value) for key, value in cut.items() if key != "trim_offsets"}
    return [_essence(item) for item in cut] if isinstance(cut, list) else cut
