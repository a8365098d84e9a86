"""The rows of a model's plan: Hugging Face's, those that families have in common, the family's own, the user's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from trainer.errors import Problem, suggest
from trainer.sharding import wildcard_name
from trainer.tensor_parallel.families import COMMON, FAMILIES, UNITS
from trainer.tensor_parallel.styles import WORDS, Style

_Rows = Mapping[str, str | None]


class Rows:
    """Styles by the full name of a module, parameter or buffer. Later sources override earlier ones.

    A row that matches nothing is a problem where the user wrote it. In the other sources it is none: a family's rows
    speak of modules that some of its configurations lack. If a row was misspelt there, its weight is left without one,
    which the audit notices.
    """

    def __init__(self, model: PreTrainedModel, user: Mapping[str, str]) -> None:
        self.problems: list[Problem] = []
        self._model = model
        self._styles: dict[str, tuple[Style, ...]] = {}
        self._present = {wildcard_name(name) for name, _ in model.named_modules()}
        self._present |= {wildcard_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
        self._present |= {wildcard_name(name) for name, _ in model.named_buffers()}
        for name, text in self._vocabulary():
            self._add(name, text)
        ends = set(self._styles)
        for name, text in (getattr(model, "_tp_plan", None) or {}).items():
            if wildcard_name(name) not in ends:
                self._add(name, self._in_units(name, text))
        before = set(self._styles)
        for name, text in COMMON.items():
            if self._full(name) not in before:
                self._add(name, text)
        for rows in self._family():
            for name, override in rows.items():
                self._add(name, override)
        for name, text in user.items():
            if self._full(name) is None:
                self.problems.append(self._no_match(name, text))
            self._add(name, text)
        self._numbered = [row for row in self._styles if row != wildcard_name(row)]

    def of(self, name: str) -> tuple[Style, ...]:
        """The styles for a module, parameter or buffer: the row with its very numbers before the one with `*`."""
        parts, star = name.split("."), wildcard_name(name)
        for row in self._numbered:
            if wildcard_name(row) == star and all(a in ("*", b) for a, b in zip(row.split("."), parts, strict=True)):
                return self._styles[row]
        return self._styles.get(star, ())

    def inside(self, name: str) -> Iterator[Style]:
        """All styles of rows for what lies below the module called `name`."""
        prefix = wildcard_name(name) + "."
        for row, styles in self._styles.items():
            if wildcard_name(row).startswith(prefix):
                yield from styles

    def _full(self, name: str) -> str | None:
        """A row's name in full, if the model has it."""
        names = (f"{self._model.base_model_prefix}.{name}", name)
        found = next((n for n in names if wildcard_name(n) in self._present), None)
        if found is None or re.search(r"(^|\.)\d+(\.|$)", name):  # a number in a row means this one only
            return found
        return wildcard_name(found)

    def _add(self, name: str, text: str | None) -> None:
        full = self._full(name)
        if full is None:
            return
        if text is None:
            self._styles.pop(full, None)
            return
        styles = tuple(Style.parse(one) for one in text.split(" + "))
        unknown = [self._unknown(name, style) for style in styles if style.word not in WORDS]
        self.problems += unknown
        if not unknown:
            self._styles[full] = styles

    def _vocabulary(self) -> Iterator[tuple[str, str]]:
        """The embedding and the head, as the model itself names them."""
        head, table = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        for name, module in self._model.named_modules():
            if isinstance(table, nn.Embedding) and module is table:
                yield name, "embedding_rowwise"
            elif isinstance(head, nn.Linear) and module is head:
                yield name, "vocabulary_head"

    @staticmethod
    def _in_units(name: str, text: str) -> str:
        """Hugging Face's plans do not say that attention's projections are cut in whole heads."""
        return UNITS.get(name.rpartition(".")[2], text) if text in ("colwise", "colwise_gather_output") else text

    def _family(self) -> Iterator[_Rows]:
        """The family's own rows, then those of the variants (`type?attribute=value&...`) that its configuration is."""
        config = self._model.config
        yield FAMILIES.get(config.model_type, {})
        for key, rows in FAMILIES.items():
            model_type, _, conditions = key.partition("?")
            pairs = [condition.split("=") for condition in conditions.split("&") if condition]
            is_variant = pairs and all(str(getattr(config, name, None)) == value for name, value in pairs)
            if is_variant and model_type == config.model_type:
                yield rows

    def _no_match(self, name: str, text: str) -> Problem:
        prefix = self._model.base_model_prefix + "."
        suggestion = suggest(name, (present.removeprefix(prefix) for present in self._present), cutoff=0.4)
        return Problem(
            f"parallel.tensor_plan.{name}",
            f"'{text}' matches no module, parameter or buffer of {self._model.config.model_type}{suggestion}",
            "Names are those of model.named_modules(), with * for numbers",
        )

    def _unknown(self, name: str, style: Style) -> Problem:
        return Problem(
            f"parallel.tensor_plan.{name}",
            f"'{style}' is not a style{suggest(style.word, WORDS)}",
            f"The styles are {', '.join(WORDS)}",
        )
