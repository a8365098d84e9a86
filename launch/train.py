"""Train a model from one JSON file.

    deepspeed launch/train.py --config X.json [--set a.b=c]... [--resume auto|never|DIR] [--allow_change KEY]...
                              [--verify_data] [--dry_run [--world N]] [--print_config]

The same command resumes the run, on any number of processes. It also runs under `torchrun`, or as one process under
plain `python`.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys

from trainer.distributed import (
    JOIN_TIMEOUT,
    Launch,
    Store,
    configure_logging,
    joined_world,
    local_device,
    open_store,
    prepare_environment,
)

prepare_environment()

from trainer.config import LoadedConfig, load_config
from trainer.config.earlier_versions import METADATA_KEY
from trainer.exit import CommandLineParser, exit_on_errors, read_launch
from trainer.fault_tolerance import GuardedRun, StopAgreement, StopRequests, refuse_missing_hostfile
from trainer.json_types import JsonObject
from trainer.sanitize import sanitize_text

log = logging.getLogger("trainer.train")


def main() -> None:
    """Run the command: train, or print the configuration or the dry run."""
    launch = read_launch()
    configure_logging(launch.rank)
    requests = StopRequests(launch.rank)
    with exit_on_errors(launch, requests):
        refuse_missing_hostfile(sys.argv[0])
        options = parse_arguments()
        is_inspection = options.print_config or options.dry_run
        world = options.world if is_inspection and launch.world_size == 1 else launch.world_size
        loaded = load_config(
            options.config, options.set, world_size=world, device=None if is_inspection else local_device()
        )
        if not is_inspection:
            requests.install(loaded.config.training.max_seconds)
            train(loaded, launch, requests, verify_data=options.verify_data)
        elif launch.rank == 0:
            if loaded.legacy_defaults.message:
                print(f"[tessera] {sanitize_text(loaded.legacy_defaults.message)}", file=sys.stderr)
            print(json.dumps(resolved_json(loaded), indent=2) if options.print_config else dry_run_text(loaded))


def train(loaded: LoadedConfig, launch: Launch, requests: StopRequests, *, verify_data: bool = False) -> None:
    """Claim the run directory, and train the remaining steps. Collective: all ranks must call it."""
    # Imported here, so that configuration errors are reported before the slow imports.
    from trainer.data import source_facts
    from trainer.fault_tolerance import claim_run_directory, compare_ranks, guarded_run, start_facts

    timeout, store = loaded.config.run.collective_timeout_seconds, open_store(launch)
    compare_ranks(launch, store, "start", [*start_facts(loaded, launch), *source_facts(loaded)])
    directory, lock = claim_run_directory(loaded, launch, store)
    if directory.is_finished(loaded):
        log.info("%s finished at step %d; its model is in %s", directory.path, directory.finished_step, directory.final)
        lock.release()
        return
    for problem in loaded.warnings:
        log.warning("%s", problem)
    with guarded_run(launch, store, requests, directory=directory, lock=lock, timeout_seconds=timeout) as run:
        train_guarded(loaded, launch, store, run, verify_data=verify_data)


def train_guarded(loaded: LoadedConfig, launch: Launch, store: Store, run: GuardedRun, *, verify_data: bool) -> None:
    """Run the whole training, in the order of the data flow. Collective: all ranks must call it."""
    from trainer.assembly import assemble, plan_model
    from trainer.data import prepare_data, prepared_facts, resolve_steps
    from trainer.fault_tolerance import compare_ranks
    from trainer.loop import fit
    from trainer.model import write_model
    from trainer.topology import Topology
    from trainer.tracking import open_trackers

    parallel, seed = loaded.config.parallel, loaded.config.run.seed
    plan = plan_model(loaded)
    topology = Topology.of(launch.world_size, launch.rank, pipeline=parallel.pipeline, tensor=parallel.tensor)
    run.phases.enter("data")
    data = prepare_data(loaded, launch, store, verify_data=verify_data)
    loaded = resolve_steps(loaded, data)
    compare_ranks(launch, store, "prepare its data", prepared_facts(loaded, data), timeout=JOIN_TIMEOUT)
    configure_logging(launch.rank, run.directory.path / "logs")
    if loaded.legacy_defaults.message:
        log.info("%s", loaded.legacy_defaults.message)
    with joined_world(launch, topology, store, run.phases, seed=seed) as world:
        trainer = assemble(loaded, world, run.directory, data=data, plan=plan)
        directory, step = trainer.directory, trainer.progress.step
        if world.is_rank_zero:
            directory.write_config(loaded, frame=data.frame_json)
            directory.save_tokenizer(data.tokenizer)
            directory.record("resume" if step else "start", step, processes=launch.world_size)
        stop = StopAgreement(run.requests, world, directory, final_step=loaded.steps, lock=run.lock)
        states = trainer.resumption.tracker_states
        with open_trackers(loaded, directory, states, is_rank_zero=world.is_rank_zero) as trackers:
            fit(trainer, trackers, stop)
        weights = trainer.engine.full_weights()
        files = write_model(trainer.model, weights, directory.final, data.tokenizer, writes=world.is_rank_zero)
        if world.is_rank_zero:
            directory.write_config(loaded, frame=data.frame_json, finished_step=loaded.steps, final=files)
            directory.record("finish", loaded.steps, reason=loaded.length_unit)
            log.info("finished: the model is in %s, the metrics in %s", directory.final, directory.metrics)


def resolved_json(loaded: LoadedConfig) -> JsonObject:
    """Return the resolved configuration, with the special tokens around each document, as in the run's config.json."""
    from trainer.data import document_frame

    frame = document_frame(loaded)
    return {**loaded.resolved(), METADATA_KEY: {"document_frame": frame and frame.as_json()}}


def dry_run_text(loaded: LoadedConfig) -> str:
    """Describe what the command would run."""
    from trainer.dry_run import describe

    return sanitize_text(describe(loaded))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; options that stand for keys become overrides.

    Raises:
        ConfigError: The command line is invalid.
    """
    parser = CommandLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", required=True, metavar="X.json", help="the configuration; see ds_configs/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=c",
        help="override one value, for example training.max_steps=10; may be repeated",
    )
    parser.add_argument(
        "--resume",
        metavar="auto|never|DIR",
        help="resume from the newest checkpoint of the run directory (auto, the default), start a new run (never), or "
        "resume from a checkpoint, a run directory or a location such as s3://bucket/run",
    )
    parser.add_argument(
        "--allow_change",
        action="append",
        default=[],
        metavar="KEY",
        help="resume with another value of this key, such as data.train; may be repeated",
    )
    parser.add_argument(
        "--verify_data",
        action="store_true",
        help="verify every block of the token cache, instead of a sample, and rebuild damaged entries",
    )
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="check the configuration and describe the run (ranks, parameters, batch, memory) without starting it",
    )
    parser.add_argument(
        "--world",
        type=int,
        metavar="N",
        help="with --dry_run or --print_config: number of processes (default: the smallest possible)",
    )
    parser.add_argument("--print_config", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    options = parser.parse_args()
    if options.resume is not None:
        options.set.append(f"checkpoint.resume={json.dumps(options.resume)}")
    if options.allow_change:
        options.set.append(f"checkpoint.allow_changed={json.dumps(options.allow_change)}")
    if options.world is not None and (options.world < 1 or not (options.dry_run or options.print_config)):
        parser.error("--world N requires --dry_run or --print_config, and N must be at least 1")
    if options.verify_data and (options.dry_run or options.print_config):
        parser.error("--verify_data cannot be used with --dry_run or --print_config")
    return options


if __name__ == "__main__":
    main()
