"""The sources of a model's plan: Hugging Face's, what families have in common, the family's own, the user's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from trainer.compat.transformers.models import head_plan
from trainer.errors import Problem, suggest
from trainer.sharding import wildcard_name
from trainer.tensor_parallel.families import COMMON, FAMILIES, UNITS, VARIANTS, Entries
from trainer.tensor_parallel.styles import (
    STYLES,
    Column,
    ColumnGatherOutput,
    Style,
    UnknownStyle,
    VocabularyEmbedding,
    VocabularyHead,
    parse_styles,
)


class PlanSources:
    """Styles by the full name of a module, parameter or buffer. Later sources override earlier ones.

    An entry of the user's that matches nothing is a problem. In the other sources it is not, because a family's
    entries name modules that some of its configurations lack. If such a name is misspelt, its weight remains without
    an entry, which the audit reports.
    """

    def __init__(self, model: PreTrainedModel, user: Mapping[str, str]) -> None:
        """Merge the sources; `problems` has the problems of the user's entries."""
        self.problems: list[Problem] = []
        self._model = model
        self._styles: dict[str, tuple[Style, ...]] = {}
        self._present = {wildcard_name(name) for name, _ in model.named_modules()}
        self._present |= {wildcard_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
        self._present |= {wildcard_name(name) for name, _ in model.named_buffers()}
        self._add_vocabulary()
        self._add_hugging_face()
        predefined = set(self._styles)
        for name, style in COMMON.items():
            if self._full_name(name) not in predefined:
                self._add(name, (style,))
        for entries in self._family():
            for name, styles in entries.items():
                if styles is None:
                    self._styles.pop(self._full_name(name) or name, None)
                else:
                    self._add(name, (styles,) if isinstance(styles, Style) else styles)
        for name, text in user.items():
            self._add_user(name, text)
        self._numbered = [name for name in self._styles if name != wildcard_name(name)]

    def styles(self, name: str) -> tuple[Style, ...]:
        """Return the styles of a module, parameter or buffer: an entry with its exact numbers, or one with `*`."""
        parts, wildcard = name.split("."), wildcard_name(name)
        for entry in self._numbered:
            if wildcard_name(entry) == wildcard and all(
                a in ("*", b) for a, b in zip(entry.split("."), parts, strict=True)
            ):
                return self._styles[entry]
        return self._styles.get(wildcard, ())

    def styles_inside(self, name: str) -> Iterator[Style]:
        """Yield all styles of entries below the module called `name`."""
        prefix = wildcard_name(name) + "."
        for entry, styles in self._styles.items():
            if wildcard_name(entry).startswith(prefix):
                yield from styles

    def _full_name(self, name: str) -> str | None:
        """Return an entry's name in full, if the model has it."""
        candidates = (f"{self._model.base_model_prefix}.{name}", name)
        full = next((n for n in candidates if wildcard_name(n) in self._present), None)
        if full is None or re.search(r"(^|\.)\d+(\.|$)", name):  # a number in an entry matches only that number
            return full
        return wildcard_name(full)

    def _add(self, name: str, styles: tuple[Style, ...]) -> None:
        """Set the styles of a name that the model has."""
        if (full := self._full_name(name)) is not None:
            self._styles[full] = styles

    def _add_vocabulary(self) -> None:
        """Add the embedding and the head, as the model itself names them."""
        head, table = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        for name, module in self._model.named_modules():
            if isinstance(table, nn.Embedding) and module is table:
                self._add(name, (VocabularyEmbedding(),))
            elif isinstance(head, nn.Linear) and module is head:
                self._add(name, (VocabularyHead(),))

    def _add_hugging_face(self) -> None:
        vocabulary = set(self._styles)
        for name, text in head_plan(self._model).items():
            if wildcard_name(name) in vocabulary or self._full_name(name) is None:
                continue
            styles = self._parsed(name, text)
            if styles is None:
                continue
            if styles in ((Column(),), (ColumnGatherOutput(),)) and (unit := UNITS.get(name.rpartition(".")[2])):
                # Hugging Face's plans do not state that attention projections are sharded in whole heads.
                styles = (unit,)
            self._add(name, styles)

    def _family(self) -> Iterator[Entries]:
        """Yield the family's own entries, then those of the variants that its configuration is."""
        config = self._model.config
        yield FAMILIES.get(config.model_type, {})
        for variant in VARIANTS:
            if variant.matches(config):
                yield variant.entries

    def _add_user(self, name: str, text: str) -> None:
        if self._full_name(name) is None:
            self.problems.append(self._unmatched(name, text))
        elif (styles := self._parsed(name, text)) is not None:
            self._add(name, styles)

    def _parsed(self, name: str, text: str) -> tuple[Style, ...] | None:
        """Return the styles of a text; None, and a problem, if it cannot be read."""
        try:
            return parse_styles(text)
        except UnknownStyle as error:
            self.problems.append(_problem(name, str(error), f"The styles are {', '.join(STYLES)}"))
        except ValueError as error:
            self.problems.append(_problem(name, str(error), "See docs/tensor_plans.md"))
        return None

    def _unmatched(self, name: str, text: str) -> Problem:
        prefix = self._model.base_model_prefix + "."
        names = sorted(present.removeprefix(prefix) for present in self._present)
        reason = f"'{text}' matches no module, parameter or buffer of {self._model.config.model_type}"
        hint = suggest(name, names, cutoff=0.4)
        return _problem(name, reason + hint, "Names are those of model.named_modules(), with * for numbers")


def _problem(name: str, reason: str, remedy: str) -> Problem:
    return Problem(f"parallel.tensor_plan.{name}", reason, remedy)
