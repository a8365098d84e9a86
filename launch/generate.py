"""Continues a text with a trained model.

    python launch/generate.py --run DIR [--checkpoint latest|best|final|step-N] --prompt "def main("
    python launch/generate.py --path HF_FOLDER --prompt "def main(" [--tokens 80] [--temperature 0.8]

Works in a process of its own, also while the run is still training, on this machine's GPU if it has one. Under the
`deepspeed` command only rank 0 works.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer.distributed import local_device, prepare_environment

prepare_environment()

import torch

from trainer.checkpoint import model_folder, refuse_run_directory, tokenizer_folder
from trainer.config.earlier_versions import stored_run
from trainer.config.plugins import import_named_plugins
from trainer.data import load_tokenizer, resolve_prompt_prefix
from trainer.errors import ConfigError, Problem
from trainer.exit import CommandLineParser, exit_on_errors, read_launch
from trainer.model import generate_texts, load_model


def main() -> None:
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
        model: Any = load_model(folder, "--path" if options.path else "--run")
        tokenizer = tokenizer_of(folder)
        torch.manual_seed(options.seed)
        for text in generate_texts(
            model.to(local_device()), tokenizer, options.prompt, prefix=resolve_prompt_prefix(tokenizer, run),
            tokens=options.tokens, temperature=options.temperature,
        ):  # fmt: skip
            print(text, flush=True)


def tokenizer_of(folder: str) -> Any:
    """The tokenizer of the model in a folder, or of a name on the hub.

    Raises:
        ConfigError: if the folder has none.
    """
    directory = tokenizer_folder(Path(folder).expanduser())
    if Path(folder).expanduser().is_dir() and not (directory / "tokenizer_config.json").is_file():
        reason = f"'{directory}' holds no tokenizer (no tokenizer_config.json)"
        raise ConfigError(Problem("tokenizer", reason, "A run on token files has none; copy its files there"))
    return load_tokenizer(str(directory) if directory.is_dir() else folder, "tokenizer")


def parse_arguments() -> argparse.Namespace:
    parser = CommandLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--run", type=Path, metavar="DIR", help="the run directory (run.output_dir)")
    source.add_argument("--path", metavar="HF_FOLDER", help="a Hugging Face folder, or a name on the hub")
    parser.add_argument(
        "--checkpoint", metavar="latest|best|final|step-N",
        help="which weights of the run (default: final if it has finished, else latest)",
    )  # fmt: skip
    parser.add_argument("--prompt", required=True, action="append", help="the text to go on with; several are allowed")
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="how many tokens to add (default 80)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds the sampling (default 0)")
    parser.add_argument(
        "--plugin", action="append", default=[], metavar="MODULE",
        help="import this module, which registers the model's classes (run.plugins); its code runs",
    )  # fmt: skip
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path is not None and options.checkpoint is not None:
        parser.error("--checkpoint goes with --run; --path names the folder itself")
    if options.tokens < 1 or not 0 <= options.temperature < float("inf"):
        parser.error("--tokens must be at least 1, and --temperature a number from 0 on")
    return options


if __name__ == "__main__":
    main()
