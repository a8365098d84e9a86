"""Continues a text with a run's trained model.

    python launch/generate.py --run DIR --prompt "def main(" [--tokens 80] [--temperature 0.8]

Reads DIR/final in a process of its own, on this machine's GPU if it has one. Under the `deepspeed` command
only rank 0 works.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from trainer.distributed import Launch, local_device, prepare_environment

prepare_environment()

import torch

from trainer.errors import ConfigError, Problem
from trainer.exit import exit_on_errors
from trainer.model import generate_text


def main() -> None:
    options = parse_arguments()
    launch = Launch.from_environment()
    if launch.rank != 0:
        return
    with exit_on_errors(launch):
        folder = final_folder(Path(options.run))
        torch.manual_seed(options.seed)
        for prompt in options.prompt:
            text = generate_text(
                folder, prompt, tokens=options.tokens, temperature=options.temperature, device=local_device()
            )
            print(text)


def final_folder(run: Path) -> Path:
    """The model of a finished run.

    Raises:
        ConfigError: if there is none in `run`.
    """
    if not (run / "final" / "config.json").is_file():
        steps = 0
        if (run / "metrics.jsonl").is_file():
            rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            steps = max((row["step"] for row in rows), default=0)
        reason = f"'{run}' has no final model" + (f"; it has come to step {steps}" if steps else "")
        raise ConfigError(Problem("--run", reason, "Give the output_dir of a finished run"))
    return run / "final"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
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
    sys.exit(main())
