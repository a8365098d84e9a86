"""The mutation tool: which faults it makes, what it leaves out, and that its list of equivalent mutants is current."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tools.mutants.__main__ import EQUIVALENT
from tools.mutants.runner import Baseline
from tools.mutants.sites import PACKAGES, Mutant, all_mutants, draw, mutants_of, mutated_code

pytestmark = pytest.mark.fast

SOURCE = '''"""A module."""
LIMIT: int = 3

def clamp(value, low=0):
    """1 + 1 in a docstring."""
    assert value == value
    if value is None:
        raise ValueError(f"{value + 1}")
    log.warning("clamped %d", value + 1)
    found = []
    found.append(value)
    return low if value < low else min(found[0], LIMIT) or not value
'''


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    return path


def test_every_kind_of_fault_is_made_and_messages_are_left_out(module: Path) -> None:
    changes = [(mutant.scope, mutant.before, mutant.after) for mutant in mutants_of(module)]
    assert changes == [
        ("module", "3", "4"),
        ("clamp", "0", "1"),
        ("clamp", "value is None", "value is not None"),
        ("clamp", "found.append(value)", "pass"),
        ("clamp", "value < low", "value <= low"),
        ("clamp", "min(found[0], LIMIT) or not value", "min(found[0], LIMIT) and (not value)"),
        ("clamp", "0", "1"),
        ("clamp", "not value", "value"),
    ]


def test_mutated_code_has_one_fault(module: Path) -> None:
    def results(number: int) -> tuple[object, ...]:
        values: dict[str, object] = {"log": __import__("logging").getLogger("mutants")}
        exec(mutated_code(module, number), values)
        try:
            return tuple(values["clamp"](value) for value in (-1, 2, 9))  # type: ignore[operator]
        except (IndexError, ValueError) as error:
            return (type(error),)

    unmutated = (0, 2, 3)
    found = [results(mutant.number) for mutant in mutants_of(module)]
    assert found[0] == (0, 2, 4)
    assert found[1] == (1, 2, 3)
    assert found[2] == (ValueError,)
    assert found[3] == (IndexError,)
    assert found[4] == found[7] == unmutated, "no value here tells these from the original"
    assert found[5] == (0, False, False)
    assert found[6] == (IndexError,)


def test_sample_has_40_mutants_of_each_package_and_is_reproducible() -> None:
    mutants = all_mutants()
    sample = draw(mutants, 400, 40, seed=1)
    assert sample == draw(mutants, 400, 40, seed=1)
    assert sample != draw(mutants, 400, 40, seed=2)
    counts = Counter(mutant.package for mutant in sample)
    assert counts.keys() == PACKAGES.keys()
    assert min(counts.values()) >= 40
    assert 400 <= len(set(sample)) == len(sample) <= 410


def test_every_listed_equivalent_mutant_exists() -> None:
    keys = {mutant.key for mutant in all_mutants()}
    assert json.loads(EQUIVALENT.read_text()).keys() - keys == set()


def test_quick_tests_of_the_mutated_line_run_first() -> None:
    line = Mutant("trainer/loop.py", 0, (5, 6), "fit", "a", "b")
    lines = {"slow": {"trainer/loop.py": [6]}, "quick": {"trainer/loop.py": [5]}, "other": {"trainer/loop.py": [7]}}
    baseline = Baseline({"slow": 2.0, "quick": 0.1, "other": 0.1}, lines)
    assert baseline.tests_of(line) == ["quick", "slow"]
    at_import = Mutant("trainer/loop.py", 0, (1, 1), "module", "1", "2", runs_at_import=True)
    assert baseline.tests_of(at_import) == ["quick", "other", "slow"]
