"""Load, train and check tokenizers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config.paths import refuse_special_files
from trainer.errors import ConfigError, Problem, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
TRAINING_BYTES = 50_000_000
"""Text that a tokenizer is trained on; more changes the result little and costs memory."""


def load_tokenizer(name: str, key: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory or from the hub. Code in the repository is never executed.

    Args:
        name: path or hub id.
        key: configuration key that named it, for the error message.

    Raises:
        ConfigError: there is none, or it encodes any text as no token.
    """
    from transformers import AutoTokenizer

    refuse_special_files(Path(name).expanduser(), key)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name, trust_remote_code=False
        )
        if len(tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()) <= 1:
            raise ValueError(
                "it has no vocabulary"
            )  # transformers builds one from a directory without vocabulary files
        if not any(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in _PROBES):
            raise ValueError(f"it encodes any text, such as {_PROBES[0]!r}, as no token")
    except Exception as error:
        first = first_line(error)
        raise ConfigError(
            Problem(
                key,
                f"no tokenizer can be loaded from '{name}': {_missing_files(name) or first}",
                "Save one there with `save_pretrained`, or set data.tokenizer to a folder or name that has one",
            )
        ) from None
    return tokenizer


_PROBES = ("seven wizards", "12", "\u4e03\u4eba")
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files of which a tokenizer's directory has at least one, unless it works on bytes or characters."""


def _missing_files(name: str) -> str:
    """Describe the files that a local directory lacks; empty if it is not local or has one of them."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any((folder / file).exists() for file in _VOCABULARY_FILES):
        return ""
    others = sorted(file.name for file in folder.glob("*token*"))
    listed = f", only {', '.join(others)}" if others else ""
    return f"the folder holds none of {', '.join(_VOCABULARY_FILES)}{listed}"


def train_tokenizer(text: Iterator[str], vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE of at most `vocabulary` entries and save it to `folder`.

    It adds no special tokens to a text. Entry 0 is the end-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    fast_tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
    fast_tokenizer.save_pretrained(str(folder))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of everything that determines the ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        raw: Any = json.loads(backend.to_str())
        raw.pop("padding", None)
        raw.pop("truncation", None)
    else:
        raw = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Check that the model has an embedding for every id of the tokenizer.

    Raises:
        ConfigError: the tokenizer's vocabulary is larger than the model's; the message names both sizes.
    """
    if len(tokenizer) > vocabulary:
        reason = f"{vocabulary} is smaller than the tokenizer's vocabulary of {len(tokenizer)}"
        remedy = "Raise vocab_size, or set data.tokenizer to one that fits"
        raise ConfigError(Problem("model.config.vocab_size", reason, remedy))
