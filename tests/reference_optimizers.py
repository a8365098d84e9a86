"""Optimizers of the reference, by their papers: torch's own, Lion and Muon, with parameter groups and schedules."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from deepspeed.runtime import lr_schedules

from tools.parity.reference import learning_rate_scale


def torch_optimizer(config: dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer that a configuration names, with the configuration's values."""
    section = config["deepspeed"]["optimizer"]
    params = dict(section["params"])
    optimizer_class = {"Lion": Lion, "Muon": Muon}.get(section["type"]) or getattr(torch.optim, section["type"])
    if optimizer_class is torch.optim.AdamW:
        params.setdefault("weight_decay", 0.0)  # DeepSpeed's default; torch's is 0.01
    return optimizer_class(_parameter_groups(config, model, params["lr"]), **params)


def scheduled_learning_rates(config: dict[str, Any], steps: int) -> list[float]:
    """Return the unscaled rate of each step, from the schedule's class alone; none without a schedule."""
    section = config["deepspeed"].get("scheduler")
    if section is None:
        return []
    alone = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config["deepspeed"]["optimizer"]["params"]["lr"])
    source = lr_schedules if hasattr(lr_schedules, section["type"]) else torch.optim.lr_scheduler
    schedule = getattr(source, section["type"])(alone, **section["params"])
    learning_rates = []
    for _ in range(steps):
        learning_rates.append(alone.param_groups[0]["lr"])
        alone.step()
        schedule.step()
    return learning_rates


def _parameter_groups(config: dict[str, Any], model: torch.nn.Module, rate: float) -> list[dict[str, Any]]:
    """Return a group for each weight, by other means than ours: all biases and norms of the models here match."""
    exclude = config["training"].get("weight_decay_exclude", ["*bias", "*norm.weight"])
    scales = config["training"].get("learning_rate_scales", {})
    groups = []
    for name, parameter in model.named_parameters():
        scale = learning_rate_scale(name, scales)
        group: dict[str, Any] = {"params": [parameter], "lr": rate * scale, "scale": scale, "name": name}
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            group["weight_decay"] = 0.0
        groups.append(group)
    return groups


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, algorithm 2: the sign of an interpolated momentum, with decoupled weight decay."""

    def __init__(self, params: Any, lr: float, betas: list[float], weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = (first * momentum + (1 - first) * p.grad).sign()
                p -= group["lr"] * (update + group["weight_decay"] * p)
                momentum.mul_(second).add_(p.grad, alpha=1 - second)


class Muon(torch.optim.Optimizer):
    """Jordan et al. 2024: the orthogonalized momentum of each matrix, by five Newton-Schulz iterations.

    Embeddings, the head and vectors have AdamW. As in DeepSpeed, momentum is an exponential average with Nesterov's
    look ahead, and the updates of tall matrices are scaled by sqrt(rows / columns).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        weight_decay: float,
        adam_lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-10,
    ) -> None:
        for group in params:
            name, (parameter,) = group["name"], group["params"]
            group["matrix"] = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            group["lr"] = group["scale"] * (lr if group["matrix"] else adam_lr)
        super().__init__(params, {"momentum": momentum, "weight_decay": weight_decay})
        adam = [group for group in self.param_groups if not group["matrix"]]
        self._adam = torch.optim.AdamW(adam, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self._adam.step()
        for group in self.param_groups:
            if group["matrix"]:
                (p,) = group["params"]
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(momentum, group["momentum"])) * max(1, p.shape[0] / p.shape[1]) ** 0.5
                p -= group["lr"] * (update + group["weight_decay"] * p)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Return U S V^T with all of S near 1."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x
