"""What a configuration would run: said by one process, before anything starts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from trainer.checkpoint import preview_resume
from trainer.config import LoadedConfig
from trainer.config.deepspeed import first_learning_rates, required_extensions, weight_decay
from trainer.config.load import device_problems, with_steps
from trainer.data import document_frame
from trainer.data.epochs import steps_for_epochs
from trainer.data.inspection import DataReport, inspect_data
from trainer.distributed import local_device
from trainer.errors import Problem
from trainer.model import ModelCost, WeightOptions, build_model_shape, model_cost, state_bytes, weight_options
from trainer.pipeline import StageAssignment, assign_stages
from trainer.run_directory import RunDirectory
from trainer.sharding import wildcard_name
from trainer.tensor_parallel import has_active_dropout, read_plan
from trainer.tensor_parallel.styles import ParallelResidual
from trainer.topology import Topology

_ONE_MOMENT = ("lion", "adagrad", "muon", "rmsprop", "asgd", "adafactor")
_SHOWN_RANKS = 16
_INSPECTED_STEPS = 1000
"""In how many steps a schedule's zeros are looked for."""


def _moments(loaded: LoadedConfig) -> int:
    optimizer = loaded.deepspeed_json["optimizer"]
    name = optimizer["type"].lower()
    if name == "sgd":
        return 1 if optimizer.get("params", {}).get("momentum") else 0
    return 1 if name in _ONE_MOMENT else 2


def _format_bytes(size: float) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _model_lines(loaded: LoadedConfig, cost: ModelCost) -> Iterator[str]:
    length = loaded.config.data.sequence_length
    yield f"model        {loaded.facts.model_type}, {loaded.initialize} weights, task {loaded.config.model.task}"
    yield (f"parameters   {cost.parameters:,}; {cost.flops_per_token(length):.3g} FLOPs a token, forward and "
           f"backward, at {length} tokens")  # fmt: skip


def _tensor_lines(loaded: LoadedConfig, model: Any) -> Iterator[str]:
    parallel = loaded.config.parallel
    if parallel.tensor == 1:
        return
    plan = read_plan(model, parallel.tensor_plan, parallel.tensor, rank=0)
    replicated: dict[str, str] = {}
    for entry in plan.entries:
        if len(entry.shape) > 1 and not entry.is_sharded:
            replicated[wildcard_name(entry.name)] = entry.style.argument or str(entry.style)
    share = 100 * plan.sharded_fraction()
    exchange = "all-gathers and reduce-scatters" if parallel.sequence_parallel else "all-reduces"
    yield f"tensor       {parallel.tensor} ranks share {share:.1f} % of the matrices' elements; {exchange} between them"
    for name, reason in replicated.items():
        yield f"  whole: {name} ({reason})"
    if any(
        isinstance(style, ParallelResidual) for target in plan.targets for style in target.styles
    ) and has_active_dropout(model):
        yield "  attention and MLP are summed apart, because dropout is active between them"


def _pipeline_lines(loaded: LoadedConfig, model: Any, assignment: StageAssignment) -> Iterator[str]:
    if assignment.dataflow is None:
        return
    parallel, micro_batches = loaded.config.parallel, loaded.batch.accumulation_steps
    size = 4 if loaded.config.deepspeed.precision == "fp32" else 2
    bubble = parallel.bubble(micro_batches)
    yield (f"pipeline     {assignment.stages} stages on {assignment.ranks} ranks ({parallel.pipeline_schedule}), "
           f"{micro_batches} micro-batches: a rank waits for {bubble:.1%} of the time")  # fmt: skip
    yield "  stage  rank  layers  share of FLOPs  parameters of the rank  sent of each micro-batch"
    rank_parameters = _parameters_by_rank(loaded, model, assignment)
    ranks = parallel.tensor if parallel.sequence_parallel else 1
    length = loaded.config.data.sequence_length
    for stage, first, end, share, boundary_bytes in assignment.table(
        loaded.batch.micro_batch_size, length, size, ranks
    ):
        traffic = ", ".join(f"{_format_bytes(count)} ({name})" for name, count in boundary_bytes.items()) or "-"
        rank = assignment.rank_of_stage(stage)
        yield f"  {stage:5}  {rank:4}  {f'{first}-{end - 1}':>6}  {share:14.1%}  {rank_parameters[rank]:22,}  {traffic}"


def _parameters_by_rank(loaded: LoadedConfig, model: Any, assignment: StageAssignment) -> list[int]:
    """Parameters that each rank of the pipeline holds; the first tensor rank's, padding included."""
    parallel = loaded.config.parallel
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if parallel.tensor > 1:
        plan = read_plan(model, parallel.tensor_plan, parallel.tensor, rank=0)
        sizes = {p.name: sum(prod(shard.local_shape()) for shard in p.shards) for p in plan.entries}
    rank_parameters = [0] * assignment.ranks
    for name, ranks in assignment.parameter_ranks(model).items():
        for rank in ranks:
            rank_parameters[rank] += sizes[name]
    return rank_parameters


def _group_lines(loaded: LoadedConfig, model: Any) -> Iterator[str]:
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
        yield (f"  {len(counts)} weights ({sum(counts):,} parameters): weight decay "
               f"{decay if option.decays else 0:g}{scale}")  # fmt: skip


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
        yield f"  the rate is 0 in step{plural} {_ranges(zero_rate_steps)}: nothing is learned there"


def _ranges(numbers: list[int]) -> str:
    """Ascending numbers in words: 1, 2 and 90 to 100."""
    parts: list[str] = []
    for _, group in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        first, *rest = [number for _, number in group]
        parts += [f"{first} to {rest[-1]}"] if len(rest) > 1 else map(str, (first, *rest))
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def _batch_lines(loaded: LoadedConfig) -> Iterator[str]:
    batch, config = loaded.batch, loaded.config
    tokens = batch.batch_size * config.data.sequence_length
    yield (f"batch        {batch.batch_size} samples a step = {batch.micro_batch_size} a micro-batch x "
           f"{batch.accumulation_steps} "
           f"accumulated x {loaded.data_ranks} data ranks")  # fmt: skip
    at_most = "" if config.data.packing == "concatenate" and config.data.drop_last else "at most "
    steps = loaded.known_steps
    frame = document_frame(loaded)
    shown = f'{frame} (data.special_tokens "{config.data.special_tokens}")' if frame else "as the token files hold them"
    yield f"documents    {shown}"
    total = "" if steps is None else f", {at_most}{tokens * steps:,} in {steps:,} steps"
    yield f"tokens       {at_most}{tokens:,} a step{total}"


def _memory_lines(loaded: LoadedConfig, model: Any, assignment: StageAssignment) -> Iterator[str]:
    section = loaded.config.deepspeed
    rank_parameters = _parameters_by_rank(loaded, model, assignment)
    states = state_bytes(
        max(rank_parameters),
        stage=section.zero_stage,
        data_ranks=loaded.data_ranks,
        half=section.precision != "fp32",
        moments=_moments(loaded),
    )
    parameters = getattr(getattr(section.zero_optimization, "offload_param", None), "device", None) or "none"
    offloaded: tuple[str, ...] = ("master weights", "optimizer moments") if section.offload_device != "none" else ()
    offloaded += ("weights",) if parameters != "none" else ()
    on_device = sum(size for name, size in states.items() if name not in offloaded)
    parts = ", ".join(f"{name} {_format_bytes(size)}" for name, size in states.items() if size)
    yield f"precision    {section.precision}, ZeRO {section.zero_stage}, clipping at {section.clipping}"
    whose = (
        "each rank's device"
        if len(rank_parameters) == 1
        else f"the devices of pipeline rank {rank_parameters.index(max(rank_parameters))}, the most"
    )
    yield f"memory       {_format_bytes(on_device)} of model states on {whose} ({parts}); activations come on top"
    if offloaded:
        yield f"offloaded    {', '.join(offloaded)}"


def _data_lines(loaded: LoadedConfig, report: DataReport) -> Iterator[str]:
    about = "" if report.is_exact else "about "
    for source in report.sources:
        yield f"data         {source}"
    if report.epoch_samples is None or loaded.known_steps is None:
        yield "  the number of samples is not known before the data are prepared"
        return
    read = loaded.known_steps * loaded.batch.batch_size
    yield (f"epochs       {loaded.known_steps:,} steps read {read:,} samples: {about}{read / report.epoch_samples:.2f} "
           f"epochs of {about}{report.epoch_samples:,} samples")  # fmt: skip


def _warnings(loaded: LoadedConfig, report: DataReport, device: list[Problem]) -> Iterator[str]:
    yield from (f"warning: on this machine it would be refused: {problem}" for problem in device)
    for source in report.sources:
        if source.empty_files:
            shown = ", ".join(source.empty_files[:3]) + (", ..." if len(source.empty_files) > 3 else "")
            yield f"warning: {source.key}: no text in {len(source.empty_files)} files: {shown}"
    yield from (f"warning: {problem}" for problem in loaded.warnings)


def _resume_lines(loaded: LoadedConfig) -> Iterator[str]:
    resumed = preview_resume(loaded)
    if resumed is not None:
        yield f"resume       from step {resumed.manifest.step:,} ({resumed.folder}); its files are there, in full size"


def _checkpoint_line(loaded: LoadedConfig, cost: ModelCost) -> str:
    section = loaded.config.checkpoint
    interval = None if loaded.known_steps is None else section.interval(loaded.known_steps)
    every = "ten over the run and " if section.every_steps == "auto" else ""
    every = f"every {interval} steps and " if interval else every
    kept = (
        "all kept"
        if section.keep_last is None
        else f"the newest {section.keep_last} and the best {section.keep_best} kept"
    )
    return f"checkpoint   {every}at the end; {_format_bytes(_checkpoint_bytes(loaded, cost))} each, {kept}"


def _checkpoint_bytes(loaded: LoadedConfig, cost: ModelCost) -> int:
    return cost.parameters * 4 * (1 + _moments(loaded))


def _disk_lines(loaded: LoadedConfig, cost: ModelCost) -> Iterator[str]:
    """A warning where the disk cannot hold one checkpoint more: training would go on without."""
    folder = Path(loaded.config.run.output_dir).expanduser().absolute()
    place = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, size = shutil.disk_usage(place).free, _checkpoint_bytes(loaded, cost)
    if free < size:
        yield (
            f"warning: run.output_dir: {_format_bytes(free)} free in {place}, and a checkpoint takes "
            f"{_format_bytes(size)}. Free space, "
            "or take another folder"
        )


def _rank_lines(loaded: LoadedConfig) -> Iterator[str]:
    parallel = loaded.config.parallel
    sizes = f"pipeline {parallel.pipeline} x data {loaded.data_ranks} x tensor {parallel.tensor}"
    yield f"processes    {loaded.world_size} = {sizes}"
    yield "  rank  stage  data  tensor"
    for rank in range(min(loaded.world_size, _SHOWN_RANKS)):
        place = Topology.of(loaded.world_size, rank, pipeline=parallel.pipeline, tensor=parallel.tensor)
        yield f"  {rank:4}  {place.stage:5}  {place.data_rank:4}  {place.tensor_rank:6}"
    if loaded.world_size > _SHOWN_RANKS:
        yield f"  ... and {loaded.world_size - _SHOWN_RANKS} more"


def describe(loaded: LoadedConfig) -> str:
    """The rank grid, parameters, batch arithmetic, memory of model states, documents, tokens, epochs.

    Looks at the first rows of the data, the headers of the weights, and the checkpoint to resume from.

    Raises:
        ConfigError: if transformers refuses to build the model, its layers cannot be divided, or the run directory is
            another run's. DataError: something wrong in the first rows. CheckpointError: nothing to resume from.
    """
    directory = RunDirectory.examine(loaded)
    report = inspect_data(loaded)
    if loaded.config.training.epochs is not None and report.epoch_samples is not None:
        loaded = with_steps(
            loaded, steps_for_epochs(loaded.config.training.epochs, report.epoch_samples, loaded.batch.batch_size)
        )
    device = device_problems(loaded, local_device())
    where = ", but not on this machine" if device else ""
    model = build_model_shape(loaded)
    cost, assignment = model_cost(model), assign_stages(model, loaded)
    optimizer, extensions = loaded.deepspeed_json["optimizer"], required_extensions(loaded.deepspeed_json)
    lines = [
        f"{loaded.name}: the configuration is sound{where}; nothing was started",
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
