"""What can go wrong, by who can mend it, with the exit status of each (DESIGN 2.4)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One mistake of the user: where it is, why it is one, what to do about it."""

    path: str
    """Dotted path of the key, or the file, that is wrong."""

    reason: str
    """What is wrong with it, naming the value."""

    remedy: str = ""
    """What to do instead; empty where the reason says it already."""

    def __str__(self) -> str:
        where = f"{self.path}: " if self.path else ""
        text = f"{where}{self.reason}" + (f". {self.remedy}" if self.remedy else "")
        return text.replace("\n", "\\n").replace("\r", "\\r")  # one line, whatever the name of a file or key


class TesseraError(Exception):
    """Ends the run with a message and no traceback. Each subclass has its own exit status."""

    exit_status = 1


class ConfigError(TesseraError):
    """The configuration, a path or a model folder is wrong. Carries every problem that was found."""

    exit_status = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[Problem]]]:
        return type(self), (self.problems,)  # one rank may raise it for all


class PlanError(ConfigError):
    """The tensor plan and the model do not fit together: names the weight and the reason."""


class RanksDifferError(ConfigError):
    """Ranks were started with different configurations, data or code: names the rank and what differs."""


class DataError(TesseraError):
    """Something inside a data file or a token index is wrong: names the file and the place in it."""

    exit_status = 3


class TrainingHalted(TesseraError):
    """Training stopped on its numbers: a loss or a gradient norm that is not finite."""

    exit_status = 5


class ReplicasDifferError(TrainingHalted):
    """Ranks that hold the same weight hold different values: names ranks, hosts, weight and step."""


class CheckpointError(TesseraError):
    """A checkpoint is damaged, does not fit, or is not there where one was asked for: names the folder and the file."""

    exit_status = 4


class RankLost(TesseraError):
    """Another rank has died, has stopped, or did not arrive in a collective within `run.collective_timeout_seconds`."""

    exit_status = 6

    def __init__(self, message: str, *, reports_first: bool = False, patience: float = 0.0) -> None:
        """Args:
        speaks: this rank is the one that reports it first. patience: seconds to wait before leaving, because a
            launcher takes the status of the first rank that leaves, and the lost one may have a better one.
        """
        self.reports_first, self.patience = reports_first, patience
        super().__init__(message)


class Preempted(TesseraError):
    """Stopped on request, with the state saved: start the same command again. No mistake of anybody's."""

    exit_status = 75
