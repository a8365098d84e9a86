"""Micro-batches of training and evaluation."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.configs import LENGTH, with_values
from tests.data_helpers import batch_shape, checked_samples, prepared, write_tokens
from trainer.config.load import check_config
from trainer.data import open_batches
from trainer.data.batches import TrainBatches
from trainer.data.order import SampleOrder
from trainer.errors import DataError
from trainer.tasks import IGNORE_INDEX
from trainer.topology import Topology

pytestmark = pytest.mark.fast


def two_sources(tiny: dict[str, Any], folder: Path, **values: object) -> dict[str, Any]:
    """Configure two token files: 6 full samples and one with 5 targets, and one sample with 2 targets."""
    paths: dict[str, list[dict[str, str]]] = {}
    for split in ("train", "validation"):
        for name, count in (("long", 6 * LENGTH + 6), ("short", 3)):
            tokens = write_tokens(folder / f"{split}-{name}", [[1 + n % 300 for n in range(count)]])
            paths.setdefault(split, []).append({"path": str(tokens.bin_path)})
    return with_values(tiny, data__train=paths["train"], data__validation=paths["validation"], **values)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_epoch_covers_every_target_once(world: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """For any number of ranks; micro-batches have one shape and need no mask."""
    config = two_sources(tiny, tmp_path, deepspeed__train_micro_batch_size_per_gpu=1)
    loaded = check_config(config, world_size=world, device="cpu")
    rank_batches = [open_batches(loaded, prepared(config), Topology.of(world, rank)) for rank in range(world)]
    assert {batches.train.epochs_after(1) for batches in rank_batches} == {1.0}
    micros = [micro for batches in rank_batches for micro in batches.train.batch_at(1).micro_batches]
    counts = sorted(micro.num_targets for micro in micros)
    assert counts == [2, 5, *[LENGTH] * 6]
    assert {batches.train.batch_at(1).tokens for batches in rank_batches} == {6 * LENGTH + 7} == {sum(counts)}
    assert {tuple(micro.inputs["input_ids"].shape) for micro in micros} == {(1, LENGTH)}
    assert all(micro.inputs.get("attention_mask") is None for micro in micros)
    held_out = [micro for batches in rank_batches for micro in batches.validation or ()]
    assert sum(micro.num_targets for micro in held_out) == 6 * LENGTH + 7
    assert {micro.inputs["input_ids"].shape[1] for micro in held_out} == {LENGTH}


def test_drop_last_omits_partial_samples(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = two_sources(tiny, tmp_path, data__drop_last=True)
    with pytest.raises(DataError, match="short\\.bin: 3 tokens, fewer than one sample"):
        open_batches(check_config(config, world_size=1, device="cpu"), prepared(config), Topology.of(1, 0))
    long_only = with_values(config, data__train=config["data"]["train"][:1], data__validation=[])
    loaded = check_config(long_only, world_size=1, device="cpu")
    batches = open_batches(loaded, prepared(long_only), Topology.of(1, 0)).train
    assert batches.epochs_after(3) == pytest.approx(3 * 8 / 6)
    assert batches.batch_at(1).tokens == 8 * LENGTH


def test_load_balancing_loss_gets_padding_mask(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A load-balancing loss counts tokens, so padding must be masked."""
    mixture = {"model_type": "mixtral", "vocab_size": 320, "hidden_size": 32, "num_local_experts": 4}
    for has_loss, expected in ((True, [2, 5]), (False, [])):
        model = {"config": {**mixture, "output_router_logits": has_loss}}
        config = two_sources(tiny, tmp_path, model=model, deepspeed__train_micro_batch_size_per_gpu=1)
        loaded = check_config(config, world_size=1, device="cpu")
        batches = open_batches(loaded, prepared(config), Topology.of(1, 0)).train
        masks = [micro.inputs.get("attention_mask") for micro in batches.batch_at(1).micro_batches]
        assert sorted(int(mask.sum()) for mask in masks if mask is not None) == expected


def _rows(batches: TrainBatches, step: int) -> list[tuple[int, ...]]:
    return [tuple(row) for micro in batches.batch_at(step).micro_batches for row in micro.labels.tolist()]


@pytest.mark.parametrize("packing", ["concatenate", "none"])
@pytest.mark.parametrize("world", range(1, 9))
def test_ranks_together_read_serial_order(packing: str, world: int, tiny: dict[str, Any]) -> None:
    """For every number of ranks and across an epoch boundary, each step reads the same samples, none twice."""
    values = {"deepspeed__train_batch_size": {5: 15, 7: 21}.get(world, 24), "data__packing": packing}
    config = with_values(tiny, deepspeed__train_micro_batch_size_per_gpu=1, **values)
    serial = open_batches(check_config(config, world_size=1, device="cpu"), prepared(config), Topology.of(1, 0)).train
    loaded = check_config(config, world_size=world, device="cpu")
    ranks = [open_batches(loaded, prepared(config), Topology.of(world, rank)).train for rank in range(world)]
    last_step_of_epoch = round(1 / serial.epochs_after(1))
    for step in (1, last_step_of_epoch, last_step_of_epoch + 1, last_step_of_epoch + 2):
        expected = sorted(map(_trim, _rows(serial, step)))
        assert sorted(_trim(row) for rank in ranks for row in _rows(rank, step)) == expected
        assert {rank.batch_at(step).tokens for rank in ranks} == {serial.batch_at(step).tokens}
        counted = sum(m.num_targets for rank in ranks for m in rank.batch_at(step).micro_batches)
        assert counted == serial.batch_at(step).tokens


def _trim(row: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(label for label in row if label != IGNORE_INDEX)


def test_micro_batches_are_layout_independent(tiny: dict[str, Any]) -> None:
    config = with_values(tiny, data__packing="none")
    labels_of_worlds = []
    for world in (1, 2, 4):
        loaded = check_config(config, world_size=world, device="cpu")
        ranks = [open_batches(loaded, prepared(config), Topology.of(world, rank)).train for rank in range(world)]
        micros = [micro for rank in ranks for micro in rank.batch_at(3).micro_batches]
        labels_of_worlds.append(sorted(json.dumps(m.labels.tolist()) for m in micros))
    assert labels_of_worlds[0] == labels_of_worlds[1] == labels_of_worlds[2]


def test_prefetch_thread_errors_reach_caller(tmp_path: Path) -> None:
    samples = checked_samples(tmp_path, [[1, 2]] * 7 + [[1, 200]])
    batches = TrainBatches([samples], SampleOrder((8,), (1.0,), 1), batch_shape(), pin=False)
    with pytest.raises(DataError, match="is 200, outside the model's vocabulary of 100"):
        for _ in batches.steps(1, 2):
            pass


def test_closed_iterator_joins_prefetch_thread(tmp_path: Path) -> None:
    samples = checked_samples(tmp_path, [[1, 2, 3]] * 8)
    steps = TrainBatches([samples], SampleOrder((8,), (1.0,), 1), batch_shape(), pin=False).steps(1, 1000)
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name == "batches"]


def test_labels_are_inputs_shifted_by_one(tiny: dict[str, Any]) -> None:
    batches = open_batches(check_config(tiny, world_size=1, device="cpu"), prepared(tiny), Topology.of(1, 0)).train
    micro = batches.batch_at(1).micro_batches[0]
    assert micro.inputs["input_ids"].shape == micro.labels.shape == (2, LENGTH)
    assert (micro.inputs["input_ids"][:, 1:] == micro.labels[:, :-1]).all()
