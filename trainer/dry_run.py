"""What a configuration would run: said by one process, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.config import LoadedConfig
from trainer.config.deepspeed import extension_of
from trainer.model import ModelCost, build_model_shape, model_cost, state_bytes
from trainer.parallel import drops, read_plan, starred
from trainer.topology import Topology

_ONE_MOMENT = ("lion", "adagrad", "muon", "rmsprop", "asgd", "adafactor")
_SHOWN_RANKS = 16


def _moments(loaded: LoadedConfig) -> int:
    optimizer = loaded.deepspeed_json["optimizer"]
    name = optimizer["type"].lower()
    if name == "sgd":
        return 1 if optimizer.get("params", {}).get("momentum") else 0
    return 1 if name in _ONE_MOMENT else 2


def _gib(size: float) -> str:
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
    whole: dict[str, str] = {}
    for placement in plan.placements:
        if len(placement.shape) > 1 and not placement.is_cut:
            whole[starred(placement.name)] = placement.style.argument or str(placement.style)
    share = 100 * plan.share_cut()
    exchange = "all-gathers and reduce-scatters" if parallel.sequence_parallel else "all-reduces"
    yield f"tensor       {parallel.tensor} ranks share {share:.1f} % of the matrices' elements; {exchange} between them"
    for name, reason in whole.items():
        yield f"  whole: {name} ({reason})"
    if any(style.word == "parallel_residual" for at in plan.modules for style in at.styles) and drops(model):
        yield "  attention and MLP are summed apart, because dropout is active between them"


def _batch_lines(loaded: LoadedConfig) -> Iterator[str]:
    batch, config = loaded.batch, loaded.config
    tokens = batch.train * config.data.sequence_length
    yield (f"batch        {batch.train} samples a step = {batch.micro} a micro-batch x {batch.accumulation} "
           f"accumulated x {loaded.data_ranks} data ranks")  # fmt: skip
    most = "" if config.data.packing == "concatenate" else "at most "
    steps = config.training.max_steps
    yield f"tokens       {most}{tokens:,} a step, {most}{tokens * steps:,} in {steps:,} steps"


def _memory_lines(loaded: LoadedConfig, model: Any) -> Iterator[str]:
    section, parallel = loaded.config.deepspeed, loaded.config.parallel
    held = read_plan(model, parallel.tensor_plan, parallel.tensor, rank=0).held if parallel.tensor > 1 else None
    states = state_bytes(
        model_cost(model).parameters if held is None else held,
        stage=section.zero_stage,
        data_ranks=loaded.data_ranks,
        half=section.precision != "fp32",
        moments=_moments(loaded),
    )
    parameters = getattr(getattr(section.zero_optimization, "offload_param", None), "device", None) or "none"
    offloaded: tuple[str, ...] = ("master weights", "optimizer moments") if section.offload_device != "none" else ()
    offloaded += ("weights",) if parameters != "none" else ()
    on_device = sum(size for name, size in states.items() if name not in offloaded)
    parts = ", ".join(f"{name} {_gib(size)}" for name, size in states.items() if size)
    yield f"precision    {section.precision}, ZeRO {section.zero_stage}, clipping at {section.clipping}"
    yield f"memory       {_gib(on_device)} of model states on each rank's device ({parts}); activations come on top"
    if offloaded:
        yield f"offloaded    {', '.join(offloaded)}"


def _rank_lines(loaded: LoadedConfig) -> Iterator[str]:
    parallel = loaded.config.parallel
    sizes = f"pipeline {parallel.pipeline} x data {loaded.data_ranks} x tensor {parallel.tensor}"
    yield f"processes    {loaded.world} = {sizes}"
    yield "  rank  stage  data  tensor"
    for rank in range(min(loaded.world, _SHOWN_RANKS)):
        place = Topology.of(loaded.world, rank, pipeline=parallel.pipeline, tensor=parallel.tensor)
        yield f"  {rank:4}  {place.stage:5}  {place.data_rank:4}  {place.tensor_rank:6}"
    if loaded.world > _SHOWN_RANKS:
        yield f"  ... and {loaded.world - _SHOWN_RANKS} more"


def describe(loaded: LoadedConfig) -> str:
    """The rank grid, parameters, batch arithmetic, memory of model states, tokens a step.

    Raises:
        ConfigError: if transformers refuses to build the model.
    """
    model = build_model_shape(loaded)
    cost = model_cost(model)
    optimizer = loaded.deepspeed_json["optimizer"]
    lines = [
        f"{loaded.name}: the configuration is sound; nothing was started",
        *_model_lines(loaded, cost),
        *_batch_lines(loaded),
        f"optimizer    {optimizer['type']} {optimizer.get('params', {})}"
        + (f" (DeepSpeed's {extension_of(loaded.deepspeed_json)})" if extension_of(loaded.deepspeed_json) else ""),
        *_memory_lines(loaded, model),
        *_tensor_lines(loaded, model),
        *_rank_lines(loaded),
        *(f"warning: {problem}" for problem in loaded.warnings),
    ]
    return "\n".join(lines)
