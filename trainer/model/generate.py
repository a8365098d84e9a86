"""Generates text with an exported model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from transformers import AutoTokenizer

from trainer.errors import ConfigError, Problem
from trainer.model.export import load_exported


@torch.no_grad()
def generate_texts(
    folder: Path, prompts: Sequence[str], *, tokens: int, temperature: float, device: str
) -> Iterator[str]:
    """Each prompt and at most `tokens` more, drawn at `temperature` (0: the likeliest each time).

    Raises:
        ConfigError: if the folder holds no tokenizer, or a prompt is empty.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(Problem("--run", f"'{folder}' holds no tokenizer: the run was trained on token files"))
    if not all(prompts):
        raise ConfigError(Problem("--prompt", "is empty"))
    tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    model = load_exported(folder).to(device)  # type: ignore[arg-type]
    sampling = {"do_sample": True, "temperature": temperature, "top_p": 0.95} if temperature else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(device)
        ids = model.generate(
            input_ids=given["input_ids"],
            attention_mask=given["attention_mask"],
            max_new_tokens=tokens,
            pad_token_id=padding,
            **sampling,
        )
        yield str(tokenizer.decode(ids[0], skip_special_tokens=True))
