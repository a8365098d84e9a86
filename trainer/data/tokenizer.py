"""The tokenizer: the model's, another one by name, or one trained on the corpus."""

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
"""How much text a tokenizer is trained on; more changes little and costs memory."""


def load_tokenizer(name: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or on the hub; code in the repository is never run.

    Raises:
        ConfigError: at `key`, if there is none.
    """
    from transformers import AutoTokenizer

    refuse_special_files(Path(name).expanduser(), key)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name, trust_remote_code=False
        )
        if len(tokenizer.get_vocab().keys() - tokenizer.added_tokens_encoder.keys()) <= 1:
            raise ValueError("it has no vocabulary")  # what transformers makes of a folder without one
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
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
"""Files of which a tokenizer's folder has at least one, unless it works on bytes or characters."""


def _missing_files(name: str) -> str:
    """What a local folder lacks of a tokenizer; empty where that is not known."""
    folder = Path(name).expanduser()
    if not folder.is_dir() or any((folder / file).exists() for file in _VOCABULARY_FILES):
        return ""
    others = sorted(file.name for file in folder.glob("*token*"))
    listed = f", only {', '.join(others)}" if others else ""
    return f"the folder holds none of {', '.join(_VOCABULARY_FILES)}{listed}"


def train_tokenizer(text: Iterator[str], vocabulary: int, folder: Path) -> None:
    """Trains a byte-level BPE of exactly `vocabulary` entries at most, and saves it to `folder`.

    It adds nothing to a text; its entry 0 is the end-of-text token.
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
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast_tokenizer.save_pretrained(str(folder))


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokenizer does to text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        raw: Any = json.loads(backend.to_str())
        raw.pop("padding", None)
        raw.pop("truncation", None)
    else:
        raw = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    """Refuses a tokenizer that can produce ids which the model has no embedding for.

    Raises:
        ConfigError: naming both sizes.
    """
    if len(tokenizer) > vocabulary:
        raise ConfigError(
            Problem("model.config.vocab_size",
                    f"{vocabulary} is smaller than the tokenizer's vocabulary of {len(tokenizer)}",
                    "Raise vocab_size, or set data.tokenizer to one that fits")
        )  # fmt: skip
