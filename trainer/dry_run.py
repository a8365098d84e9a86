"""What a configuration would run: said by one process, before anything starts."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config import LoadedConfig
from trainer.config.deepspeed import extension_of
from trainer.model import ModelCost, build_model_shape, model_cost, state_bytes
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


def _batch_lines(loaded: LoadedConfig) -> Iterator[str]:
    batch, config = loaded.batch, loaded.config
    tokens = batch.train * config.data.sequence_length
    yield (f"batch        {batch.train} samples a step = {batch.micro} a micro-batch x {batch.accumulation} "
           f"accumulated x {loaded.data_ranks} data ranks")  # fmt: skip
    most = "" if config.data.packing == "concatenate" else "at most "
    steps = config.training.max_steps
    yield f"tokens       {most}{tokens:,} a step, {most}{tokens * steps:,} in {steps:,} steps"


def _memory_lines(loaded: LoadedConfig, cost: ModelCost) -> Iterator[str]:
    section = loaded.config.deepspeed
    states = state_bytes(
        cost.parameters,
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
    cost = model_cost(build_model_shape(loaded))
    optimizer = loaded.deepspeed_json["optimizer"]
    lines = [
        f"{loaded.name}: the configuration is sound; nothing was started",
        *_model_lines(loaded, cost),
        *_batch_lines(loaded),
        f"optimizer    {optimizer['type']} {optimizer.get('params', {})}"
        + (f" (DeepSpeed's {extension_of(loaded.deepspeed_json)})" if extension_of(loaded.deepspeed_json) else ""),
        *_memory_lines(loaded, cost),
        *_rank_lines(loaded),
        *(f"warning: {problem}" for problem in loaded.warnings),
    ]
    return "\n".join(lines)
