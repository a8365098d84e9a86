"""Collectives and bytes per layer under tensor parallelism, forward and backward, compared with DeepSpeed's AutoTP.

They are counted at the process group, in tiny models of 2 and 3 layers: the difference is exactly one layer.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from tools.bench.common import table
from tools.parity.shrink import tiny
from tools.ranks import run_ranks
from trainer.distributed import Launch, World, joined_world
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel import build_mapper, collectives
from trainer.topology import Topology

BATCH, LENGTH, HIDDEN = 2, 256, 64
ACTIVATION = BATCH * LENGTH * HIDDEN * 4
"""Bytes of one hidden state, batch x sequence x hidden in fp32: the unit of all printed numbers."""

VOCABULARY = 256

LAYERS = (2, 3)

Counts = Counter[tuple[str, str, int]]
"""Number of calls, by (`forward`, `loss` or `backward`; operation; bytes of the whole tensor)."""

_OPERATIONS = {"allreduce_": "all-reduce", "_allgather_base_": "all-gather", "_reduce_scatter_base_": "reduce-scatter"}


@dataclass(frozen=True)
class Case:
    """A type of model, and the system that shards it."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)
    sequence_parallel: bool = False
    system: str = "Tessera"
    """Or `AutoTP`."""

    @property
    def name(self) -> str:
        return f"{self.model_type} {'sequence sharded' if self.sequence_parallel else 'sequence full'} {self.system}"


@dataclass(frozen=True)
class Measured:
    """Traffic of one step."""

    layer: Counts
    outside: Counts
    """By embedding, head and loss."""


CASES = [
    Case("llama"),
    Case("llama", sequence_parallel=True),
    Case("llama", system="AutoTP"),
    *(
        Case(model_type, fields, sequence_parallel)
        for model_type, fields in (
            ("gpt_neox", {}),
            ("falcon", {}),
            ("mixtral", {}),
            ("deepseek_v3", {"first_k_dense_replace": 0}),
        )
        for sequence_parallel in (False, True)
    ),
]


class Recorder(TorchDispatchMode):
    """Counts every collective that reaches a process group."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counts = Counter()
        self.during = "forward"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [leaf.nbytes for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            word = func.overloadpacket.__name__
            self.counts[self.during, _OPERATIONS.get(word, word), max(sizes, default=0)] += 1
        return func(*args, **(kwargs or {}))


def sent(counts: Counts, ranks: int) -> float:
    """Return the bytes that a rank sends in ring collectives, as NCCL runs them for large tensors.

    An all-reduce is a reduce-scatter and an all-gather.
    """
    once = (ranks - 1) / ranks
    return sum(n * size * once * (2 if word == "all-reduce" else 1) for (_, word, size), n in counts.items())


def _difference(shallow: Counts, deep: Counts) -> Measured:
    layer, outside = Counter(deep), Counter(shallow)
    layer.subtract(shallow)
    outside.subtract({key: count * LAYERS[0] for key, count in layer.items()})
    if min(*layer.values(), *outside.values()) < 0:
        raise AssertionError(f"the traffic outside the layers depends on their number: {shallow}, {deep}")
    return Measured(+layer, +outside)


def _model(case: Case, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "max_position_embeddings": LENGTH, "vocab_size": VOCABULARY}
    config = tiny(case.model_type, **(sizes | case.fields))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model.train()


def _ids() -> Tensor:
    return torch.randint(5, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def step(model: PreTrainedModel, case: Case, world: World) -> Counts:
    """Shard a model and count the traffic of its forward pass, loss and backward pass."""
    mapper = build_mapper(model, {}, world, sequence_parallel=case.sequence_parallel)
    mapper.shard_parameters(model.parameters())
    mapper.install()
    ids, recorder = _ids(), Recorder()
    with recorder:
        logits = model(input_ids=ids, use_cache=False).logits
        recorder.during = "loss"
        objective = VocabularyCrossEntropy(shard=mapper.vocabulary_shard())(logits, ids).objective
        recorder.during = "backward"
        objective.backward()
    return recorder.counts


def measure(cases: list[Case]) -> list[Measured]:
    """Count the traffic of a layer of each case; the world is one tensor group. Collective: all ranks must call it."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, tensor=launch.world_size)
    with joined_world(launch, topology, seed=1) as world:
        return [_difference(*(step(_model(case, n), case, world) for n in LAYERS)) for case in cases]


def measure_autotp(case: Case) -> tuple[Measured, dict[str, bool]]:
    """Count the same for DeepSpeed's AutoTP; also return which system sums a non-contiguous tensor correctly."""
    import deepspeed

    warnings.filterwarnings("ignore", category=FutureWarning)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "tensor_parallel": {"autotp_size": dist.get_world_size()},
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    }
    counts = []
    for layers in LAYERS:
        engine, *_ = deepspeed.initialize(model=_model(case, layers), config=config)
        engine.module(input_ids=_ids())  # it compares the ranks' first inputs
        recorder = Recorder()
        with recorder:
            loss = engine.module(input_ids=_ids(), labels=_ids(), use_cache=False).loss
            recorder.during = "backward"
            loss.backward()
        counts.append(recorder.counts)
    return _difference(*counts), _sums_of_a_transposed_tensor()


def _sums_of_a_transposed_tensor() -> dict[str, bool]:
    from deepspeed.module_inject.layers import RowParallel

    def transposed() -> Tensor:
        return torch.arange(6.0).reshape(2, 3).T

    expected = transposed() * dist.get_world_size()
    return {
        "AutoTP": torch.equal(RowParallel.apply(dist.group.WORLD, transposed(), False), expected),
        "Tessera": torch.equal(collectives.reduce_from_region(transposed(), None), expected),
    }


QUICK: dict[str, Any] = {"ranks": [2], "families": ["llama"]}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    families = list(dict.fromkeys(case.model_type for case in CASES))
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="sizes of the tensor group (default 2 4)")
    parser.add_argument("--families", nargs="+", default=families, choices=families, help="default: all")


def run(options: argparse.Namespace) -> dict[str, Any]:
    layers: list[tuple[Any, ...]] = []
    outside: list[tuple[Any, ...]] = []
    figures: dict[str, Any] = {"batch": BATCH, "sequence": LENGTH, "hidden": HIDDEN}
    summed: dict[str, bool] = {}
    began = time.perf_counter()
    cases = [case for case in CASES if case.model_type in options.families]
    for ranks in options.ranks:
        ours = [case for case in cases if case.system == "Tessera"]
        measurements = dict(zip((case.name for case in ours), run_ranks(measure, ranks, ours)[0], strict=True))
        for case in cases:
            if case.system == "AutoTP":
                measurements[case.name], summed = run_ranks(measure_autotp, ranks, case)[0]
            measured = measurements[case.name]
            bytes_sent = sent(measured.layer, ranks)
            figures[f"{case.name}, {ranks} ranks"] = {
                "layer": list(_as_figures(measured.layer)),
                "outside": list(_as_figures(measured.outside)),
                "layer_bytes_sent_by_a_rank": bytes_sent,
            }
            head = (case.model_type, case.system, "cut" if case.sequence_parallel else "whole", ranks)
            layers.append(
                (
                    *head,
                    _words(measured.layer, "forward"),
                    _words(measured.layer, "backward"),
                    f"{bytes_sent / ACTIVATION:.3f}",
                )
            )
            if case.model_type == "llama":
                outside.append((*head, *(_words(measured.outside, d) for d in ("forward", "loss", "backward"))))
    figures |= {"sum_of_a_transposed_tensor_is_right": summed, "seconds": round(time.perf_counter() - began, 1)}
    print(
        f"Of one layer. AR all-reduce, AG all-gather, RS reduce-scatter, each of a hidden state, {BATCH} x {LENGTH} x "
    )
    print(f"{HIDDEN} in fp32, or of so many hidden states. Bytes of a ring are in hidden states too.\n")
    head = ("family", "system", "sequence", "ranks")
    print(table((*head, "forward", "backward", "a rank sends"), layers))
    print(f"\nOutside the layers: embedding, loss and head of a vocabulary of {VOCABULARY}.\n")
    print(table((*head, "forward", "loss", "backward"), outside))
    print()
    for system, right in summed.items():
        print(f"{system}: the sum over ranks of a tensor that is not contiguous is {'right' if right else 'wrong'}")
    return figures


def _as_figures(counts: Counts) -> Iterator[dict[str, Any]]:
    for (during, word, size), count in sorted(counts.items()):
        yield {"during": during, "operation": word, "bytes": size, "count": count}


def _words(counts: Counts, during: str) -> str:
    short = {"all-reduce": "AR", "all-gather": "AG", "reduce-scatter": "RS"}
    operations = sorted(
        ((w, s, n) for (d, w, s), n in counts.items() if d == during), key=lambda item: (-item[1], item[0])
    )
    return " + ".join(
        f"{n} {short.get(word, word)}" + ("" if size == ACTIVATION else f" of {size / ACTIVATION:.3g}")
        for word, size, n in operations
    )
