"""The causality probe: before the first step of a run, whether the model sees the tokens that it has to predict.

An encoder that is trained as a causal language model by mistake (BERT without `is_decoder`) attends to later tokens:
its loss falls to almost nothing, and it generates nothing of use. No loss curve tells, so the model is asked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import LoadedConfig
from trainer.data import TrainBatches
from trainer.distributed import World
from trainer.engine import Engine
from trainer.errors import ConfigError, Problem
from trainer.tasks import TASKS, Collation, MicroBatch

log = logging.getLogger(__name__)

LONGEST = 64
"""Tokens of the probed sample at most."""

SHORTEST = 8
"""Tokens of the training data's first sample below which random ids are taken instead."""

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""Largest change of a loss, as a share of the largest loss."""

SYSTEMATIC = 0.5
"""If the control row repeats exactly and so large a share of the positions changes by more than fp32's tolerance, it is
no rounding in any precision. Fresh random weights change so little: a BERT's losses in bf16 by 4e-4."""

PROBED, CONTROL = 0, 1
"""Rows of the micro-batch. Nothing of the control row is replaced: what changes there is no look at later tokens, but
noise, or the rounding of experts that compute with other numbers of tokens."""


@dataclass(frozen=True)
class Finding:
    """What the losses of the two passes tell, the same on every rank."""

    position: int
    """The first one whose loss depends on replaced inputs; -1 if there is none."""

    before: float
    after: float
    """The loss at `position` with the sample's own inputs, and with later ones replaced. In nats."""

    largest_change: float
    """Of a loss before the replaced inputs. In nats."""

    is_repeatable: bool
    """Whether the control row had the same losses in both passes."""


def verify_causality(loaded: LoadedConfig, world: World, engine: Engine, batches: TrainBatches) -> None:
    """Refuse a model whose loss at some position depends on later inputs. Every rank must call it.

    Runs two forward passes in evaluation over at most `LONGEST` tokens, in the second of which the inputs of the last
    quarter are replaced, and leaves the random number generators as they were. A model that computes other losses for
    the same inputs cannot be probed, and is warned of.

    Raises:
        ConfigError: on every rank, naming the first position that sees later inputs.
    """
    if not TASKS[loaded.config.model.task].is_causal:
        return
    start = time.perf_counter()
    model_type, ids = loaded.facts.model_type, _sample(loaded, batches.first_ids())
    if len(ids) < 3:
        log.info("causality not probed: the sample has fewer than 2 tokens, or cannot be divided by parallel.tensor")
        return
    first = _replaced_from(len(ids) - 1)
    with _preserved_random_state(world.device):
        before, after = (_losses(engine, world, micro) for micro in _micro_batches(loaded, ids, first))
    finding = _agreed(engine, before, after, first, TOLERANCES[loaded.config.deepspeed.precision])
    if finding.position < 0:
        seconds = time.perf_counter() - start
        log.info("causality probed in %.2f s: no loss of %s depends on later tokens", seconds, model_type)
    elif not finding.is_repeatable:
        log.warning("causality of %s cannot be probed: the same inputs do not give the same losses", model_type)
    else:
        raise ConfigError(_problem(loaded, finding, first))


def _sample(loaded: LoadedConfig, ids: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
    """One more id than inputs: of the training data's first sample, or random ones where that is short."""
    blocks = loaded.facts.min_block_sparse_length
    longest = min(loaded.config.data.sequence_length, max(LONGEST, blocks))
    sample = torch.from_numpy(ids[: longest + 1])
    if len(sample) - 1 < min(longest, max(SHORTEST, blocks)):
        sample = _ordinary_ids(loaded, longest + 1)
    parallel = loaded.config.parallel
    inputs = len(sample) - 1
    return sample[: inputs - inputs % (parallel.tensor if parallel.sequence_parallel else 1) + 1]


def _ordinary_ids(loaded: LoadedConfig, count: int) -> Tensor:
    """Random ids of the vocabulary without special ones, the same on every rank."""
    is_ordinary = torch.ones(loaded.facts.vocabulary_size, dtype=torch.bool)
    is_ordinary[[n for n in loaded.facts.special_token_ids if 0 <= n < len(is_ordinary)]] = False
    ordinary = is_ordinary.nonzero().flatten() if is_ordinary.any() else torch.arange(len(is_ordinary))
    draw = torch.Generator().manual_seed(loaded.config.run.seed)
    return ordinary[torch.randint(len(ordinary), (count,), generator=draw)]


def _replaced_from(inputs: int) -> int:
    """The first of the replaced positions: the last quarter's."""
    return inputs - max(1, inputs // 4)


def _micro_batches(loaded: LoadedConfig, ids: Tensor, first: int) -> tuple[MicroBatch, MicroBatch]:
    """The sample in two rows; and the same with other inputs from `first` on in the probed row. Labels stay."""
    other = _ordinary_ids(loaded, len(ids))
    other = torch.where(other == ids, (other + 1) % loaded.facts.vocabulary_size, other)
    collation = Collation(length=len(ids) - 1, pad_id=0, pad_to_multiple_of=1, mask_padding=False)
    micro = TASKS[loaded.config.model.task].collate([ids.numpy()] * 2, collation)
    inputs = dict(micro.inputs)
    if loaded.config.data.packing == "none":  # most micro-batches of the run are padded: take the same code path
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["attention_mask"][:, -1] = 0
    changed = inputs["input_ids"].clone()
    changed[PROBED, first:] = other[first:-1]
    return replace(micro, inputs=inputs), replace(micro, inputs={**inputs, "input_ids": changed})


@contextlib.contextmanager
def _preserved_random_state(device: torch.device) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(python)
    np.random.set_state(numpy)


def _losses(engine: Engine, world: World, micro: MicroBatch) -> Tensor | None:
    world.seed_step(0)
    losses = engine.target_losses(micro)
    return None if losses is None else losses.double().cpu()


def _agreed(engine: Engine, before: Tensor | None, after: Tensor | None, first: int, tolerance: float) -> Finding:
    """What the first rank that has the losses finds, on every rank."""
    row = [0.0] * 6
    if before is not None and after is not None:
        before, after = before[:, :first], after[:, :first]
        changes, largest = (after - before).abs(), before.abs().max()
        slightly = changes[PROBED] > TOLERANCES["fp32"] * largest
        if not changes[CONTROL].any() and slightly.double().mean() >= SYSTEMATIC:
            tolerance = TOLERANCES["fp32"]
        differs = ~(changes <= tolerance * largest)  # also where one is not a number
        positions = differs[PROBED].nonzero().flatten().tolist()
        if positions:
            at = positions[0]
            losses = float(before[PROBED, at]), float(after[PROBED, at])
            row = [1.0, float(at), *losses, float(changes[PROBED].max()), float(not differs[CONTROL].any())]
        else:
            row = [1.0, -1.0, 0.0, 0.0, 0.0, 1.0]
    _, position, old, new, change, repeats = next(result for result in engine.all_gather_scalars([*row]) if result[0])
    return Finding(int(position), old, new, change, bool(repeats))


def _problem(loaded: LoadedConfig, finding: Finding, first: int) -> Problem:
    setting, path = loaded.facts.causal_setting, loaded.config.model.path
    where = "model.config" if path is None else "model.path"
    reason = (
        f"'{loaded.facts.model_type}' sees later tokens, so it is not a causal language model: with the inputs from "
        f"position {first} on replaced, the loss at position {finding.position} goes from {finding.before:.6g} to "
        f"{finding.after:.6g} (largest change of a loss: {finding.largest_change:.1g})"
    )
    if setting is None:
        remedy = "Take another family, because the attention of this one is bidirectional, or another model.attention"
        return Problem(where, reason, remedy)
    key, shown = setting[0], json.dumps(setting[1])
    if path is None:
        return Problem(f"{where}.{key}", reason, f"Set it to {shown}")
    if Path(path).expanduser().is_dir():
        return Problem(where, reason, f"Set {key} to {shown} in {path}/config.json, or take another family")
    remedy = f"Download the folder, set {key} to {shown} in its config.json and give its path, or take another family"
    return Problem(where, reason, remedy)
