"""The engine over `deepspeed.initialize`: data and tensor parallelism with ZeRO 0 to 3."""

from __future__ import annotations

import zlib
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
from trainer.engine.grid import Grid
from trainer.engine.interface import Evaluation, StepResult
from trainer.errors import DataError
from trainer.model import TASKS, TaskLoss, give_weights
from trainer.parallel import Joiner, Mapper, counts, shard_of, tensor_mapper

_PREFIX = "model."


class PlainEngine:
    """Every rank holds the whole model, or its tensor rank's part of it, or under ZeRO-3 a data rank's part of that.

    The loss of a micro-batch is its summed cross entropy times data ranks / tokens of the global batch. DeepSpeed
    averages gradients over the data ranks, so their sum is the gradient of the token-weighted mean over the
    global batch, whatever the layout and however unevenly the tokens are spread.
    """

    def __init__(self, engine: Any, world: World, mapper: Mapper, clipping: float | None) -> None:
        self._engine = engine
        self._mapper = mapper
        self._verifies = True
        """Until the first backward pass is through."""

        self._world = world
        self._clipping = clipping
        """The norm to clip at where this engine clips; None where DeepSpeed does."""

        self._joiner = Joiner(world.groups.get("tensor"), world.topology.tensor)

        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        self._counted = [p for p in self._parameters if counts(p)]
        self._speaks = world.topology.tensor_rank == 0
        """Whether this rank speaks for its tensor group, whose ranks all see the same samples."""

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
        if self._verifies:
            self._refuse_different_samples(batch.micro_batches[0])
        for number, micro in enumerate(batch.micro_batches, start=1):
            loss = self._forward(micro)
            objective = loss.objective * weight + loss.auxiliary / count
            self._engine.backward(objective, scale_wrt_gas=False)
            if self._verifies:
                self._mapper.verify_gradients()
                self._verifies = False
            loss_sum = loss_sum + loss.loss_sum.detach()
            auxiliary_sum = auxiliary_sum + loss.auxiliary.detach()
            if number == count and self._clipping is not None:
                norm = self._clip(self._clipping)
            self._engine.step()
        if self._clipping is None:
            norm = self._engine.get_global_grad_norm()
        applied = bool(self._engine.was_step_applied())
        if not self._speaks:
            loss_sum, auxiliary_sum, count = torch.zeros_like(loss_sum), torch.zeros_like(auxiliary_sum), 0
        return StepResult(loss_sum, auxiliary_sum, norm, rate, count, applied)

    def _refuse_different_samples(self, micro: MicroBatch) -> None:
        """Looks whether the ranks of this tensor group were given the same samples, as all they compute supposes."""
        if "tensor" not in self._world.groups:
            return
        own = zlib.crc32(micro.input_ids_BT.numpy().tobytes())
        sums: list[int | None] = [None] * self._world.topology.tensor
        dist.all_gather_object(sums, own, group=self._world.groups["tensor"])
        if len(set(sums)) > 1:
            raise DataError(
                f"rank {self._world.topology.rank}: the ranks of a tensor group read different samples. They must see "
                "the same data: is data.cache_dir, or a data file, another one on some host?"
            )

    def _clip(self, largest: float) -> Tensor:
        """Norm of all gradients, which are then scaled down to `largest`; stays on the device."""
        norm = nn.utils.get_total_norm([p.grad for p in self._counted if p.grad is not None])
        if "tensor" in self._world.groups:
            squared = norm.square()
            dist.all_reduce(squared, group=self._world.groups["tensor"])
            norm = squared.sqrt()
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
        rows = self.exchange([loss_sum, float(tokens)] if self._speaks else [torch.zeros_like(loss_sum), 0.0])
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
                yield from self._joiner.add(name.removeprefix(_PREFIX), parameter.detach(), shard_of(parameter))
        persistent = self.model.state_dict(keep_vars=True)
        for name, buffer in self.model.named_buffers():
            if name in persistent:
                yield name, self._mapper.whole_buffer(name, buffer)


def _zero3_partitioner(settings: dict[str, Any], dtype: torch.dtype, grid: Grid) -> Any:
    """A function that takes whole parameters away to where ZeRO-3 keeps their parts, as soon as they are made."""
    context: Any = None

    def partition(parameters: list[nn.Parameter]) -> None:
        nonlocal context
        if context is None:
            context = deepspeed.zero.Init(
                config_dict_or_path=settings,
                dtype=dtype,
                mpu=grid,
                data_parallel_group=grid.get_data_parallel_group(),
            )
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype)
        context._convert_to_zero_parameters(parameters)

    return partition


def start_engine(model: Any, loaded: LoadedConfig, world: World) -> PlainEngine:
    """Gives the model its weights and hands it to DeepSpeed.

    Args:
        model: from `build_model`, on the meta device.
    """
    settings = for_engine(loaded.deepspeed_json)
    extension = extension_of(settings)
    if extension is not None:
        load_extension(extension)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[loaded.config.deepspeed.precision]
    grid = Grid(world)
    parallel = loaded.config.parallel
    mapper = tensor_mapper(model, parallel.tensor_plan, world, sequence_parallel=parallel.sequence_parallel)
    partition = _zero3_partitioner(settings, dtype, grid) if settings["zero_optimization"]["stage"] == 3 else None

    def complete(parameters: list[nn.Parameter]) -> None:
        cut = mapper.cut(parameters)
        if partition is not None:
            partition(cut)

    give_weights(model, loaded, complete)
    mapper.install()
    model.train()
    options = loaded.config.training
    cross_entropy = mapper.cross_entropy(options.label_smoothing, options.z_loss, options.loss_chunk_tokens)
    module = TASKS[loaded.config.model.task](model, cross_entropy)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=settings, mpu=grid)
    engine.train()
    clipping = None if clips_itself(settings) else float(loaded.deepspeed_json["gradient_clipping"])
    return PlainEngine(engine, world, mapper, clipping)
