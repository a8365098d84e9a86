"""Placeholders for parameters of other pipeline stages: they have a name, a shape and a shard, and no values.

A remote parameter is an attribute of its module like any other, but not registered: nothing trains, moves or counts it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


def make_remote(module: nn.Module, key: str) -> None:
    """Turn a registered parameter of `module` into a remote one."""
    parameter = module.get_parameter(key)
    delattr(module, key)
    module.__dict__[key] = parameter


def is_remote(module: nn.Module) -> bool:
    """Return whether `module` has parameters, and all of them are remote."""
    has_local = any(True for _ in module.parameters())
    return not has_local and any(True for inner in module.modules() for _ in _remote_items(inner))


def _remote_items(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for key, value in module.__dict__.items():
        if isinstance(value, nn.Parameter):
            yield key, value


def local_and_remote_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield local and remote parameters under all their names, in the same order on every stage."""
    for owner, module in model.named_modules():
        local = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for key, parameter in sorted((local | dict(_remote_items(module))).items()):
            yield f"{owner}.{key}" if owner else key, parameter


def fill_remote_with_zeros(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Make the value of remote parameters zero, in the memory of a single number.

    Modules that run on every stage, such as an embedding whose output this stage does not use, then return tensors of
    the right shape.
    """
    zeros: dict[int, nn.Parameter] = {}
    """By the identity of the placeholder, so that tied parameters remain tied."""

    for module in model.modules():
        for key, parameter in list(_remote_items(module)):
            if id(parameter) not in zeros:
                zero_dtype = dtype if parameter.is_floating_point() else parameter.dtype
                zero = torch.zeros((), dtype=zero_dtype, device=device).expand(parameter.shape)
                zeros[id(parameter)] = nn.Parameter(zero, requires_grad=False)
                zeros[id(parameter)].__dict__.update(parameter.__dict__)
            module.__dict__[key] = zeros[id(parameter)]
