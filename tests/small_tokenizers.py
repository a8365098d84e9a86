"""Small tokenizers of each type of special tokens that are added to a text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

WORDS = ["seven", "wizards", "brew", "potions", "of", "quartz", "and", "jade", "while", "the", "quick", "fox", "jumps"]


class Kind(NamedTuple):
    """Special tokens of this type of tokenizer, as documented by its family."""

    prefix: tuple[str, ...]
    suffix: tuple[str, ...]
    end: str | None
    """Its end-of-text token."""


KINDS = {
    "llama": Kind(("<s>",), (), "</s>"),
    "gemma": Kind(("<bos>",), (), "<eos>"),
    "gpt2": Kind((), (), "<|endoftext|>"),
    "qwen": Kind((), (), "<|im_end|>"),
    "bert": Kind(("[CLS]",), ("[SEP]",), None),
    "t5": Kind((), ("</s>",), "</s>"),
    "glm": Kind(("[gMASK]", "<sop>"), (), "<|endoftext|>"),
    "nllb": Kind((), ("</s>", "eng_Latn"), "</s>"),
}


def framed_by(kind: Kind) -> list[str]:
    """The tokens before and after the text `TEXT` under `data.special_tokens: "tokenizer"`, worked out manually."""
    end = [kind.end] if kind.end is not None and kind.end not in kind.suffix else []
    return [*kind.prefix, "TEXT", *kind.suffix, *end]


def _sentencepiece(vocabulary: dict[str, int]) -> Tokenizer:
    """Bytes fall back, a space is part of the next word: as in Llama, Gemma and T5."""
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return backend


def _byte_level(vocabulary: dict[str, int]) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _wordpiece(vocabulary: dict[str, int]) -> Tokenizer:
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return backend


def _numbered(*groups: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(dict.fromkeys(t for group in groups for t in group))}


def make(name: str, **special: Any) -> PreTrainedTokenizerBase:
    """A tokenizer of one of `KINDS`."""
    kind = KINDS[name]
    frame = [*kind.prefix, *kind.suffix, *([kind.end] if kind.end else [])]
    letters = sorted({letter for word in WORDS for letter in word} | set(",.!\nABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))
    if name in ("gpt2", "qwen", "glm"):
        backend = _byte_level(_numbered(frame, sorted(pre_tokenizers.ByteLevel.alphabet())))
    elif name == "bert":
        backend = _wordpiece(_numbered(["[PAD]", "[UNK]"], frame, WORDS))
    else:
        backend = _sentencepiece(_numbered(["<pad>", "<unk>"], frame, ["▁", *letters]))
    if kind.prefix or kind.suffix:
        backend.add_special_tokens(list(dict.fromkeys(frame)))
        backend.post_processor = processors.TemplateProcessing(
            single=[*kind.prefix, "$A", *kind.suffix],
            special_tokens=[(token, backend.token_to_id(token)) for token in (*kind.prefix, *kind.suffix)],
        )
    named = {"eos_token": kind.end, **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in named.items() if v is not None})


def save(name: str, folder: Path) -> Path:
    """The same in a separate folder below `folder`."""
    make(name).save_pretrained(str(folder / name))
    return folder / name
