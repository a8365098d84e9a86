"""Exceptions of the trainer, grouped by who can fix the problem; each class has an exit status."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


@dataclass(frozen=True)
class Problem:
    """A user's mistake: the key or file, the reason, and the remedy."""

    path: str
    """Dotted path of the key, or the file, that is wrong."""

    reason: str
    """The problem, with the value."""

    remedy: str = ""
    """The remedy; empty if the reason implies it."""

    def __str__(self) -> str:
        prefix = f"{self.path}: " if self.path else ""
        text = f"{prefix}{self.reason}" + (f". {self.remedy}" if self.remedy else "")
        return text.replace("\n", "\\n").replace("\r", "\\r")  # one line, even if a file name or key has several


class TesseraError(Exception):
    """Base of all errors that end the run with a message and no traceback."""

    exit_status = 1


class ConfigError(TesseraError):
    """An invalid configuration, path or model folder. Holds every problem that was detected."""

    exit_status = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # an error of one rank is pickled and raised on all


class PlanError(ConfigError):
    """A tensor plan that does not match the model. Names the weight and the reason."""


class RanksDifferError(ConfigError):
    """Ranks that were started with different configurations, data or code. Names the rank and the difference."""


class DataError(TesseraError):
    """Invalid content of a data file or token index. Names the file and the position."""

    exit_status = 3


class CheckpointError(TesseraError):
    """A damaged, incompatible or missing checkpoint. Names the folder and the file."""

    exit_status = 4


class TrainingHalted(TesseraError):
    """Training stopped because a loss or a gradient norm is not finite."""

    exit_status = 5


class ReplicasDifferError(TrainingHalted):
    """Replicas of a weight that hold different values. Names ranks, hosts, weight and step."""


class RankLost(TesseraError):
    """Another rank died, stopped, or did not join a collective within `run.collective_timeout_seconds`."""

    exit_status = 6

    def __init__(self, message: str, *, reports_first: bool = False, patience: float = 0.0) -> None:
        """Initialize the error.

        Args:
            message: Names the ranks and the phase.
            reports_first: Whether this rank is the first to report the loss.
            patience: Seconds to wait before exiting. A launcher returns the status of the first rank that exits, and
                the lost rank may have a more specific one.
        """
        self.reports_first, self.patience = reports_first, patience
        super().__init__(message)


class Preempted(TesseraError):
    """Training stopped on request after saving its state. The same command resumes it."""

    exit_status = 75


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty.

    Messages cite it as the cause when a library's exception is turned into one of ours.
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def closest_match(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """Return the known name that `name` most likely misspells, ignoring case if necessary; None without one.

    Args:
        name: What the user wrote.
        known: The valid names.
        cutoff: Similarity in [0, 1] that a match needs.
    """
    names = sorted(known)
    if exact_case := get_close_matches(name, names, n=1, cutoff=cutoff):
        return exact_case[0]
    by_lower_case = {candidate.lower(): candidate for candidate in names}
    return next((by_lower_case[m] for m in get_close_matches(name.lower(), by_lower_case, n=1, cutoff=cutoff)), None)


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """Return "; did you mean 'X'?" for a misspelled name, to be appended to a reason; empty without a close match."""
    match = closest_match(name, known, cutoff=cutoff)
    return f"; did you mean '{match}'?" if match else ""
