"""Compares every gradient of a family's sharded model with those of the plain Hugging Face model."""

from __future__ import annotations

import copy
import inspect
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tools.parity.dropout import disable_config_dropout, parts_of
from tools.parity.families import CLASSES, Family
from tools.parity.reference import auxiliary_loss, loss_sums
from tools.parity.shrink import MINIMAL, tiny
from tools.parity.stage_runner import PipelineStage, SingleStage
from trainer.config.causal_attention import make_causal
from trainer.distributed import Launch, World, joined_world
from trainer.errors import ConfigError
from trainer.pipeline import Stage, refuse_uses_on_other_stages, stage_bounds, trace_dataflow
from trainer.sharding import Shard, fill_remote_with_zeros, shard_of, wildcard_name
from trainer.tasks.cross_entropy import VocabularyCrossEntropy
from trainer.tensor_parallel import IdentityMapper, Mapper, Plan, TensorMapper, model_region, resolve_plan
from trainer.topology import Topology

BATCH, LENGTH = 2, 24
LARGEST = 20_000_000
"""Parameters that a tiny model may have at most."""

TOLERANCE = 1e-4
"""Largest difference of a gradient, as a share of the largest element of the reference's."""

NOISE = 1e-3
"""A difference of gradients is relative to at least this share of the model's largest gradient: where the true gradient
is zero (a key's bias), all of it is rounding."""


@dataclass
class Verdict:
    """The result for one family."""

    family: str
    ranks: int
    outcome: str
    """`right`; `partly` (right, and less than 90 % of the matrices in blocks sharded, or over 5 % without a gradient);
    `wrong`; `refused` (by the plan); `not built`."""

    reason: str = ""
    """Reason of a refusal, or of a wrong gradient."""

    share_cut: float = 0.0
    share_without_gradient: float = 0.0
    worst: float = 0.0
    worst_name: str = ""
    loss: tuple[float, float] = (0.0, 0.0)
    """Parameters of the plain and of the sharded model."""

    whole: dict[str, str] = field(default_factory=dict)
    """Replicated matrices in blocks, with the reason."""


_ENLARGED = 5.0
"""Factor on matrices for the proof of causality."""


class _NotBuilt(Exception):
    """The reason why there is no tiny model."""


def tiny_config(family: Family) -> PreTrainedConfig:
    """Return the configuration of a family's tiny model, causal and without dropout."""
    config = tiny(family.model_type, **family.fields)
    if family.task == "causal_lm":
        make_causal(config)
    disable_config_dropout(config)
    _return_router_logits(config)
    return config


def _return_router_logits(config: PreTrainedConfig) -> None:
    for part in parts_of(config):
        for key, value in (("output_router_logits", True), ("use_cache", False)):
            if key in vars(part):
                setattr(part, key, value)


def _signature(model: nn.Module) -> tuple[set[str], set[tuple[str, str]]]:
    names = {wildcard_name(name) for name, _ in model.named_parameters()}
    return names, {(wildcard_name(name), type(module).__name__) for name, module in model.named_modules()}


def reference_model(family: Family, *, like_default: bool = True) -> PreTrainedModel:
    """Return the family's tiny model, with random weights and no zero bias; the same on every rank.

    Args:
        family: Its row in the table.
        like_default: refuse one whose parameters and module classes are not those of the family's default.
    """
    try:
        config = tiny_config(family)
        auto_class = CLASSES[family.task]
        with torch.device("meta"):
            shape = auto_class.from_config(config)
            default = CONFIG_MAPPING[family.model_type](**(MINIMAL.get(family.model_type, {}) | family.fields))
            default_model = auto_class.from_config(default) if like_default else None
    except Exception as error:
        raise _NotBuilt(f"{type(error).__name__}: {error}".splitlines()[0]) from None
    if default_model is not None and _signature(default_model) != _signature(shape):
        differ = [a ^ b for a, b in zip(_signature(default_model), _signature(shape), strict=True)]
        raise _NotBuilt(f"differs from the default: {sorted(map(str, differ[0] | differ[1]))[:3]}")
    count = sum(parameter.numel() for parameter in shape.parameters())
    if count > LARGEST:
        raise _NotBuilt(f"{count:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = auto_class.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # DeepSeek-V4's table from tokens to experts, which is read from a checkpoint
                buffer.copy_(torch.randint_like(buffer, config.n_routed_experts))
    return model.train()


def prove_likeness(family: Family) -> Verdict:
    """Whether the tiny model has the layers of the family's default; `not built` where it has not."""
    try:
        reference_model(family)
    except _NotBuilt as error:
        return Verdict(str(family), 1, "not built", str(error))
    return Verdict(str(family), 1, "right")


@torch.no_grad()
def computes(family: Family) -> None:
    """Run the family's tiny model forward with Hugging Face's code only, and let its exceptions pass."""
    model = reference_model(family, like_default=False)
    model(**_inputs(family, model)[0])


@torch.no_grad()
def prove_causality(family: Family) -> Verdict:
    """Whether no logits of the plain model depend on later tokens, in float32.

    The weights are larger than usual random ones, with which ProphetNet's logits change by only 8e-8.
    """
    verdict = Verdict(str(family), 1, "right")
    try:
        model = reference_model(family, like_default=False).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(_ENLARGED)
        inputs, _ = _inputs(family, model)
        _seed_every_block(model)
        first = LENGTH - LENGTH // 4
        ids = inputs["input_ids"]
        later = ids.index_fill(1, torch.arange(first, LENGTH), int(ids.min()))
        before, after = (
            model(**inputs | {"input_ids": tokens}).logits[:, -LENGTH:][:, :first] for tokens in (ids, later)
        )
    except Exception as error:
        return replace(verdict, outcome="not built", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    changes = (after - before).abs().amax((0, 2)) / before.abs().max()
    verdict.worst = float(changes.max())
    if not verdict.worst <= TOLERANCE:
        position = int((~(changes <= TOLERANCE)).nonzero()[0])
        verdict.outcome, verdict.reason = "wrong", f"position {position} sees the tokens from position {first} on"
    return verdict


def _inputs(family: Family, model: PreTrainedModel) -> tuple[dict[str, Any], Tensor]:
    """Return random inputs, with those of cross attention, and random labels."""
    config = model.config
    vocabulary = config.get_text_config(decoder=True).vocab_size
    draw = torch.Generator().manual_seed(1)
    ids, more, labels = (torch.randint(5, vocabulary, (BATCH, LENGTH), generator=draw) for _ in range(3))
    inputs: dict[str, Any] = {"input_ids": ids}
    takes = inspect.signature(model.forward).parameters
    if family.task == "seq2seq_lm":
        inputs["decoder_input_ids"] = more
    if family.task == "causal_lm":
        crosses = any(part in name for name, _ in model.named_modules() for part in ("encoder_attn", "crossattention"))
        width = getattr(config, "cross_attention_hidden_size", None) or getattr(config, "hidden_size", 0)
        if "encoder_outputs" in takes:
            inputs["encoder_outputs"] = (torch.randn((BATCH, LENGTH, width), generator=draw),)
        elif "encoder_hidden_states" in takes and crosses:
            inputs["encoder_hidden_states"] = torch.randn((BATCH, LENGTH, width), generator=draw)
        if "pixel_values" in takes and family.model_type == "git":
            size = config.vision_config.image_size
            inputs["pixel_values"] = torch.randn((BATCH, 3, size, size), generator=draw)
    return inputs, labels


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's blocks: the members of module lists, by name."""
    return {
        f"{name}.{key}": block
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for key, block in stack.named_children()
    }


def _seed_every_block(model: nn.Module) -> None:
    """Seed each block's forward pass by its name, because a family may sample experts while it trains."""

    def seeded(seed: int) -> Callable[..., None]:
        def seeds(*_: Any) -> None:
            torch.manual_seed(seed)

        return seeds

    for name, block in blocks_of(model).items():
        block.register_forward_pre_hook(seeded(zlib.crc32(name.encode())))


def _staged(family: Family, cut: PreTrainedModel, world: World) -> tuple[Stage, dict[str, tuple[int, ...]]]:
    """Return this rank's stage, without remote weights, and the stages that hold each weight."""
    with torch.device("meta"):
        shape = type(cut)._from_config(copy.deepcopy(cut.config), attn_implementation="eager")  # noqa: SLF001
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), _inputs(family, shape)[0])
    dataflow = trace_dataflow(shape, inputs)
    refuse_uses_on_other_stages(shape, dataflow, trace_dataflow(shape, inputs, training=False))
    stage = Stage(
        cut, dataflow, stage_bounds([1.0] * len(dataflow.units), world.topology.pipeline), world.topology.pipeline_rank
    )
    return stage, stage.drop_remote_parameters()


@dataclass
class _ShardedModel:
    """This rank's copy of the family's model."""

    model: PreTrainedModel
    mapper: Mapper
    plan: Plan
    runner: SingleStage | PipelineStage


def _compare(
    family: Family, plain: PreTrainedModel, sharded: _ShardedModel, topology: Topology, more: dict[str, Tensor]
) -> Verdict:
    """Run both models forward and backward, and compare this rank's shard of each gradient with the plain one.

    Collective: all ranks must call it.
    """
    inputs, labels = _inputs(family, plain)
    inputs |= more
    for model in (plain, sharded.model):
        _seed_every_block(model)
    plain_loss = _plain_loss(plain, inputs, labels)
    plain_loss.backward()  # type: ignore[no-untyped-call]
    cross_entropy = VocabularyCrossEntropy(shard=sharded.mapper.vocabulary_shard())

    def compute() -> Tensor:
        output = sharded.model(**inputs)
        objective = cross_entropy(output.logits[:, -LENGTH:], labels).objective / labels.numel()
        return objective + auxiliary_loss(sharded.model, output)

    stage_loss = sharded.runner.loss(compute)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    floor = NOISE * max(float(g.abs().max()) for g in gradients.values() if g is not None)
    if not (math.isfinite(floor) and bool(plain_loss.isfinite())):
        raise _NotBuilt("Hugging Face's own model computes a loss or a gradient that is not finite")
    worst = _largest(_gradient_errors(sharded.model, gradients, floor), topology.world_size)
    losses = (float(plain_loss.detach()), float(sum(sharded.runner.reports(stage_loss))))
    verdict = Verdict(str(family), topology.world_size, "right", loss=losses)
    verdict.worst_name, verdict.worst = max(worst.items(), key=lambda item: item[1])
    _describe_plan(verdict, plain, sharded.plan)
    trained = {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    _judge(verdict, worst, trained, is_sharded=topology.tensor > 1)
    return verdict


def _plain_loss(model: PreTrainedModel, inputs: dict[str, Any], labels: Tensor) -> Tensor:
    try:
        output = model(**inputs)
    except Exception as error:  # sizes that the constructor accepts and the forward pass cannot compute
        raise _NotBuilt(f"Hugging Face's own model fails: {type(error).__name__}: {error}".splitlines()[0]) from None
    _, objective = loss_sums(output.logits[:, -LENGTH:], labels)  # after the tokens of an image
    return objective / labels.numel() + auxiliary_loss(model, output)


def _gradient_errors(model: nn.Module, gradients: dict[str, Tensor | None], floor: float) -> dict[str, float]:
    """Return the largest difference of each local gradient, as a share of the plain one's largest element."""
    errors: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter) or Shard.full(name, parameter.shape, owner=True)
        if not parameter.requires_grad:
            continue
        plain = gradients[shard.name]
        expected = torch.zeros(shard.full_shape) if plain is None else plain
        actual = torch.zeros(shard.local_shape()) if parameter.grad is None else parameter.grad
        error = float((actual - shard.extract(expected)).abs().max()) / max(float(expected.abs().max()), floor)
        # A weight may be in several parameters, and a maximum ignores NaN.
        errors[shard.name] = max(errors.get(shard.name, 0.0), error if math.isfinite(error) else math.inf)
    return errors


def _largest(errors: dict[str, float], world_size: int) -> dict[str, float]:
    """Return the largest error of each name over all ranks. Collective: all ranks must call it."""
    gathered: list[dict[str, float]] = [{}] * world_size
    dist.all_gather_object(gathered, errors)
    names = {name for of_rank in gathered for name in of_rank}
    return {name: max(of_rank.get(name, 0.0) for of_rank in gathered) for name in names}


def _describe_plan(verdict: Verdict, plain: PreTrainedModel, plan: Plan) -> None:
    blocks = blocks_of(plain)
    verdict.share_cut = plan.sharded_fraction(blocks)
    verdict.share_without_gradient = _share_without_gradient(plain)
    verdict.whole = {
        wildcard_name(entry.name): entry.style.argument or str(entry.style)
        for entry in plan.entries
        if len(entry.shape) > 1 and not entry.is_sharded and any(entry.name.startswith(f"{block}.") for block in blocks)
    }


def _judge(verdict: Verdict, worst: dict[str, float], trained: set[str], *, is_sharded: bool) -> None:
    wrong = {wildcard_name(name) for name, error in worst.items() if not error <= TOLERANCE}
    wrong |= trained - worst.keys()
    if wrong or not abs(verdict.loss[0] - verdict.loss[1]) <= TOLERANCE * abs(verdict.loss[0]):
        verdict.outcome, verdict.reason = "wrong", ", ".join(sorted(wrong)[:4])
    elif (is_sharded and verdict.share_cut < 0.9) or verdict.share_without_gradient > 0.05:
        verdict.outcome = "partly"


def _share_without_gradient(model: nn.Module) -> float:
    """Return the share of parameter elements without a gradient; experts without tokens do not count."""
    outcome_counts = {
        n: p for n, p in model.named_parameters() if p.grad is not None or not re.search(r"experts\.\d+\.", n)
    }
    none = sum(p.numel() for p in outcome_counts.values() if p.grad is None or not bool(p.grad.any()))
    return none / max(1, sum(p.numel() for p in outcome_counts.values()))


def prove(
    families: list[Family],
    user: dict[str, str] | None = None,
    *,
    like_default: bool = True,
    sequence_parallel: bool = False,
    pipeline: int = 1,
    dtype: torch.dtype = torch.float32,
    more: dict[str, Tensor] | None = None,
) -> list[Verdict]:
    """Compare the gradients of each family's sharded model with the plain one's. Collective: all ranks must call it.

    Args:
        families: Families to compare.
        user: Entries of a tensor plan, as in `parallel.tensor_plan`.
        like_default: Refuse tiny models whose layers differ from the family's default.
        sequence_parallel: Whether to shard the sequence.
        pipeline: Number of stages; the ranks of a stage are one tensor group.
        dtype: In float64, a family without float32 computations agrees to 1e-9.
        more: Inputs of the models in addition to the usual ones.
    """
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, tensor=launch.world_size // pipeline, pipeline=pipeline)
    with joined_world(launch, topology, seed=1) as world:
        verdicts = []
        for family in families:
            try:
                plain = reference_model(family, like_default=like_default).to(dtype)
                sharded = _shard(family, copy.deepcopy(plain), world, user or {}, sequence_parallel=sequence_parallel)
                verdicts.append(_compare(family, plain, sharded, topology, more or {}))
            except _NotBuilt as error:
                verdicts.append(Verdict(str(family), topology.world_size, "not built", str(error)))
            except ConfigError as error:
                verdicts.append(Verdict(str(family), topology.world_size, "refused", str(error.problems[0])))
        return verdicts


def _shard(
    family: Family, model: PreTrainedModel, world: World, user: dict[str, str], *, sequence_parallel: bool
) -> _ShardedModel:
    """Make a model this rank's shard of its stage. Collective: all ranks must call it."""
    topology = world.topology
    plan: Plan = Plan([], [], {})
    mapper: Mapper = IdentityMapper()
    if topology.tensor > 1:
        plan = resolve_plan(model, user, topology.tensor, topology.tensor_rank)
        region = model_region(model, world.groups.of("tensor"), topology.tensor, topology.tensor_rank)
        mapper = TensorMapper(model, plan, region, world.groups.tensor_subgroup, sequence_parallel=sequence_parallel)
    stage, parameter_ranks = _staged(family, model, world) if topology.pipeline > 1 else (None, {})
    mapper.shard_parameters(model.parameters())
    mapper.install()
    if stage is None:
        return _ShardedModel(model, mapper, plan, SingleStage())
    stage.install()
    fill_remote_with_zeros(model, torch.device("cpu"), next(model.parameters()).dtype)
    return _ShardedModel(model, mapper, plan, PipelineStage(model, stage, parameter_ranks, world))


def outcome_counts(verdicts: list[Verdict]) -> Iterator[str]:
    """Yield the number of families of each outcome, in words."""
    for outcome in ("right", "partly", "wrong", "refused", "not built"):
        yield f"{sum(v.outcome == outcome for v in verdicts)} {outcome}"
