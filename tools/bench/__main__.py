"""Benchmarks of Tessera.

python -m tools.bench overhead    CPU time a step, against a plain DeepSpeed loop, bare torch, HF Trainer
python -m tools.bench states      bytes of model states on a rank, against the formula, ZeRO 0 to 3
python -m tools.bench data        time a step waits for data; cost of starting at any position
python -m tools.bench traffic     collectives and bytes a layer under tensor parallelism, against DeepSpeed's AutoTP
python -m tools.bench pipeline    idle share of the schedule, bytes over each boundary, parameters of a rank
python -m tools.bench checkpoint  saving and loading against the disk itself, the stall of an asynchronous save, memory
python -m tools.bench replicas    CPU time of a step that compares the copies of all weights by hash
python -m tools.bench guards      cost of stop requests, run lock, watchdog, comparison of ranks; time until runs end
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.distributed import prepare_environment

prepare_environment()

from tools.ranks import start_server

if __name__ == "__main__":
    start_server()

from tools.bench import checkpoint, data, guards, overhead, pipeline, replicas, states, traffic

BENCHMARKS: dict[str, Any] = {
    "overhead": overhead,
    "states": states,
    "data": data,
    "traffic": traffic,
    "pipeline": pipeline,
    "checkpoint": checkpoint,
    "replicas": replicas,
    "guards": guards,
}


def machine() -> dict[str, Any]:
    """Describe the machine, the versions and the commit of a measurement."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": f"{platform.system()} {platform.machine()}, {platform.processor() or 'unknown processor'}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "commit": asked.stdout.strip() or None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = parser.add_subparsers(dest="name", required=True)
    for name, module in BENCHMARKS.items():
        sub = names.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        module.add_arguments(sub)
        sub.add_argument(
            "--quick",
            action="store_true",
            help="a short round, to check that the benchmark works: "
            + ", ".join(f"{key} {value}" for key, value in module.QUICK.items()),
        )
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to FILE")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(BENCHMARKS[options.name].QUICK)
    figures = BENCHMARKS[options.name].run(options)
    if options.json is not None:
        options.json.write_text(
            json.dumps({"benchmark": options.name, **machine(), "figures": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
