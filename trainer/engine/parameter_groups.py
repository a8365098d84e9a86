"""Parameter groups of the optimizer: excluded from weight decay, or with a scaled learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from trainer.compat.deepspeed.interfaces import ParameterGroup
from trainer.compat.deepspeed.layouts.find import layout_of
from trainer.model import WeightOptions
from trainer.pipeline import local_parameters

_SCALE = "learning_rate_scale"
_NAME = "name"
"""Key of a group that every optimizer keeps. DeepSpeed's Muon turns NAME into `NAME-muon-params`."""


class ParameterGroups:
    """Builds the groups of an optimizer, and scales their learning rates in each step.

    Schedules set the `lr` of every group to the unscaled rate. The scale is applied around the step of torch's
    optimizer, so no schedule, logged rate or checkpoint ever sees a scaled one.
    """

    def __init__(self, options: Mapping[str, WeightOptions]) -> None:
        """Collect the distinct options.

        Args:
            options: of every trained weight of the full model, by name; equal on all ranks.
        """
        self._options = options
        self._distinct_options = sorted(set(options.values()), key=lambda o: (not o.decays, o.scale))

    def build(
        self, trained: Sequence[nn.Parameter], models: Sequence[nn.Module]
    ) -> list[nn.Parameter] | list[ParameterGroup]:
        """Build the parameters for `deepspeed.initialize`: a plain list where all weights have the same options.

        Groups without a weight on this rank are omitted. All ranks of a data group hold the same weights, so
        they agree on the groups. Pipeline stages and tensor ranks may differ in their number, so no collective over
        those may run once per group: see `reduce_norm_once`.

        Args:
            trained: this rank's parameters that require a gradient.
            models: of this rank's stages, which hold `trained`.
        """
        if all(option == WeightOptions() for option in self._distinct_options):
            return list(trained)
        names = {id(weight): name for name, pieces in local_parameters(models).items() for weight, _ in pieces}
        groups: list[list[nn.Parameter]] = [[] for _ in self._distinct_options]
        for parameter in trained:
            option = self._options[names[id(parameter)]]
            groups[self._distinct_options.index(option)].append(parameter)
        return [
            {"params": group, _NAME: str(index), **({} if option.decays else {"weight_decay": 0.0})}
            for index, (option, group) in enumerate(zip(self._distinct_options, groups, strict=True))
            if group
        ]

    def install_rate_scales(self, optimizer: object) -> None:
        """Make each step of an optimizer use the scaled rates.

        Args:
            optimizer: DeepSpeed's.
        """
        if all(option.scale == 1 for option in self._distinct_options):
            return
        torch_optimizer = layout_of(optimizer).torch_optimizer
        for group in torch_optimizer.param_groups:
            group[_SCALE] = self._distinct_options[int(group[_NAME].split("-")[0])].scale
        torch_optimizer.register_step_pre_hook(_scale)
        torch_optimizer.register_step_post_hook(_unscale)


def _scale(torch_optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in torch_optimizer.param_groups:
        group["unscaled_lr"] = group["lr"]
        group["lr"] = group["lr"] * group[_SCALE]


def _unscale(torch_optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in torch_optimizer.param_groups:
        group["lr"] = group.pop("unscaled_lr")
