"""What keeps a run from being lost, from going wrong, from hanging, and from ending without a word."""

from trainer.fault_tolerance.agreement import StopAgreement
from trainer.fault_tolerance.comparison import Fact, compare_ranks
from trainer.fault_tolerance.facts import start_facts
from trainer.fault_tolerance.hostfile import refuse_missing_hostfile
from trainer.fault_tolerance.stop import StopRequest, StopRequests
from trainer.fault_tolerance.watchdog import Watchdog

__all__ = [
    "Fact", "StopAgreement", "StopRequest", "StopRequests", "Watchdog", "compare_ranks", "refuse_missing_hostfile",
    "start_facts",
]  # fmt: skip
