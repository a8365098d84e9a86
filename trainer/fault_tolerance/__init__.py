"""What keeps a run from being lost, from hanging, and from ending without a word."""

from trainer.fault_tolerance.agreement import StopAgreement
from trainer.fault_tolerance.hostfile import refuse_missing_hostfile
from trainer.fault_tolerance.stop import StopRequest, StopRequests
from trainer.fault_tolerance.watchdog import Watchdog

__all__ = ["StopAgreement", "StopRequest", "StopRequests", "Watchdog", "refuse_missing_hostfile"]
