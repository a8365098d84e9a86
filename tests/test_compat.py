"""The border to the dependencies: an unsupported version and every missing internal name are refused."""

from __future__ import annotations

import ast
import dataclasses
import os
import pkgutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

from trainer.compat import Dependency, IncompatibleDependencyError, check_names, check_versions
from trainer.compat.dependencies import DEPENDENCIES
from trainer.compat.dependency_check import ALLOW_UNSUPPORTED, mentioned_names

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parent.parent
UNCOPIED = ("__dict__", "__weakref__", "__slots__", "__qualname__")
"""Members of a class that `type` makes itself."""

IDS = [dependency.distribution for dependency in DEPENDENCIES]


def every_name() -> Iterator[Any]:
    for dependency in DEPENDENCIES:
        for group, owners in dependency.required.items():
            for path, names in owners.items():
                for name in names:
                    yield pytest.param(dependency, group, path, name, id=f"{path}.{name}")


# Versions ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=IDS)
def test_supported_range_equals_pyproject(dependency: Dependency) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = {requirement.name: requirement.specifier for requirement in map(Requirement, project["dependencies"])}
    assert ranges[dependency.distribution] == Requirement(f"x{dependency.supported}").specifier
    assert "<" in dependency.supported


def test_installed_versions_are_supported() -> None:
    check_versions(DEPENDENCIES)


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=IDS)
@pytest.mark.parametrize("version", ["0.1", "99.0", "99.0rc1"])
def test_unsupported_version_is_refused(version: str, dependency: Dependency, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    with pytest.raises(IncompatibleDependencyError) as refused:
        check_versions([dependency])
    assert str(refused.value) == (
        f"{dependency.distribution}: supported {dependency.supported}, found {version}. "
        f"Install a supported version, or set {ALLOW_UNSUPPORTED}=1 to try"
    )
    assert refused.value.exit_status == 2


def test_unsupported_version_is_allowed_by_environment_variable(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "99.0")
    monkeypatch.setenv(ALLOW_UNSUPPORTED, "1")
    with caplog.at_level("WARNING", logger="trainer.compat.dependency_check"):
        check_versions(DEPENDENCIES)
    assert [record.getMessage() for record in caplog.records] == [
        f"{dependency.distribution}: supported {dependency.supported}, found 99.0" for dependency in DEPENDENCIES
    ]


def test_command_refuses_unsupported_version_before_importing_it(tmp_path: Path) -> None:
    metadata = tmp_path / "deepspeed-99.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 99.0\n")
    (tmp_path / "deepspeed").mkdir()
    (tmp_path / "deepspeed" / "__init__.py").write_text("raise AssertionError('imported')")
    ended = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "train.py"), "--config", "absent.json"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stderr) == (
        2,
        "error: deepspeed: supported >=0.19.8,<0.20, found 99.0. "
        f"Install a supported version, or set {ALLOW_UNSUPPORTED}=1 to try\n",
    )


# Names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=IDS)
def test_installed_dependency_has_every_name(dependency: Dependency) -> None:
    for group in dependency.required:
        check_names(dependency, group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for group in dependency.required:  # users would see a warning in every run
            check_names(dependency, group)


@pytest.mark.parametrize(("dependency", "group", "path", "name"), every_name())
def test_missing_name_is_refused(
    dependency: Dependency, group: str, path: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The module, class or function as a version would have it that calls the name otherwise."""
    resolve = pkgutil.resolve_name
    renamed = with_renamed(resolve(path), name)
    monkeypatch.setattr("pkgutil.resolve_name", lambda wanted: renamed if wanted == path else resolve(wanted))
    with pytest.raises(IncompatibleDependencyError) as refused:
        check_names(dependency, group)
    expected = (
        f"{dependency.distribution}: version {dependency.version()} lacks {path}.{name}, needed for: "
        f"{dependency.required[group][path][name]}. {dependency.remedy()}"
    )
    assert expected in str(refused.value).splitlines()


@pytest.mark.parametrize("dependency", DEPENDENCIES, ids=IDS)
def test_names_in_use_are_those_listed(dependency: Dependency) -> None:
    """Every private name that the package touches is listed, and every listed name is in use."""
    package = ROOT / "trainer" / "compat" / dependency.distribution
    attributes, strings = names_in(package)
    attributes_anywhere, _ = names_in(ROOT / "trainer")
    listed = {name for owners in dependency.required.values() for names in owners.values() for name in names}
    modules = {part for owners in dependency.required.values() for path in owners for part in path.split(".")}
    private = {name for name in attributes if name.startswith("_") and not name.startswith("__")}
    assert private - listed - modules == set()
    assert {name for name in listed if name.startswith("_")} - attributes - strings == set()
    assert listed - attributes_anywhere - attributes - strings == set()


def names_in(package: Path) -> tuple[set[str], set[str]]:
    """Collect attributes, imported names included, and strings in the code of a package but its tables of names."""
    attributes, strings = set(), set()
    for file in package.glob("**/*.py"):
        if file.name == "names.py":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "super()"):
                attributes.add(node.attr)
            elif isinstance(node, ast.alias):
                attributes.add(node.name)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.add(node.value)
    return attributes, strings


def with_renamed(owner: Any, name: str) -> Any:
    """Copy a module, class or function, with another word for `name` in its attributes and code."""
    if isinstance(owner, type):
        members = {key: value for base in reversed(owner.__mro__[:-1]) for key, value in vars(base).items()}
        members = {key: value for key, value in members.items() if key not in UNCOPIED}
        return type(
            owner.__name__, (), {key: with_renamed(value, name) for key, value in members.items() if key != name}
        )
    if isinstance(owner, ModuleType):
        copy = ModuleType(owner.__name__)
        for key, value in vars(owner).items():
            if key != name:
                own = getattr(value, "__module__", None) == owner.__name__
                setattr(copy, key, with_renamed(value, name) if own else value)
        return copy
    if isinstance(owner, property):
        return property(owner.fget and with_renamed(owner.fget, name))
    if isinstance(owner, classmethod | staticmethod):
        return type(owner)(with_renamed(owner.__func__, name))
    if not isinstance(owner, FunctionType):
        return owner
    function = FunctionType(_renamed_code(owner.__code__, name), owner.__globals__, closure=owner.__closure__)
    function.__module__ = owner.__module__
    if hasattr(owner, "__wrapped__"):
        function.__wrapped__ = with_renamed(owner.__wrapped__, name)  # type: ignore[attr-defined]
    return function


def _renamed_code(code: CodeType, name: str) -> CodeType:
    def constant(value: Any) -> Any:
        if isinstance(value, CodeType):
            return _renamed_code(value, name)
        return "another_name" if value == name and isinstance(value, str) else value

    return code.replace(
        co_names=tuple("another_name" if used == name else used for used in code.co_names),
        co_consts=tuple(map(constant, code.co_consts)),
    )


def test_missing_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dependency = dataclasses.replace(
        DEPENDENCIES[0], required={"group": {"deepspeed.no_such_module.Class": {"attribute": "a purpose"}}}
    )
    with pytest.raises(IncompatibleDependencyError, match=r"lacks deepspeed.no_such_module.Class .*: a purpose"):
        check_names(dependency, "group")


def test_mentioned_names_cover_instances_parameters_and_strings() -> None:
    class Base:
        def __init__(self) -> None:
            self.from_base = 1

    class Example(Base):
        @property
        def view(self) -> int:
            return self.behind_property  # type: ignore[attr-defined, no-any-return]

        def mark(self, parameter: Any) -> bool:
            def nested() -> None:
                parameter.set_on_parameter = 1

            nested()
            return hasattr(parameter, "looked_for")

    names = mentioned_names(Example)
    assert {"from_base", "behind_property", "set_on_parameter", "looked_for"} <= names
    assert "absent" not in names
