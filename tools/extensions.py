"""Compiles DeepSpeed's extensions for CPUs, once, so that no run has to wait for the compiler.

    python -m tools.extensions ShareMemCommBuilder FusedAdamBuilder

On a machine with a GPU it does nothing: the kernels for GPUs are compiled at first use, on the device they
are for.
"""

from __future__ import annotations

import argparse
import time

from trainer.distributed import load_extension, local_device, prepare_environment

prepare_environment()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builders", nargs="+", metavar="BUILDER", help="names of classes in deepspeed.ops.op_builder")
    options = parser.parse_args()
    if local_device() != "cpu":
        return
    for builder in options.builders:
        begin = time.monotonic()
        load_extension(builder)
        print(f"DeepSpeed's {builder}: ready after {time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
