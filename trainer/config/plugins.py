"""Modules of the user that register model classes: `run.plugins`. Importing one runs its code."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Collection, Iterator, Sequence

from trainer.errors import ConfigError, Problem, first_line


def import_plugins(names: Sequence[str], key: str = "run.plugins") -> Iterator[Problem]:
    """Import each module, and yield a problem for each one that fails. Call on every rank, before the model is read.

    Args:
        names: Dotted module names.
        key: Key or option that they come from, for messages.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # importing a module can raise anything
            yield _problem(name, error, key)


def _problem(name: str, error: BaseException, key: str) -> Problem:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and (name == missing or name.startswith(f"{missing}.")):
        detail = "" if name == missing else f" (no module '{missing}')"
        remedy = "Install its package in this environment, or put its folder on PYTHONPATH, on every host"
        return Problem(key, f"there is no module '{name}'{detail}", remedy)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    cause = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
    reason = f"'{name}' cannot be imported: {cause} ({frame.filename}, line {frame.lineno})"
    return Problem(key, reason, "Correct the module, or remove it")


def import_named_plugins(recorded: Collection[str], allowed: Sequence[str]) -> None:
    """Import the plugins that a model needs, if the user named each one on the command line.

    A model folder may come from somebody else, so its content alone never makes code run.

    Args:
        recorded: `run.plugins` of the run that trained the model.
        allowed: Modules named with `--plugin`.

    Raises:
        ConfigError: A recorded plugin is not named, or cannot be imported.
    """
    if unnamed := [name for name in recorded if name not in allowed]:
        options = " ".join(f"--plugin {name}" for name in unnamed)
        reason = f"the run was trained with the code of {', '.join(unnamed)}, which runs only if you name it"
        raise ConfigError(Problem("--plugin", reason, f"Add {options}"))
    if problems := list(import_plugins(allowed, "--plugin")):
        raise ConfigError(problems)
