"""What keeps a run from hanging or ending without a word."""

from trainer.fault_tolerance.watchdog import Watchdog

__all__ = ["Watchdog"]
