"""What no single key can see: rules across sections, in one table. Each has a failing example in the tests.

A module for each theme adds its rules to the table when it is imported here.
"""

from trainer.config.rules import data, layout, model, offload, optimizer, schedule, secrets
from trainer.config.rules.table import RULES, Device, Draft, Rule
from trainer.config.rules.warnings import warnings_of

__all__ = [
    "RULES",
    "Device",
    "Draft",
    "Rule",
    "data",
    "layout",
    "model",
    "offload",
    "optimizer",
    "schedule",
    "secrets",
    "warnings_of",
]
