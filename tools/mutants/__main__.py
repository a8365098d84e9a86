"""Mutates `trainer/` in small ways and counts how many mutants the fast tests detect.

    python -m tools.mutants                       # 400 mutants, at least 40 of each package
    python -m tools.mutants --packages data config
    python -m tools.mutants --packages checkpoint --tests tests/checkpoint --markers 'not matrix'   # with its ranks
    python -m tools.mutants --key 'trainer/data/order.py: ...'   # one mutant, with the output of its tests

Outcomes are kept in .cache/mutants for as long as the sources and tests stay the same, so that a run that was stopped
resumes. Exit status: 0 if each package reaches `--minimum`, 1 if one does not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from tools.mutants import runner, sites
from tools.mutants.sites import Mutant

FOLDER = Path(".cache/mutants")
EQUIVALENT = Path("tools/mutants/equivalent.json")
"""Mutants that no test can detect, by key, each with the reason."""

SEED = 20261124
DETECTED = (runner.KILLED, runner.TIMEOUT)


def source_hash(*selection: str) -> str:
    """Return a hash of all sources that an outcome depends on, and of the selection of tests."""
    whole = hashlib.sha256(repr(selection).encode())
    for root in runner.REPOSITORY:
        for path in sorted(Path(root).rglob("*.py")):
            if not path.as_posix().startswith("tools/mutants"):
                whole.update(path.as_posix().encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.mutants", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sample", type=int, default=400, metavar="N", help="total number of mutants (default 400)")
    parser.add_argument(
        "--each", type=int, default=40, metavar="N", help="minimum number of mutants of a package (default 40)"
    )
    parser.add_argument("--packages", nargs="+", choices=sorted(sites.PACKAGES), help="default: all")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the sample (default {SEED})")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="mutants to run in parallel (default 2)")
    parser.add_argument(
        "--minimum", type=float, default=85.0, metavar="PERCENT", help="percentage to detect in each package"
    )
    parser.add_argument(
        "--markers", default=runner.MARKERS, help=f"marker expression that selects tests (default '{runner.MARKERS}')"
    )
    parser.add_argument("--tests", nargs="+", default=["tests"], metavar="PATH", help="test files (default: all)")
    parser.add_argument("--key", help="run only this mutant, and show the output of its tests")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit status."""
    options = parse_arguments(arguments)
    everything = sites.all_mutants()
    runner.prepare_process()
    runner.forget_repository()
    folder = FOLDER / source_hash(options.markers, *options.tests)
    baseline = _baseline(folder / "baseline.json", options)
    runner.preload(baseline)
    runner.forget_repository()
    if options.key:
        return _run_one(next(mutant for mutant in everything if mutant.key == options.key), baseline)
    sample = sites.draw(everything, options.sample, options.each, options.seed)
    chosen = [mutant for mutant in sample if not options.packages or mutant.package in options.packages]
    equivalent = json.loads(EQUIVALENT.read_text())
    outcomes = _run_all([m for m in chosen if m.key not in equivalent], baseline, folder, options.workers)
    return _report(chosen, outcomes, equivalent, options.minimum)


def _baseline(path: Path, options: argparse.Namespace) -> runner.Baseline:
    if not path.exists():
        print("running the tests unmutated, under a line tracer (minutes) ...", flush=True)
        runner.record_baseline(path, options.markers, options.tests)
    baseline = runner.read_baseline(path)
    print(f"{len(baseline.seconds)} tests pass in {sum(baseline.seconds.values()):.0f} s, {len(baseline.failed)} fail")
    for test in baseline.failed:
        print(f" excluded, because it fails without a mutation: {test}")
    return baseline


def _run_one(mutant: Mutant, baseline: runner.Baseline) -> int:
    tests = baseline.tests_of(mutant)
    run = runner.start(mutant, tests, sum(baseline.seconds[test] for test in tests))
    os.set_inheritable(1, True)
    output = Path(run.folder.name) / "output"
    text = ""
    while (outcome := run.outcome()) is None:
        text = output.read_text() if output.exists() else text
        time.sleep(0.02)
    print(f"{text}\n{mutant.file}:{mutant.lines[0]}: {outcome} by {len(tests)} tests")
    return int(outcome not in DETECTED)


def _run_all(mutants: list[Mutant], baseline: runner.Baseline, folder: Path, workers: int) -> dict[str, str]:
    """Run all mutants whose outcome is not known yet; return every outcome by key."""
    kept = folder / "outcomes.jsonl"
    rows = map(json.loads, kept.read_text().splitlines()) if kept.exists() else ()
    outcomes: dict[str, str] = {row["key"]: row["outcome"] for row in rows}
    waiting = [mutant for mutant in reversed(mutants) if mutant.key not in outcomes]
    running: list[runner.Run] = []
    began, total = time.monotonic(), len(waiting)
    with kept.open("a") as file:
        while waiting or running:
            while waiting and len(running) < workers:
                mutant = waiting.pop()
                tests = baseline.tests_of(mutant)
                if tests:
                    running.append(runner.start(mutant, tests, sum(baseline.seconds[test] for test in tests)))
                else:
                    _keep(file, outcomes, mutant, runner.UNCOVERED)
            for run in list(running):
                if (outcome := run.outcome()) is not None:
                    running.remove(run)
                    _keep(file, outcomes, run.mutant, outcome)
                    done = total - len(waiting) - len(running)
                    print(f"{done}/{total} {time.monotonic() - began:.0f} s  {outcome}: {run.mutant.key}", flush=True)
            time.sleep(0.02)
    return outcomes


def _keep(file: object, outcomes: dict[str, str], mutant: Mutant, outcome: str) -> None:
    outcomes[mutant.key] = outcome
    print(json.dumps({"key": mutant.key, "outcome": outcome}), file=file, flush=True)  # type: ignore[arg-type]


def _report(chosen: Iterable[Mutant], outcomes: dict[str, str], equivalent: dict[str, str], minimum: float) -> int:
    """Print the share of each package and the survivors. Return the exit status."""
    by_package: dict[str, list[Mutant]] = defaultdict(list)
    for mutant in chosen:
        by_package[mutant.package].append(mutant)
    is_enough = True
    print(f"\n{'package':<22}{'mutants':>8}{'killed':>8}{'timeout':>8}{'alive':>8}{'equivalent':>11}{'share':>9}")
    for package, mutants in sorted(by_package.items()):
        counts = Counter(outcomes[mutant.key] for mutant in mutants if mutant.key not in equivalent)
        detected = sum(counts[outcome] for outcome in DETECTED)
        share = 100 * detected / max(1, counts.total())
        is_enough = is_enough and share >= minimum
        print(
            f"{package:<22}{len(mutants):>8}{counts[runner.KILLED]:>8}{counts[runner.TIMEOUT]:>8}"
            f"{counts.total() - detected:>8}{len(mutants) - counts.total():>11}{share:>8.1f}%"
        )
    for package, mutants in sorted(by_package.items()):
        for mutant in mutants:
            outcome = outcomes.get(mutant.key, "")
            if outcome and outcome not in DETECTED and mutant.key not in equivalent:
                print(f"{package}: {outcome}: line {mutant.lines[0]} of {mutant.key}")
    return int(not is_enough)


if __name__ == "__main__":
    sys.exit(main())
