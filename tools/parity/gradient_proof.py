"""Every gradient of a family's cut model, compared with a plain Hugging Face model that never saw our code."""

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
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tools.parity.families import CLASSES, Family
from tools.parity.shrink import MINIMAL, tiny
from trainer.config.causal_attention import make_causal
from trainer.distributed import Launch, World, joined_world
from trainer.errors import ConfigError
from trainer.pipeline import Stage, refuse_uses_on_other_stages, shared_parameters, stage_bounds, trace_dataflow
from trainer.sharding import Shard, fill_remote_with_zeros, shard_of, wildcard_name
from trainer.tasks import auxiliary_coefficient
from trainer.tensor_parallel import IdentityMapper, Mapper, Plan, TensorMapper, read_plan
from trainer.topology import Topology

BATCH, LENGTH = 2, 24
LARGEST = 20_000_000
"""Parameters that a tiny model may have at most."""

TOLERANCE = 1e-4
"""Largest difference of a gradient, as a share of the largest element of the reference's."""

NOISE = 1e-3
"""A gradient smaller than this share of the model's largest is held against that: where the true gradient is zero
(a key's bias), all of it is rounding."""


@dataclass
class Verdict:
    """What was found about one family."""

    family: str
    ranks: int
    outcome: str
    """`right`; `partly` (right, and less than 90 % of the matrices in blocks cut, or over 5 % without a gradient);
    `wrong`; `refused` (by the plan); `not built`."""

    reason: str = ""
    """Of a refusal or a wrong gradient."""

    share_cut: float = 0.0
    share_without_gradient: float = 0.0
    worst: float = 0.0
    worst_name: str = ""
    loss: tuple[float, float] = (0.0, 0.0)
    """Of the plain model and of the cut one."""

    whole: dict[str, str] = field(default_factory=dict)
    """Matrices in blocks that stay whole, with the reason."""


_ENLARGED = 5.0
"""What matrices are multiplied by where causality is proven."""


class _NotBuilt(Exception):
    """Why there is no tiny model."""


def tiny_config(family: Family) -> PreTrainedConfig:
    """The configuration of a family's tiny model, as the proof trains it: causal, and without dropout."""
    config = tiny(family.model_type, **family.fields)
    if family.task == "causal_lm":
        make_causal(config)
    _without_dropout(config)
    return config


def _without_dropout(config: Any) -> None:
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for part in (config, *parts):
        for key, value in list(vars(part).items()) if part is not None else []:
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
            if key == "output_router_logits":
                setattr(part, key, True)
            if key == "use_cache":
                setattr(part, key, False)


def _signature(model: nn.Module) -> tuple[set[str], set[tuple[str, str]]]:
    names = {wildcard_name(name) for name, _ in model.named_parameters()}
    return names, {(wildcard_name(name), type(module).__name__) for name, module in model.named_modules()}


def reference_model(family: Family, *, like_default: bool = True) -> PreTrainedModel:
    """The family's tiny model, with random weights that leave no bias at zero; the same on every rank.

    Args:
        like_default: refuse one whose parameters and module classes are not those of the family's default.
    """
    try:
        config = tiny_config(family)
        kind = CLASSES[family.task]
        with torch.device("meta"):
            shape = kind.from_config(config)
            default = CONFIG_MAPPING[family.model_type](**(MINIMAL.get(family.model_type, {}) | family.fields))
            whole = kind.from_config(default) if like_default else None
    except Exception as error:
        raise _NotBuilt(f"{type(error).__name__}: {error}".splitlines()[0]) from None
    if whole is not None and _signature(whole) != _signature(shape):
        differ = [a ^ b for a, b in zip(_signature(whole), _signature(shape), strict=True)]
        raise _NotBuilt(f"differs from the default: {sorted(map(str, differ[0] | differ[1]))[:3]}")
    count = sum(parameter.numel() for parameter in shape.parameters())
    if count > LARGEST:
        raise _NotBuilt(f"{count:,} parameters")
    torch.manual_seed(0)
    model: PreTrainedModel = kind.from_config(config, attn_implementation="eager")
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
    """Runs the family's tiny model forward, by Hugging Face's own code alone; raises what that raises."""
    model = reference_model(family, like_default=False)
    model(**_inputs(family, model)[0])


@torch.no_grad()
def prove_causality(family: Family) -> Verdict:
    """Whether no logits of the plain model depend on later tokens, in float32.

    The weights are larger than random ones usually are: with those, ProphetNet's logits change by 8e-8 only.
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
        before, after = (model(**inputs | {"input_ids": own}).logits[:, -LENGTH:][:, :first] for own in (ids, later))
    except Exception as error:
        return replace(verdict, outcome="not built", reason=f"{type(error).__name__}: {error}".splitlines()[0])
    changes = (after - before).abs().amax((0, 2)) / before.abs().max()
    verdict.worst = float(changes.max())
    if not verdict.worst <= TOLERANCE:
        at = int((~(changes <= TOLERANCE)).nonzero()[0])
        verdict.outcome, verdict.reason = "wrong", f"position {at} sees the tokens from position {first} on"
    return verdict


def _inputs(family: Family, model: PreTrainedModel) -> tuple[dict[str, Any], Tensor]:
    """What the model is given, and the labels: random ids, and what a decoder attends to beside its own."""
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


def _auxiliary(model: PreTrainedModel, output: Any) -> Tensor | float:
    loss = getattr(output, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return 0.0
    return loss * auxiliary_coefficient(model.config)


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """The model's blocks: what lies in a list of modules."""
    return {
        f"{name}.{key}": block
        for name, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList)
        for key, block in stack.named_children()
    }


def _seed_every_block(model: nn.Module) -> None:
    """Lets each block draw the same numbers wherever it runs: a family may sample experts while it trains."""

    def seeded(seed: int) -> Callable[..., None]:
        def seeds(*_: Any) -> None:
            torch.manual_seed(seed)

        return seeds

    for name, block in blocks_of(model).items():
        block.register_forward_pre_hook(seeded(zlib.crc32(name.encode())))


class _SingleStage:
    """The whole model on every tensor rank."""

    is_last = True

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        """Forward and backward; the loss, detached."""
        loss = compute()
        loss.backward()
        return loss.detach()

    def reports(self, report: Any) -> list[Any]:
        """What the stages have to say, each its own."""
        return [report]


class _PipelineStage:
    """One stage of a model, which speaks with its neighbours."""

    def __init__(
        self, model: PreTrainedModel, stage: Stage, parameter_ranks: dict[str, tuple[int, ...]], world: World
    ) -> None:
        self._stage, self._world = stage, world
        self._shared = list(shared_parameters([model], parameter_ranks, world))
        self._ranks = world.topology.ranks_of("pipeline")
        self.is_last = stage.is_last

    def loss(self, compute: Callable[[], Tensor]) -> Tensor:
        received = () if self._stage.is_first else self._receive(self._stage.number - 1)
        result = self._stage.run(compute, tuple(tensor.clone() for tensor in received))  # as DeepSpeed does
        if isinstance(result, Tensor):
            result.backward()
        else:
            self._send(result, self._stage.number + 1)
            real = tuple(tensor for tensor in result if tensor.is_floating_point())
            torch.autograd.backward(real, self._receive(self._stage.number + 1))
        if received:
            real = tuple(tensor for tensor in received if tensor.is_floating_point())
            gradients = tuple(torch.zeros_like(t) if t.grad is None else t.grad.contiguous() for t in real)
            self._send(gradients, self._stage.number - 1)
        for parameter, group in self._shared:
            dist.all_reduce(parameter.grad, group=group)
        return result.detach() if isinstance(result, Tensor) else torch.zeros(())

    def reports(self, report: Any) -> list[Any]:
        found: list[Any] = [None] * len(self._ranks)
        dist.all_gather_object(found, report, group=self._world.groups.of("pipeline"))
        return found

    def _send(self, tensors: tuple[Tensor, ...], stage: int) -> None:
        shapes = [(tuple(tensor.shape), tensor.dtype) for tensor in tensors]
        dist.send_object_list([shapes], self._ranks[stage])
        for tensor in tensors:
            dist.send(tensor.detach(), self._ranks[stage])

    def _receive(self, stage: int) -> tuple[Tensor, ...]:
        box: list[Any] = [None]
        dist.recv_object_list(box, self._ranks[stage])
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in box[0]]
        for tensor in tensors:
            dist.recv(tensor, self._ranks[stage])
        return tuple(tensor.requires_grad_(tensor.is_floating_point()) for tensor in tensors)


def _staged(family: Family, cut: PreTrainedModel, world: World) -> tuple[Stage, dict[str, tuple[int, ...]]]:
    """This rank's stage of a model, its weights elsewhere gone; and the stages that hold each weight."""
    with torch.device("meta"):
        shape = type(cut)._from_config(copy.deepcopy(cut.config), attn_implementation="eager")
    inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), _inputs(family, shape)[0])
    dataflow = trace_dataflow(shape, inputs)
    refuse_uses_on_other_stages(shape, dataflow, trace_dataflow(shape, inputs, training=False))
    stage = Stage(
        cut, dataflow, stage_bounds([1.0] * len(dataflow.units), world.topology.pipeline), world.topology.stage
    )
    return stage, stage.drop_remote_parameters()


def _compare(
    family: Family,
    plain: PreTrainedModel,
    cut: PreTrainedModel,
    mapper: Mapper,
    plan: Plan,
    topology: Topology,
    stage_runner: _SingleStage | _PipelineStage,
    more: dict[str, Tensor],
) -> Verdict:
    """Runs both models forward and backward; on every rank, its own part of each gradient against the plain one."""
    inputs, labels = _inputs(family, plain)
    inputs |= more
    for model in (plain, cut):
        _seed_every_block(model)
    try:
        output = plain(**inputs)
    except Exception as error:  # sizes that a constructor takes and no forward pass can have
        raise _NotBuilt(f"Hugging Face's own model fails: {type(error).__name__}: {error}".splitlines()[0]) from None
    logits = output.logits[:, -LENGTH:]  # behind those of an image
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = F.cross_entropy(logits.flatten(0, 1).to(wide), labels.flatten()) + _auxiliary(plain, output)
    loss.backward()
    cross_entropy = mapper.cross_entropy(0.0, 0.0, None)

    def compute() -> Tensor:
        output = cut(**inputs)
        own = cross_entropy(output.logits[:, -LENGTH:], labels).objective / labels.numel()
        return own + _auxiliary(cut, output)

    own = stage_runner.loss(compute)
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    floor = NOISE * max(float(g.abs().max()) for g in expected.values() if g is not None)
    if not (math.isfinite(floor) and bool(loss.isfinite())):
        raise _NotBuilt("Hugging Face's own model computes a loss or a gradient that is not finite")
    errors: dict[str, float] = {}
    for name, parameter in cut.named_parameters():
        shard = shard_of(parameter) or Shard.full(name, parameter.shape, owner=True)
        if not parameter.requires_grad:
            continue
        wanted = expected[shard.name]
        wanted = torch.zeros(shard.full_shape) if wanted is None else wanted
        got = torch.zeros(shard.local_shape()) if parameter.grad is None else parameter.grad
        error = float((got - shard.extract(wanted)).abs().max()) / max(float(wanted.abs().max()), floor)
        # A weight may lie in several parameters, and a maximum passes over what is not a number.
        errors[shard.name] = max(errors.get(shard.name, 0.0), error if math.isfinite(error) else math.inf)
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, errors)
    own = sum(stage_runner.reports(own))
    worst: dict[str, float] = {}
    for found in gathered:
        for name, error in found.items():
            worst[name] = max(worst.get(name, 0.0), error)
    verdict = Verdict(str(family), topology.world_size, "right", loss=(float(loss.detach()), float(own)))
    verdict.worst_name, verdict.worst = max(worst.items(), key=lambda item: item[1])
    blocks = blocks_of(plain)
    verdict.share_cut = plan.sharded_fraction(blocks)
    verdict.share_without_gradient = _share_without_gradient(plain)
    verdict.whole = {
        wildcard_name(p.name): p.style.argument or str(p.style)
        for p in plan.entries
        if len(p.shape) > 1 and not p.is_sharded and any(p.name.startswith(f"{block}.") for block in blocks)
    }
    missing = {name for name, parameter in plain.named_parameters() if parameter.requires_grad} - worst.keys()
    wrong = {wildcard_name(name) for name, error in worst.items() if not error <= TOLERANCE} | set(missing)
    if wrong or not abs(verdict.loss[0] - verdict.loss[1]) <= TOLERANCE * abs(verdict.loss[0]):
        verdict.outcome, verdict.reason = "wrong", ", ".join(sorted(wrong)[:4])
    elif (topology.tensor > 1 and verdict.share_cut < 0.9) or verdict.share_without_gradient > 0.05:
        verdict.outcome = "partly"
    return verdict


def _share_without_gradient(model: nn.Module) -> float:
    """Share of parameter elements whose gradient is None or all zero; experts that no token chose do not count."""
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
    """What this rank's world finds about each family. Runs on every rank.

    Args:
        user: rows of a tensor plan, as in `parallel.tensor_plan`.
        pipeline: stages; the ranks of a stage are one tensor group.
        more: inputs of the models beside the usual ones.
        dtype: in float64 a family that computes nothing in float32 by itself agrees to 1e-9.
    """
    launch = Launch.from_environment()
    topology = Topology.of(launch.world_size, launch.rank, tensor=launch.world_size // pipeline, pipeline=pipeline)
    with joined_world(launch, topology, seed=1) as world:
        found = []
        mapper: Mapper
        for family in families:
            try:
                plain = reference_model(family, like_default=like_default).to(dtype)
                cut = copy.deepcopy(plain)
                plan, mapper = Plan([], [], {}), IdentityMapper()
                if topology.tensor > 1:
                    plan = read_plan(cut, user or {}, topology.tensor, topology.tensor_rank)
                    group, rank = world.groups.of("tensor"), topology.tensor_rank
                    mapper = TensorMapper(
                        cut, plan, group, topology.tensor, rank, world.groups.tensor_subgroup,
                        sequence_parallel=sequence_parallel,
                    )  # fmt: skip
                stage, parameter_ranks = _staged(family, cut, world) if pipeline > 1 else (None, {})
                mapper.shard_parameters(cut.parameters())
                mapper.install()
                stage_runner: _SingleStage | _PipelineStage = _SingleStage()
                if stage is not None:
                    stage.install()
                    fill_remote_with_zeros(cut, torch.device("cpu"), dtype)
                    stage_runner = _PipelineStage(cut, stage, parameter_ranks, world)
                found.append(_compare(family, plain, cut, mapper, plan, topology, stage_runner, more or {}))
            except _NotBuilt as error:
                found.append(Verdict(str(family), topology.world_size, "not built", str(error)))
            except ConfigError as error:
                found.append(Verdict(str(family), topology.world_size, "refused", str(error.problems[0])))
        return found


def outcome_counts(verdicts: list[Verdict]) -> Iterator[str]:
    """How many families came out how, in words."""
    for outcome in ("right", "partly", "wrong", "refused", "not built"):
        yield f"{sum(v.outcome == outcome for v in verdicts)} {outcome}"
