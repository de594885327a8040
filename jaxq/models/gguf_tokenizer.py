"""Rebuilds a tokenizer from GGUF metadata: byte-level BPE ("gpt2") or SentencePiece BPE ("llama").

Token types in the file: 1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from jaxq.errors import JaxqError

UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
SPACE = "\u2581"

# How text is cut before merging; `%s` is how many digits stay together, where Llama 3 and Qwen 2 differ.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The same pre-tokenizer goes by several names.
_KINDS = {
    "gpt-2": ("gpt-2", "gpt2", "phi-2", "olmo"),
    "smollm": ("smollm", "starcoder", "command-r", "refact"),
    "llama-bpe": ("llama-bpe", "llama3", "llama-v3", "smaug-bpe"),
    "qwen2": ("qwen2", "deepseek-r1-qwen", "stablelm2"),
}
PRE_TOKENIZERS = {name: kind for kind, names in _KINDS.items() for name in names}


def build(metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast | None:
    """The transformers tokenizer that the metadata describes, None when it describes none.

    Raises `JaxqError` for a tokenizer model or pre-tokenizer that jaxq does not know.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None or kind == "none":
        return None
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in makers:
        raise JaxqError(f"the GGUF file's tokenizer {kind!r} is not supported; jaxq knows gpt2 and llama")
    try:
        return _assemble(makers[kind], metadata)
    except JaxqError:
        raise
    except KeyError as error:
        raise JaxqError(f"the GGUF file's tokenizer lacks {error}: convert the model again") from error
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise JaxqError(f"the GGUF file's tokenizer is damaged ({error}): convert the model again") from error


def _assemble(make: Callable[..., Tokenizer], metadata: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = list(metadata.get("tokenizer.ggml.token_type", [1] * len(tokens)))
    tokenizer = make(tokens, types, metadata)
    added = {UNKNOWN: True, CONTROL: True, USER_DEFINED: False}
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=added[kind])
            for token, kind in zip(tokens, types, strict=True)
            if kind in added
        ]
    )
    _add_template(tokenizer, tokens, metadata)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        chat_template=metadata.get("tokenizer.chat_template"),
        model_max_length=_context_length(metadata),
        **_special(tokens, metadata),
    )


def _context_length(metadata: Mapping[str, Any]) -> int:
    return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 1 << 30))


def _special(tokens: list[str], metadata: Mapping[str, Any]) -> dict[str, str]:
    names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    ids = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for key, name in names.items()}
    return {name: tokens[index] for name, index in ids.items() if index is not None and index < len(tokens)}


def _add_template(tokenizer: Tokenizer, tokens: list[str], metadata: Mapping[str, Any]) -> None:
    """Puts the begin and end tokens around a text where the metadata asks for them."""
    bos, eos = (_flagged(tokens, metadata, kind) for kind in ("bos", "eos"))
    if bos or eos:
        one = [token for token in (bos and bos[0], "$A", eos and eos[0]) if token]
        two = one + [token for token in (bos and f"{bos[0]}:1", "$B:1", eos and f"{eos[0]}:1") if token]
        special = list({token[0]: token for token in (bos, eos) if token}.values())
        tokenizer.post_processor = processors.TemplateProcessing(single=one, pair=two, special_tokens=special)


def _flagged(tokens: list[str], metadata: Mapping[str, Any], kind: str) -> tuple[str, int] | None:
    """(token, id) of the bos or eos token if it is to be added."""
    # llama.cpp adds a begin token to SentencePiece models that do not say.
    default = kind == "bos" and metadata["tokenizer.ggml.model"] == "llama"
    index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    if index is None or not metadata.get(f"tokenizer.ggml.add_{kind}_token", default):
        return None
    return tokens[index], int(index)


def _byte_level(tokens: list[str], types: list[int], metadata: Mapping[str, Any]) -> Tokenizer:
    """Byte-level BPE (Radford et al. 2019) with the merges of the file."""
    named = metadata.get("tokenizer.ggml.pre", "default")
    kind = PRE_TOKENIZERS.get(named)
    if kind is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise JaxqError(f"the GGUF file's pre-tokenizer {named!r} is not supported; jaxq knows {known}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # Llama 3 takes a word that is a token whole, whatever the merges would make of it.
    model = BPE(_vocabulary(tokens), merges, ignore_merges=kind == "llama-bpe")
    tokenizer = Tokenizer(model)
    if kind in ("gpt-2", "smollm"):
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        first = [pre_tokenizers.Digits(individual_digits=True)] if kind == "smollm" else []
    else:
        pattern = Regex(_WORDS % ("{1,3}" if kind == "llama-bpe" else ""))
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        first = [pre_tokenizers.Split(pattern, "isolated")]
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(tokens: list[str], types: list[int], metadata: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece BPE with byte fallback (Kudo and Richardson 2018); its merges come from the scores."""
    vocabulary = _vocabulary(tokens)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    merges = score_merges(tokens, types, metadata["tokenizer.ggml.scores"])
    model = BPE(
        vocabulary,
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=BYTE in types,
    )
    tokenizer = Tokenizer(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if prefix else escape
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def score_merges(tokens: list[str], types: list[int], scores: Any) -> list[tuple[str, str]]:
    """Every split of a piece into two known pieces, those of the best-scored pieces first.

    SentencePiece merges the neighbours whose union scores highest; ranking the merges by that score makes
    ordinary BPE do the same.
    """
    pieces = {token: i for i, token in enumerate(tokens) if types[i] not in (UNKNOWN, CONTROL, BYTE)}
    merges: list[tuple[str, str]] = []
    for i in sorted(pieces.values(), key=lambda i: -scores[i]):
        token = tokens[i]
        splits = [(token[:k], token[k:]) for k in range(1, len(token))]
        known = [split for split in splits if split[0] in pieces and split[1] in pieces]
        merges += sorted(known, key=lambda split: (pieces[split[0]], pieces[split[1]]))
    return merges


def _vocabulary(tokens: list[str]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise JaxqError("the GGUF file's tokenizer has a token twice: convert the model again")
    return vocabulary
