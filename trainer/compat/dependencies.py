"""The dependencies whose internals are used, and the check of their versions at start."""

from __future__ import annotations

import os
import sys
import time

from trainer.compat.deepspeed.names import DEEPSPEED
from trainer.compat.dependency_check import IncompatibleDependencyError, check_versions
from trainer.compat.torch.names import TORCH
from trainer.compat.transformers.names import TRANSFORMERS

DEPENDENCIES = (DEEPSPEED, TORCH, TRANSFORMERS)

_GRACE_SECONDS = 120.0


def exit_on_unsupported_versions() -> None:
    """End the process with status 2 where a version is unsupported.

    To be called before the dependencies are imported: an unknown version may fail on import, without a message. A
    launcher ends all ranks as soon as one exits, so that the others wait until rank 0 has printed the message.
    """
    try:
        check_versions(DEPENDENCIES)
    except IncompatibleDependencyError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(_GRACE_SECONDS)
        print(*(f"error: {problem}" for problem in error.problems), sep="\n", file=sys.stderr, flush=True)
        raise SystemExit(error.exit_status) from None
