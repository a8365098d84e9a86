"""Compiles DeepSpeed's extensions for CPUs, once, so that no run has to wait for the compiler.

    python -m tools.extensions ShareMemCommBuilder FusedAdamBuilder

On a machine with a GPU it does nothing: the kernels for GPUs are compiled at first use, on the device they
are for.
"""

from __future__ import annotations

import argparse
import contextlib
import threading
import time
from collections.abc import Iterator

from trainer.distributed import load_extension, local_device, prepare_environment
from trainer.units import format_duration

prepare_environment()

_SECONDS_BETWEEN_LINES = 15.0

_PURPOSES = {
    "ShareMemCommBuilder": "sums between the processes of one machine; every run on CPUs",
    "FusedAdamBuilder": "AdamW on CPUs; the quickstart",
    "CPUAdamBuilder": "AdamW of an offloaded optimizer; ds_configs/quickstart-offload.json",
}


@contextlib.contextmanager
def progress_lines(what: str) -> Iterator[None]:
    """Print every few seconds that `what` is still running."""
    done, begin = threading.Event(), time.monotonic()

    def tell() -> None:
        while not done.wait(_SECONDS_BETWEEN_LINES):
            print(f"  still {what}, {format_duration(time.monotonic() - begin)}", flush=True)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builders", nargs="+", metavar="BUILDER", help="names of classes in deepspeed.ops.op_builder")
    options = parser.parse_args()
    if local_device() != "cpu":
        print("nothing to compile: this machine has a GPU, whose kernels are compiled at first use")
        return
    for number, builder in enumerate(options.builders, start=1):
        purpose = _PURPOSES.get(builder, "as asked for")
        print(f"DeepSpeed's {builder} ({number} of {len(options.builders)}): {purpose}", flush=True)
        begin = time.monotonic()
        with progress_lines("compiling"):
            load_extension(builder)
        print(f"  ready after {format_duration(time.monotonic() - begin)}", flush=True)


if __name__ == "__main__":
    main()
