"""The reference: a plain Hugging Face model in a plain torch loop, in one process that runs no engine of ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.generic import ModelOutput

from trainer.config.load import LoadedConfig
from trainer.config.model_config import model_config
from trainer.config.schema import TrainingSection
from trainer.model import build_model, initialize_weights
from trainer.tasks import IGNORE_INDEX, MicroBatch, auxiliary_coefficient
from trainer.tensor_parallel import choose_experts_implementation


def load_reference_model(loaded: LoadedConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """Return the plain Hugging Face model with its weights; pretrained ones are read by transformers itself.

    Args:
        loaded: The configuration.
        tokenizer: The run's. A new model uses its special tokens.
    """
    if loaded.initialize == "random":
        model = build_model(loaded, tokenizer)
        initialize_weights(model, loaded.config.run.seed)
        choose_experts_implementation(model, torch.float32)
        return model
    path = loaded.config.model.path
    assert path is not None
    folder = Path(path).expanduser()
    pretrained: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder) if folder.is_dir() else path,
        config=model_config(loaded.config.model),
        attn_implementation=loaded.attention,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
    )
    choose_experts_implementation(pretrained, torch.float32)
    return pretrained


def loss_sums(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return (cross entropy, objective), both summed over the targets, at least in fp32.

    Args:
        logits: (B, T, V).
        labels: (B, T).
        label_smoothing: Of the objective.
        z_loss: Of the objective.
    """
    rows = logits.flatten(0, 1)  # (B * T, V)
    rows, targets = rows.to(torch.promote_types(rows.dtype, torch.float32)), labels.flatten()
    cross_entropy = F.cross_entropy(rows, targets, ignore_index=IGNORE_INDEX, reduction="sum")
    objective = F.cross_entropy(
        rows, targets, ignore_index=IGNORE_INDEX, reduction="sum", label_smoothing=label_smoothing
    )
    if z_loss:
        objective = objective + z_loss * rows[targets != IGNORE_INDEX].logsumexp(-1).square().sum()
    return cross_entropy.detach(), objective


def auxiliary_loss(model: PreTrainedModel, output: ModelOutput) -> Tensor:
    """Return the load-balancing loss of a forward pass times the family's coefficient, as a scalar; 0 without one."""
    loss = getattr(output, "aux_loss", None)
    return loss * auxiliary_coefficient(model.config) if isinstance(loss, Tensor) else torch.zeros(())


def reference_losses(
    model: PreTrainedModel, micro_batch: MicroBatch, training: TrainingSection
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cross entropy, objective, auxiliary loss) of a micro-batch: two sums over its targets, and a mean."""
    output = model(**micro_batch.inputs, use_cache=False)
    cross_entropy, objective = loss_sums(
        output.logits, micro_batch.labels, label_smoothing=training.label_smoothing, z_loss=training.z_loss
    )
    return cross_entropy, objective, auxiliary_loss(model, output)


def learning_rate_scale(name: str, scales: Mapping[str, float]) -> float:
    """Return the factor that `training.learning_rate_scales` has for a weight; 1 where no pattern matches its name."""
    patterns = ((re.escape(pattern).replace(r"\*", ".*"), scale) for pattern, scale in scales.items())
    return next((scale for pattern, scale in patterns if re.fullmatch(pattern, name)), 1.0)


def scaled_sgd(model: PreTrainedModel, rate: float, training: TrainingSection) -> torch.optim.SGD:
    """Return SGD with a group for each trained weight, which holds its `scale`: the rate is `rate * scale`."""
    groups = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = learning_rate_scale(name, training.learning_rate_scales)
            groups.append({"params": [parameter], "lr": rate * scale, "scale": scale})
    return torch.optim.SGD(groups, lr=rate)


@dataclass(frozen=True)
class ReferenceStep:
    """One optimizer step of the reference."""

    number: int
    loss: float
    """Mean cross entropy over the targets of the global batch."""

    grad_norm: float
    """Before clipping."""


def train_reference(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Sequence[MicroBatch]],
    training: TrainingSection,
    *,
    before_update: Callable[[ReferenceStep], float | None],
) -> list[ReferenceStep]:
    """Train a model in plain torch: backward passes of a global batch's micro-batches, clipping, an update.

    Args:
        model: In training mode; it is changed.
        optimizer: Of its parameters.
        batches: The micro-batches of each step.
        training: Section that has the terms of the objective.
        before_update: Called when the gradients of a step are complete and not clipped yet. It may read them and set
            learning rates, and returns the norm to clip at, or None not to clip.
    """
    steps = []
    for number, micro_batches in enumerate(batches, start=1):
        targets = sum(micro_batch.num_targets for micro_batch in micro_batches)
        loss = 0.0
        for micro_batch in micro_batches:
            cross_entropy, objective, auxiliary = reference_losses(model, micro_batch, training)
            (objective / targets + auxiliary / len(micro_batches)).backward()  # type: ignore[no-untyped-call]
            loss += float(cross_entropy) / targets
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        step = ReferenceStep(number, loss, float(nn.utils.get_total_norm(gradients)))
        max_norm = before_update(step)
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(step)
    return steps


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, micro_batches: Iterable[MicroBatch], training: TrainingSection) -> float:
    """Return the mean cross entropy over the targets of all micro-batches."""
    total, targets = 0.0, 0
    for micro_batch in micro_batches:
        total += float(reference_losses(model, micro_batch, training)[0])
        targets += micro_batch.num_targets
    return total / targets
