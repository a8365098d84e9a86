"""Exporting a checkpoint as a Hugging Face folder, tensor by tensor, and checking the export."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.checkpoint_format import BUFFER, DTYPES, WEIGHT, ChunkReader, Manifest, read_manifest, verify_files
from trainer.data import load_tokenizer
from trainer.errors import CheckpointError
from trainer.model import build_from_description, load_exported, read_weights, write_model
from trainer.run_layout import run_tokenizer_folder
from trainer.tasks import random_inputs


def export(
    checkpoint: Path, target: Path, *, dtype: torch.dtype | None, shard_bytes: int, tokenizer: Path | None = None
) -> Manifest:
    """Write the weights of a checkpoint as a Hugging Face folder, with the tokenizer of the run if it has one.

    Host memory: one block of the model and one file.

    Args:
        checkpoint: Folder of the checkpoint.
        target: Folder to write.
        dtype: Type of the weights in the files; default: fp32, as in the checkpoint.
        shard_bytes: Largest size of a file.
        tokenizer: Folder of another tokenizer.

    Returns:
        The manifest of the checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: transformers cannot build the model, or the tokenizer cannot be read.
    """
    manifest = read_manifest(checkpoint)
    verify_files(checkpoint, manifest)
    model = build_from_description(manifest.model, manifest.config["model"]["task"])
    tokenizer_source = tokenizer or run_tokenizer_folder(checkpoint)
    has_tokenizer = tokenizer is not None or tokenizer_source.is_dir()
    write_model(
        model,
        _weights(model, manifest, ChunkReader(checkpoint)),
        target,
        load_tokenizer(str(tokenizer_source), "--tokenizer") if has_tokenizer else None,
        dtype=dtype,
        largest=shard_bytes,
        card=_card(manifest),
    )
    return manifest


def _weights(model: nn.Module, manifest: Manifest, reader: ChunkReader) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full tensor) of every weight and persistent buffer."""
    persistent = model.state_dict(keep_vars=True)
    names = [(name, WEIGHT) for name, _ in model.named_parameters()]
    names += [(name, BUFFER) for name, _ in model.named_buffers() if name in persistent]
    for name, role in names:
        stored = manifest.tensors.get((name, role))
        if stored is None:
            raise CheckpointError(f"the checkpoint lacks {role} of {name}")
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        reader.read(stored, (0,) * len(stored.shape), tensor)
        yield name, tensor


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

Trained with Tessera, starting from {model}.

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
    """Logits of an exported model against those of its checkpoint, on the same random ids, all computed in fp32."""

    difference: float
    """Largest difference between the exported model and the checkpoint's weights rounded to the exported dtype."""

    rounding: float
    """Largest difference that this rounding makes: what the exported dtype cannot represent."""

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
        """True if the export is within the tolerance; False also where a logit is not finite."""
        return self.difference <= self.tolerance


@torch.no_grad()
def compare_logits(checkpoint: Path, exported: Path, dtype: torch.dtype) -> Comparison:
    """Compare an exported model with its checkpoint; both are in memory as a whole, in fp32.

    Args:
        checkpoint: Folder of the checkpoint.
        exported: Folder of the exported model.
        dtype: Type of the weights in `exported`.
    """
    manifest = read_manifest(checkpoint)
    model = build_from_description(manifest.model, manifest.config["model"]["task"])
    read_weights(model, str(checkpoint))
    model.eval()
    inputs = random_inputs(model, 2, 16)
    precise_BTV = model(**inputs).logits.double()
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.to(dtype))
    rounded_BTV = model(**inputs).logits.double()
    exported_model = load_exported(exported, torch.float32, manifest.config["model"]["task"])
    exported_BTV = exported_model(**inputs).logits.double()
    return Comparison(
        difference=_max_difference(exported_BTV, rounded_BTV),
        rounding=_max_difference(rounded_BTV, precise_BTV),
        largest=float(precise_BTV.abs().max()),
    )


def _max_difference(left: Tensor, right: Tensor) -> float:
    """Return the largest absolute difference of two tensors of the same shape."""
    return float((left - right).abs().max())
