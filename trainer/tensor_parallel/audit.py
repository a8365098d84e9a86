"""The audit of a tensor plan: it is applied to a model's parameters, modules and buffers, and checked both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem
from trainer.sharding import Shard, wildcard_name
from trainer.tensor_parallel.plan import Plan, PlanEntry
from trainer.tensor_parallel.plan_sources import PlanSources
from trainer.tensor_parallel.styles import (
    ColumnStyle,
    FullStyle,
    ModuleTarget,
    ParameterStyle,
    ParameterTarget,
    Replicated,
    Requires,
    RowSplitInput,
    RowStyle,
    ShardedParameter,
)
from trainer.tensor_parallel.units import Refused, Scope

_DIVIDES_INPUT = (ColumnStyle, ShardedParameter)
"""Styles whose outputs are sharded, as the input of a row layer must be."""


def resolve_plan(model: PreTrainedModel, user: Mapping[str, str], ranks: int, rank: int) -> Plan:
    """Return the plan for `rank` of `ranks` tensor ranks; `user` is `parallel.tensor_plan`.

    Raises:
        PlanError: with every problem: an unknown style, an entry of the user's that matches nothing, a weight without
            an entry, a row layer with a full input, sizes that do not divide.
    """
    return _Audit(model, user, ranks, rank).read()


class _Audit:
    """Applies the entries of a plan to a model, and collects the mismatches."""

    def __init__(self, model: PreTrainedModel, user: Mapping[str, str], ranks: int, rank: int) -> None:
        self._model, self._ranks, self._rank = model, ranks, rank
        self._modules = dict(model.named_modules())
        self._sources = PlanSources(model, user)
        self._user = user
        self._problems = list(self._sources.problems)
        self._indivisible: dict[str, Problem] = {}
        """Weights that cannot be divided among so many ranks: one of each name with wildcards."""

    def read(self) -> Plan:
        """See `resolve_plan`."""
        plan = self._build()
        if self._indivisible:
            remedy = self._remedy()
            self._problems += [replace(problem, remedy=remedy) for problem in self._indivisible.values()]
        if self._problems:
            raise PlanError(self._problems)
        return plan

    def _remedy(self) -> str:
        if not self._is_divisible(1):  # the number of ranks is right, and an entry is wrong
            return ""
        largest = next(ranks for ranks in range(self._ranks - 1, 0, -1) if self._is_divisible(ranks))
        return f"The largest size below that works for the whole model is {largest}"

    def _is_divisible(self, ranks: int) -> bool:
        other = _Audit(self._model, self._user, ranks, 0)
        other._build()
        return not other._indivisible

    def _build(self) -> Plan:
        entries = self._entries()
        targets = self._targets()
        buffers = self._buffers()
        self._problems += [_unpaired(e) for e in entries if isinstance(e.style, RowStyle) and self._is_unpaired(e)]
        return Plan(entries, targets, buffers)

    # Parameters -------------------------------------------------------------------------------------------------------

    def _entries(self) -> list[PlanEntry]:
        """Return one entry for each parameter; tied weights have one, under their first name."""
        entries: dict[nn.Parameter, PlanEntry] = {}
        for owner, module in self._modules.items():
            for key, parameter in module.named_parameters(recurse=False):
                entry = self._entry(owner, module, key, parameter)
                if entry is None:
                    continue
                first = entries.setdefault(parameter, entry)
                if _divisions(first) != _divisions(entry):
                    self._problems.append(_contradiction(first, entry))
        return list(entries.values())

    def _entry(self, owner: str, module: nn.Module, key: str, parameter: nn.Parameter) -> PlanEntry | None:
        name = _joined(owner, key)
        style = self._style(owner, key, parameter)
        if style is None:
            self._problems.append(self._missing(name, module, parameter))
            return None
        shards = self._shards(name, module, parameter, style)
        return None if shards is None else PlanEntry(name, parameter, tuple(parameter.shape), style, shards)

    def _style(self, owner: str, key: str, parameter: nn.Parameter) -> ParameterStyle | None:
        for name in (_joined(owner, key), owner):
            for style in self._sources.styles(name):
                if (parameter_style := style.parameter_style()) is not None:
                    return parameter_style
        if parameter.ndim <= 1 and not self._is_near_sharded(owner):
            return Replicated("a vector outside the sharded weights")
        return None

    def _is_near_sharded(self, owner: str) -> bool:
        """Return whether a module is in a part of a block that has sharded weights.

        There a vector may be used on full or on sharded activations: only an entry can decide.
        """
        path = owner.split(".")
        stacks = (n for n in range(1, len(path)) if isinstance(self._modules[".".join(path[:n])], nn.ModuleList))
        stack = next(stacks, 0)
        if not stack:
            return False
        block = ".".join(path[: stack + 2])
        return any(
            isinstance(style, ParameterStyle) and not isinstance(style, FullStyle)
            for style in self._sources.styles_inside(block)
        )

    def _shards(self, name: str, module: nn.Module, tensor: Tensor, style: ParameterStyle) -> tuple[Shard, ...] | None:
        """Return this rank's shards of a parameter or buffer; None, and a problem, if its sizes do not divide."""
        path = name.split(".")[:-1]
        above = [self._modules[".".join(path[:n])] for n in range(len(path) - 1, 0, -1)]
        scope = Scope(module, *above, self._model.config.get_text_config())
        try:
            return style.shards(ParameterTarget(name, tuple(tensor.shape), module, scope), self._rank, self._ranks)
        except Refused as refused:
            reason = f"{name} {list(tensor.shape)}, '{style}': {refused}"
            self._indivisible.setdefault(wildcard_name(name), Problem("parallel.tensor", reason))
            return None

    def _missing(self, name: str, module: nn.Module, parameter: nn.Parameter) -> Problem:
        return Problem(
            f"parallel.tensor_plan.{wildcard_name(name)}",
            f"{name} {list(parameter.shape)} ({type(module).__name__}) has no entry in the tensor plan of "
            f"{self._model.config.model_type}",
            "Add one to parallel.tensor_plan",
        )

    # Modules and buffers ----------------------------------------------------------------------------------------------

    def _targets(self) -> list[ModuleTarget]:
        targets = [
            ModuleTarget(name, module, self._modules[name.rpartition(".")[0]], styles)
            for name, module in self._modules.items()
            if (styles := self._sources.styles(name))
        ]
        for target in targets:
            for style in target.styles:
                if isinstance(style, Requires) and not style.is_met(self._model.config):
                    self._problems.append(self._unmet(target, style))
        return targets

    def _unmet(self, target: ModuleTarget, style: Requires) -> Problem:
        return Problem(
            f"parallel.tensor_plan.{wildcard_name(target.name)}",
            f"{self._model.config.model_type} can be sharded only with {style.field} = {style.value}",
            "Set that field of the model's configuration, or parallel.tensor to 1",
        )

    def _buffers(self) -> dict[str, tuple[Shard, ...]]:
        buffers = {}
        for name, buffer in self._model.named_buffers():
            for style in self._sources.styles(name):
                parameter_style = style.parameter_style()
                if parameter_style is None:
                    continue
                module = self._modules[name.rpartition(".")[0]]
                if (shards := self._shards(name, module, buffer, parameter_style)) is not None:
                    buffers[name] = shards
        return buffers

    # Row layers -------------------------------------------------------------------------------------------------------

    def _is_unpaired(self, entry: PlanEntry) -> bool:
        """Return whether the nearest module around a row layer that has other matrices shards none of their outputs."""
        if isinstance(entry.style, RowSplitInput) or len(entry.shape) < 2:
            return False
        path = entry.name.split(".")[:-2]
        while path and not isinstance(self._modules[".".join(path[:-1])], nn.ModuleList):
            matrices = [p for p in self._modules[".".join(path)].parameters() if p.ndim > 1]
            if len(matrices) > 1:
                break
            path.pop()
        around = self._sources.styles_inside(".".join(path))
        return bool(path) and not any(isinstance(style, _DIVIDES_INPUT) for style in around)


def _joined(owner: str, key: str) -> str:
    return f"{owner}.{key}" if owner else key


def _divisions(entry: PlanEntry) -> list[object]:
    """Return the properties that the entries of tied weights must share."""
    return [(shard.slices, shard.copies) for shard in entry.shards]


def _contradiction(first: PlanEntry, other: PlanEntry) -> Problem:
    return Problem(
        f"parallel.tensor_plan.{wildcard_name(other.name)}",
        f"'{other.style}' contradicts '{first.style}' of {first.name}, which is the same tensor",
        "Give both the same style",
    )


def _unpaired(entry: PlanEntry) -> Problem:
    return Problem(
        f"parallel.tensor_plan.{wildcard_name(entry.name)}",
        f"'{entry.style}' needs a sharded input, but no column-parallel layer precedes {entry.name}",
        "Shard its input with 'colwise', or use 'rowwise_split_input'",
    )
