"""What ranks do in the layout tests: train with our engine, or with a bare loop that never saw our code."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer.config.load import LoadedConfig, check
from trainer.data import open_batches, prepare_data
from trainer.distributed import Launch, World, joined_world
from trainer.engine import start_engine
from trainer.engine.plain import PlainEngine
from trainer.model import build_model, initialize_weights
from trainer.topology import Topology

Curve = list[tuple[float, float]]
"""(loss, gradient norm before clipping) by step."""

Weights = dict[str, torch.Tensor]


def _loaded(config: dict[str, Any], world: int) -> LoadedConfig:
    return check(config, world=world, device="cpu")


Outcome = tuple[Curve, Weights, float | None]
"""The curve, the final weights, and the held-out loss before training."""


def train(jobs: list[tuple[dict[str, Any], int]], sabotage: str = "") -> list[Outcome]:
    """Our engine in this rank's world, once for each (configuration, steps)."""
    launch = Launch.from_environment()
    topology = Topology.of(launch.world, launch.rank)
    with joined_world(launch, topology, seed=jobs[0][0]["run"]["seed"]) as world:
        return [_train(config, steps, launch, topology, world, sabotage) for config, steps in jobs]


def _train(
    config: dict[str, Any], steps: int, launch: Launch, topology: Topology, world: World, sabotage: str
) -> Outcome:
    loaded = _loaded(config, launch.world)
    prepared = prepare_data(loaded, builder=launch.rank == 0)
    batches = open_batches(loaded, prepared, topology)
    engine = start_engine(build_model(loaded, prepared.tokenizer), loaded, world)
    before = engine.evaluate(batches.validation).loss if batches.validation else None
    if sabotage:
        _sabotage(engine, sabotage)
    curve = []
    for batch in batches.train.steps(1, steps):
        result = engine.train_step(batch)
        total = sum(row[0] for row in engine.exchange([result.loss_sum]))
        norm = float("nan") if result.grad_norm is None else float(result.grad_norm)
        curve.append((total / batch.tokens, norm))
    weights = {name: tensor.float().numpy() for name, tensor in engine.whole_weights()}
    return curve, weights, before


def _sabotage(engine: PlainEngine, how: str) -> None:
    """Breaks what the layout tests claim to prove; they must go red."""
    forward = engine._forward

    def mean_of_means(micro: Any) -> Any:
        loss = forward(micro)
        own = (micro.labels_BT != -100).sum() * engine._world.topology.data
        return loss._replace(loss_sum=loss.loss_sum * (engine._tokens / own / 4))

    def first_micro_batch_only(micro: Any) -> Any:
        loss = forward(micro)
        engine._seen = getattr(engine, "_seen", 0) + 1
        return loss if engine._seen % 2 else loss._replace(loss_sum=loss.loss_sum.detach() + 0 * loss.loss_sum)

    if how == "mean of means":
        step = engine.train_step

        def remember(batch: Any) -> Any:
            engine._tokens = batch.tokens
            return step(batch)

        engine.train_step = remember  # type: ignore[method-assign]
        engine._forward = mean_of_means  # type: ignore[method-assign]
    elif how == "drop a micro-batch":
        engine._forward = first_micro_batch_only  # type: ignore[method-assign]
    elif how == "no clipping":
        engine._clipping = 0.0
    else:
        raise ValueError(how)


def train_bare(jobs: list[tuple[dict[str, Any], int]]) -> list[Outcome]:
    """One process, plain torch and Hugging Face: the whole global batch at once, no engine of any kind."""
    return [_train_bare(config, steps) for config, steps in jobs]


def _train_bare(config: dict[str, Any], steps: int) -> Outcome:
    loaded = _loaded(config, 1)
    prepared = prepare_data(loaded, builder=True)
    whole_batch = {**config["deepspeed"], "train_micro_batch_size_per_gpu": loaded.batch.train}
    whole_batch.pop("gradient_accumulation_steps", None)
    loaded = _loaded({**config, "deepspeed": whole_batch}, 1)
    batches = open_batches(loaded, prepared, Topology.of(1, 0))
    model = build_model(loaded, prepared.tokenizer)
    initialize_weights(model, loaded.config.run.seed)
    model.train()
    optimizer = _torch_optimizer(config["deepspeed"]["optimizer"], model)
    curve = []
    for step in range(1, steps + 1):
        (micro,) = batches.train.at(step).micro_batches
        logits = model(input_ids=micro.input_ids_BT, attention_mask=micro.attention_mask_BT).logits
        loss = F.cross_entropy(logits.flatten(0, 1), micro.labels_BT.flatten(), ignore_index=-100)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["deepspeed"]["gradient_clipping"])
        optimizer.step()
        optimizer.zero_grad()
        curve.append((float(loss), float(norm)))
    return curve, {name: p.detach().numpy() for name, p in model.named_parameters()}, None


def _torch_optimizer(section: dict[str, Any], model: torch.nn.Module) -> torch.optim.Optimizer:
    params = dict(section["params"])
    kind = getattr(torch.optim, section["type"])
    if kind is torch.optim.AdamW:
        params.setdefault("weight_decay", 0.0)  # DeepSpeed's default; torch's is 0.01
    return kind(model.parameters(), **params)
