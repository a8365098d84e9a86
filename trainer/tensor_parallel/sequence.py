"""Sequence parallelism: between the tensor-parallel regions each rank holds its part of every sequence.

Source: Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.2.2. A layer
costs 4 all-gathers and 4 reduce-scatters for a forward and a backward pass: as many bytes as tensor parallelism's 4
all-reduces, while norms, residuals and dropout see only a part of the sequence.

A Hugging Face model builds masks and positions from the embeddings' output, so the sequence is sharded at the first
layer's input, and gathered at the last layer's output. Inside a layer the hidden state is gathered before a module
that has sharded weights, not in its linear layers, because attention reads the shape of its own input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.errors import PlanError, Problem, TesseraError
from trainer.tensor_parallel import collectives
from trainer.tensor_parallel.families import FULL_SEQUENCES
from trainer.tensor_parallel.hooks import on_argument, on_output
from trainer.tensor_parallel.layers import sum_gradient
from trainer.tensor_parallel.plan import Plan
from trainer.tensor_parallel.region import Region
from trainer.tensor_parallel.styles import ModuleTarget, ReplicatedSumGradient

SEQUENCE = 1
"""Dimension of hidden states (batch, sequence, hidden) that is sharded."""

_OTHER_SEQUENCES = {"key_value_states", "encoder_hidden_states"}
"""Arguments of cross-attention with another sequence: an encoder's output, gathered after its last layer."""


class SequenceParallel:
    """Shards the sequence in a model whose tensor parallelism is installed."""

    def __init__(self, model: PreTrainedModel, plan: Plan, region: Region) -> None:
        self._model, self._plan, self._region = model, plan, region
        self._sharded = _sharded_names(plan)
        self._summed = {entry.name for entry in plan.entries if isinstance(entry.style, ReplicatedSumGradient)}

    def install(self) -> None:
        """Shard the sequence between the first layer and the last of each stack."""
        region = self._region
        region.is_sequence_sharded = True
        for name, stack in _stacks(self._model, self._sharded):
            layers = list(stack.children())
            on_argument(layers[0], _hidden_argument(layers[0]), _checked(region.ranks, self._begin))
            on_output(layers[-1], self._end)
            for key, layer in stack.named_children():
                self._install_layer(f"{name}.{key}", layer)

    def _begin(self, hidden_BTD: Tensor) -> Tensor:
        self._region.use_rank_local_rng(hidden_BTD.device)
        return collectives.split_to_region(hidden_BTD, SEQUENCE, self._region.group)

    def _end(self, hidden_BtD: Tensor) -> Tensor:
        self._region.use_shared_rng(hidden_BtD.device)
        return collectives.gather_from_region(hidden_BtD, SEQUENCE, self._region.group)

    def _install_layer(self, name: str, layer: nn.Module) -> None:
        blocks = _blocks(name, layer, self._sharded)
        for key in blocks:
            block = layer.get_submodule(key)
            if _allows_sharded_sequence(self._plan, f"{name}.{key}"):
                self._install_sharded(block)
            else:
                self._install_gathered(block)
        for key, parameter in layer.named_parameters():
            # Outside the blocks a parameter is used on this rank's part of the sequence only.
            is_outside = key.partition(".")[0] not in blocks
            if is_outside and f"{name}.{key}" not in self._summed:
                sum_gradient(parameter, self._region.group)

    def _install_sharded(self, block: nn.Module) -> None:
        """Gather the sequence once for all column layers of a block, and scatter the sums of its row layers."""
        region = self._region
        rows = [module for module in block.modules() if region.is_row_layer(module)]
        for row in rows:
            region.keep_output_sharded(row, SEQUENCE)
            if isinstance(bias := getattr(row, "bias", None), nn.Parameter):
                sum_gradient(bias, region.group)
        for column in block.modules():
            region.skip_input_reduce(column)
        if block not in rows:
            on_argument(block, _hidden_argument(block), lambda x: region.enter_gathered(x, SEQUENCE), prepend=True)
            for name in _OTHER_SEQUENCES & set(inspect.signature(block.forward).parameters):
                on_argument(block, name, region.enter, prepend=True)

    def _install_gathered(self, block: nn.Module) -> None:
        """Run a block on the full sequence, as without sequence parallelism."""
        group, hidden = self._region.group, _hidden_argument(block)
        on_argument(block, hidden, lambda x: collectives.gather_from_region(x, SEQUENCE, group), prepend=True)
        on_output(block, lambda output: collectives.split_to_region(output, SEQUENCE, group))


def refuse_sequence_parallel(model: PreTrainedModel, plan: Plan, *, has_active_dropout: bool) -> None:
    """Check that the sequence of this model can be sharded; its tensors may be on the meta device.

    Raises:
        PlanError: if the family's layers use full sequences outside attention and MLP; if a part of a layer ends a
            region that begins in another part; or if dropout is active and a part needs the full sequence, because its
            ranks would need shared random numbers there and rank-local ones outside.
    """
    problem = _problem(model, plan, has_active_dropout=has_active_dropout)
    if problem is not None:
        raise PlanError(problem)


def _problem(model: PreTrainedModel, plan: Plan, *, has_active_dropout: bool) -> Problem | None:
    key, disable = "parallel.sequence_parallel", "Set it to false; parallel.tensor works without it"
    model_type = model.config.model_type
    if model_type in FULL_SEQUENCES:
        reason = f"the layers of {model_type} use full sequences outside attention and MLP"
        return Problem(key, reason, disable)
    sharded = _sharded_names(plan)
    stacks = list(_stacks(model, sharded))
    if not stacks:
        return Problem(key, f"{model_type} has no list of layers with sharded weights", disable)
    blocks = (
        f"{stack}.{number}.{block}"
        for stack, layers in stacks
        for number, layer in layers.named_children()
        for block in _blocks(f"{stack}.{number}", layer, sharded)
    )
    for name in (block for block in blocks if not _allows_sharded_sequence(plan, block)):
        styles = [style for target in _inside(plan, name) if target.name != name for style in target.styles]
        if not any(style.starts_region for style in styles):
            reason = f"{model_type}: {name} ends a tensor-parallel region that begins outside it"
            return Problem(key, reason, disable)
        if has_active_dropout:
            reason = f"{name} needs full sequences, and dropout is active in {model_type}"
            return Problem(key, reason, "Set the configuration's dropout rates to 0, or sequence_parallel to false")
    return None


def _sharded_names(plan: Plan) -> set[str]:
    return {entry.name for entry in plan.entries if entry.is_sharded}


def _stacks(model: PreTrainedModel, sharded: set[str]) -> Iterator[tuple[str, nn.ModuleList]]:
    """Yield the outermost lists of layers that have sharded weights."""
    stacks: list[str] = []
    for name, module in model.named_modules():
        is_nested = any(name.startswith(f"{stack}.") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not is_nested and any(n.startswith(f"{name}.") for n in sharded):
            stacks.append(name)
            yield name, module


def _blocks(name: str, layer: nn.Module, sharded: set[str]) -> list[str]:
    """Return the parts of a layer that have sharded weights."""
    return [key for key, _ in layer.named_children() if any(n.startswith(f"{name}.{key}.") for n in sharded)]


def _allows_sharded_sequence(plan: Plan, name: str) -> bool:
    """Return whether all column layers of a block read its arguments, which can then enter once for all of them."""
    styles = {style for target in _inside(plan, name) for style in target.styles}
    styles |= {entry.style for entry in plan.entries if entry.name.startswith(f"{name}.")}
    return all(style.allows_sharded_sequence for style in styles)


def _inside(plan: Plan, name: str) -> list[ModuleTarget]:
    """Return the targets that are a block or inside it."""
    return [target for target in plan.targets if f"{target.name}.".startswith(f"{name}.")]


def _hidden_argument(module: nn.Module) -> str:
    """Return the name of the argument with the hidden state: the first one."""
    return next(iter(inspect.signature(module.forward).parameters))


def _checked(ranks: int, shard: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def shard_checked(hidden_BTD: Tensor) -> Tensor:
        if hidden_BTD.ndim != 3 or hidden_BTD.shape[SEQUENCE] % ranks:
            raise TesseraError(
                f"sequence parallelism: hidden states of shape {list(hidden_BTD.shape)} cannot be sharded along the "
                f"sequence by {ranks}"
            )
        return shard(hidden_BTD)

    return shard_checked
