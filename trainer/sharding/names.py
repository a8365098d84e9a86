"""Names of modules and parameters with their layer numbers as wildcards."""

from __future__ import annotations

import re


def wildcard_name(name: str) -> str:
    """Return the name with `*` for each part that is a number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
