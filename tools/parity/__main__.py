"""Compares layouts with one process, for your own configuration or for every family of transformers.

    python -m tools.parity --config X.json --layouts tensor=2 tensor=4,sequence_parallel=true tensor=2,data=2,zero=1
    python -m tools.parity --config X.json --layouts tensor=8 --shrink
    python -m tools.parity --families all --write

Runs on CPUs, each rank a process of this machine; no data is read. Exit status: 0 all agree; 1 one differs; 2 a
mistake in the configuration or the command line.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from trainer.distributed import Launch, prepare_environment

prepare_environment()

from tools.parity import compared_config, comparison, matrix, page, results
from tools.parity.layout import parse_layouts
from trainer.exit import CommandLineParser, exit_on_errors

_LAYOUTS = """layouts:
  Each is a list of key=value: tensor (ranks that share each weight), pipeline (stages), data (ranks that share the
  batch), all 1 by default; sequence_parallel and dualpipev (true or false); zero (ZeRO stage 0 to 3; default: the
  file's); accumulation (micro-batches of a data rank; default: so that all layouts have the same micro-batches).
  It needs tensor x pipeline x data processes. Of the file's parallel section only tensor_plan is read.

what is compared:
  Three steps of SGD with clipping, in fp32, without dropout, on random tokens of data.sequence_length; the weights
  are the file's (pretrained where model.path says so). The reference is a plain Hugging Face model in a plain torch
  loop. A difference of gradients is relative to the largest element, one of parameters to the largest change.
"""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandLineParser(
        prog="python -m tools.parity",
        description=__doc__,
        epilog=_LAYOUTS,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    comparison = parser.add_argument_group("your configuration")
    comparison.add_argument("--config", type=Path, metavar="X.json", help="a configuration as for launch/train.py")
    comparison.add_argument(
        "--layouts", nargs="+", metavar="LAYOUT", help="layouts to compare with one process; see below"
    )
    comparison.add_argument(
        "--shrink",
        action="store_true",
        help="compare a tiny model with the same kinds of layers and random weights, on sequences of "
        f"{compared_config.SHRUNK_LENGTH} tokens: seconds instead of minutes, "
        "and no weights needed",
    )
    comparison.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one value of the file"
    )
    families = parser.add_argument_group("families")
    families.add_argument(
        "--families", nargs="+", metavar="NAME", help="model types of tools/parity/families.py, or 'all' (minutes)"
    )
    families.add_argument(
        "--tensor", type=int, default=None, metavar="N", help="tensor ranks (default: 2, or 1 with --pipeline)"
    )
    families.add_argument("--pipeline", type=int, default=None, metavar="N", help="stages (default: 1)")
    families.add_argument("--sequence_parallel", action="store_true", help="with sequence parallelism")
    families.add_argument(
        "--shapes",
        action="store_true",
        help="also in other shapes: key/value heads, widths, ties, "
        "biases, every boolean that changes the set of weights",
    )
    families.add_argument(
        "--training",
        action="store_true",
        help="also through launch/train.py: a step, a checkpoint, a step in another layout, an export",
    )
    families.add_argument(
        "--matrix",
        action="store_true",
        help="all of these: tensor, sequence and pipeline parallelism, other shapes, training",
    )
    families.add_argument(
        "--write",
        action="store_true",
        help=f"with --families all: the same as --matrix, and write {page.PAGE} and the totals in {page.README}",
    )
    families.add_argument(
        "--fresh", action="store_true", help=f"ignore the verdicts cached in {results.FOLDER} for these sources"
    )
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: CommandLineParser, options: argparse.Namespace) -> None:
    """Refuse options that have no effect."""
    if (options.config is None) == (options.families is None):
        parser.error("either --config with --layouts or --families is required")
    of_comparison = {"--layouts": options.layouts, "--shrink": options.shrink, "--set": options.set}
    of_families = {
        "--tensor": options.tensor,
        "--pipeline": options.pipeline,
        "--shapes": options.shapes,
        "--sequence_parallel": options.sequence_parallel,
        "--training": options.training,
        "--matrix": options.matrix,
        "--write": options.write,
        "--fresh": options.fresh,
    }
    if options.config is not None and options.layouts is None:
        parser.error("--config requires --layouts, for example --layouts tensor=2")
    for name, value in (of_families if options.config is not None else of_comparison).items():
        if value:
            parser.error(f"{name} cannot be used with {'--config' if options.config is not None else '--families'}")
    for name, size in (("--tensor", options.tensor), ("--pipeline", options.pipeline)):
        if size is not None and size < 2:
            parser.error(f"{name}: must be at least 2 (got {size})")
    if options.sequence_parallel and options.pipeline and not options.tensor:
        parser.error("--sequence_parallel requires --tensor: tensor ranks share a sequence")
    chosen = any((options.sequence_parallel, options.tensor, options.pipeline, options.shapes, options.training))
    if options.matrix and chosen:
        parser.error("--matrix proves all of its columns, all shapes and training; remove the other options")
    if options.write and (options.families != ["all"] or chosen):
        parser.error("--write requires --families all without other options, and proves all of its columns")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0 if all layouts agree, 1 if not.

    Raises:
        ConfigError: a mistake in the command line, the configuration or a layout.
    """
    options = parse(arguments)
    if options.families is not None:
        return _families(options)
    wanted = parse_layouts(options.layouts)
    return comparison.compare(options.config, wanted, options.set, shrink=options.shrink)


def _families(options: argparse.Namespace) -> int:
    whole = options.matrix or options.write
    tensor = options.tensor or (1 if options.pipeline else 2)
    column = matrix.Column(tensor, options.pipeline or 1, options.sequence_parallel)
    kept = results.Results(fresh=options.fresh)
    rows = matrix.run(
        options.families,
        matrix.PAGES_COLUMNS if whole else (column,),
        kept,
        shapes=whole or options.shapes,
        training=whole or options.training,
    )
    if options.write:
        page.write(rows, kept.seconds())
    return 0 if matrix.is_sound(rows) else 1


if __name__ == "__main__":
    with exit_on_errors(Launch()):
        sys.exit(main())
