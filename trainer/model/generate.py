"""Generates text with an exported model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from trainer.errors import ConfigError, Problem
from trainer.model.export import load_exported


@torch.no_grad()
def generate_texts(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    prefix: Sequence[int],
    tokens: int,
    temperature: float,
    device: str,
) -> Iterator[str]:
    """Each prompt and at most `tokens` more, drawn at `temperature` (0: the likeliest each time).

    Args:
        folder: of the exported model.
        prefix: ids before each prompt, as before each document in training; they are not part of the text.

    Raises:
        ConfigError: if a prompt is empty.
    """
    if not all(prompts):
        raise ConfigError(Problem("--prompt", "is empty"))
    model = load_exported(folder).to(device)  # type: ignore[arg-type]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for prompt in prompts:
        encoded = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        input_ids = torch.tensor([[*prefix, *encoded]], device=device)
        ids = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            pad_token_id=padding,
            **sampling,
        )
        yield str(tokenizer.decode(ids[0, len(prefix) :], skip_special_tokens=True))
