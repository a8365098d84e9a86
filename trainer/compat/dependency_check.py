"""Checks of the versions and internal names of dependencies."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

from packaging.specifiers import SpecifierSet

from trainer.errors import ConfigError, Problem

ALLOW_UNSUPPORTED = "TESSERA_UNSUPPORTED_VERSIONS"
"""Environment variable: 1 turns the refusal of an unsupported version into a warning."""

log = logging.getLogger(__name__)

_WITH_CODE = (type, FunctionType, type(functools.cache(len)))
"""Types of the members of a module whose code is searched for names."""

Names = Mapping[str, Mapping[str, str]]
"""Purpose of each name, by the dotted path of the module, class or function that has it."""


class IncompatibleDependencyError(ConfigError):
    """An installed dependency has an unsupported version, or lacks an internal name that Tessera uses."""


@dataclass(frozen=True)
class Dependency:
    """A dependency whose internals Tessera uses."""

    distribution: str
    supported: str
    """Version specifiers (PEP 440), equal to those in pyproject.toml."""

    required: Mapping[str, Names]
    """Names by group. A group is checked at once, before the first use of its names."""

    def version(self) -> str:
        """Read the installed version."""
        return importlib.metadata.version(self.distribution)

    def remedy(self) -> str:
        """Return the remedy for an incompatible version."""
        return f"Install a supported version ({self.distribution}{self.supported})"


def check_versions(dependencies: Iterable[Dependency]) -> None:
    """Refuse unsupported versions, without importing the dependencies.

    Raises:
        IncompatibleDependencyError: for all unsupported versions at once, unless `TESSERA_UNSUPPORTED_VERSIONS` is 1.
    """
    problems = [problem for dependency in dependencies for problem in _version_problems(dependency)]
    if problems and os.environ.get(ALLOW_UNSUPPORTED) != "1":
        raise IncompatibleDependencyError(problems)
    for problem in problems:
        log.warning("%s: %s", problem.path, problem.reason)


def _version_problems(dependency: Dependency) -> Iterator[Problem]:
    version = dependency.version()
    if not SpecifierSet(dependency.supported).contains(version, prereleases=True):
        yield Problem(
            dependency.distribution,
            f"supported {dependency.supported}, found {version}",
            f"Install a supported version, or set {ALLOW_UNSUPPORTED}=1 to try",
        )


def check_names(dependency: Dependency, group: str) -> None:
    """Refuse a dependency that lacks a name of a group, whatever its version. Import the modules that have the names.

    Raises:
        IncompatibleDependencyError: for all missing names of the group at once.
    """
    problems = [
        Problem(dependency.distribution, f"version {dependency.version()} lacks {missing}", dependency.remedy())
        for path, names in dependency.required[group].items()
        for missing in _missing(path, names)
    ]
    if problems:
        raise IncompatibleDependencyError(problems)


def _missing(path: str, names: Mapping[str, str]) -> Iterator[str]:
    try:
        owner = pkgutil.resolve_name(path)
    except (ImportError, AttributeError) as error:
        yield f"{path} ({error}), needed for: {'; '.join(names.values())}"
        return
    known = mentioned_names(owner)
    for name, purpose in names.items():
        if name not in known and not hasattr(owner, name):
            yield f"{path}.{name}, needed for: {purpose}"


def mentioned_names(owner: Any) -> set[str]:
    """Collect names and strings in the code of a class with its bases, of a module, or of a function.

    Finds what `hasattr` cannot: attributes of instances, and attributes that the code sets on parameters or looks for
    on them. A name that no code mentions has no effect when we set it, and no value when we read it.
    """
    names: set[str] = set()
    for code in _codes(owner):
        names.update(_names_in(code))
    return names


def _codes(owner: Any) -> Iterator[CodeType]:
    if isinstance(owner, ModuleType):
        for member in vars(owner).values():
            # By type alone: some modules hold objects that warn of their deprecation when an attribute is read.
            if issubclass(type(member), _WITH_CODE) and member.__module__ == owner.__name__:
                yield from _codes(member)
    elif isinstance(owner, type):
        for base in owner.__mro__:
            for member in vars(base).values():
                unwrapped = getattr(member, "fget", None) or getattr(member, "__func__", member)
                yield from _code_of(unwrapped)
    else:
        yield from _code_of(owner)


def _code_of(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function and of those that it decorates."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            yield code
        function = getattr(function, "__wrapped__", None)


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _names_in(constant)
