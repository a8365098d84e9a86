"""Hooks that change the inputs and outputs of a module without changing its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor, nn

Args = tuple[object, ...]
Kwargs = dict[str, object]
Change = Callable[[Tensor], Tensor]
"""Takes and returns a tensor of any shape."""


def _apply_to_float(change: Change, value: object) -> object:
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value


def on_inputs(module: nn.Module, change: Change) -> None:
    """Pass every floating-point argument of the module through `change`."""

    def hook(_: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        return (
            tuple(_apply_to_float(change, value) for value in args),
            {key: _apply_to_float(change, value) for key, value in kwargs.items()},
        )

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_argument(module: nn.Module, name: str, change: Change, *, prepend: bool = False) -> None:
    """Pass the argument called `name`, if it is a tensor, through `change`; with `prepend`, before other changes."""
    index = list(inspect.signature(module.forward).parameters).index(name)

    def hook(_: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        if isinstance(value := kwargs.get(name), Tensor):
            kwargs = kwargs | {name: change(value)}
        elif index < len(args) and isinstance(value := args[index], Tensor):
            args = (*args[:index], change(value), *args[index + 1 :])
        return args, kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)


def on_output(module: nn.Module, change: Change) -> None:
    """Pass the module's output, or the first of several, through `change`."""

    def hook(_: nn.Module, __: Args, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module.register_forward_hook(hook)
