"""Assembly of a run: from a configuration to all parts that train it."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.causality import verify_causality
from trainer.checkpoint import CheckpointSaver, Resumption, RunRecord, find_checkpoint, restore
from trainer.config import LoadedConfig
from trainer.data import Batches, PreparedData, open_batches, prepare_data
from trainer.distributed import Launch, World
from trainer.engine import Engine, build_engine
from trainer.model import ModelCost, PreTrainedModel, build_model, check_model, describe_model, model_cost
from trainer.pipeline import StageAssignment, assign_stages, attention_to_recompute
from trainer.progress import Progress
from trainer.run_directory import RunDirectory
from trainer.update import Synchronous


@dataclass(frozen=True)
class ModelPlan:
    """What follows from the shapes of the model alone."""

    shape: PreTrainedModel
    """The unsharded model on the meta device."""

    cost: ModelCost
    assignment: StageAssignment | None
    """None without a pipeline."""


@dataclass(frozen=True)
class Trainer:
    """The parts of a run on one rank, ready for the step after `progress`."""

    loaded: LoadedConfig
    world: World
    data: PreparedData
    batches: Batches
    plan: ModelPlan
    model: PreTrainedModel
    """The model as built; the models that hold weights are those of the engine."""

    engine: Engine
    resumption: Resumption
    checkpoints: CheckpointSaver
    progress: Progress

    @property
    def directory(self) -> RunDirectory:
        """The run directory, numbered for this attempt."""
        return self.resumption.directory


def plan_model(loaded: LoadedConfig) -> ModelPlan:
    """Derive costs and stages from the shapes of the model, before data are read and before ranks wait for each other.

    Raises:
        ConfigError: transformers cannot build the model.
        PlanError: the tensor plan, the pipeline or selective recomputation does not fit the model.
    """
    shape = build_model(loaded)
    check_model(shape, loaded)
    attention_to_recompute(shape, loaded)
    return ModelPlan(shape, model_cost(shape), assign_stages(shape, loaded))


def assemble(
    loaded: LoadedConfig,
    world: World,
    directory: RunDirectory | None = None,
    *,
    data: PreparedData | None = None,
    plan: ModelPlan | None = None,
) -> Trainer:
    """Put the parts of a run together, in the order of the data flow. Collective: all ranks must call it.

    A run that has a checkpoint resumes from it; any other one starts at step 1 with the weights of the configuration,
    after a check that the model is causal.

    Args:
        loaded: The configuration, with its number of steps resolved.
        world: The joined world.
        directory: The run directory as `RunDirectory.examine` returns it, which is called by default.
        data: Prepared data; prepared here by default.
        plan: From `plan_model`, which is called by default.

    Raises:
        ConfigError: the model, the data or the checkpoint does not fit the configuration.
        CheckpointError: the checkpoint to resume from is missing or damaged.
        DataError: a source is too small for one sample.
    """
    data = prepare_data(loaded, Launch.from_environment(), world.store) if data is None else data
    plan = plan_model(loaded) if plan is None else plan
    batches = open_batches(loaded, data, world.topology, pin=world.device.type == "cuda")
    model = build_model(loaded, data.tokenizer)
    record = RunRecord(describe_model(model), batches.fingerprint, batches.evaluated_samples)
    directory = RunDirectory.examine(loaded) if directory is None else directory
    resumption = find_checkpoint(loaded, directory, world, record)
    is_resumed = resumption.checkpoint is not None
    engine = Synchronous().wrap(build_engine(model, loaded, world, plan.assignment, zero_weights=is_resumed), world)
    if not is_resumed:
        # The probe needs the engine, because no rank has the full model: it runs the forward pass that trains, in its
        # layout and precision. It precedes `restore`, which has nothing to load here: the weights are those of the
        # configuration. An engine that resumes is `blank` up to `restore`; its run was probed when it began, unless its
        # first checkpoint was imported.
        verify_causality(loaded, world, engine, batches.train)
    progress = restore(resumption, engine)
    batches.train.resume_from(progress.step, progress.samples)
    checkpoints = CheckpointSaver(resumption.context)
    return Trainer(loaded, world, data, batches, plan, model, engine, resumption, checkpoints, progress)
