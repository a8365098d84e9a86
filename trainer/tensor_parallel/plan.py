"""The tensor plan: one row for each weight, read from three places, checked both ways.

A plan maps names to styles, in Hugging Face's words and some of our own. A name is a module's or a parameter's, with
`*` for the numbers in it; it counts from the base model, as in Hugging Face's plans, or is given in full. A style is a
word, sometimes with an argument after a colon:

    "layers.*.self_attn.q_proj": "colwise:head_dim"

`docs/tensor_plans.md` tells how to write one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import groupby

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trainer.errors import PlanError, Problem
from trainer.sharding import wildcard_name
from trainer.sharding.remote import is_remote
from trainer.sharding.shard import Shard
from trainer.tensor_parallel.plan_sources import Rows
from trainer.tensor_parallel.styles import COLUMNS, ON_MODULES, ROWS, WHOLE, Style
from trainer.tensor_parallel.units import Part, Refused, Scope, in_units, parse_parts


@dataclass(frozen=True)
class PlanEntry:
    """A parameter and what becomes of it."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    style: Style
    shards: tuple[Shard, ...]
    """What this rank holds of it; more than one where a part of a fused weight is shared by ranks."""

    def held(self, module: nn.Module) -> Iterator[tuple[nn.Parameter, Shard]]:
        """The parameters of `module`, which has it, in which this rank holds it after `Mapper.shard_parameters`."""
        key = self.name.rpartition(".")[2]
        for number, piece in enumerate(self.shards):
            parameter = module._parameters[f"{key}_piece{number}" if number else key]
            assert parameter is not None
            yield parameter, piece

    @property
    def is_sharded(self) -> bool:
        return not all(piece.is_full for piece in self.shards)

    @property
    def is_divided(self) -> bool:
        """Whether its style divides it into units among the ranks, though there may be one unit, which all of them
        share."""
        return self.style.word not in WHOLE


@dataclass(frozen=True)
class ModuleTarget:
    """A module and how it has to be changed."""

    name: str
    module: nn.Module
    parent: nn.Module
    styles: tuple[Style, ...]


@dataclass(frozen=True)
class Plan:
    """The audited plan of one model, for one rank."""

    entries: list[PlanEntry]
    modules: list[ModuleTarget]
    buffers: dict[str, tuple[Shard, ...]]
    """Buffers that are cut, by name."""

    def local_to(self, model: nn.Module) -> Plan:
        """The part of the plan about what lies in `model` and not on another pipeline stage."""
        held = dict(model.named_parameters(remove_duplicate=False))
        return Plan(
            [entry for entry in self.entries if entry.name in held],
            [target for target in self.modules if not is_remote(target.module)],
            {n: s for n, s in self.buffers.items() if not is_remote(model.get_submodule(n.rpartition(".")[0]))},
        )

    @property
    def held(self) -> int:
        """Elements of parameters that this rank holds, padding included."""
        return sum(math.prod(piece.local_shape()) for entry in self.entries for piece in entry.shards)

    def sharded_fraction(self, blocks: Collection[str] = ("",)) -> float:
        """Share of the matrix elements in `blocks` (names of modules; by default the model) that are cut."""
        cut = whole = 0
        for entry in self.entries:
            if len(entry.shape) >= 2 and any(entry.name.startswith(f"{block}." if block else "") for block in blocks):
                count = math.prod(entry.shape)
                whole += count
                cut += count if entry.is_sharded else 0
        return cut / whole if whole else 0.0


def _dimension(word: str, module: nn.Module, shape: tuple[int, ...]) -> int | None:
    """Along which dimension a style cuts a parameter; None if not at all."""
    column, row = word in COLUMNS, word in ROWS
    if not column and not row and not word.startswith("embedding"):
        return None
    if len(shape) == 1:
        return 0 if column else None
    if word == "embedding_rowwise":
        return 0
    if isinstance(module, nn.Embedding) or word == "embedding_colwise":
        return 1
    if isinstance(module, nn.Conv1d):
        return 0 if column else 1
    if isinstance(module, Conv1D):
        return 1 if column else 0
    return len(shape) - 2 if column else len(shape) - 1


class _Audit:
    """Applies a model's rows to its parameters, modules and buffers, and collects what does not fit."""

    def __init__(self, model: PreTrainedModel, user: Mapping[str, str], ranks: int, rank: int) -> None:
        self._model, self._ranks, self._rank = model, ranks, rank
        self._modules = dict(model.named_modules())
        self._rows = Rows(model, user)
        self._user = user
        self._problems = list(self._rows.problems)
        self._indivisible: dict[str, Problem] = {}
        """Weights that cannot be divided by so many ranks; one of each kind."""

    def read(self) -> Plan:
        """See `read_plan`."""
        plan = self._collect()
        if self._indivisible:
            remedy = self._remedy()
            self._problems += [replace(problem, remedy=remedy) for problem in self._indivisible.values()]
        if self._problems:
            raise PlanError(self._problems)
        return plan

    def _remedy(self) -> str:
        if not self._divides(1):  # not the number of ranks is wrong, but a row
            return ""
        works = next(ranks for ranks in range(self._ranks - 1, 0, -1) if self._divides(ranks))
        return f"The largest size below that works for the whole model is {works}"

    def _divides(self, ranks: int) -> bool:
        other = _Audit(self._model, self._user, ranks, 0)
        other._collect()
        return not other._indivisible

    def _collect(self) -> Plan:
        entries: dict[nn.Parameter, PlanEntry] = {}
        for owner, module in self._modules.items():
            for key, parameter in module.named_parameters(recurse=False):
                entry = self._place(owner, module, key, parameter)
                if entry is None:
                    continue
                known = entries.get(parameter)
                if known is not None and known.shards != entry.shards:
                    known = self._tied(known, entry)
                entries[parameter] = known or entry
        modules = [
            ModuleTarget(name, module, self._parent(name), self._rows.of(name))
            for name, module in self._modules.items()
            if self._rows.of(name)
        ]
        for target in modules:
            self._problems += [
                self._missing(target, s) for s in target.styles if s.word == "needs" and not self._has(s)
            ]
        buffers = {}
        for name, buffer in self._model.named_buffers():
            for style in self._rows.of(name):
                owner, _, key = name.rpartition(".")
                try:
                    buffers[name] = self._shards(owner, self._modules[owner], key, buffer, style)
                except Refused as refused:
                    reason = f"{name} {list(buffer.shape)}, '{style}': {refused}"
                    self._indivisible.setdefault(wildcard_name(name), Problem("parallel.tensor", reason))
        self._problems += [
            self._unpaired_problem(p) for p in entries.values() if p.style.word in ROWS and self._is_unpaired(p)
        ]
        return Plan(list(entries.values()), modules, buffers)

    def _is_unpaired(self, entry: PlanEntry) -> bool:
        """Whether nothing cuts the input of a row layer: no style in the nearest module around it that has others."""
        if entry.style.word == "rowwise_split_input" or len(entry.shape) < 2:
            return False
        path = entry.name.split(".")[:-2]
        while path and not isinstance(self._modules[".".join(path[:-1])], nn.ModuleList):
            matrices = [p for p in self._modules[".".join(path)].parameters() if p.ndim > 1]
            if len(matrices) > 1:
                break
            path.pop()
        around = list(self._rows.inside(".".join(path)))
        return bool(path) and not any(s.word in COLUMNS | {"cut"} for s in around)

    def _unpaired_problem(self, entry: PlanEntry) -> Problem:
        return Problem(
            f"parallel.tensor_plan.{wildcard_name(entry.name)}",
            f"'{entry.style}' expects an input that is cut, and no module beside {entry.name} cuts its outputs",
            "Cut them with 'colwise', or take 'rowwise_split_input'",
        )

    def _has(self, style: Style) -> bool:
        field, _, value = style.argument.partition("=")
        return str(getattr(self._model.config, field, None)) == value

    def _missing(self, target: ModuleTarget, style: Style) -> Problem:
        return Problem(
            f"parallel.tensor_plan.{wildcard_name(target.name)}",
            f"{self._model.config.model_type} can be cut only with {style.argument.replace('=', ' = ')}",
            "Set that field of the model's configuration, or parallel.tensor to 1",
        )

    def _tied(self, known: PlanEntry, other: PlanEntry) -> PlanEntry:
        boxes = [[(s.dim, s.index, s.of, s.packed, s.copies) for s in p.shards] for p in (known, other)]
        if boxes[0] != boxes[1]:
            self._problems.append(
                Problem(f"parallel.tensor_plan.{wildcard_name(other.name)}",
                        f"'{other.style}' does not agree with '{known.style}' of {known.name}, which is the same one",
                        "Give both the same cut")
            )  # fmt: skip
        return known

    def _parent(self, name: str) -> nn.Module:
        parent: nn.Module = self._modules[name.rpartition(".")[0]]
        return parent

    def _place(self, owner: str, module: nn.Module, key: str, parameter: nn.Parameter) -> PlanEntry | None:
        name = f"{owner}.{key}" if owner else key
        style = self._style(owner, module, key, parameter)
        if style is None:
            self._problems.append(
                Problem(f"parallel.tensor_plan.{wildcard_name(name)}",
                        f"{name} {list(parameter.shape)} ({type(module).__name__}) has no row in the tensor plan of "
                        f"{self._model.config.model_type}",
                        "Add one to parallel.tensor_plan")
            )  # fmt: skip
            return None
        try:
            shards = self._shards(owner, module, key, parameter, style)
        except Refused as refused:
            reason = f"{name} {list(parameter.shape)}, '{style}': {refused}"
            self._indivisible.setdefault(wildcard_name(name), Problem("parallel.tensor", reason))
            return None
        return PlanEntry(name, parameter, tuple(parameter.shape), style, shards)

    def _style(self, owner: str, module: nn.Module, key: str, parameter: nn.Parameter) -> Style | None:
        for name in (f"{owner}.{key}" if owner else key, owner):
            for style in self._rows.of(name):
                if style.word not in ON_MODULES:
                    return style
                if style.word == "mla_kv_a_proj":
                    return Style("replicate", "its outputs are few, and used by all heads")
        if parameter.ndim <= 1 and not self._beside_cut(owner):
            return Style("replicate", "a vector outside the cut weights")
        return None

    def _beside_cut(self, owner: str) -> bool:
        """Whether a module lies in a part of a block that has cut weights, so that nobody can say what it sees."""
        path = owner.split(".")
        stack = next(
            (n for n in range(1, len(path)) if isinstance(self._modules[".".join(path[:n])], nn.ModuleList)), 0
        )
        if not stack:
            return False
        block = ".".join(path[: stack + 2])
        return any(style.word not in ON_MODULES | WHOLE for style in self._rows.inside(block))

    def _shards(self, owner: str, module: nn.Module, key: str, parameter: Tensor, style: Style) -> tuple[Shard, ...]:
        name, shape = (f"{owner}.{key}" if owner else key), tuple(parameter.shape)
        first = self._rank == 0
        dim, argument = _dimension(style.word, module, shape), style.argument
        if style.word in ("cut", "vocabulary"):
            dimension, _, argument = argument.partition(":")
            dim = int(dimension)
        if dim is None:
            copies = self._ranks if style.word == "replicated_with_grad_allreduce" else 1
            return (Shard.full(name, shape, owner=first, owner_only=style.word == "first_rank", copies=copies),)
        if style.word in ("embedding_rowwise", "vocabulary_head", "vocabulary"):  # may be padded
            return (Shard(name, shape, dim, self._rank, self._ranks, (shape[dim],)),)
        if argument and style.word in ("colwise", "kv_colwise", "colwise_gather_output") and not in_units(argument)[1]:
            argument = f"{'~' if style.word == 'kv_colwise' else ''}all/{argument}"
        path = owner.split(".")
        above = [self._modules[".".join(path[:n])] for n in range(len(path) - 1, 0, -1)]
        scope = Scope(module, *above, self._model.config.get_text_config())
        parts = parse_parts(style, argument, shape[dim], scope)
        return tuple(self._grouped(name, shape, dim, parts))

    def _grouped(self, name: str, shape: tuple[int, ...], dim: int, parts: tuple[Part, ...]) -> Iterator[Shard]:
        """Neighbouring parts that are cut alike make one piece."""
        start = 0
        for share, group in groupby(parts, key=lambda part: part.place(self._ranks, self._rank)):
            packed = tuple(part.size for part in group)
            yield Shard(name, shape, dim, packed=packed, start=start, **vars(share))
            start += sum(packed)


def read_plan(model: PreTrainedModel, user: Mapping[str, str], ranks: int, rank: int) -> Plan:
    """The plan for `rank` of `ranks` tensor ranks; `user` is `parallel.tensor_plan`.

    Raises:
        PlanError: with every problem: an unknown style, a row of the user's that matches nothing, a weight without a
            row, a row layer whose input nothing cuts, sizes that do not divide.
    """
    return _Audit(model, user, ranks, rank).read()
