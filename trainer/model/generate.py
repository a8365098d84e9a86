"""Text generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trainer.errors import ConfigError, Problem


@torch.no_grad()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    prefix: Sequence[int],
    tokens: int,
    temperature: float,
) -> Iterator[str]:
    """Yield each prompt with its continuation.

    Args:
        model: on any device, in evaluation mode.
        tokenizer: of the model.
        prompts: texts to continue.
        prefix: ids in front of each prompt, as in front of each document in training; not part of the yielded text.
        tokens: maximum number of new tokens.
        temperature: of sampling; 0 takes the most likely token.

    Raises:
        ConfigError: if a prompt is empty.
    """
    if not all(prompts):
        raise ConfigError(Problem("--prompt", "is empty"))
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for prompt in prompts:
        encoded = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        input_ids = torch.tensor([[*prefix, *encoded]], device=model.device)
        generate: Any = model.generate  # typed as a tensor or module
        ids = generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=tokens,
            pad_token_id=padding,
            **sampling,
        )
        yield str(tokenizer.decode(ids[0, len(prefix) :], skip_special_tokens=True))
