"""Update modes: how replicas of a model combine their updates."""

from trainer.update.interface import UpdateMode
from trainer.update.synchronous import Synchronous

__all__ = ["Synchronous", "UpdateMode"]
