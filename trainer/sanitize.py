"""Text that is safe to show and store: without secrets of URLs, and without characters that control a terminal."""

from __future__ import annotations

import logging
import re
from typing import Any, overload

from trainer.json_types import Json

REDACTED = "***"

_CREDENTIALS = re.compile(r"(?<=://)[^/\s'\"<>?#]+@")
"""Credentials before the host of a URL: `user:password@`, or a token alone."""

_QUERY = re.compile(
    r"(?i)(?<=[?&;])([\w.%-]*(?:sig|signature|token|secret|passw|pwd|credential|access_?key|auth)[\w.%-]*"
    r"|[\w.%-]*key|sas)=[^&;\s'\"<>#]*"
)
"""Query parameters that sign a URL."""

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters other than tab and newline, characters that reorder text, and unpaired surrogates."""


def redact(text: str) -> str:
    """Return text without user names, passwords, tokens and signatures of the URLs in it."""
    if "://" not in text:
        return text
    return _QUERY.sub(rf"\1={REDACTED}", _CREDENTIALS.sub(f"{REDACTED}@", text))


@overload
def redact_json(value: dict[str, Any]) -> dict[str, Any]: ...
@overload
def redact_json(value: Json) -> Json: ...
def redact_json(value: Json) -> Json:
    """Return a JSON value with `redact` applied to each string and key."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {redact(key) if isinstance(key, str) else key: redact_json(item) for key, item in value.items()}
    return [redact_json(item) for item in value] if isinstance(value, list | tuple) else value


def is_redacted(text: str) -> bool:
    """Return whether a secret was removed from a URL in the text."""
    return "://" in text and (f"://{REDACTED}@" in text or f"={REDACTED}" in text)


def escape(text: str) -> str:
    r"""Return text with control characters escaped, such as \x1b; newlines and tabs stay."""
    return _UNSAFE.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def sanitize_text(text: str) -> str:
    """Return text that is safe to show on a console and to store in a log."""
    return escape(redact(text))


class SafeFormatter(logging.Formatter):
    """Format records as `sanitize_text`; later lines are indented, so that no file name can forge a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Format one record."""
        return sanitize_text(super().format(record)).replace("\n", "\n    ")
