"""The engine over `deepspeed.initialize`: data parallelism with ZeRO 0 to 3."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partition_parameters import GatheredParameters
from torch import Tensor, nn

from trainer.config import LoadedConfig
from trainer.config.deepspeed import clips_itself, extension_of, for_engine
from trainer.data.batches import IGNORED, MicroBatch, StepBatch
from trainer.distributed import World, load_extension
from trainer.engine.interface import Evaluation, StepResult
from trainer.model import TASKS, TaskLoss, initialize_weights

_PREFIX = "model."


class PlainEngine:
    """Every rank holds the whole model, or under ZeRO-3 an equal part of each weight.

    The loss of a micro-batch is its summed cross entropy times data ranks / tokens of the global batch. DeepSpeed
    averages gradients over the data ranks, so their sum is the gradient of the token-weighted mean over the
    global batch, whatever the layout and however unevenly the tokens are spread.
    """

    def __init__(self, engine: Any, world: World, clipping: float | None) -> None:
        self._engine = engine
        self._world = world
        self._clipping = clipping
        """The norm to clip at where this engine clips; None where DeepSpeed does."""

        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]

    @property
    def model(self) -> nn.Module:
        """The Hugging Face model."""
        model: nn.Module = self._engine.module.model
        return model

    def _forward(self, micro: MicroBatch) -> TaskLoss:
        on_device = micro.to(self._world.device)
        loss: TaskLoss = self._engine(
            on_device.input_ids_BT, on_device.labels_BT, attention_mask_BT=on_device.attention_mask_BT
        )
        return loss

    def train_step(self, batch: StepBatch) -> StepResult:
        """See `Engine.train_step`."""
        rate = float(self._engine.optimizer.param_groups[0]["lr"])
        weight = self._world.topology.data / batch.tokens
        count = len(batch.micro_batches)
        loss_sum = auxiliary_sum = torch.zeros((), device=self._world.device)
        norm: Tensor | float | None = None
        for number, micro in enumerate(batch.micro_batches, start=1):
            loss = self._forward(micro)
            objective = loss.loss_sum * weight + loss.auxiliary / count
            self._engine.backward(objective, scale_wrt_gas=False)
            loss_sum = loss_sum + loss.loss_sum.detach()
            auxiliary_sum = auxiliary_sum + loss.auxiliary.detach()
            if number == count and self._clipping is not None:
                norm = self._clip(self._clipping)
            self._engine.step()
        if self._clipping is None:
            norm = self._engine.get_global_grad_norm()
        return StepResult(loss_sum, auxiliary_sum, norm, rate, count, bool(self._engine.was_step_applied()))

    def _clip(self, largest: float) -> Tensor:
        """Norm of all gradients, which are then scaled down to `largest`; stays on the device."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if largest > 0:
            nn.utils.clip_grads_with_norm_(self._parameters, largest, norm)
        return norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[MicroBatch]) -> Evaluation:
        """See `Engine.evaluate`."""
        self._engine.eval()
        loss_sum, tokens = torch.zeros((), dtype=torch.float64, device=self._world.device), 0
        for micro in batches:
            tokens += int((micro.labels_BT != IGNORED).sum())
            loss_sum = loss_sum + self._forward(micro).loss_sum
        self._engine.train()
        rows = self.exchange([loss_sum, float(tokens)])
        whole = int(sum(row[1] for row in rows))
        return Evaluation(sum(row[0] for row in rows) / max(1, whole), whole)

    def exchange(self, values: list[Tensor | float]) -> list[list[float]]:
        """See `Engine.exchange`."""
        device = self._world.device
        own = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=device).detach() for v in values])
        rows = [torch.empty_like(own) for _ in range(self._world.topology.world)]
        dist.all_gather(rows, own)
        table: list[list[float]] = torch.stack(rows).tolist()
        return table

    def whole_weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Engine.whole_weights`."""
        for name, parameter in self._engine.module.named_parameters():
            with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                yield name.removeprefix(_PREFIX), parameter.detach()


def _zero3_partitioner(settings: dict[str, Any], dtype: torch.dtype) -> Any:
    """A function that takes whole parameters away to where ZeRO-3 keeps their parts, as soon as they are made."""
    context: Any = None

    def partition(parameters: list[nn.Parameter]) -> None:
        nonlocal context
        if context is None:
            context = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        context._convert_to_zero_parameters(parameters)

    return partition


def start_engine(model: Any, loaded: LoadedConfig, world: World) -> PlainEngine:
    """Gives the model its weights and hands it to DeepSpeed.

    Args:
        model: from `build_model`, on the meta device or with pretrained weights.
    """
    settings = for_engine(loaded.deepspeed_json)
    extension = extension_of(settings)
    if extension is not None:
        load_extension(extension)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[loaded.config.deepspeed.precision]
    if settings["zero_optimization"]["stage"] == 3:
        initialize_weights(model, loaded.config.run.seed, _zero3_partitioner(settings, dtype))
    else:
        initialize_weights(model, loaded.config.run.seed)
    model.train()
    module = TASKS[loaded.config.model.task](model)
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=settings)
    engine.train()
    clipping = None if clips_itself(settings) else float(loaded.deepspeed_json["gradient_clipping"])
    return PlainEngine(engine, world, clipping)
