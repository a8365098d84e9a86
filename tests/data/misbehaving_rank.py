"""Runs launch/train.py; the rank BAD_RANK does ACTION (stop, exit, sleep) when it has entered the phase AT."""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

import trainer.fault_tolerance.watchdog as watchdog
from trainer.distributed import Phases, waiting

watchdog.WAIT_LINE_SECONDS = waiting.LOG_INTERVAL_SECONDS = 1.0
watchdog.DEATH_DELAY_SECONDS = 0.5
enter = Phases.enter


def entering(self: Phases, phase: str, step: int = 0) -> None:
    enter(self, phase, step)
    if f"{phase} {step}" == os.environ["AT"] and os.environ.get("RANK") == os.environ["BAD_RANK"]:
        Path(os.environ["SINCE"]).write_text(str(time.time()))
        action = os.environ["ACTION"]
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif action == "exit":
            os._exit(0)
        elif action == "sleep":
            time.sleep(4)


Phases.enter = entering
script = str(Path(__file__).parents[2] / "launch" / "train.py")
sys.argv[0] = script
runpy.run_path(script, run_name="__main__")
