"""From a checkpoint to a Hugging Face folder, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.checkpoint_format import (
    BUFFER,
    DTYPES,
    WEIGHT,
    ChunkReader,
    Manifest,
    read_manifest,
    run_tokenizer_folder,
    verify_files,
)
from trainer.data import load_tokenizer
from trainer.errors import CheckpointError
from trainer.model import build_from_description, load_exported, read_weights, write_model
from trainer.tasks import random_inputs


def export(
    checkpoint: Path, into: Path, dtype: torch.dtype | None, largest: int, tokenizer: Path | None = None
) -> Manifest:
    """Writes the weights of a checkpoint as a Hugging Face folder: config, safetensors, generation config, model card,
    and the tokenizer of the run, if it is there. Host memory: one block of the model and one file.

    Args:
        dtype: of the weights in the files; fp32 by default, as they are in the checkpoint. largest: bytes of a file.
        tokenizer: a folder with another one.

    Raises:
        CheckpointError: if the checkpoint is damaged.
        ConfigError: if transformers cannot build the model, or the tokenizer cannot be read.
    """
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest)
    model = build_from_description(manifest.model, manifest.config["model"]["task"])
    found = tokenizer or run_tokenizer_folder(checkpoint)
    write_model(
        model,
        _weights(model, manifest, ChunkReader(checkpoint)),
        into,
        load_tokenizer(str(found), "--tokenizer") if tokenizer or found.is_dir() else None,
        dtype=dtype,
        largest=largest,
        card=_card(manifest),
    )
    return manifest


def _weights(model: Any, manifest: Manifest, files: ChunkReader) -> Iterator[tuple[str, Tensor]]:
    persistent = model.state_dict(keep_vars=True)
    names = [(name, WEIGHT) for name, _ in model.named_parameters()]
    names += [(name, BUFFER) for name, _ in model.named_buffers() if name in persistent]
    for name, role in names:
        stored = manifest.tensors.get((name, role))
        if stored is None:
            raise CheckpointError(f"the checkpoint has no {role} of {name}")
        whole = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        files.read(stored, (0,) * len(stored.shape), whole)
        yield name, whole


def _card(manifest: Manifest) -> str:
    config, world = manifest.config, manifest.about["world"]
    sources = "\n".join(f"- `{s['path']}` (weight {s['weight']})" for s in config["data"]["train"])
    losses = "\n".join(f"| {split} loss | {loss:.4f} |" for split, loss in manifest.losses.items() if loss is not None)
    model = config["model"]["path"] or f"a {manifest.model['config']['model_type']} from random weights"
    return f"""---
library_name: transformers
tags: [tessera]
---

# {config["run"]["name"]}

Trained with Tessera, beginning from {model}.

| | |
| --- | --- |
| steps | {manifest.step:,} |
| samples | {manifest.samples:,} |
| tokens | {manifest.tokens:,} |
{losses}
| sequence length | {config["data"]["sequence_length"]:,} |
| batch | {config["deepspeed"]["train_batch_size"]:,} |
| optimizer | {config["deepspeed"]["optimizer"]["type"]} |
| processes | {world["processes"]}: pipeline {world["pipeline"]}, data {world["data"]}, tensor {world["tensor"]} |
| saved | {manifest.created} |

Training data:

{sources}
"""


@dataclass(frozen=True)
class Comparison:
    """Logits of an exported model beside those of its checkpoint, on the same random ids, all computed in fp32."""

    difference: float
    """Largest difference between the exported model and the checkpoint's weights rounded to the exported dtype."""

    rounding: float
    """Largest difference that this rounding makes: what the exported dtype cannot hold."""

    largest: float
    """Largest absolute logit of the checkpoint."""

    @property
    def tolerance(self) -> float:
        """Largest difference of a correct export.

        Both models compute in fp32 from equal weights, so only the order of additions may differ. A sum of n terms
        rounds by about sqrt(n) x 2^-24 of its size, and 1e-5 of the largest logit allows for n = 2^14.
        """
        return 1e-5 * self.largest

    @property
    def is_good(self) -> bool:
        """False also where a logit is not finite."""
        return self.difference <= self.tolerance


@torch.no_grad()
def compare_logits(checkpoint: Path, exported: Path, dtype: torch.dtype) -> Comparison:
    """Compare an exported model with its checkpoint; both are in memory whole, in fp32.

    Args:
        dtype: of the weights in `exported`.
    """
    manifest = read_manifest(checkpoint)
    model: Any = build_from_description(manifest.model, manifest.config["model"]["task"])
    read_weights(model, str(checkpoint))
    model.eval()
    inputs = random_inputs(model, 2, 16)
    precise = model(**inputs).logits.double()
    persistent = model.state_dict(keep_vars=True).values()
    for tensor in (tensor for tensor in persistent if tensor.is_floating_point()):
        tensor.copy_(tensor.to(dtype))
    rounded = model(**inputs).logits.double()
    theirs: Any = load_exported(exported, torch.float32, manifest.config["model"]["task"])
    found = theirs(**inputs).logits.double()
    return Comparison(_max_difference(found, rounded), _max_difference(rounded, precise), float(precise.abs().max()))


def _max_difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())
