"""The report of replicas that differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from trainer.engine.replica_set import ReplicaSet

MAX_REPORTED = 8
"""Number of weights that are compared with their master weights and named."""

Hash = tuple[int, int]
"""Both halves of `hash_bits`."""


class Mismatch(NamedTuple):
    """A weight whose replicas differ."""

    name: str
    replica_set: ReplicaSet
    hashes: dict[int, Hash]
    """Hash of each replica, by rank."""

    def minority_ranks(self) -> set[int]:
        """Find the ranks whose replica differs from that of more than half of the ranks; empty without a majority."""
        majority, count = Counter(self.hashes.values()).most_common(1)[0]
        if 2 * count <= len(self.hashes):
            return set()
        return {rank for rank, value in self.hashes.items() if value != majority}


def describe_mismatches(
    mismatches: Sequence[Mismatch],
    wrong_ranks: Sequence[set[int]],
    hosts: Sequence[str],
    *,
    step: int,
    last_verified: int | None,
) -> str:
    """Format the error message.

    Args:
        mismatches: all of them; the first `MAX_REPORTED` are named.
        wrong_ranks: of each mismatch; empty if it cannot be determined which replica is wrong.
        hosts: host name of each rank.
        step: in which the replicas were compared.
        last_verified: step after which they were equal; None if none was compared.
    """
    lines: dict[str, list[str]] = defaultdict(list)
    for mismatch, ranks in zip(mismatches[:MAX_REPORTED], wrong_ranks, strict=False):
        all_ranks = _describe_ranks(sorted(mismatch.hashes), hosts)
        if ranks:
            line = f"{_describe_ranks(sorted(ranks), hosts)} of {all_ranks} wrong"
        else:
            line = f"{all_ranks} differ, and neither a majority nor master weights show which is wrong"
        lines[line].append(mismatch.name)
    weights = "; ".join(f"{', '.join(names)}: {line}" for line, names in lines.items())
    rest = f"; and {len(mismatches) - MAX_REPORTED} more weights" if len(mismatches) > MAX_REPORTED else ""
    since = "no earlier step was compared" if last_verified is None else f"equal after step {last_verified}"
    until = "" if last_verified is None else f" of step {last_verified} or before"
    return (
        f"step {step}: replicas of weights differ ({since}). {weights}{rest}. Check the memory and the device of the "
        f"rank; resume from a checkpoint{until} (--resume DIR)"
    )


def _describe_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    by_host: dict[str, list[int]] = defaultdict(list)
    for rank in ranks:
        by_host[hosts[rank]].append(rank)
    return " and ".join(
        f"rank{'s' * (len(members) > 1)} {', '.join(map(str, members))} on {host}" for host, members in by_host.items()
    )
