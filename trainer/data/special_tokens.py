"""The special tokens around each document, `data.special_tokens`: found by asking the tokenizer, not by its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.config.earlier_versions import StoredRun

SpecialTokens = Literal["tokenizer", "end", "none"]

_PROBES = ("seven wizards", "a", "Brew 2 potions, quickly!")
"""Texts encoded with and without special tokens; the frame must be the same for all."""


@dataclass(frozen=True)
class DocumentFrame:
    """Ids before and after each document. A document that is cut into samples has them once, not in each sample."""

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    prefix_tokens: tuple[str, ...] = ()
    suffix_tokens: tuple[str, ...] = ()

    def __str__(self) -> str:
        before = [f"{token} ({number})" for token, number in zip(self.prefix_tokens, self.prefix, strict=True)]
        after = [f"{token} ({number})" for token, number in zip(self.suffix_tokens, self.suffix, strict=True)]
        return " ".join([*before, "TEXT", *after])

    def as_json(self) -> dict[str, Any]:
        """For `config.json`."""
        return {name: list(values) for name, values in asdict(self).items()}

    @property
    def cache_key(self) -> Any:
        """What tells token files of one frame from those of another. Without a prefix, and with at most one id after
        the text, it is the id alone, as earlier versions wrote it, so that their token files stay valid."""
        if not self.prefix and len(self.suffix) <= 1:
            return self.suffix[0] if self.suffix else None
        return {"prefix": list(self.prefix), "suffix": list(self.suffix)}


def resolve_frame(tokenizer: PreTrainedTokenizerBase, special_tokens: SpecialTokens) -> DocumentFrame:
    """The frame that `data.special_tokens` asks of this tokenizer.

    Raises:
        ConfigError: the tokenizer has no end-of-text token where one is needed, or does not frame all texts alike.
    """
    end = tokenizer.eos_token_id
    prefix, suffix = find_added_ids(tokenizer) if special_tokens == "tokenizer" else ((), ())
    if special_tokens != "none" and end is not None and end not in suffix:
        suffix = (*suffix, end)
    if special_tokens != "none" and not suffix:
        raise ConfigError(
            Problem("data.special_tokens", f'"{special_tokens}" needs an end-of-text token, and the tokenizer has none',
                    'Set it to "none"')
        )  # fmt: skip
    return DocumentFrame(prefix, suffix, _token_texts(tokenizer, prefix), _token_texts(tokenizer, suffix))


def resolve_prompt_prefix(tokenizer: PreTrainedTokenizerBase, run: StoredRun | None) -> tuple[int, ...]:
    """Ids before each prompt: those before each document of the run that trained the model.

    Args:
        run: what its directory or a checkpoint stores; None for a model of unknown origin, whose prompts get what the
            tokenizer adds to every text.
    """
    if run is not None and "document_frame" in run.about:
        return tuple((run.about["document_frame"] or {}).get("prefix", ()))
    if run is not None and run.written["data"].get("special_tokens") != "tokenizer":
        return ()  # nor do earlier versions, which do not know the key, put anything before a document
    try:
        return find_added_ids(tokenizer)[0]
    except ConfigError:  # it does not add the same ids to every text
        return ()


def find_added_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(ids before, ids after) that the tokenizer adds to a single text.

    Raises:
        ConfigError: what it adds depends on the text.
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
        raise ConfigError(
            Problem("data.special_tokens", 'the tokenizer does not add the same special tokens to every text (got '
                    f'"tokenizer", {type(tokenizer).__name__})', 'Set it to "end" or "none"')
        )  # fmt: skip
    return common.pop()


def _token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(token) for token in tokenizer.convert_ids_to_tokens(list(ids)))
