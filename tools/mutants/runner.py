"""Runs the fast tests in children of a process that has imported everything but this repository.

The baseline runs them all, unmutated, under a line tracer; it records the tests that execute each line, and their
times. Each mutant's child runs the tests that execute its lines, quickest first, until one fails. Ranks and commands
that these tests start are forked from the child, not from a server, so that they run the mutated module too.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import json
import mmap
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from tools.mutants.sites import SOURCES, Mutant, mutated_code

REPOSITORY = ("trainer", "tools", "tests", "launch")
MARKERS = "fast and not matrix"
BASE_SECONDS = 15.0
"""Seconds that a child may take in addition to `SLOWDOWN` times its tests' baseline."""

SLOWDOWN = 8.0
LARGEST_SECONDS = 25.0
"""Maximum baseline time of the tests that one mutant is run against."""

KILLED, TIMEOUT, SURVIVED, UNCOVERED = "killed", "timeout", "survived", "uncovered"


@dataclass
class Baseline:
    """Results of the unmutated code."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds of each passing test."""

    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """Executed lines by test and file, without imports."""

    modules: list[str] = field(default_factory=list)
    """Modules that are imported afterwards."""

    failed: list[str] = field(default_factory=list)
    """Failing tests; no mutant is run against them."""

    def tests_of(self, mutant: Mutant) -> list[str]:
        """Return the tests that execute a line of the mutant, or its file if it runs at import, quickest first."""
        first, last = mutant.lines
        covering = [test for test, files in self.lines.items() if _executes(files.get(mutant.file, []), first, last)]
        if not covering and mutant.runs_at_import:
            covering = [test for test, files in self.lines.items() if mutant.file in files]
        chosen: list[str] = []
        total = 0.0
        for test in sorted(covering, key=lambda test: self.seconds[test]):
            total += self.seconds[test]
            if chosen and total > LARGEST_SECONDS:
                break
            chosen.append(test)
        return chosen


def _executes(lines: list[int], first: int, last: int) -> bool:
    return any(first <= line <= last for line in lines)


class _Tracer:
    """Records executed lines of `trainer/` in memory that forked processes share."""

    def __init__(self) -> None:
        self._offsets: dict[str, int] = {}
        size = 0
        for path in sorted(SOURCES.rglob("*.py")):
            self._offsets[str(path.resolve())] = size
            size += len(path.read_text().splitlines()) + 2
        self._seen = mmap.mmap(-1, size)

    def start(self) -> None:
        threading.settrace(self._call)
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, argument: object) -> Callable[..., Any] | None:
        offset = self._offsets.get(frame.f_code.co_filename)
        if offset is None or frame.f_code.co_name == "<module>":
            return None
        seen = self._seen
        seen[offset + frame.f_lineno] = 1

        def line(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
            seen[offset + frame.f_lineno] = 1
            return line

        return line

    def take(self) -> dict[str, list[int]]:
        """Return the lines seen since the last call, by file."""
        lines_by_file: dict[str, list[int]] = {}
        data, root = self._seen[:], Path.cwd()
        borders = [*self._offsets.values(), len(data)]
        for (file, start), end in zip(self._offsets.items(), borders[1:], strict=True):
            lines = [line for line, seen in enumerate(data[start:end]) if seen]
            if lines:
                lines_by_file[Path(file).relative_to(root).as_posix()] = lines
        self._seen[:] = bytes(len(data))
        return lines_by_file


class _Recorder:
    """A pytest plugin that fills a baseline."""

    def __init__(self, tracer: _Tracer, baseline: Baseline) -> None:
        self._tracer, self._baseline = tracer, baseline
        self._failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._tracer.take()
        start = time.monotonic()
        result = yield
        if item.nodeid in self._failed:
            self._baseline.failed.append(item.nodeid)
        else:
            self._baseline.seconds[item.nodeid] = time.monotonic() - start
            self._baseline.lines[item.nodeid] = self._tracer.take()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self._failed.add(report.nodeid)


class _MutatingLoader(importlib.abc.MetaPathFinder):
    """Import hook that loads one module of the repository with its mutated code."""

    def __init__(self, path: Path, code: CodeType) -> None:
        self._path, self._code = path, code
        self._name = path.with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        for finder in sys.meta_path:
            if finder is not self and (spec := finder.find_spec(name, path, target)) is not None:
                spec.loader.get_code = lambda fullname: self._code  # type: ignore[union-attr]
                return spec
        return None


def prepare_process() -> None:
    """Set the environment of the tests, before anything else is imported."""
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    import tests.conftest  # noqa: F401


def forget_repository() -> None:
    """Forget the modules of this repository, so that a child imports them again."""
    for name in list(sys.modules):
        if name.split(".")[0] in REPOSITORY and not name.startswith("tools.mutants") and name != "tools":
            del sys.modules[name]


def _run_pytest(arguments: list[str], folder: str, plugins: list[object]) -> int:
    """Run pytest in this process, whose ranks and commands are forked from it."""
    import tools.ranks

    tools.ranks.context = multiprocessing.get_context("fork")  # type: ignore[assignment]
    options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "--basetemp", f"{folder}/tests"]
    return int(pytest.main([*options, *arguments], plugins=plugins))


def _in_child(work: Callable[[], int], output: Path) -> int:
    """Fork a child that leads its own session and exits with the status that `work` returns. Return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        status = work()
    finally:
        os._exit(status)


def record_baseline(path: Path, markers: str, tests: list[str]) -> Baseline:
    """Run the tests that match a marker expression under the tracer, and keep the result in a file."""
    with tempfile.TemporaryDirectory() as folder:
        result, output = Path(folder) / "baseline.json", Path(folder) / "output"

        def work() -> int:
            baseline, tracer = Baseline(), _Tracer()
            recorder = _Recorder(tracer, baseline)
            tracer.start()
            status = _run_pytest(["-m", markers, *tests], folder, [recorder])
            sys.settrace(None)
            baseline.modules = [name for name in sys.modules if name.split(".")[0] not in (*REPOSITORY, "__main__")]
            result.write_text(json.dumps(vars(baseline)))
            return min(status, 1)  # some tests may fail

        _, status = os.waitpid(_in_child(work, output), 0)
        if not result.exists():
            raise SystemExit(f"the baseline ended with status {status}:\n{output.read_text()[-3000:]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(result.read_text())
    return read_baseline(path)


def read_baseline(path: Path) -> Baseline:
    """Read the baseline that `record_baseline` saved."""
    return Baseline(**json.loads(path.read_text()))


def preload(baseline: Baseline) -> None:
    """Import the modules that the tests import, so that no child has to."""
    for name in baseline.modules:
        with contextlib.suppress(Exception):  # some modules exist only inside the tests
            importlib.import_module(name)


@dataclass
class Run:
    """A mutant's child."""

    mutant: Mutant
    tests: list[str]
    process: int
    deadline: float
    folder: tempfile.TemporaryDirectory[str]

    def outcome(self) -> str | None:
        """Return the outcome; None while it runs. A child that takes too long is killed with all its descendants."""
        process, status = os.waitpid(self.process, os.WNOHANG)
        if not process and time.monotonic() < self.deadline:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        if not process:
            os.waitpid(self.process, 0)
        self.folder.cleanup()
        if not process:
            return TIMEOUT
        return SURVIVED if status == 0 else KILLED


def start(mutant: Mutant, tests: list[str], seconds: float) -> Run:
    """Run `tests`, which take `seconds` unmutated, against a mutant."""
    folder = tempfile.TemporaryDirectory(prefix="tessera-mutant-", ignore_cleanup_errors=True)

    def work() -> int:
        path = Path(mutant.file)
        sys.meta_path.insert(0, _MutatingLoader(path, mutated_code(path, mutant.number)))
        return _run_pytest(["-x", *tests], folder.name, [])

    process = _in_child(work, Path(folder.name) / "output")
    return Run(mutant, tests, process, time.monotonic() + BASE_SECONDS + SLOWDOWN * seconds, folder)
