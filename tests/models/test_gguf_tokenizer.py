"""Tokenizers rebuilt from metadata against SentencePiece and a plain BPE over the published regexes."""

import io

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from jaxq.errors import JaxqError
from jaxq.models import gguf_tokenizer

TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be
in want of a wife. However little known the feelings or views of such a man may be on his first entering a
neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered as
the rightful property of some one or other of their daughters. "My dear Mr. Bennet," said his lady one day,
"have you heard that Netherfield Park is let at last?" In 1813, 1,000 pounds; é, ü, 漢字, I'll, we've, DON'T.
"""
SAMPLES = [
    "a truth, that a man",
    "  two  spaces\n\n and lines\r\n\ttabs  ",
    "1813 12345 3.14 ½ ²",
    "I'll DON'T we've 'tis",
    "naïve café 漢字 🦄 \u00a0x",
    "a\u0301 e\u0301",
    "<|end|>a<|end|>",
    "",
]


def byte_table() -> dict[int, str]:
    """GPT-2's printable name of each byte (Radford et al. 2019)."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in keep]
    return {b: chr(b) for b in keep} | {b: chr(256 + i) for i, b in enumerate(rest)}


BYTES = byte_table()
# As in llama.cpp's vocabulary code; several patterns cut one after the other.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
}


def cut(text: str, patterns: list[str]) -> list[str]:
    regex = pytest.importorskip("regex")
    pieces = [text]
    for pattern in patterns:
        found = []
        for piece in pieces:
            at = 0
            for match in regex.finditer(pattern, piece):
                found += [piece[at : match.start()], match.group()]
                at = match.end()
            found.append(piece[at:])
        pieces = [piece for piece in found if piece]
    return pieces


def merge(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding by its definition: join the best-ranked pair until none is left."""
    while True:
        found = enumerate(zip(word, word[1:], strict=False))
        pairs = [(ranks[pair], i) for i, pair in found if pair in ranks]
        if not pairs:
            return word
        _, i = min(pairs)
        word = [*word[:i], word[i] + word[i + 1], *word[i + 2 :]]


def learn(pieces: list[str], count: int) -> list[tuple[str, str]]:
    words, merges = [[BYTES[b] for b in piece.encode()] for piece in pieces], []
    for _ in range(count):
        pairs: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = [merge(word, {best: 0}) for word in words]
    return merges


def byte_level(kind: str, **more) -> dict:
    """Metadata of a byte-level tokenizer with 150 merges learnt from TEXT."""
    merges = learn(cut(TEXT, PATTERNS[kind]), 150)
    tokens = ["<|end|>", "<|start|>", *BYTES.values(), *dict.fromkeys(a + b for a, b in merges)]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([3, 3] + [1] * (len(tokens) - 2)),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    } | more


BYTE_LEVEL = {kind: byte_level(kind) for kind in PATTERNS}


@pytest.mark.parametrize("kind", PATTERNS)
def test_byte_level_equals_plain_bpe(kind):
    meta = BYTE_LEVEL[kind]
    tokenizer = gguf_tokenizer.build(meta)
    ranks = {tuple(pair.split(" ")): i for i, pair in enumerate(meta["tokenizer.ggml.merges"])}
    index = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}

    def check(text: str) -> None:
        if kind == "qwen2":
            import unicodedata

            text = unicodedata.normalize("NFC", text)
        expected = []
        for i, part in enumerate(text.split("<|end|>")):
            words = [[BYTES[b] for b in piece.encode()] for piece in cut(part, PATTERNS[kind])]
            expected += [0] * (i > 0) + [index[token] for word in words for token in merge(word, ranks)]
        assert tokenizer(text)["input_ids"] == expected
        assert tokenizer.decode(expected) == text

    for text in [*SAMPLES, TEXT]:
        check(text)
    alphabet = st.sampled_from(list(" \n\r\tabtruhinesdIlv'’,.!-0123½éä漢🦄"))
    given(st.text(alphabet, max_size=40))(check)()


def test_llama3_takes_a_known_word_whole():
    meta = byte_level("llama-bpe")
    meta["tokenizer.ggml.tokens"] = [*meta["tokenizer.ggml.tokens"], "zebra"]
    meta["tokenizer.ggml.token_type"] = np.append(meta["tokenizer.ggml.token_type"], 1)
    assert gguf_tokenizer.build(meta).tokenize("zebra") == ["zebra"]
    assert gguf_tokenizer.build(meta | {"tokenizer.ggml.pre": "gpt-2"}).tokenize("zebra") != ["zebra"]


def test_begin_and_end_tokens_and_template():
    plain = gguf_tokenizer.build(BYTE_LEVEL["gpt-2"])
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    both = gguf_tokenizer.build(BYTE_LEVEL["gpt-2"] | flags | {"tokenizer.chat_template": template})
    ids = plain("a truth")["input_ids"]
    assert 1 not in ids and both("a truth")["input_ids"] == [1, *ids, 0]
    assert both("a truth", "a")["input_ids"] == [1, *ids, 0, 1, *plain("a")["input_ids"], 0]
    assert both("a truth", add_special_tokens=False)["input_ids"] == ids
    assert (both.bos_token, both.eos_token, both.pad_token) == ("<|start|>", "<|end|>", None)
    assert both.decode([1, *ids, 0], skip_special_tokens=True) == "a truth"
    chat = both.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "user: hi\n"
    assert plain.chat_template is None


def sentencepiece_model(prefix: bool, user: list[str]):
    trainer = pytest.importorskip("sentencepiece")
    out = io.BytesIO()
    trainer.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n") * 3),
        model_writer=out,
        model_type="bpe",
        vocab_size=450,
        byte_fallback=True,
        character_coverage=0.99,
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        user_defined_symbols=user,
        minloglevel=2,
    )
    return trainer.SentencePieceProcessor(model_proto=out.getvalue())


def sentencepiece_metadata(model, prefix: bool, user: list[str]) -> dict:
    ids = range(model.vocab_size())
    tokens = [model.id_to_piece(i) for i in ids]
    kinds = {2: model.is_unknown, 3: model.is_control, 6: model.is_byte, 4: lambda i: tokens[i] in user}
    types = [next((kind for kind, test in kinds.items() if test(i)), 1) for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(types),
        "tokenizer.ggml.bos_token_id": model.bos_id(),
        "tokenizer.ggml.eos_token_id": model.eos_id(),
        "tokenizer.ggml.unknown_token_id": model.unk_id(),
        "tokenizer.ggml.add_space_prefix": prefix,
    }


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_equals_sentencepiece(prefix):
    model = sentencepiece_model(prefix, [])
    tokenizer = gguf_tokenizer.build(sentencepiece_metadata(model, prefix, []))

    @given(st.text(st.sampled_from(list(" \n\tabtruhinesdIlv',.!-0123é漢🦄")), max_size=40))
    @example("\u00a0x")
    def check(text: str) -> None:
        ids = model.encode(text)
        # A leading space prefix is added to the empty text too; SentencePiece leaves it empty.
        if text:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
            assert tokenizer.decode(ids) == text
        assert tokenizer(text)["input_ids"][0] == model.bos_id()

    check()
    for text in [*SAMPLES, *TEXT.split("\n")]:
        if text:
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.encode(text)


def test_user_defined_pieces_are_taken_before_merging():
    user = ["\n", "\n\n", "<b>"]
    model = sentencepiece_model(False, user)
    tokenizer = gguf_tokenizer.build(sentencepiece_metadata(model, False, user))
    for text in ["a\nb", "a\n\n\nb <b>man</b>", "\n\n\n\n", "truth <b>"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids == model.encode(text) and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_no_tokenizer_and_unknown_ones():
    assert gguf_tokenizer.build({}) is None
    assert gguf_tokenizer.build({"tokenizer.ggml.model": "none"}) is None
    with pytest.raises(JaxqError, match="tokenizer 'bert' is not supported; jaxq knows gpt2 and llama"):
        gguf_tokenizer.build({"tokenizer.ggml.model": "bert"})
    with pytest.raises(JaxqError, match="pre-tokenizer 'falcon' is not supported; jaxq knows gpt-2"):
        gguf_tokenizer.build(BYTE_LEVEL["gpt-2"] | {"tokenizer.ggml.pre": "falcon"})
    with pytest.raises(JaxqError, match="lacks 'tokenizer.ggml.merges'"):
        gguf_tokenizer.build({k: v for k, v in BYTE_LEVEL["gpt-2"].items() if not k.endswith("merges")})
    with pytest.raises(JaxqError, match="a token twice"):
        twice = BYTE_LEVEL["gpt-2"]["tokenizer.ggml.tokens"].copy()
        twice[5] = twice[6]
        gguf_tokenizer.build(BYTE_LEVEL["gpt-2"] | {"tokenizer.ggml.tokens": twice})
    beyond = {"bos_token_id": 10**6, "add_bos_token": True}
    for damage in ({"token_type": np.ones(3)}, {"merges": ["zz qq"]}, beyond):
        with pytest.raises(JaxqError, match="damaged"):
            gguf_tokenizer.build(BYTE_LEVEL["gpt-2"] | {f"tokenizer.ggml.{k}": v for k, v in damage.items()})
