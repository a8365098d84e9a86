"""Causality probe: checks before the first step of a run that the model does not see the tokens that it predicts.

An encoder that is trained as a causal language model by mistake (BERT without `is_decoder`) attends to later tokens:
its loss falls to almost zero, and its generated text is useless. The loss curve does not reveal it.
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
from trainer.config.tasks import TASK_FAMILIES
from trainer.data import TrainBatches
from trainer.distributed import World
from trainer.engine import Engine
from trainer.errors import ConfigError, Problem
from trainer.tasks import TASKS, Collation, MicroBatch

log = logging.getLogger(__name__)

LONGEST = 64
"""Maximum number of tokens of the probed sample."""

SHORTEST = 8
"""Minimum number of tokens of the first training sample; a shorter one is replaced by random ids."""

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-3, "fp16": 1e-3}
"""Largest change of a loss that is attributed to rounding, relative to the largest loss."""

SYSTEMATIC = 0.5
"""Share of positions. If more change by more than the tolerance of fp32 while the control row repeats exactly, it
is not rounding in any precision. With random weights the changes are small: 4e-4 for the losses of a BERT in bf16."""

PROBED, CONTROL = 0, 1
"""Rows of the micro-batch. No input of the control row is replaced: its changes are noise, or the rounding of experts
that compute different numbers of tokens."""


@dataclass(frozen=True)
class Finding:
    """Result of the comparison of both passes, equal on every rank."""

    position: int
    """First position whose loss depends on replaced inputs; -1 if there is none."""

    before: float
    after: float
    """Loss at `position` with the original inputs, and with later inputs replaced. In nats."""

    largest_change: float
    """Largest change of a loss at a position before the replaced inputs. In nats."""

    is_repeatable: bool
    """Whether the control row had equal losses in both passes."""


def verify_causality(loaded: LoadedConfig, world: World, engine: Engine, batches: TrainBatches) -> None:
    """Refuse a model whose loss at some position depends on later inputs. Collective: all ranks must call it.

    Does nothing for a task that is not causal. Runs two forward passes in evaluation mode over at most `LONGEST`
    tokens; the second one replaces the inputs of the last quarter. Restores the random number generators. A model whose
    losses for equal inputs differ cannot be probed, which is logged as a warning.

    Raises:
        ConfigError: on every rank, naming the first position that sees later inputs.
    """
    if not TASK_FAMILIES[loaded.config.model.task].is_causal:
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
    """Return ids (T + 1,) of the first training sample, or random ones if that is short."""
    blocks = loaded.facts.min_block_sparse_length
    longest = min(loaded.config.data.sequence_length, max(LONGEST, blocks))
    sample = torch.from_numpy(ids[: longest + 1])
    if len(sample) - 1 < min(longest, max(SHORTEST, blocks)):
        sample = _ordinary_ids(loaded, longest + 1)
    parallel = loaded.config.parallel
    inputs = len(sample) - 1
    return sample[: inputs - inputs % (parallel.tensor if parallel.sequence_parallel else 1) + 1]


def _ordinary_ids(loaded: LoadedConfig, count: int) -> Tensor:
    """Return random ids (count,) without special tokens, the same on every rank."""
    is_ordinary = torch.ones(loaded.facts.vocabulary_size, dtype=torch.bool)
    is_ordinary[[n for n in loaded.facts.special_token_ids if 0 <= n < len(is_ordinary)]] = False
    ordinary = is_ordinary.nonzero().flatten() if is_ordinary.any() else torch.arange(len(is_ordinary))
    draw = torch.Generator().manual_seed(loaded.config.run.seed)
    return ordinary[torch.randint(len(ordinary), (count,), generator=draw)]


def _replaced_from(inputs: int) -> int:
    """Return the first replaced position: that of the last quarter."""
    return inputs - max(1, inputs // 4)


def _micro_batches(loaded: LoadedConfig, ids: Tensor, first: int) -> tuple[MicroBatch, MicroBatch]:
    """Return the sample in two rows, and the same with other inputs from `first` on in the probed row, (2, T) each."""
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
    """Return the result of the first rank that has the losses. Collective: all ranks must call it."""
    row = [0.0] * 6
    if before is not None and after is not None:
        before, after = before[:, :first], after[:, :first]
        changes, largest = (after - before).abs(), before.abs().max()
        slightly = changes[PROBED] > TOLERANCES["fp32"] * largest
        if not changes[CONTROL].any() and slightly.double().mean() >= SYSTEMATIC:
            tolerance = TOLERANCES["fp32"]
        differs = ~(changes <= tolerance * largest)  # also true for NaN
        positions = differs[PROBED].nonzero().flatten().tolist()
        if positions:
            position = positions[0]
            losses = float(before[PROBED, position]), float(after[PROBED, position])
            row = [1.0, float(position), *losses, float(changes[PROBED].max()), float(not differs[CONTROL].any())]
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
