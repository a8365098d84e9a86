"""What no single key can see: rules across sections, in one table. Each has a failing example in the tests.

A module for each theme adds its rules to the table when it is imported here.
"""

from trainer.config.rules import data, layout, model, offload, optimizer, schedule, secrets
from trainer.config.rules.registry import RULES, Device, Draft, Rule
from trainer.config.rules.warnings import configuration_warnings

__all__ = [
    "RULES",
    "Device",
    "Draft",
    "Rule",
    "configuration_warnings",
    "data",
    "layout",
    "model",
    "offload",
    "optimizer",
    "schedule",
    "secrets",
]
