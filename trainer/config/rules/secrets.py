"""Rules about secrets that were removed from a stored configuration."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.rules.table import Draft, rule
from trainer.errors import Problem
from trainer.sanitize import is_redacted


@rule("checkpoint", "data", "model")
def secrets_are_given(draft: Draft) -> Iterator[Problem]:
    assert draft.checkpoint is not None
    assert draft.data is not None
    assert draft.model is not None
    places = {"checkpoint.upload": draft.checkpoint.upload, "checkpoint.resume": draft.checkpoint.resume,
              "model.path": draft.model.path}  # fmt: skip
    for split in ("train", "validation"):
        for number, source in enumerate(getattr(draft.data, split)):
            places[f"data.{split}.{number}.path"] = getattr(source, "path", None)
    for key, place in places.items():
        if place is not None and is_redacted(place):
            yield Problem(key, f"its secret was removed when this configuration was stored (got {place!r})",
                          f"Give the whole URL, for example with --set {key}=...")  # fmt: skip
