"""Flags that DeepSpeed reads on parameters. Importing this does not import DeepSpeed."""

from __future__ import annotations

from torch import nn


def set_tensor_parallel(parameter: nn.Parameter, value: bool) -> None:
    """State whether every tensor rank counts a parameter in the gradient norm, and not only the first."""
    parameter.tensor_model_parallel = value  # type: ignore[attr-defined]


def set_counted_elsewhere(parameter: nn.Parameter, value: bool) -> None:
    """State whether another pipeline stage counts a parameter in the gradient norm."""
    parameter.ds_pipe_replicated = value  # type: ignore[attr-defined]


def is_counted_elsewhere(parameter: nn.Parameter) -> bool:
    """Return whether another pipeline stage counts a parameter in the gradient norm, and saves it."""
    return getattr(parameter, "ds_pipe_replicated", False)
