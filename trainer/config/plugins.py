"""Modules of the user's own that register model classes: `run.plugins`. Importing one runs its code."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Collection, Iterator, Sequence

from trainer.errors import ConfigError, Problem, first_line


def import_plugins(names: Sequence[str], key: str = "run.plugins") -> Iterator[Problem]:
    """Import each module, and yield what is wrong with those that cannot be imported.

    Every rank must call it, before it looks at the model.

    Args:
        names: dotted module names. key: where they come from.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever a module does when it is imported
            yield _problem(name, error, key)


def _problem(name: str, error: BaseException, key: str) -> Problem:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and (name == missing or name.startswith(f"{missing}.")):
        detail = "" if name == missing else f" (no module '{missing}')"
        return Problem(key, f"there is no module '{name}'{detail}", "Install its package in this environment, or "
                       "put its folder on PYTHONPATH, on every host")  # fmt: skip
    cause = first_line(error)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    reason = f"'{name}' cannot be imported: {type(error).__name__}: {cause} ({frame.filename}, line {frame.lineno})"
    return Problem(key, reason, "Correct the module, or leave it out")


def import_named_plugins(recorded: Collection[str], allowed: Sequence[str]) -> None:
    """Import the plugins that a model needs, if the user has named each on the command line.

    A folder may come from somebody else, so nothing runs because the folder says so.

    Args:
        recorded: `run.plugins` of the run that trained the model. named: by `--plugin`.

    Raises:
        ConfigError: for a recorded plugin that is not named, and for one that cannot be imported.
    """
    if unnamed := [name for name in recorded if name not in allowed]:
        options = " ".join(f"--plugin {name}" for name in unnamed)
        raise ConfigError(Problem("--plugin", f"the run was trained with the code of {', '.join(unnamed)}, which runs "
                                  "only where you name it", f"Add {options}"))  # fmt: skip
    if problems := list(import_plugins(allowed, "--plugin")):
        raise ConfigError(problems)
