"""Generate text with a trained model.

    python launch/generate.py --run DIR [--checkpoint latest|best|final|step-N] --prompt "def main("
    python launch/generate.py --path HF_FOLDER --prompt "def main(" [--tokens 80] [--temperature 0.8]

Runs in its own process, also while the run is still training, on this machine's GPU if it has one. Under `deepspeed`
only rank 0 generates.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.distributed import local_device, prepare_environment

prepare_environment()

import torch
from torch import nn

from trainer.checkpoint import model_folder, refuse_run_directory, tokenizer_folder
from trainer.config.earlier_versions import stored_run
from trainer.config.plugins import import_named_plugins
from trainer.data import load_tokenizer, resolve_prompt_prefix
from trainer.errors import ConfigError, Problem
from trainer.exit import CommandLineParser, exit_on_errors, read_launch
from trainer.model import generate_texts, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main() -> None:
    """Run the command."""
    launch = read_launch()
    if launch.rank != 0:
        return
    with exit_on_errors(launch):
        options = parse_arguments()
        if options.path is not None:
            refuse_run_directory(Path(options.path).expanduser())
        folder = options.path or str(model_folder(options.run, options.checkpoint))
        run = stored_run(options.run or Path(folder).expanduser())
        import_named_plugins(run.config["run"]["plugins"] if run else (), options.plugin)
        model: nn.Module = load_model(folder, "--path" if options.path else "--run")
        tokenizer = find_tokenizer(folder)
        torch.manual_seed(options.seed)
        texts = generate_texts(
            model.to(local_device()),
            tokenizer,
            options.prompt,
            prefix=resolve_prompt_prefix(tokenizer, run),
            tokens=options.tokens,
            temperature=options.temperature,
        )
        for text in texts:
            print(text, flush=True)


def find_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of the model in a directory, or of a name on the hub.

    Raises:
        ConfigError: the directory contains none.
    """
    directory = tokenizer_folder(Path(folder).expanduser())
    if Path(folder).expanduser().is_dir() and not (directory / "tokenizer_config.json").is_file():
        reason = f"'{directory}' contains no tokenizer (no tokenizer_config.json)"
        remedy = "A run on token files has no tokenizer; copy the files of one to this directory"
        raise ConfigError(Problem("tokenizer", reason, remedy))
    return load_tokenizer(str(directory) if directory.is_dir() else folder, "tokenizer")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line.

    Raises:
        ConfigError: the command line is invalid.
    """
    parser = CommandLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="the run directory (run.output_dir)")
    source.add_argument("--path", metavar="HF_FOLDER", help="a Hugging Face model directory, or a name on the hub")
    parser.add_argument(
        "--checkpoint",
        metavar="latest|best|final|step-N",
        help="weights of the run to use (default: final if it has finished, otherwise latest)",
    )
    parser.add_argument("--prompt", required=True, action="append", help="the text to continue; may be repeated")
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="number of tokens to generate (default 80)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="sampling temperature; 0 is greedy (default 0.8)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling (default 0)")
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import this module, which registers the classes of the model (run.plugins); its code is executed",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path is not None and options.checkpoint is not None:
        parser.error("--checkpoint requires --run; --path names the directory itself")
    if options.tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be at least 1, and --temperature a finite number of at least 0")
    return options


if __name__ == "__main__":
    main()
