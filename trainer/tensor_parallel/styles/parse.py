"""Read the text of a user's plan, or of Hugging Face's, as styles."""

from __future__ import annotations

from trainer.errors import suggest
from trainer.tensor_parallel.styles.base import STYLES, Style


class UnknownStyle(ValueError):
    """No style has this name; the message suggests the closest one."""


def parse_styles(text: str) -> tuple[Style, ...]:
    """Read `name[:argument]`, or several with ` + ` between them.

    Raises:
        UnknownStyle: if a name is not one of a style.
        ValueError: if a style takes no such argument.
    """
    return tuple(_parse(item) for item in text.split(" + "))


def _parse(text: str) -> Style:
    name, _, argument = (part.strip() for part in text.partition(":"))
    if name not in STYLES:
        raise UnknownStyle(f"'{text}' is not a style{suggest(name, STYLES)}")
    try:
        return STYLES[name].parse(argument)
    except ValueError as error:
        usage, _ = STYLES[name].documentation()
        raise ValueError(f"'{text}' cannot be read: {error}; the style is written '{usage}'") from None
