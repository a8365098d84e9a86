"""The two sides of a comparison, as ranks run them: plain torch in one process, and a layout in the real engine.

Both take three steps of SGD with clipping on the same random tokens; SGD, because an adaptive optimizer divides by
small numbers and makes rounding visible. The reference writes its tensors to a folder, from which the ranks of a layout
read one at a time.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from tools.parity.compared_config import STEPS, RawConfig
from tools.parity.dropout import disable_dropout
from tools.parity.gradient_proof import NOISE, blocks_of
from tools.parity.layout import Layout
from tools.parity.reference import ReferenceStep, load_reference_model, scaled_sgd, train_reference
from trainer.assembly import plan_model
from trainer.config.load import LoadedConfig, check_config
from trainer.data.batches import StepBatch
from trainer.distributed import Launch, World, configure_logging, joined_world
from trainer.distributed.collectives import all_gather
from trainer.engine import Engine, build_engine
from trainer.errors import ConfigError, Problem, TesseraError
from trainer.model import build_model
from trainer.sharding import shard_of
from trainer.tasks import IGNORE_INDEX, MicroBatch, count_targets
from trainer.topology import Topology

_SEED = 2026
_LARGE = 10_000_000
"""Number of parameters from which the reference uses more than one thread."""

_FIRST_ID = 5
"""First random id: lower ids are special tokens in most vocabularies."""

_RESOLUTION = 1e-2
"""A change of a parameter counts as at least this share of its largest element: fp32 has 24 bits."""


@dataclass(frozen=True)
class ComparisonJob:
    """The input of a rank, in plain values, because it is sent to other processes."""

    raw: RawConfig
    layout: Layout
    micro_batches: int
    """Micro-batches of a global batch, over all data ranks."""

    samples: int
    """Of a micro-batch."""

    folder: str
    """Folder that the reference writes its tensors to."""

    def batch(self, step: int, loaded: LoadedConfig) -> list[MicroBatch]:
        """Return the micro-batches of one step: random ids, in rows with unequal numbers of targets."""
        length, vocabulary = loaded.config.data.sequence_length, loaded.facts.vocabulary_size
        draw = torch.Generator().manual_seed(_SEED + step)
        rows = self.micro_batches * self.samples
        ids = torch.randint(min(_FIRST_ID, vocabulary - 1), vocabulary, (rows, length + 1), generator=draw)
        predicted = torch.randint((length + 1) // 2, length + 1, (rows, 1), generator=draw)
        labels = ids[:, 1:].masked_fill(torch.arange(length) >= predicted, IGNORE_INDEX)
        pairs = zip(ids[:, :-1].split(self.samples), labels.split(self.samples), strict=True)
        return [
            MicroBatch({"input_ids": inputs.contiguous()}, labels.contiguous(), count_targets(labels))
            for inputs, labels in pairs
        ]


@dataclass(frozen=True)
class Reference:
    """Results of one process; its tensors are in the job's folder."""

    losses: list[float]
    norms: list[float]
    rate: float
    clipping: float
    floor: float
    """Minimum size that differences of gradients are relative to."""

    scales: dict[str, float]
    """Size that a difference of each parameter is relative to, in the model's order."""

    blocks: list[str]
    outputs: list[str]
    """Keys of the blocks' outputs, in order of computation."""

    parameters: int
    dropout: list[str]
    seconds: float


@dataclass(frozen=True)
class Refusal:
    """An error of ours, to be sent to the parent."""

    problems: list[Problem]


@dataclass
class RankDifferences:
    """Results of a rank of a layout: relative differences, by name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, float]
    parameters: dict[str, float]
    outputs: dict[str, float]


class BlockOutputs:
    """Records the outputs of the outermost blocks in the first forward pass of a step."""

    def __init__(self, model: PreTrainedModel) -> None:
        names = blocks_of(model)
        outermost = [name for name in names if not any(name.startswith(f"{outer}.") for outer in names)]
        self.blocks = [name for name in outermost if any(True for _ in names[name].parameters())]  # others: remote
        self.seen: list[tuple[str, Tensor]] = []
        self._state = "waits"
        for name in self.blocks:
            names[name].register_forward_hook(self._keeper(name))
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _keeper(self, name: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            first = next(iter(_floating_tensors(output)), None)
            if self._state == "keeps" and first is not None:
                self.seen.append((name, first.detach().clone()))

        return keep

    def _begin(self, *_: Any) -> None:
        torch.manual_seed(_SEED)  # a family may draw random numbers in training mode
        self._state = "keeps" if self._state == "waits" else "over"

    def _end(self, *_: Any) -> None:
        self._state = "over"

    def of_step(self, step: int) -> Iterator[tuple[str, Tensor]]:
        """Yield (key, output) in order of computation, and forget them."""
        counts: Counter[str] = Counter()
        for name, tensor in self.seen:
            yield f"{step}/{counts[name]}/{name}", tensor
            counts[name] += 1
        self.seen, self._state = [], "waits"


def _floating_tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors in a module's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _floating_tensors(list(output.values()))
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _floating_tensors(item)


def reference(job: ComparisonJob) -> Reference | Refusal:
    """Compute the reference: one process, plain torch and Hugging Face, no engine."""
    try:
        return _reference(job)
    except TesseraError as error:
        return _to_refusal(error)


def _to_refusal(error: TesseraError) -> Refusal:
    return Refusal(error.problems if isinstance(error, ConfigError) else [Problem("", str(error))])


def _reference(job: ComparisonJob) -> Reference:
    began = time.monotonic()
    loaded = check_config(job.raw, world_size=1, device="cpu")
    model = load_reference_model(loaded)
    if sum(p.numel() for p in model.parameters()) > _LARGE:
        torch.set_num_threads(os.cpu_count() or 1)
    dropout = disable_dropout(model)
    model.train()
    kept, folder = BlockOutputs(model), Path(job.folder)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = scaled_sgd(model, 0.0, loaded.config.training)
    scale = _StepScale()
    outputs: dict[str, Tensor] = {}

    def before_update(step: ReferenceStep) -> float:
        _require_finite(step)
        gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
        if step.number == 1:
            scale.choose(step, gradients)
            for group in optimizer.param_groups:
                group["lr"] = scale.rate * group["scale"]
            save_file({name: g.contiguous() for name, g in gradients.items()}, folder / "gradients.safetensors")
        if step.number < STEPS:
            outputs.update({key: tensor.contiguous() for key, tensor in kept.of_step(step.number)})
        return scale.clipping

    batches = (job.batch(step, loaded) for step in range(1, STEPS + 1))
    steps = train_reference(model, optimizer, batches, loaded.config.training, before_update=before_update)
    after = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    persistent = model.state_dict()
    buffers = {name: b.detach().clone().contiguous() for name, b in model.named_buffers() if name in persistent}
    save_file(after | buffers, folder / "parameters.safetensors")
    save_file(outputs, folder / "outputs.safetensors")
    scales = _scales(before, after)
    count = sum(p.numel() for p in after.values())
    seconds = time.monotonic() - began
    return Reference(
        losses=[step.loss for step in steps],
        norms=[step.grad_norm for step in steps],
        rate=scale.rate,
        clipping=scale.clipping,
        floor=scale.floor,
        scales=scales,
        blocks=kept.blocks,
        outputs=list(outputs),
        parameters=count,
        dropout=dropout,
        seconds=seconds,
    )


@dataclass
class _StepScale:
    """Learning rate, clipping and the resolution of gradients, chosen after the first backward pass."""

    rate: float = 0.0
    clipping: float = 0.0
    floor: float = 0.0

    def choose(self, step: ReferenceStep, gradients: dict[str, Tensor]) -> None:
        """Choose a norm that is exceeded, and a rate at which a step lowers the loss by a tenth, to first order."""
        self.clipping = step.grad_norm / 2
        self.rate = 0.1 * step.loss / (self.clipping * step.grad_norm)
        self.floor = NOISE * max(float(gradient.abs().max()) for gradient in gradients.values())


def _require_finite(step: ReferenceStep) -> None:
    if not (math.isfinite(step.loss) and math.isfinite(step.grad_norm) and step.grad_norm > 0):
        reason = (
            f"in step {step.number} one process computes a loss of {step.loss} and a gradient norm of "
            f"{step.grad_norm}, on random tokens"
        )
        raise ConfigError(Problem("model", reason, "Nothing can be compared"))


def _scales(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, float]:
    """Return the largest change of each parameter, or a larger size if that is lost in rounding."""
    changes = {name: float((after[name] - before[name]).abs().max()) for name in after}
    floor = NOISE * max(changes.values())
    return {
        name: max(change, floor, _RESOLUTION * float(after[name].abs().max())) or 1.0
        for name, change in changes.items()
    }


def layout(job: ComparisonJob, expected: Reference) -> RankDifferences | Refusal:
    """Run one rank of a layout in the real engine, and compare it with the reference."""
    try:
        return _layout(job, expected)
    except TesseraError as error:
        return _to_refusal(error)


def _layout(job: ComparisonJob, expected: Reference) -> RankDifferences:
    launch = Launch.from_environment()
    configure_logging(launch.rank)
    topology = Topology.of(launch.world_size, launch.rank, tensor=job.layout.tensor, pipeline=job.layout.pipeline)
    with joined_world(launch, topology, seed=_SEED) as world:
        loaded = check_config(job.raw, world_size=launch.world_size, device="cpu")
        model = build_model(loaded)
        disable_dropout(model)
        engine = build_engine(model, loaded, world, plan_model(loaded).assignment)
        kept = [BlockOutputs(model_part) for model_part in engine.models]
        differences = RankDifferences([], [], {}, {}, {})

        def compare_gradients() -> None:
            _compare_gradients(engine.models, job, expected, differences)

        for step in range(1, STEPS + 1):
            micro_batches = job.batch(step, loaded)
            model_part = tuple(micro_batches[topology.data_rank :: topology.data])
            tokens = sum(micro.num_targets for micro in micro_batches)
            result = engine.train_step(
                StepBatch(model_part, tokens, job.micro_batches * job.samples),
                before_update=compare_gradients if step == 1 else None,
            )
            total = sum(row[0] for row in engine.all_gather_scalars([result.loss_sum]))
            norm = float("nan") if result.grad_norm is None else float(result.grad_norm)
            differences.losses.append(_relative(total / tokens, expected.losses[step - 1]))
            differences.norms.append(_relative(norm, expected.norms[step - 1]))
            if step < STEPS and topology.data_rank == 0:
                _compare_outputs(
                    [output for outputs in kept for output in outputs.of_step(step)], job, world, differences
                )
        _compare_parameters(engine, world, job, expected, differences)
        return differences


def _relative(actual: float, expected_tensor: float) -> float:
    return abs(actual - expected_tensor) / abs(expected_tensor) if math.isfinite(actual) else math.inf


def _difference(actual: Tensor, expected_tensor: Tensor, scale: float) -> float:
    """Largest difference of an element as a share of `scale`; infinite where shapes differ or a value is NaN."""
    if actual.shape != expected_tensor.shape:
        return math.inf
    if not actual.numel():
        return 0.0
    worst = float((actual - expected_tensor).abs().max()) / scale
    return worst if math.isfinite(worst) else math.inf


@torch.no_grad()
def _compare_gradients(
    models: list[nn.Module], job: ComparisonJob, expected: Reference, differences: RankDifferences
) -> None:
    """Each rank compares its own part of every gradient, so that a correct copy cannot hide a wrong one."""
    with safe_open(Path(job.folder) / "gradients.safetensors", "pt") as file:
        reference_names = set(file.keys())
        for name, parameter in (pair for model in models for pair in model.named_parameters()):
            if not parameter.requires_grad:
                continue
            shard = shard_of(parameter)
            whole_name = name if shard is None else shard.name
            actual = safe_get_full_grad(parameter)
            expected_tensor = file.get_tensor(whole_name) if whole_name in reference_names else None
            size = max(0.0 if expected_tensor is None else float(expected_tensor.abs().max()), expected.floor)
            if expected_tensor is not None and shard is not None:
                expected_tensor = shard.extract(expected_tensor)
            if actual is None or expected_tensor is None:
                gradient = actual if expected_tensor is None else expected_tensor
                error = 0.0 if gradient is None else _difference(gradient, torch.zeros_like(gradient), size)
            else:
                error = _difference(
                    actual.view_as(expected_tensor) if actual.numel() == expected_tensor.numel() else actual,
                    expected_tensor,
                    size,
                )
            differences.gradients[whole_name] = max(differences.gradients.get(whole_name, 0.0), error)


@torch.no_grad()
def _compare_parameters(
    engine: Engine, world: World, job: ComparisonJob, expected: Reference, differences: RankDifferences
) -> None:
    """Compare the full weights, as exported, without those that only the first tensor rank trains."""
    parameters = (parameter for model in engine.models for parameter in model.parameters())
    first_rank_names = {shard.name for p in parameters if not p.requires_grad and (shard := shard_of(p)) is not None}
    with safe_open(Path(job.folder) / "parameters.safetensors", "pt") as file:
        reference_names = set(file.keys())
        for name, actual in engine.full_weights():
            if name in first_rank_names and world.topology.tensor_rank:
                continue
            if name not in reference_names:
                differences.parameters[name] = math.inf
                continue
            expected_tensor = file.get_tensor(name)
            scale = (
                expected.scales.get(name) or _RESOLUTION * float(expected_tensor.abs().max()) or 1.0
            )  # a buffer has none
            differences.parameters[name] = _difference(actual.float(), expected_tensor.float(), scale)
    for name in expected.scales.keys() - differences.parameters.keys() - first_rank_names:
        differences.parameters[name] = math.inf


@torch.no_grad()
def _compare_outputs(
    outputs: list[tuple[str, Tensor]], job: ComparisonJob, world: World, differences: RankDifferences
) -> None:
    """Compare the blocks' outputs on the first micro-batch; a sharded sequence is gathered."""
    with safe_open(Path(job.folder) / "outputs.safetensors", "pt") as file:
        reference_names = set(file.keys())
        for key, actual in outputs:
            if key not in reference_names:
                differences.outputs[key] = math.inf
                continue
            expected_tensor = file.get_tensor(key)
            if (
                actual.shape != expected_tensor.shape
                and actual.ndim == expected_tensor.ndim
                and world.topology.tensor > 1
            ):
                dim = next(n for n in range(actual.ndim) if actual.shape[n] != expected_tensor.shape[n])
                actual = torch.cat(list(all_gather(actual.unsqueeze(0), 0, world.groups.of("tensor"))), dim)
            differences.outputs[key] = _difference(actual, expected_tensor, float(expected_tensor.abs().max()) or 1.0)
