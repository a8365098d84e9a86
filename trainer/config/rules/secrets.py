"""Rules about secrets that were removed from a stored configuration."""

from __future__ import annotations

from collections.abc import Iterator

from trainer.config.rules.registry import Draft, rule
from trainer.errors import Problem
from trainer.sanitize import is_redacted


@rule("checkpoint", "data", "model")
def secrets_present(draft: Draft) -> Iterator[Problem]:
    assert draft.checkpoint is not None
    assert draft.data is not None
    assert draft.model is not None
    urls = {"checkpoint.upload": draft.checkpoint.upload, "checkpoint.resume": draft.checkpoint.resume,
              "model.path": draft.model.path}  # fmt: skip
    for split in ("train", "validation"):
        for index, source in enumerate(getattr(draft.data, split)):
            urls[f"data.{split}.{index}.path"] = getattr(source, "path", None)
    for key, url in urls.items():
        if url is not None and is_redacted(url):
            yield Problem(key, f"its secret was removed when this configuration was stored (got {url!r})",
                          f"Give the whole URL, for example with --set {key}=...")  # fmt: skip
