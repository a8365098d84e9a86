"""Sequence parallelism: between the blocks' cut parts, each tensor rank holds its stretch of every sequence.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2. A layer
costs 4 all-gathers and 4 reduce-scatters for a forward and a backward pass: as many bytes as tensor parallelism's 4
all-reduces, while norms, residuals and dropout see only a part.

A Hugging Face model builds masks and positions from the embeddings' output, so the sequence is cut at the first
layer's input, and joined again at the last layer's output. Inside a layer the hidden state is joined before a
module that has cut weights, not in its linear layers, because attention reads its own input's shape.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem, TesseraError
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.families import WHOLE_SEQUENCES
from trainer.tensor_parallel.hooks import on_argument, on_output
from trainer.tensor_parallel.layers import sum_gradient
from trainer.tensor_parallel.plan import Plan
from trainer.tensor_parallel.region import Region

SEQUENCE = 1
"""Dimension of hidden states (batch, sequence, hidden) that is cut."""

_PLAIN = {"colwise", "kv_colwise", "packed_colwise", "rowwise", "packed_rowwise", "replicated_with_grad_allreduce",
          "rms_norm", "grouped_rms_norm", "cut", "divide", "split_input", "local_params", "unfused",
          "inside", "per_head_norms"}  # fmt: skip
"""Styles of a module whose input enters once and whose output leaves once, and which can therefore be given and give a
cut sequence itself. Others get the whole sequence and give it, at twice the traffic."""

_COLUMNS = {"colwise", "kv_colwise", "packed_colwise", "colwise_gather_output", "moe_tp_experts", "enter"}
"""Styles with which a cut region begins."""

_OTHER_SEQUENCES = {"key_value_states", "encoder_hidden_states"}
"""Arguments with which cross-attention is given another sequence: an encoder's output, joined after its last layer."""


def _stacks(model: PreTrainedModel, cut: set[str]) -> Iterator[tuple[str, nn.ModuleList]]:
    """The outermost lists of layers that have cut weights."""
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(c.startswith(f"{name}.") for c in cut):
            found.append(name)
            yield name, module


def _hidden(module: nn.Module) -> str:
    """Name of the argument with the hidden state: the first one."""
    return next(iter(inspect.signature(module.forward).parameters))


def _checked(ranks: int, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def cut(x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[SEQUENCE] % ranks:
            raise TesseraError(
                f"sequence parallelism: hidden states of shape {list(x.shape)} cannot be cut along the sequence by "
                f"{ranks}"
            )
        return change(x)

    return cut


class SequenceParallel:
    """Changes a model whose tensor parallelism is installed."""

    def __init__(self, model: PreTrainedModel, plan: Plan, region: Region) -> None:
        self._model, self._plan, self._region = model, plan, region
        self._cut = {entry.name for entry in plan.entries if entry.is_sharded}
        self._summed = {p.name for p in plan.entries if p.style.word == "replicated_with_grad_allreduce"}

    def install(self) -> None:
        """Cuts the sequence between the first layer and the last of each stack."""
        region = self._region
        region.is_sequence_sharded = True
        for name, stack in _stacks(self._model, self._cut):
            layers = list(stack.children())
            on_argument(layers[0], _hidden(layers[0]), _checked(region.ranks, self._begin))
            on_output(layers[-1], self._end)
            for key, layer in stack.named_children():
                self._layer(f"{name}.{key}", layer)

    def _begin(self, x: Tensor) -> Tensor:
        self._region.use_rank_local_rng(x.device)
        return collectives.split_to_region(x, SEQUENCE, self._region.group)

    def _end(self, x: Tensor) -> Tensor:
        self._region.use_shared_rng(x.device)
        return collectives.gather_from_region(x, SEQUENCE, self._region.group)

    def _layer(self, name: str, layer: nn.Module) -> None:
        blocks = _blocks(name, layer, self._cut)
        for key in blocks:
            block = layer.get_submodule(key)
            if _is_plain(self._plan, f"{name}.{key}", block):
                self._plain(block)
            else:
                self._enclosed(block)
        for key, parameter in layer.named_parameters():
            sees_a_stretch = key.partition(".")[0] not in blocks
            if sees_a_stretch and f"{name}.{key}" not in self._summed:
                sum_gradient(parameter, self._region.group)

    def _plain(self, block: nn.Module) -> None:
        region = self._region
        rows = [module for module in block.modules() if region.is_row_layer(module)]
        for row in rows:
            region.keep_output_sharded(row, SEQUENCE)
            if isinstance(bias := getattr(row, "bias", None), nn.Parameter):
                sum_gradient(bias, region.group)
        for column in block.modules():
            region.skip_input_reduce(column)
        if block not in rows:
            on_argument(block, _hidden(block), lambda x: region.enter_gathered(x, SEQUENCE), prepend=True)
            for name in _OTHER_SEQUENCES & set(inspect.signature(block.forward).parameters):
                on_argument(block, name, region.enter, prepend=True)

    def _enclosed(self, block: nn.Module) -> None:
        group = self._region.group
        on_argument(block, _hidden(block), lambda x: collectives.gather_from_region(x, SEQUENCE, group), prepend=True)
        on_output(block, lambda y: collectives.split_to_region(y, SEQUENCE, group))


def _blocks(name: str, layer: nn.Module, cut: set[str]) -> list[str]:
    """The parts of a layer that have cut weights."""
    return [key for key, _ in layer.named_children() if any(c.startswith(f"{name}.{key}.") for c in cut)]


def _is_plain(plan: Plan, name: str, block: nn.Module) -> bool:
    """Whether all column layers of the block read its arguments, which can then enter once for all of them."""
    inside = [target for target in plan.modules if target.name == name or target.name.startswith(f"{name}.")]
    words = {style.word for target in inside for style in target.styles}
    words |= {p.style.word for p in plan.entries if p.name.startswith(f"{name}.")}
    return words <= _PLAIN


def refuse_sequence_parallel(model: PreTrainedModel, plan: Plan, *, has_active_dropout: bool) -> None:
    """Looks whether the sequence of this model can be cut; its tensors may be on the meta device.

    Args:
        drops: whether some dropout is active.

    Raises:
        PlanError: if the family's layers use whole sequences outside attention and MLP; if a part of a layer ends a cut
            region that begins in another one; or if dropout is active and a part needs the whole sequence, because its
            ranks would have to draw alike there and apart beside it.
    """
    kind, cut = model.config.model_type, {entry.name for entry in plan.entries if entry.is_sharded}
    stacks = dict(_stacks(model, cut))
    reason, remedy = "", "Set it to false; parallel.tensor works without it"
    if kind in WHOLE_SEQUENCES:
        reason = f"the layers of {kind} use whole sequences beside attention and MLP"
    elif not stacks:
        reason = f"{kind} has no list of layers with cut weights"
    names = {
        f"{stack}.{key}.{block}": layer.get_submodule(block)
        for stack, layers in stacks.items()
        for key, layer in layers.named_children()
        for block in _blocks(f"{stack}.{key}", layer, cut)
    }
    for name in (name for name, block in names.items() if not reason and not _is_plain(plan, name, block)):
        inside = [target for target in plan.modules if target.name.startswith(f"{name}.")]
        if not any(_COLUMNS & {style.word for style in target.styles} for target in inside):
            reason = f"{kind}: {name} ends a cut region that begins outside it"
        elif has_active_dropout:
            reason = f"{name} needs whole sequences, and dropout is active in {kind}"
            remedy = "Set the configuration's dropout rates to 0, or sequence_parallel to false"
    if reason:
        raise PlanError(Problem("parallel.sequence_parallel", reason, remedy))
