"""Changing what goes into a module and what comes out of it, without touching its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def _is_real(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def on_inputs(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Passes every floating-point tensor that the module is given through `change`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (
            tuple(change(a) if _is_real(a) else a for a in args),
            {key: change(a) if _is_real(a) else a for key, a in kwargs.items()},
        )

    module.register_forward_pre_hook(hook, with_kwargs=True)


def on_argument(module: nn.Module, name: str, change: Callable[[Tensor], Tensor], *, prepend: bool = False) -> None:
    """Passes the argument called `name` through `change`, where it is given; with `prepend`, before other changes."""
    place = list(inspect.signature(module.forward).parameters).index(name)

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if isinstance(kwargs.get(name), Tensor):
            kwargs = kwargs | {name: change(kwargs[name])}
        elif place < len(args) and isinstance(args[place], Tensor):
            args = (*args[:place], change(args[place]), *args[place + 1 :])
        return args, kwargs

    module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)


def on_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Passes the module's output, or the first of several, through `change`."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    module.register_forward_hook(hook)
