"""Rules across keys and sections, by subject. Each has a failing example in the tests.

Importing a module of this package registers its rules.
"""

from trainer.config.rules import data, layout, model, offload, optimizer, output, schedule, warnings
from trainer.config.rules.registry import RULES, WARNINGS, Device, Draft, Processes, Rule, TrainingLength

__all__ = [
    "RULES",
    "WARNINGS",
    "Device",
    "Draft",
    "Processes",
    "Rule",
    "TrainingLength",
    "data",
    "layout",
    "model",
    "offload",
    "optimizer",
    "output",
    "schedule",
    "warnings",
]
