"""Verification of replicas: the hash, and the ranks that are named in each layout."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.configs import tiny_config, with_values
from tests.harness import run_command, run_ranks
from tests.training_jobs import _start, job_topology
from trainer.config.load import check_config
from trainer.distributed import Launch, joined_world
from trainer.engine.replica_set import ReplicaSet
from trainer.engine.tensor_hash import hash_bits
from trainer.errors import ReplicasDifferError
from trainer.topology import Topology

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")
HOST = socket.gethostname()
NORM, UP, VALUE = "model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture
def base(corpus: Path, shared_cache: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_config(corpus, shared_cache, tmp_path / "run")


# The hash ------------------------------------------------------------------------------------------------------------


def reference(tensor: Tensor) -> list[int]:
    """Compute the definition in `tensor_hash` with Python's integers."""
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    words = np.frombuffer(raw + bytes(-len(raw) % 8), "<u8").tolist()
    sums = [0, 0]
    for number, word in enumerate(words, start=1):
        z = (word + number * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
        sums[0] += z
        sums[1] += (z ^ z >> 29) * 0xD6E8FEB86659FD93
    return [(total + 2**63) % 2**64 - 2**63 for total in sums]


@pytest.mark.fast
@pytest.mark.parametrize(("count", "dtype"), [(1, torch.bfloat16), (7, torch.float32), (70_001, torch.float32)])
def test_hash_matches_definition_at_any_alignment(count: int, dtype: torch.dtype) -> None:
    whole = torch.randn(count + 3, generator=torch.Generator().manual_seed(1)).to(dtype)
    for first in (0, 1, 3):  # of a flat buffer, where nothing is aligned
        part = whole[first : first + count]
        assert hash_bits(part).tolist() == reference(part)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hash_detects_every_bit_flip_and_swap(dtype: torch.dtype) -> None:
    count, bits = 37, torch.empty(0, dtype=dtype).element_size() * 8
    values = torch.randn(count, generator=torch.Generator().manual_seed(2)).to(dtype)
    as_integers = values.view({32: torch.int32, 16: torch.int16}[bits])
    hashes = {tuple(hash_bits(values).tolist())}
    for place in range(count):
        for bit in range(bits):
            changed = as_integers.clone()
            changed[place] ^= 1 << bit if bit < bits - 1 else -(1 << bit)
            hashes.add(tuple(hash_bits(changed).tolist()))
    pairs = [(a, b) for a in range(count) for b in range(a) if as_integers[a] != as_integers[b]]
    for a, b in pairs:
        changed = as_integers.clone()
        changed[[a, b]] = as_integers[[b, a]]
        hashes.add(tuple(hash_bits(changed).tolist()))
    for a, b in ((0, 1), (3, 30)):  # signs of two elements: the top bits, which sums alone would lose
        changed = values.clone()
        changed[[a, b]] *= -1
        hashes.add(tuple(hash_bits(changed).tolist()))
    assert len(hashes) == 1 + count * bits + len(pairs) + 2
    for half in (0, 1):
        assert len({each[half] for each in hashes}) == len(hashes), "each half notices by itself"


# Replica sets --------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_replica_set_is_product_of_axes() -> None:
    own = Topology(rank=9, pipeline=2, data=2, tensor=4)  # stage 1, data rank 0, tensor rank 1
    assert ReplicaSet((), 1, data=False).ranks(own) == (9,)
    assert ReplicaSet((), 1, data=True).ranks(own) == (9, 13)
    assert ReplicaSet((), 2, data=True).ranks(own) == (8, 9, 12, 13)
    assert ReplicaSet((), 4, data=False).ranks(own) == (8, 9, 10, 11)
    assert ReplicaSet((0, 1), 1, data=True).ranks(own) == (1, 5, 9, 13)
    assert ReplicaSet((0,), 1, data=True).ranks(own) == ()
    own = Topology(rank=9, replica=2, context=4, tensor=2)  # replica 1, context rank 0, tensor rank 1
    assert ReplicaSet((), 1, data=True).ranks(own) == (9, 11, 13, 15)
    assert ReplicaSet((), 2, data=False).ranks(own) == (8, 9)


# Flipped bits --------------------------------------------------------------------------------------------------------


def flip(engine: Any, name: str, element: int = 5, bit: int = 3) -> None:
    """Flip a bit of this rank's replica of a weight; on a rank with two stages, of the last one with that name."""
    parameter = [p for model in engine.models for n, p in model.named_parameters() if n == name][-1]
    flat = getattr(parameter, "ds_tensor", parameter).data.view(-1)
    flat.view({4: torch.int32, 2: torch.int16}[flat.element_size()])[element] ^= 1 << bit


Case = tuple[dict[str, Any], str, int]
"""Changed values of the configuration, a weight, and the rank on which one of its bits is flipped; -1 for none."""


def flipped(config: dict[str, Any], cases: list[Case], after_update: bool = False) -> list[str]:
    """Return the error of the second step, for a flip after the first or the second; the first step must pass."""
    launch, messages = Launch.from_environment(), []
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        for values, name, rank in cases:
            batches, engine, _ = _start(with_values(config, **values), world)
            first, second, third = batches.steps(1, 3)
            engine.train_step(first, verify_step=1)
            try:
                if after_update:
                    engine.train_step(second)
                if rank == launch.rank:
                    flip(engine, name)
                if after_update:
                    engine.replica_verifier.verify(2)
                engine.train_step(second if not after_update else third, verify_step=2)
                messages.append("")
            except ReplicasDifferError as error:
                messages.append(str(error))
    return messages


def zero(stage: int, **keys: Any) -> dict[str, Any]:
    return {"deepspeed__zero_optimization": {"stage": stage, **keys}}


def check_flips(config: dict[str, Any], ranks: int, cases: list[tuple[Case, str]], after_update: bool = False) -> None:
    """Every rank must raise the same error; without a flip there is none."""
    jobs = [case for case, _ in cases]
    for messages in run_ranks(flipped, ranks, config, [*jobs, (jobs[0][0], NORM, -1)], after_update):
        assert messages[-1] == "", "negative control"
        for (values, name, rank), expected in cases:
            message = messages[jobs.index((values, name, rank))]
            assert message.startswith("step 2: replicas of weights differ (equal after step 1). "), (values, message)
            assert f"{name}: {expected.format(host=HOST)}." in message, (values, message)


BOTH = "ranks 0, 1 on {host} differ, and neither a majority nor master weights show which is wrong"
WRONG = "rank {rank} on {{host}} of ranks {ranks} on {{host}} wrong"


def wrong(rank: int, *ranks: int) -> str:
    return WRONG.format(rank=rank, ranks=", ".join(map(str, ranks)))


BF16 = {"deepspeed__bf16": {"enabled": True}}


@pytest.mark.parametrize("after_update", [False, True])
def test_flip_detected_between_two_data_ranks(base: dict[str, Any], after_update: bool) -> None:
    cases: list[tuple[Case, str]] = [
        ((zero(0), UP, 1), BOTH),
        ((zero(1), UP, 1), wrong(1, 0, 1)),
        ((zero(2), EMBEDDING, 1), wrong(1, 0, 1)),  # of which rank 0 has the master weights
        ((BF16 | zero(0), NORM, 0), wrong(0, 0, 1)),
        ((BF16 | zero(1), UP, 1), wrong(1, 0, 1)),
    ]
    check_flips(base, 2, cases, after_update)


def test_flip_outvoted_by_three_data_ranks(base: dict[str, Any]) -> None:
    config = with_values(base, deepspeed__train_batch_size=12)
    check_flips(config, 3, [((zero(0), UP, 2), wrong(2, 0, 1, 2)), ((zero(1), NORM, 0), wrong(0, 0, 1, 2))])


def test_flip_detected_between_tensor_ranks(base: dict[str, Any]) -> None:
    """Replicated weights, a key/value head that both ranks hold, and under ZeRO 3 the partitions of these."""
    config = with_values(base, parallel__tensor=2, model__config__num_key_value_heads=1)
    sequence = {"parallel__sequence_parallel": True}
    cases: list[tuple[Case, str]] = [
        ((zero(0), NORM, 1), BOTH),
        ((zero(1), VALUE, 0), wrong(0, 0, 1)),
        ((zero(3), NORM, 1), wrong(1, 0, 1)),
        ((BF16 | sequence | zero(1), NORM, 1), wrong(1, 0, 1)),
    ]
    check_flips(config, 2, cases)


def test_unreplicated_weights_are_not_compared(base: dict[str, Any]) -> None:
    """A tensor shard, and under ZeRO 3 a partition: no other rank has the elements."""
    tensor = with_values(base, parallel__tensor=2)
    assert run_ranks(flipped, 2, tensor, [(zero(0), UP, 1)]) == [[""], [""]]
    assert run_ranks(flipped, 2, base, [(zero(3), UP, 1)]) == [[""], [""]]


TIED = {"parallel__pipeline": 2, "model__config__tie_word_embeddings": True}


def test_flip_detected_in_tied_weights_of_two_stages(base: dict[str, Any]) -> None:
    config = with_values(base, **TIED)
    cases: list[tuple[Case, str]] = [
        ((zero(0), EMBEDDING, 1), BOTH),
        ((zero(1), EMBEDDING, 0), wrong(0, 0, 1)),
        ((BF16 | zero(1), EMBEDDING, 1), wrong(1, 0, 1)),
    ]
    check_flips(config, 2, cases)


@pytest.mark.matrix
def test_flip_detected_in_hybrid_layouts(base: dict[str, Any]) -> None:
    """Four replicas of a norm, two of a tensor shard, four of a tied embedding's; offload; DualPipeV."""
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    hybrid = with_values(base, parallel__tensor=2)
    cases: list[tuple[Case, str]] = [
        ((zero(0), NORM, 2), wrong(2, 0, 1, 2, 3)),
        ((zero(1), UP, 3), wrong(3, 1, 3)),
        ((zero(3), NORM, 2), wrong(2, 2, 3)),
        (({"deepspeed__zero_optimization": offload}, UP, 0), wrong(0, 0, 2)),
    ]
    check_flips(hybrid, 4, cases)
    stages = with_values(base, **TIED)
    check_flips(stages, 4, [((zero(1), EMBEDDING, 3), wrong(3, 0, 1, 2, 3)), ((zero(1), NORM, 2), wrong(2, 2, 3))])
    two_ways = with_values(
        base,
        **TIED,
        parallel__pipeline_schedule="dualpipev",
        model__config__num_hidden_layers=4,
        deepspeed__train_batch_size=16,
    )
    check_flips(two_ways, 4, [((zero(1), NORM, 1), wrong(1, 0, 1)), ((zero(0), UP, 2), BOTH.replace("0, 1", "2, 3"))])


# Side effects --------------------------------------------------------------------------------------------------------


def verified(config: dict[str, Any], stages: list[int], steps: int, verify: bool) -> list[dict[str, np.ndarray]]:
    """Return the weights after some steps, at each ZeRO stage."""
    launch, weights = Launch.from_environment(), []
    with joined_world(launch, job_topology(config, launch), seed=1) as world:
        for stage in stages:
            batches, engine, _ = _start(with_values(config, **zero(stage)), world)
            for step, batch in enumerate(batches.steps(1, steps), start=1):
                engine.train_step(batch, verify_step=step if verify else None)
            weights.append({name: tensor.float().numpy().copy() for name, tensor in engine.full_weights()})
    return weights


def test_verification_leaves_training_bitwise_equal(base: dict[str, Any]) -> None:
    config = with_values(base, parallel__tensor=2, deepspeed__bf16={"enabled": True})
    with_it, without = (run_ranks(verified, 2, config, [0, 1, 3], 3, verify)[0] for verify in (True, False))
    for one, other in zip(with_it, without, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert np.array_equal(one[name], other[name]), name


FAULTY = """
import runpy, sys
import torch
from trainer.engine.plain import PlainEngine

step = PlainEngine.train_step

def train_step(self, batch, *, verify_step=None):
    result = step(self, batch, verify_step=verify_step)
    self.steps = getattr(self, "steps", 0) + 1
    if self.steps == 2 and self._world.topology.rank == 1:
        weight = self.models[0].model.norm.weight
        weight.data.view(torch.int32)[3] ^= 1
    return result

PlainEngine.train_step = train_step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_command_exits_5_within_verification_interval(base: dict[str, Any], tmp_path: Path) -> None:
    """A bit is flipped after step 2: step 3, which does not verify, passes, and step 4 is not saved."""
    config = with_values(
        base,
        training__max_steps=8,
        training__verify_every_steps=2,
        training__log_every_steps=1,
        checkpoint={"every_steps": 2},
        evaluation={"max_batches": 1},
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "faulty.py").write_text(FAULTY)
    ended = run_command(str(tmp_path / "faulty.py"), TRAIN, "--config", str(tmp_path / "config.json"), world=2)
    assert ended.status == 5, ended.err
    assert (
        f"error: step 4: replicas of weights differ (equal after step 2). {NORM}: {BOTH.format(host=HOST)}" in ended.err
    )
    assert "resume from a checkpoint of step 2 or before" in ended.err
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")] == ["step-00000002"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 3


@pytest.mark.fast
@pytest.mark.parametrize(
    ("values", "world", "expected"),
    [
        ({}, 2, None),
        ({}, 1, "has nothing to compare: there is one rank"),
        (zero(3), 2, "has nothing to compare: ZeRO 3 keeps one copy of each weight"),
        ({**zero(3), "parallel__tensor": 2}, 4, "compares only weights replicated over tensor ranks"),
    ],
)
def test_layout_without_replicas_warns(
    values: dict[str, Any], world: int, expected: str | None, base: dict[str, Any]
) -> None:
    config = with_values(base, training__verify_every_steps=2, **values)
    warnings = [str(warning) for warning in check_config(config, world_size=world, device="cpu").warnings]
    own = [warning for warning in warnings if warning.startswith("training.verify_every_steps")]
    assert len(own) == (0 if expected is None else 1)
    assert all(expected in warning for warning in own if expected)
