"""Names of modules and parameters with their layer numbers as wildcards."""

from __future__ import annotations

import re


def wildcard_name(name: str) -> str:
    """The name with `*` for each number that stands alone in it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
