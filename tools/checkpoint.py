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
_BLOCK_BYTES = 1 << 24


def main(arguments: Sequence[str] | None = None) -> None:
    with exit_on_errors(Launch()):
        options = _parser().parse_args(arguments)
        status = options.run(options)
        if status:
            raise SystemExit(status)


def _say(line: str) -> None:
    """Print; names in a manifest may be anybody's."""
    print(sanitize_text(line))


def _parser() -> CommandLineParser:
    parser = CommandLineParser(
        prog="python -m tools.checkpoint",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=CommandLineParser)

    def command(name: str, run: object, about: str) -> argparse.ArgumentParser:
        found: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        found.set_defaults(run=run)
        return found

    listing = command("list", _list, "the checkpoints of a run: step, losses, layout, size")
    listing.add_argument("run_directory", type=Path)
    show = command("show", _show, "what a checkpoint says about itself, and its tensors")
    show.add_argument("checkpoint", type=Path)
    show.add_argument("--tensors", action="store_true", help="name every tensor")
    verify = command("verify", _verify, "read every byte and compare it with the manifest's hashes")
    verify.add_argument("checkpoint", type=Path, help="a checkpoint, or a run directory for all of its checkpoints")
    diff = command("diff", _diff, "the tensors in which two checkpoints differ most")
    diff.add_argument("checkpoint", type=Path)
    diff.add_argument("other", type=Path)
    diff.add_argument("--top", type=int, default=10, metavar="N", help="how many to show (default 10)")
    out = command("export", _export, "write the weights as a Hugging Face folder")
    out.add_argument("checkpoint", type=Path)
    out.add_argument("folder", type=Path)
    out.add_argument("--dtype", choices=_DTYPES, default="fp32", help="of the weights in the files (default fp32)")
    out.add_argument("--shard_gigabytes", type=float, default=2.0, metavar="N", help="largest file (default 2)")
    out.add_argument("--tokenizer", type=Path, metavar="DIR", help="instead of the one that the run keeps")
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
    into = command("import", _import, "make the first checkpoint of a run, from a Hugging Face folder or DeepSpeed's")
    into.add_argument("folder", type=Path)
    into.add_argument("--config", required=True, metavar="X.json", help="the configuration of the run")
    into.add_argument("--set", action="append", default=[], metavar="a.b=c", help="override one value")
    return parser


def _resolve_checkpoint(path: Path) -> Path:
    """Return the checkpoint that `path` names."""
    if is_checkpoint(path) or not (path / CHECKPOINTS).is_dir():
        return path
    kept, _ = list_checkpoints(path / CHECKPOINTS)
    if not kept:
        raise CheckpointError(f"{path / CHECKPOINTS}: no valid checkpoint")
    return kept[0].folder


def _find_checkpoints(path: Path) -> tuple[list[SavedCheckpoint], list[CheckpointError]]:
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    if not folder.is_dir():
        raise ConfigError(Problem("run_directory", f"{path} does not exist", "Give the output_dir of a run"))
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
    kept, damaged = _find_checkpoints(options.run_directory)
    best = {one.folder for one in best_checkpoints(kept)}
    table = Table("checkpoint", "attempt", "tokens", "loss", "held-out", "layout", "size", "")
    for position, one in enumerate(kept):
        manifest = one.manifest
        marks = [mark for mark, true in (("latest", position == 0), ("best", one.folder in best)) if true]
        table.add_row(
            one.folder.name,
            str(manifest.attempt),
            f"{manifest.tokens:,}",
            _loss(manifest, "train"),
            _loss(manifest, "validation"),
            _layout(manifest),
            format_bytes(manifest.bytes),
            " ".join(marks),
        )
    _console().print(table)
    for error in damaged:
        _say(f"damaged: {error}")
    return 0


def _show(options: argparse.Namespace) -> int:
    folder = _resolve_checkpoint(options.checkpoint)
    manifest = read_manifest(folder)
    numbers = Counter[str]()
    for (_, role), stored in manifest.tensors.items():
        numbers[role] += stored.numel
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
        "tensors": ", ".join(f"{count:,} numbers of {role}" for role, count in numbers.items()),
        "W&B run": manifest.trackers.get("wandb", {}).get("run_id", "-"),
    }
    for name, value in lines.items():
        _say(f"{name:<12} {value}")
    if options.tensors:
        for (name, role), stored in sorted(manifest.tensors.items()):
            _say(f"  {role:<12} {name} {list(stored.shape)} {stored.dtype} in {len(stored.chunks)} parts")
    return 0


def _verify(options: argparse.Namespace) -> int:
    single = is_checkpoint(options.checkpoint)
    if single:
        kept, damaged = [SavedCheckpoint(options.checkpoint, read_manifest(options.checkpoint))], []
    else:
        kept, damaged = _find_checkpoints(options.checkpoint)
    for one in track(kept, description="reading", console=Console(stderr=True), transient=True):
        try:
            verify_files(one.folder, one.manifest)
            _say(f"{one.folder}: sound ({len(one.manifest.files)} files, {format_bytes(one.manifest.bytes)})")
        except CheckpointError as error:
            damaged.append(error)
    for error in damaged:
        _say(f"damaged: {error}")
    if not kept and not damaged:
        raise CheckpointError(f"{options.checkpoint}: no checkpoint found")
    return 4 if damaged else 0


def _diff(options: argparse.Namespace) -> int:
    folders = [_resolve_checkpoint(options.checkpoint), _resolve_checkpoint(options.other)]
    manifest, other = (read_manifest(folder) for folder in folders)
    files, theirs = (ChunkReader(folder) for folder in folders)
    rows = []
    for key in track(manifest.tensors, description="comparing", console=Console(stderr=True), transient=True):
        if key in other.tensors and manifest.tensors[key].shape == other.tensors[key].shape:
            most, largest = _difference(files, manifest.tensors[key], theirs, other.tensors[key])
            if most:
                rows.append((most, largest, *key))
    rows.sort(reverse=True)
    table = Table("tensor", "kind", "largest difference", "of a largest value of")
    for most, largest, name, role in rows[: options.top]:
        table.add_row(escape(sanitize_text(name)), role, f"{most:.3g}", f"{largest:.3g}")
    if rows:
        _console().print(table)
    alone = manifest.tensors.keys() ^ other.tensors.keys()
    reshaped = {
        k for k in manifest.tensors.keys() & other.tensors.keys() if manifest.tensors[k].shape != other.tensors[k].shape
    }
    for name, role in sorted(alone):
        _say(f"only in {folders[(name, role) in other.tensors]}: {role} of {name}")
    for name, role in sorted(reshaped):
        _say(f"of another shape: {role} of {name}")
    same = len(manifest.tensors) - len(rows) - len(reshaped) - len(manifest.tensors.keys() - other.tensors.keys())
    _say(f"{same} tensors are equal bit for bit, {len(rows)} differ")
    return 1 if rows or alone or reshaped else 0


def _difference(
    files: ChunkReader, stored: StoredTensor, theirs: ChunkReader, other: StoredTensor
) -> tuple[float, float]:
    """(largest difference, largest value), box by box."""
    most = largest = 0.0
    for chunk in stored.chunks:
        own = files.view(chunk, stored.dtype)
        found = torch.empty(chunk.sizes, dtype=DTYPES[other.dtype])
        theirs.read(other, chunk.offsets, found)
        if own.numel() and (own.dtype != found.dtype or _bits(own) != _bits(found)):
            apart = float((own.double() - found.double()).abs().nan_to_num(nan=inf).max())
            most = max(most, apart, sys.float_info.min)  # of another type, or zeros of another sign
            largest = max(largest, float(own.double().abs().max()))
    return most, largest


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _export(options: argparse.Namespace) -> int:
    folder = _resolve_checkpoint(options.checkpoint)
    if options.folder.exists() and any(options.folder.iterdir()):
        raise ConfigError(Problem("folder", f"{options.folder} is not empty", "Take another one"))
    import_named_plugins(read_manifest(folder).config["run"].get("plugins", ()), options.plugin)
    dtype, shard_bytes = _DTYPES[options.dtype], int(options.shard_gigabytes * 1e9)
    manifest = export(folder, options.folder, dtype=dtype, shard_bytes=shard_bytes, tokenizer=options.tokenizer)
    _say(f"{options.folder}: {manifest.model['class']} of step {manifest.step:,} in {options.dtype}")
    if not (options.folder / "tokenizer_config.json").exists():
        _say("without a tokenizer: the run keeps none; --tokenizer DIR names one")
    if options.check:
        found = compare_logits(folder, options.folder, _DTYPES[options.dtype])
        _say(
            f"check {'passed' if found.is_good else 'FAILED'}: logits differ by {found.difference:.3g} from the "
            f"checkpoint's with weights in {options.dtype}; up to {found.tolerance:.3g} is the rounding of fp32 "
            f"arithmetic (1e-5 of the largest logit, {found.largest:.3g})"
        )
        if options.dtype != "fp32":
            _say(f"rounding the weights to {options.dtype} changes logits by up to {found.rounding:.3g}")
        return 0 if found.is_good else 1
    return 0


def _import(options: argparse.Namespace) -> int:
    if not options.folder.is_dir():
        raise ConfigError(Problem("folder", f"{options.folder} does not exist", "Give a folder"))
    loaded = load_config(options.config, options.set, world_size=None, device=None)
    with joined_world(Launch(), Topology.of(1, 0), seed=0):
        made = import_checkpoint(options.folder, loaded)
    _say(f"{made}: the run begins with these weights; start it as ever: launch/train.py --config {options.config}")
    return 0


def _console() -> Console:
    return Console(width=None if os.isatty(1) else 160)


if __name__ == "__main__":
    main()
