"""Lines of text for tables and logs."""

from __future__ import annotations

import textwrap


def shortened(text: str, width: int) -> str:
    """Return `text` on one line of at most `width` characters, cut between words."""
    return textwrap.shorten(text, width, placeholder=" ...")


def last_line(report: str) -> str:
    """Return the exception's line of a rank's report, which the rank's output may follow."""
    lines = [line for line in report.splitlines() if line.strip()]
    inside = [n for n, line in enumerate(lines) if line.startswith("  ")]
    after = lines[inside[-1] + 1 :] if inside else lines
    return (after or lines or ["no message"])[0].strip()


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
