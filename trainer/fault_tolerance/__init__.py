"""Protection of a run: its lock, the comparison of its ranks, stop requests, and the watchdog."""

from trainer.fault_tolerance.claim import claim_run_directory
from trainer.fault_tolerance.comparison import Fact, compare_ranks
from trainer.fault_tolerance.guard import GuardedRun, guarded_run
from trainer.fault_tolerance.hostfile import refuse_missing_hostfile
from trainer.fault_tolerance.start_facts import start_facts
from trainer.fault_tolerance.stop_agreement import StopAgreement
from trainer.fault_tolerance.stop_requests import StopRequest, StopRequests

__all__ = [
    "Fact",
    "GuardedRun",
    "StopAgreement",
    "StopRequest",
    "StopRequests",
    "claim_run_directory",
    "compare_ranks",
    "guarded_run",
    "refuse_missing_hostfile",
    "start_facts",
]
