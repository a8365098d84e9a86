"""The dry run: a description of the run that a configuration would start, by one process that starts nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpoint import preview_resume
from trainer.config import LoadedConfig
from trainer.config.deepspeed import first_learning_rates, required_extensions, weight_decay
from trainer.config.load import device_problems, with_steps
from trainer.data import document_frame
from trainer.data.epochs import steps_for_epochs
from trainer.data.inspection import DataReport, inspect_data
from trainer.distributed import local_device
from trainer.errors import Problem
from trainer.model import ModelCost, WeightOptions, build_model, check_model, model_cost, state_bytes, weight_options
from trainer.pipeline import StageAssignment, assign_stages, attention_to_recompute
from trainer.run_directory import RunDirectory
from trainer.sharding import wildcard_name
from trainer.tensor_parallel import has_active_dropout, resolve_plan
from trainer.tensor_parallel.styles import ParallelResidual
from trainer.topology import Topology
from trainer.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ONE_MOMENT_OPTIMIZERS = ("lion", "adagrad", "muon", "rmsprop", "asgd", "adafactor")
_SHOWN_RANKS = 16
_INSPECTED_STEPS = 1000
"""First steps of a schedule that are searched for rates of 0."""


def _moments(loaded: LoadedConfig) -> int:
    """Return the number of fp32 values that the optimizer stores for each parameter."""
    optimizer = loaded.deepspeed_json["optimizer"]
    name = optimizer["type"].lower()
    if name == "sgd":
        return 1 if optimizer.get("params", {}).get("momentum") else 0
    return 1 if name in _ONE_MOMENT_OPTIMIZERS else 2


def _model_lines(loaded: LoadedConfig, cost: ModelCost) -> Iterator[str]:
    length = loaded.config.data.sequence_length
    yield f"model        {loaded.facts.model_type}, {loaded.initialize} weights, task {loaded.config.model.task}"
    flops = cost.flops_per_token(length)
    yield f"parameters   {cost.parameters:,}; {flops:.3g} FLOPs a token, forward and backward, at {length} tokens"


def _tensor_lines(loaded: LoadedConfig, model: PreTrainedModel) -> Iterator[str]:
    parallel = loaded.config.parallel
    if parallel.tensor == 1:
        return
    plan = resolve_plan(model, parallel.tensor_plan, parallel.tensor, rank=0)
    replicated: dict[str, str] = {}
    for entry in plan.entries:
        if len(entry.shape) > 1 and not entry.is_sharded:
            replicated[wildcard_name(entry.name)] = entry.style.argument or str(entry.style)
    share = 100 * plan.sharded_fraction()
    exchange = "all-gathers and reduce-scatters" if parallel.sequence_parallel else "all-reduces"
    yield f"tensor       {share:.1f} % of the elements of matrices sharded over {parallel.tensor} ranks; {exchange}"
    for name, reason in replicated.items():
        yield f"  replicated: {name} ({reason})"
    styles = [style for target in plan.targets for style in target.styles]
    if any(isinstance(style, ParallelResidual) for style in styles) and has_active_dropout(model):
        yield "  separate all-reduces for attention and MLP, because dropout is active between them"


def _pipeline_lines(loaded: LoadedConfig, model: PreTrainedModel, assignment: StageAssignment | None) -> Iterator[str]:
    if assignment is None:
        return
    parallel, micro_batches = loaded.config.parallel, loaded.batch.accumulation_steps
    stages = f"{assignment.num_stages} stages on {assignment.ranks} ranks ({parallel.pipeline_schedule})"
    yield f"pipeline     {stages}, {micro_batches} micro-batches: a bubble of {parallel.bubble(micro_batches):.1%}"
    yield "  stage  rank  layers  share of FLOPs  parameters of the rank  sent for each micro-batch"
    rank_parameters = _parameters_by_rank(loaded, model, assignment)
    for row in assignment.rows(
        micro_batch=loaded.batch.micro_batch_size,
        length=loaded.config.data.sequence_length,
        element_bytes=4 if loaded.config.deepspeed.precision == "fp32" else 2,
        sequence_ranks=parallel.tensor if parallel.sequence_parallel else 1,
    ):
        traffic = ", ".join(f"{format_bytes(count)} ({name})" for name, count in row.boundary_bytes.items()) or "-"
        rank = assignment.rank_of_stage(row.stage)
        layers = f"{row.first_layer}-{row.end_layer - 1}"
        parameters = rank_parameters[rank]
        yield f"  {row.stage:5}  {rank:4}  {layers:>6}  {row.cost_share:14.1%}  {parameters:22,}  {traffic}"


def _parameters_by_rank(loaded: LoadedConfig, model: PreTrainedModel, assignment: StageAssignment | None) -> list[int]:
    """Return the number of parameters of each pipeline rank, on the first tensor rank, with padding."""
    parallel = loaded.config.parallel
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if parallel.tensor > 1:
        plan = resolve_plan(model, parallel.tensor_plan, parallel.tensor, rank=0)
        sizes = {p.name: sum(prod(shard.local_shape()) for shard in p.shards) for p in plan.entries}
    if assignment is None:
        return [sum(sizes.values())]
    rank_parameters = [0] * assignment.ranks
    for name, ranks in assignment.parameter_ranks(model).items():
        for rank in ranks:
            rank_parameters[rank] += sizes[name]
    return rank_parameters


def _group_lines(loaded: LoadedConfig, model: PreTrainedModel) -> Iterator[str]:
    decay = weight_decay(loaded.deepspeed_json)
    options = weight_options(model, loaded.config.training, decay=decay)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    members: dict[WeightOptions, list[int]] = {}
    for name, option in options.items():
        members.setdefault(option, []).append(sizes[name])
    if members.keys() == {WeightOptions()}:
        return
    for option, counts in sorted(members.items(), reverse=True):
        scale = "" if option.scale == 1 else f", learning rate x {option.scale:g}"
        rate = decay if option.decays else 0
        yield f"  {len(counts)} weights ({sum(counts):,} parameters): weight decay {rate:g}{scale}"


def _schedule_lines(loaded: LoadedConfig) -> Iterator[str]:
    section, steps = loaded.deepspeed_json.get("scheduler"), loaded.known_steps
    if section is None:
        return
    yield f"schedule     {section['type']} {section['params']}"
    if steps is None:
        return
    rates = first_learning_rates(loaded.deepspeed_json, min(steps, _INSPECTED_STEPS))
    zero_rate_steps = [step for step, rate in enumerate(rates, start=1) if rate == 0]
    if zero_rate_steps:
        plural = "s" if len(zero_rate_steps) > 1 else ""
        yield f"  the rate is 0 in step{plural} {_ranges(zero_rate_steps)}, which changes no weight"


def _ranges(numbers: list[int]) -> str:
    """Return ascending numbers in words: 1, 2 and 90 to 100."""
    parts: list[str] = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in group]
        parts += [f"{first} to {rest[-1]}"] if len(rest) > 1 else map(str, (first, *rest))
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _batch_lines(loaded: LoadedConfig) -> Iterator[str]:
    batch, config = loaded.batch, loaded.config
    tokens = batch.batch_size * config.data.sequence_length
    yield (
        f"batch        {batch.batch_size} samples a step = {batch.micro_batch_size} a micro-batch x "
        f"{batch.accumulation_steps} accumulated x {loaded.data_ranks} data ranks"
    )
    at_most = "" if config.data.packing == "concatenate" and config.data.drop_last else "at most "
    steps = loaded.known_steps
    frame = document_frame(loaded)
    shown = f'{frame} (data.special_tokens "{config.data.special_tokens}")' if frame else "as in the token files"
    yield f"documents    {shown}"
    total = "" if steps is None else f", {at_most}{tokens * steps:,} in {steps:,} steps"
    yield f"tokens       {at_most}{tokens:,} a step{total}"


def _memory_lines(loaded: LoadedConfig, model: PreTrainedModel, assignment: StageAssignment | None) -> Iterator[str]:
    section = loaded.config.deepspeed
    rank_parameters = _parameters_by_rank(loaded, model, assignment)
    states = state_bytes(
        max(rank_parameters),
        stage=section.zero_stage,
        data_ranks=loaded.data_ranks,
        half=section.precision != "fp32",
        moments=_moments(loaded),
    )
    weight_device = getattr(getattr(section.zero_optimization, "offload_param", None), "device", None) or "none"
    offloaded: tuple[str, ...] = ("master weights", "optimizer moments") if section.offload_device != "none" else ()
    offloaded += ("weights",) if weight_device != "none" else ()
    on_device = sum(size for name, size in states.items() if name not in offloaded)
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in states.items() if size)
    yield f"precision    {section.precision}, ZeRO {section.zero_stage}, clipping at {section.clipping}"
    largest = f"the devices of pipeline rank {rank_parameters.index(max(rank_parameters))}, the maximum"
    device = "each rank's device" if len(rank_parameters) == 1 else largest
    yield f"memory       {format_bytes(on_device)} of model states on {device} ({parts}), without activations"
    if offloaded:
        yield f"offloaded    {', '.join(offloaded)}"


def _data_lines(loaded: LoadedConfig, report: DataReport) -> Iterator[str]:
    about = "" if report.is_exact else "about "
    for source in report.sources:
        yield f"data         {source}"
    if report.epoch_samples is None or loaded.known_steps is None:
        yield "  the number of samples is known once the data are prepared"
        return
    read = loaded.known_steps * loaded.batch.batch_size
    epochs = f"{about}{read / report.epoch_samples:.2f} epochs of {about}{report.epoch_samples:,} samples"
    yield f"epochs       {loaded.known_steps:,} steps read {read:,} samples: {epochs}"


def _warnings(loaded: LoadedConfig, report: DataReport, device: list[Problem]) -> Iterator[str]:
    yield from (f"warning: refused on this machine: {problem}" for problem in device)
    for source in report.sources:
        if source.empty_files:
            shown = ", ".join(source.empty_files[:3]) + (", ..." if len(source.empty_files) > 3 else "")
            yield f"warning: {source.key}: {len(source.empty_files)} files contain no text: {shown}"
    yield from (f"warning: {problem}" for problem in loaded.warnings)


def _resume_lines(loaded: LoadedConfig) -> Iterator[str]:
    resumed = preview_resume(loaded)
    if resumed is not None:
        yield f"resume       from step {resumed.manifest.step:,} ({resumed.folder}); its files are complete by size"


def _checkpoint_line(loaded: LoadedConfig, cost: ModelCost) -> str:
    section = loaded.config.checkpoint
    interval = None if loaded.known_steps is None else section.interval(loaded.known_steps)
    every = "ten over the run and " if section.every_steps == "auto" else ""
    every = f"every {interval} steps and " if interval else every
    newest = f"the newest {section.keep_last} and the best {section.keep_best} kept"
    kept = "all kept" if section.keep_last is None else newest
    return f"checkpoint   {every}at the end; {format_bytes(_checkpoint_bytes(loaded, cost))} each, {kept}"


def _checkpoint_bytes(loaded: LoadedConfig, cost: ModelCost) -> int:
    return cost.parameters * 4 * (1 + _moments(loaded))


def _disk_lines(loaded: LoadedConfig, cost: ModelCost) -> Iterator[str]:
    """Yield a warning if the disk cannot hold another checkpoint, without which training would continue."""
    folder = Path(loaded.config.run.output_dir).expanduser().absolute()
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, size = shutil.disk_usage(existing).free, _checkpoint_bytes(loaded, cost)
    if free < size:
        shortage = f"{format_bytes(free)} free in {existing}, and a checkpoint takes {format_bytes(size)}"
        yield f"warning: run.output_dir: {shortage}. Free space, or choose another folder"


def _rank_lines(loaded: LoadedConfig) -> Iterator[str]:
    parallel = loaded.config.parallel
    sizes = f"pipeline {parallel.pipeline} x data {loaded.data_ranks} x tensor {parallel.tensor}"
    yield f"processes    {loaded.world_size} = {sizes}"
    yield "  rank  stage  data  tensor"
    for rank in range(min(loaded.world_size, _SHOWN_RANKS)):
        topology = Topology.of(loaded.world_size, rank, pipeline=parallel.pipeline, tensor=parallel.tensor)
        yield f"  {rank:4}  {topology.pipeline_rank:5}  {topology.data_rank:4}  {topology.tensor_rank:6}"
    if loaded.world_size > _SHOWN_RANKS:
        yield f"  ... and {loaded.world_size - _SHOWN_RANKS} more"


def describe(loaded: LoadedConfig) -> str:
    """Return a description of the run: ranks, parameters, batch arithmetic, memory of model states, data, epochs.

    Reads the first rows of the data, the headers of the weights, and the manifest of the checkpoint to resume from.

    Raises:
        ConfigError: The model cannot be built, its layers cannot be divided, or the run directory belongs to another
            run.
        DataError: The first rows are invalid.
        CheckpointError: The checkpoint to resume from is missing or damaged.
    """
    directory = RunDirectory.examine(loaded)
    report = inspect_data(loaded)
    if loaded.config.training.epochs is not None and report.epoch_samples is not None:
        loaded = with_steps(
            loaded, steps_for_epochs(loaded.config.training.epochs, report.epoch_samples, loaded.batch.batch_size)
        )
    device = device_problems(loaded, local_device())
    where = ", but not on this machine" if device else ""
    model = build_model(loaded)
    check_model(model, loaded)
    cost, assignment = model_cost(model), assign_stages(model, loaded)
    attention_to_recompute(model, loaded)
    optimizer, extensions = loaded.deepspeed_json["optimizer"], required_extensions(loaded.deepspeed_json)
    lines = [
        f"{loaded.name}: the configuration is valid{where}; nothing was started",
        *(
            [f"finished     at step {directory.finished_step}"]
            if directory.is_finished(loaded)
            else _resume_lines(loaded)
        ),
        *_model_lines(loaded, cost),
        *_batch_lines(loaded),
        *_data_lines(loaded, report),
        _checkpoint_line(loaded, cost),
        f"optimizer    {optimizer['type']} {optimizer.get('params', {})}"
        + (f" (DeepSpeed's {', '.join(extensions)})" if extensions else ""),
        *_group_lines(loaded, model),
        *_schedule_lines(loaded),
        *_memory_lines(loaded, model, assignment),
        *_tensor_lines(loaded, model),
        *_pipeline_lines(loaded, model, assignment),
        *_rank_lines(loaded),
        *_disk_lines(loaded, cost),
        *_warnings(loaded, report, device),
    ]
    return "\n".join(lines)
