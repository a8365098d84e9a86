"""Inspects checkpoints, and converts them to Hugging Face folders and back.

    python -m tools.checkpoint list runs/NAME
    python -m tools.checkpoint show runs/NAME/checkpoints/step-00000100
    python -m tools.checkpoint verify runs/NAME
    python -m tools.checkpoint diff CHECKPOINT OTHER
    python -m tools.checkpoint export CHECKPOINT FOLDER [--dtype bf16] [--check]
    python -m tools.checkpoint import FOLDER --config X.json

Where a checkpoint is expected, a run directory stands for its newest one. Exit status: 0; 1 if `diff` or
`export --check` finds a difference; 2 for an invalid command line; 4 if a checkpoint is damaged or missing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from math import inf
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from trainer.distributed import Launch, joined_world, prepare_environment

prepare_environment()

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from trainer.checkpoint.export import compare_logits, export
from trainer.checkpoint.import_checkpoint import import_checkpoint
from trainer.checkpoint.retention import best_checkpoints
from trainer.checkpoint.saved import SavedCheckpoint, list_checkpoints
from trainer.checkpoint_format import (
    DTYPES,
    ChunkReader,
    Manifest,
    StoredTensor,
    is_checkpoint,
    read_manifest,
    verify_files,
)
from trainer.config import load_config
from trainer.config.plugins import import_named_plugins
from trainer.errors import CheckpointError, ConfigError, Problem
from trainer.exit import CommandLineParser, exit_on_errors
from trainer.run_layout import CHECKPOINTS
from trainer.sanitize import sanitize_text
from trainer.topology import Topology
from trainer.units import format_bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_on_errors(Launch()):
        options = _parser().parse_args(arguments)
        status = options.run(options)
        if status:
            raise SystemExit(status)


def _say(line: str) -> None:
    """Print a line; names in a manifest are not trusted."""
    print(sanitize_text(line))


def _parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog="python -m tools.checkpoint",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandLineParser)

    def command(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        subparser: argparse.ArgumentParser = commands.add_parser(
            name, help=summary, description=summary, allow_abbrev=False
        )
        subparser.set_defaults(run=run)
        return subparser

    listing = command("list", _list, "list the checkpoints of a run: step, losses, layout, size")
    listing.add_argument("run_directory", type=Path)
    show = command("show", _show, "show the metadata of a checkpoint, and its tensors")
    show.add_argument("checkpoint", type=Path)
    show.add_argument("--tensors", action="store_true", help="list every tensor")
    verify = command("verify", _verify, "read every byte and compare it with the manifest's hashes")
    verify.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for all of its checkpoints")
    diff = command("diff", _diff, "show the tensors in which two checkpoints differ most")
    diff.add_argument("checkpoint", type=Path)
    diff.add_argument("other", type=Path)
    diff.add_argument("--top", type=int, default=10, metavar="N", help="number of tensors to show (default 10)")
    out = command("export", _export, "write the weights as a Hugging Face folder")
    out.add_argument("checkpoint", type=Path)
    out.add_argument("folder", type=Path)
    out.add_argument("--dtype", choices=_DTYPES, default="fp32", help="type of the weights in the files (default fp32)")
    out.add_argument("--shard_gigabytes", type=float, default=2.0, metavar="N", help="largest file (default 2)")
    out.add_argument("--tokenizer", type=Path, metavar="DIR", help="folder of another tokenizer than the run's")
    out.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module, which registers the model's classes (run.plugins); its code runs",
    )
    out.add_argument(
        "--check",
        action="store_true",
        help="compare the logits of both models, which must fit in memory; status 1 if they differ",
    )
    into = command("import", _import, "create the first checkpoint of a run from Hugging Face or DeepSpeed files")
    into.add_argument("folder", type=Path)
    into.add_argument("--config", required=True, metavar="X.json", help="the configuration of the run")
    into.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value")
    return parser


def _resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` names."""
    if is_checkpoint(path) or not (path / CHECKPOINTS).is_dir():
        return path
    checkpoints, _ = list_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        raise CheckpointError(f"{path / CHECKPOINTS}: no valid checkpoint")
    return checkpoints[0].folder


def _find_checkpoints(path: Path) -> tuple[list[SavedCheckpoint], list[CheckpointError]]:
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        raise ConfigError(Problem("run_directory", f"{path} does not exist", "Use the run.output_dir of a run"))
    return list_checkpoints(folder)


def _layout(manifest: Manifest) -> str:
    world, deepspeed = manifest.about["world"], manifest.config["deepspeed"]
    precision = next((name for name in ("bf16", "fp16") if deepspeed.get(name, {}).get("enabled")), "fp32")
    axes = " x ".join(f"{axis} {world[axis]}" for axis in ("pipeline", "data", "tensor"))
    return f"{axes}, ZeRO {deepspeed['zero_optimization']['stage']}, {precision}"


def _loss(manifest: Manifest, split: str) -> str:
    loss = manifest.losses.get(split)
    return "" if loss is None else f"{loss:.4f}"


def _list(options: argparse.Namespace) -> int:
    checkpoints, errors = _find_checkpoints(options.run_directory)
    best = {checkpoint.folder for checkpoint in best_checkpoints(checkpoints)}
    table = Table("checkpoint", "attempt", "tokens", "loss", "validation", "layout", "size", "")
    for i, checkpoint in enumerate(checkpoints):
        manifest = checkpoint.manifest
        labels = ["latest"] * (i == 0) + ["best"] * (checkpoint.folder in best)
        table.add_row(
            checkpoint.folder.name,
            str(manifest.attempt),
            f"{manifest.tokens:,}",
            _loss(manifest, "train"),
            _loss(manifest, "validation"),
            _layout(manifest),
            format_bytes(manifest.bytes),
            " ".join(labels),
        )
    _console().print(table)
    for error in errors:
        _say(f"damaged: {error}")
    return 0


def _show(options: argparse.Namespace) -> int:
    folder = _resolve_checkpoint(options.checkpoint)
    manifest = read_manifest(folder)
    numel = Counter[str]()
    for (_, role), stored in manifest.tensors.items():
        numel[role] += stored.numel
    lines = {
        "checkpoint": folder,
        "step": f"{manifest.step:,} (attempt {manifest.attempt}), {manifest.samples:,} samples, "
        f"{manifest.tokens:,} tokens",
        "losses": ", ".join(f"{split} {loss:.4f}" for split, loss in manifest.losses.items() if loss is not None)
        or "-",
        "model": f"{manifest.model['class']} ({manifest.model['config']['model_type']})",
        "layout": _layout(manifest),
        "saved": f"{manifest.created}, commit {manifest.about['git_commit'] or 'unknown'}",
        "versions": ", ".join(f"{name} {version}" for name, version in manifest.about["versions"].items()),
        "files": f"{len(manifest.files)} of {format_bytes(manifest.bytes)}",
        "tensors": ", ".join(f"{count:,} elements of {role}" for role, count in numel.items()),
        "W&B run": manifest.trackers.get("wandb", {}).get("run_id", "-"),
    }
    for name, value in lines.items():
        _say(f"{name:<12} {value}")
    if options.tensors:
        for (name, role), stored in sorted(manifest.tensors.items()):
            _say(f"  {role:<12} {name} {list(stored.shape)} {stored.dtype} in {len(stored.chunks)} chunks")
    return 0


def _verify(options: argparse.Namespace) -> int:
    if is_checkpoint(options.checkpoint):
        checkpoints, errors = [SavedCheckpoint(options.checkpoint, read_manifest(options.checkpoint))], []
    else:
        checkpoints, errors = _find_checkpoints(options.checkpoint)
    for checkpoint in track(checkpoints, description="reading", console=Console(stderr=True), transient=True):
        folder, manifest = checkpoint.folder, checkpoint.manifest
        try:
            verify_files(folder, manifest)
            _say(f"{folder}: valid ({len(manifest.files)} files, {format_bytes(manifest.bytes)})")
        except CheckpointError as error:
            errors.append(error)
    for error in errors:
        _say(f"damaged: {error}")
    if not checkpoints and not errors:
        raise CheckpointError(f"{options.checkpoint}: no checkpoint found")
    return 4 if errors else 0


def _diff(options: argparse.Namespace) -> int:
    folders = [_resolve_checkpoint(options.checkpoint), _resolve_checkpoint(options.other)]
    manifest, other = (read_manifest(folder) for folder in folders)
    reader, other_reader = (ChunkReader(folder) for folder in folders)
    rows = []
    for key in track(manifest.tensors, description="comparing", console=Console(stderr=True), transient=True):
        if key in other.tensors and manifest.tensors[key].shape == other.tensors[key].shape:
            difference, magnitude = _compare(reader, manifest.tensors[key], other_reader, other.tensors[key])
            if difference:
                rows.append((difference, magnitude, *key))
    rows.sort(reverse=True)
    table = Table("tensor", "role", "largest difference", "largest value")
    for difference, magnitude, name, role in rows[: options.top]:
        table.add_row(escape(sanitize_text(name)), role, f"{difference:.3g}", f"{magnitude:.3g}")
    if rows:
        _console().print(table)
    unmatched = manifest.tensors.keys() ^ other.tensors.keys()
    reshaped = {
        k for k in manifest.tensors.keys() & other.tensors.keys() if manifest.tensors[k].shape != other.tensors[k].shape
    }
    for name, role in sorted(unmatched):
        _say(f"only in {folders[(name, role) in other.tensors]}: {role} of {name}")
    for name, role in sorted(reshaped):
        _say(f"shapes differ: {role} of {name}")
    equal = len(manifest.tensors) - len(rows) - len(reshaped) - len(manifest.tensors.keys() - other.tensors.keys())
    _say(f"{equal} tensors are equal bit for bit, {len(rows)} differ")
    return 1 if rows or unmatched or reshaped else 0


def _compare(
    reader: ChunkReader, stored: StoredTensor, other_reader: ChunkReader, other: StoredTensor
) -> tuple[float, float]:
    """Return the largest difference and the largest magnitude of two tensors of one shape, chunk by chunk.

    The difference is zero only if the tensors are equal bit for bit.
    """
    difference = magnitude = 0.0
    for chunk in stored.chunks:
        left = reader.view(chunk, stored.dtype)
        right = torch.empty(chunk.sizes, dtype=DTYPES[other.dtype])
        other_reader.read(other, chunk.offsets, right)
        if left.numel() and (left.dtype != right.dtype or _as_bytes(left) != _as_bytes(right)):
            chunk_difference = float((left.double() - right.double()).abs().nan_to_num(nan=inf).max())
            # Equal values may differ in dtype, or in the sign of zero.
            difference = max(difference, chunk_difference, sys.float_info.min)
            magnitude = max(magnitude, float(left.double().abs().max()))
    return difference, magnitude


def _as_bytes(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor of any shape."""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _export(options: argparse.Namespace) -> int:
    folder = _resolve_checkpoint(options.checkpoint)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise ConfigError(Problem("folder", f"{options.folder} is not empty", "Choose another folder"))
    import_named_plugins(read_manifest(folder).config["run"].get("plugins", ()), options.plugin)
    dtype, shard_bytes = _DTYPES[options.dtype], int(options.shard_gigabytes * 1e9)
    manifest = export(folder, options.folder, dtype=dtype, shard_bytes=shard_bytes, tokenizer=options.tokenizer)
    _say(f"{options.folder}: {manifest.model['class']} of step {manifest.step:,} in {options.dtype}")
    if not (options.folder / "tokenizer_config.json").exists():
        _say("exported without a tokenizer: the run has none; --tokenizer DIR adds one")
    if options.check:
        comparison = compare_logits(folder, options.folder, _DTYPES[options.dtype])
        verdict = "passed" if comparison.is_good else "FAILED"
        _say(
            f"check {verdict}: logits differ by {comparison.difference:.3g} from the checkpoint's with weights in "
            f"{options.dtype}; up to {comparison.tolerance:.3g} is the rounding of fp32 arithmetic (1e-5 of the "
            f"largest logit, {comparison.largest:.3g})"
        )
        if options.dtype != "fp32":
            _say(f"rounding the weights to {options.dtype} changes logits by up to {comparison.rounding:.3g}")
        return 0 if comparison.is_good else 1
    return 0


def _import(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise ConfigError(Problem("folder", f"{options.folder} does not exist", "Name an existing folder"))
    loaded = load_config(options.config, options.set, world_size=None, device=None)
    with joined_world(Launch(), Topology.of(1, 0), seed=0):
        checkpoint = import_checkpoint(options.folder, loaded)
    _say(f"{checkpoint}: imported; start the run with launch/train.py --config {options.config}")
    return 0


def _console() -> Console:
    return Console(width=None if os.isatty(1) else 160)


if __name__ == "__main__":
    main()
