"""Continues a text with a run's trained model.

    python launch/generate.py --run DIR --prompt "def main(" [--tokens 80] [--temperature 0.8]

Reads DIR/final in a process of its own, on this machine's GPU if it has one. Under the `deepspeed` command
only rank 0 works.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from trainer.distributed import Launch, local_device, prepare_environment

prepare_environment()

import torch

from trainer.config.earlier_versions import stored_run
from trainer.data import added_ids, load_tokenizer
from trainer.errors import ConfigError, Problem
from trainer.exit import Arguments, exit_on_errors
from trainer.model import generate_texts


def main() -> None:
    launch = Launch.from_environment()
    if launch.rank != 0:
        return
    with exit_on_errors(launch):
        options = parse_arguments()
        folder = final_folder(Path(options.run))
        tokenizer = tokenizer_in(folder)
        torch.manual_seed(options.seed)
        for text in generate_texts(
            folder, tokenizer, options.prompt, prefix=prefix_of(Path(options.run), tokenizer), tokens=options.tokens,
            temperature=options.temperature, device=local_device(),
        ):  # fmt: skip
            print(text, flush=True)


def final_folder(run: Path) -> Path:
    """The model of a finished run.

    Raises:
        ConfigError: if there is none in `run`.
    """
    if not (run / "final" / "config.json").is_file():
        raise ConfigError(Problem("--run", f"'{run}' has no final model", "Give the output_dir of a finished run"))
    return run / "final"


def tokenizer_in(folder: Path) -> Any:
    """The tokenizer of an exported model.

    Raises:
        ConfigError: if the folder holds none.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise ConfigError(Problem("--run", f"'{folder}' holds no tokenizer: the run was trained on token files"))
    return load_tokenizer(str(folder), "--run")


def prefix_of(run: Path, tokenizer: Any) -> tuple[int, ...]:
    """Ids before each prompt: those before each document of the run, as its config.json records them.

    Without a config.json, those that the tokenizer adds to every text.
    """
    stored = stored_run(run)
    if stored is not None:  # earlier versions record no frame, and put nothing before a document
        return tuple((stored.about.get("document_frame") or {}).get("prefix", ()))
    try:
        return added_ids(tokenizer)[0]
    except ConfigError:  # it does not add the same ids to every text
        return ()


def parse_arguments() -> argparse.Namespace:
    parser = Arguments(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="DIR", help="the run directory (run.output_dir)")
    parser.add_argument("--prompt", required=True, action="append", help="the text to go on with; several are allowed")
    parser.add_argument("--tokens", type=int, default=80, metavar="N", help="how many tokens to add (default 80)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 always takes the likeliest token (default 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seeds the sampling (default 0)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
