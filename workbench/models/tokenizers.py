"""Tokenizers: from a model folder, or built from a GGUF file's metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from workbench.errors import TokenizerError

CONTROL_TOKEN = 3  # tokenizer.ggml.token_type of special tokens
SPECIAL_IDS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# How llama.cpp names the ways in which text is cut before byte-pair merges.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; code in the folder is never run.

    Raises:
        TokenizerError: the folder holds no tokenizer that transformers can read.
    """
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        reason = str(error).strip().split("\n")[0]
        raise TokenizerError(
            f"holds no readable tokenizer ({reason})",
            where=folder,
            cure="Put the model's tokenizer.json and tokenizer_config.json there.",
        ) from None


def gguf_tokenizer(metadata: Mapping[str, object], source: object) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from GGUF metadata, with its chat template and special tokens.

    Raises:
        TokenizerError: the metadata has no vocabulary, or one of an unsupported kind.
    """
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    tokens, merges = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.merges")
    before_merges = _pre_tokenizers().get(str(cut))
    if kind != "gpt2" or before_merges is None or not tokens or merges is None:
        raise TokenizerError(
            f"has a tokenizer of kind {kind!r} ({cut!r}), which cannot be built from a GGUF file",
            where=source,
            cure="Pass tokenizer='folder with the model's tokenizer.json'.",
        )
    tokenizer = _byte_level_bpe(tokens, merges, before_merges, source)
    types = metadata.get("tokenizer.ggml.token_type") or []
    special = [token for token, type_ in zip(tokens, types) if type_ == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    named = {}
    for name, key in SPECIAL_IDS.items():
        number = metadata.get(f"tokenizer.ggml.{key}")
        if isinstance(number, int) and 0 <= number < len(tokens):
            named[name] = tokens[number]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def _byte_level_bpe(tokens: list, merges: list, before_merges, source: object) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"has inconsistent merges ({error})", where=source) from None
    tokenizer.pre_tokenizer = before_merges
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizers() -> dict[str, pre_tokenizers.PreTokenizer]:
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
