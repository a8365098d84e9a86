"""Special tokens around each document (`data.special_tokens`), determined by probing the tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trainer.errors import ConfigError, Problem
from trainer.json_types import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config.earlier_versions import StoredRun

SpecialTokens = Literal["tokenizer", "end", "none"]

_PROBES = ("seven wizards", "a", "Brew 2 potions, quickly!")
"""Texts that are encoded with and without special tokens; the difference must be the same for all of them."""


@dataclass(frozen=True)
class DocumentFrame:
    """Ids before and after each document: once per document, not once per sample that it is cut into."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    prefix_tokens: tuple[str, ...] = ()
    suffix_tokens: tuple[str, ...] = ()

    def __str__(self) -> str:
        before = [f"{token} ({number})" for token, number in zip(self.prefix_tokens, self.prefix, strict=True)]
        after = [f"{token} ({number})" for token, number in zip(self.suffix_tokens, self.suffix, strict=True)]
        return " ".join([*before, "TEXT", *after])

    def as_json(self) -> JsonObject:
        """Return the frame as it is recorded in `config.json`."""
        return {
            "prefix": [*self.prefix],
            "suffix": [*self.suffix],
            "prefix_tokens": [*self.prefix_tokens],
            "suffix_tokens": [*self.suffix_tokens],
        }

    @property
    def cache_key(self) -> int | dict[str, list[int]] | None:
        """The frame's part of a cache key.

        Without a prefix and with at most one id in the suffix it is that id alone, as in earlier versions, so that
        their token files stay valid.
        """
        if not self.prefix and len(self.suffix) <= 1:
            return self.suffix[0] if self.suffix else None
        return {"prefix": list(self.prefix), "suffix": list(self.suffix)}


def resolve_frame(tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens) -> DocumentFrame:
    """Return the frame that `data.special_tokens` selects for this tokenizer.

    Raises:
        ConfigError: the tokenizer lacks a required end-of-text token, or its special tokens depend on the text.
    """
    end = tokenizer.eos_token_id
    prefix, suffix = find_added_ids(tokenizer) if special_tokens == "tokenizer" else ((), ())
    if special_tokens != "none" and end is not None and end not in suffix:
        suffix = (*suffix, end)
    if special_tokens != "none" and not suffix:
        reason = f'"{special_tokens}" needs an end-of-text token, and the tokenizer has none'
        raise ConfigError(Problem("data.special_tokens", reason, 'Set it to "none"'))
    return DocumentFrame(prefix, suffix, _token_texts(tokenizer, prefix), _token_texts(tokenizer, suffix))


def resolve_prompt_prefix(tokenizer: PreTrainedTokenizerBase, run: StoredRun | None) -> tuple[int, ...]:
    """Return the ids to put before each prompt: those before each document of the run that trained the model.

    Args:
        tokenizer: the model's tokenizer.
        run: configuration stored in the run directory or checkpoint; None for a model of unknown origin, whose prompts
            get the ids that the tokenizer adds to every text.
    """
    if run is not None and "document_frame" in run.about:
        return tuple((run.about["document_frame"] or {}).get("prefix", ()))
    if run is not None and run.written["data"].get("special_tokens") != "tokenizer":
        return ()  # the same holds for earlier versions, which lack the key and have no document prefix
    try:
        return find_added_ids(tokenizer)[0]
    except ConfigError:  # its special tokens depend on the text
        return ()


def find_added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that the tokenizer adds before and after a single text.

    The plain ids are searched in the framed ones. A probe may match at several offsets (a text that repeats its own
    special tokens), so the candidates of all probes are intersected.

    Raises:
        ConfigError: the added ids depend on the text.
    """
    common = None
    for text in _PROBES:
        plain, framed = (
            list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]) for special in (False, True)
        )
        starts = [n for n in range(len(framed) - len(plain) + 1) if framed[n : n + len(plain)] == plain]
        frames = {(tuple(framed[:n]), tuple(framed[n + len(plain) :])) for n in starts}
        common = frames if common is None else common & frames
    if not common or len(common) > 1:
        reason = (
            "the tokenizer does not add the same special tokens to every text "
            f'(got "tokenizer", {type(tokenizer).__name__})'
        )
        raise ConfigError(Problem("data.special_tokens", reason, 'Set it to "end" or "none"'))
    return common.pop()


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(token) for token in tokenizer.convert_ids_to_tokens(list(ids)))
