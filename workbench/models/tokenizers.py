"""Tokenizers: from a model folder, or built from a GGUF file's metadata."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workbench.errors import TokenizerError
from workbench.models.files import read_json
from workbench.models.regular_files import check_regular

FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*/*.jinja")  # that may be read
SMALL_JSON = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_FILE_BYTES = 256_000_000
CURE = "Put the model's tokenizer.json and tokenizer_config.json there."
CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens
SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; code in the folder is never run.

    Raises:
        TokenizerError: the folder holds no tokenizer that transformers can read and use, or one
            of its files is a pipe, a link out of the folder, or too large.
        FileFormatError: one of its small JSON files is malformed.
    """
    _check_files(Path(folder))
    with _refusing("holds no readable tokenizer", folder, CURE):
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
        tokenizer.encode("")  # a broken post-processor shows only here
        # Without a file of its vocabulary, transformers makes a tokenizer of special tokens alone.
        if not _has_words(tokenizer):
            raise ValueError("its vocabulary is missing or empty")
        template = tokenizer.chat_template
        if not isinstance(template, str | dict | None):
            raise ValueError(f"its chat template is a {type(template).__name__}")
    return tokenizer


def _has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there are two tokens at least beside those that were added."""
    added = len(tokenizer.added_tokens_encoder)
    # The first number comes at once; it may leave out tokens, and the dictionary takes 30 ms.
    return tokenizer.vocab_size >= added + 2 or len(tokenizer.get_vocab()) >= added + 2


def _check_files(folder: Path) -> None:
    for path in (path for pattern in FILES for path in folder.glob(pattern)):
        if check_regular(path, inside=folder, kind=TokenizerError) > MAX_FILE_BYTES:
            raise TokenizerError(f"is larger than {MAX_FILE_BYTES} bytes", where=path)
        if path.name in SMALL_JSON:
            read_json(path)


@contextlib.contextmanager
def _refusing(what: str, where: object, cure: str = "") -> Iterator[None]:
    """Turn whatever the tokenizers library raises, its panics included, into a TokenizerError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, TokenizerError) or not is_failure(error):
            raise
        reason = (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
        raise TokenizerError(f"{what} ({reason})", where=where, cure=cure) from None


def is_failure(error: BaseException) -> bool:
    """Whether this is an error of the tokenizers library, rather than an interrupt.

    It raises bare Exception, and for a panic a class of its own that is no Exception.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


def gguf_tokenizer(metadata: Mapping[str, object], source: object) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from GGUF metadata, with its chat template and special tokens.

    Raises:
        TokenizerError: the metadata has no vocabulary, one of an unsupported kind, or one that
            contradicts itself.
    """
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    before_merges = ways_to_cut().get(cut) if isinstance(cut, str) else None
    if kind != "gpt2" or before_merges is None or not tokens or merges is None:
        raise TokenizerError(
            f"has a tokenizer of kind {reprlib.repr(kind)} ({reprlib.repr(cut)}), "
            "which cannot be built from a GGUF file",
            where=source,
            cure="Pass tokenizer='folder with the model's tokenizer.json'.",
        )
    types = metadata.get("tokenizer.ggml.token_type", [])
    template = metadata.get("tokenizer.chat_template")
    _check_vocabulary(tokens, merges, types, template, source)
    with _refusing("has a tokenizer that contradicts itself", source):
        tokenizer = _byte_level_bpe(tokens, merges, before_merges)
        special = [token for token, type_ in zip(tokens, types) if type_ == CONTROL_TOKEN]
        tokenizer.add_special_tokens(
            [AddedToken(token, special=True, normalized=False) for token in special]
        )
        named = {}
        for name, key in SPECIAL_IDS.items():
            number = metadata.get(f"tokenizer.ggml.{key}")
            if type(number) is int and 0 <= number < len(tokens):
                named[name] = tokens[number]
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            chat_template=template,
            clean_up_tokenization_spaces=False,
            **named,
        )


def _check_vocabulary(
    tokens: object, merges: object, types: object, template: object, source: object
) -> None:
    def refuse(what: str) -> None:
        raise TokenizerError(what, where=source, cure="Fetch the file again.")

    if not isinstance(tokens, list) or not all(isinstance(t, str) and t for t in tokens):
        refuse("tokenizer.ggml.tokens must be a list of texts, none empty")
    if len(set(tokens)) != len(tokens):
        refuse("tokenizer.ggml.tokens holds a token twice")
    if not isinstance(merges, list) or not all(isinstance(m, str) and " " in m for m in merges):
        refuse("tokenizer.ggml.merges must be a list of pairs")
    if not isinstance(types, list) or (types and len(types) != len(tokens)):
        refuse("tokenizer.ggml.token_type must have one number a token")
    if not isinstance(template, str | None):
        refuse("tokenizer.chat_template must be a text")


def _byte_level_bpe(tokens: list[str], merges: list[str], before_merges) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    tokenizer.pre_tokenizer = before_merges
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def ways_to_cut() -> dict[str, pre_tokenizers.PreTokenizer]:
    """Under llama.cpp's names, how text is cut before byte-pair merges."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    llama3 = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return {"smollm": digits, "gpt-2": byte_level, "default": byte_level, "llama-bpe": llama3}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, source: object) -> None:
    """Raise TokenizerError if the tokenizer can make an id that the embedding does not have.

    Such an id would read beyond the embedding's rows, in silence. An embedding with more rows than
    the tokenizer has tokens is fine: many models pad it.
    """
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest < 0:
        raise TokenizerError("is empty", where=source)
    if largest >= vocab_size:
        raise TokenizerError(
            f"makes token ids up to {largest}, but the embedding has {vocab_size} rows",
            where=source,
            cure="Tokenizer and weights are from different models: use the pair.",
        )
