"""Whether all ranks were started alike: compared through the store, before any of them depends on another.

Every rank posts facts, rank 0 compares them and posts its verdict, and all ranks raise the same error. Only rank 0
prints it, and the launcher ends the others with it.
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from datetime import timedelta
from typing import Any, NamedTuple

import xxhash

from trainer.distributed import Launch, PrefixStore, Store, hand_out, named, receive, wait_for
from trainer.errors import ConfigError, Problem, RanksDifferError

_PATIENCE = timedelta(minutes=30)
"""How long rank 0 waits for the other ranks' facts, and these for its verdict."""

_READ_PATIENCE = timedelta(seconds=10)
_PROBLEMS = 12
_SHOWN = 160
"""Characters of a value in a message."""


class Fact(NamedTuple):
    """Something that must be equal on all ranks."""

    key: str
    """What it is called in the message: a key of the configuration, a package, a file."""

    value: Any
    """JSON. A string is shown as it is."""

    remedy: str = "Start all ranks with the same configuration and command line"
    is_per_host: bool = False
    """Whether it must be equal only on the ranks of one host."""

    group: str = ""
    """Of facts with the same group only the first that differs is reported."""


class _Posted(NamedTuple):
    """What a rank has posted."""

    host: str
    builder: int
    """The first rank of its host."""

    facts: dict[str, Any]


def compare_ranks(
    launch: Launch, store: Store, purpose: str, facts: Iterable[Fact], patience: timedelta = _PATIENCE
) -> None:
    """Compare facts of all ranks; every rank must call it with the same purpose.

    Args:
        purpose: what ranks do before this comparison, as in "start"; each is made once.
        patience: how long ranks wait for each other.

    Raises:
        RanksDifferError: on all ranks alike, naming key, ranks, hosts and values; on a process whose rank another one
            has, alone.
        ConfigError: a rank has not arrived in time.
    """
    if launch.world == 1:
        return
    own, shared = list(facts), PrefixStore(f"compare/{purpose}", store)
    if shared.add(f"processes/{launch.rank}", 1) > 1:
        raise RanksDifferError(
            Problem("RANK", f"another process is rank {launch.rank} already",
                    "Start each rank once, and each run with a port of its own (MASTER_PORT)")
        )  # fmt: skip
    posted = _Posted(socket.gethostname(), launch.rank - launch.local_rank, {fact.key: fact.value for fact in own})
    shared.set(f"facts/{launch.rank}", json.dumps(posted))
    if launch.rank == 0:
        problems = _problems(launch.world, shared, purpose, own, patience)
        verdict = json.dumps(list(map(astuple, problems)))
        hand_out(shared, launch.world, "verdict", verdict, "read the verdict", min(patience, _READ_PATIENCE))
    else:
        told = receive(shared, launch.rank, "verdict", "compare all ranks", patience)
        if told is None:
            raise ConfigError(_late(["rank 0"], patience))
        problems = [Problem(*problem) for problem in json.loads(told)]
    if problems:
        raise RanksDifferError(problems)


def _problems(world: int, store: Store, purpose: str, own: list[Fact], patience: timedelta) -> list[Problem]:
    """What differs, on rank 0."""
    keys = {f"facts/{rank}": f"rank {rank}" for rank in range(world)}
    if late := wait_for(store, keys, purpose, patience):
        return [_late(late, patience)]
    posted = [_Posted(*json.loads(text)) for text in store.multi_get(list(keys))]
    known = {fact.key for fact in own}
    unknown = {key for other in posted for key in other.facts if key not in known}
    problems: dict[str, Problem] = {}
    for fact in [*own, *(Fact(key, None) for key in sorted(unknown))]:
        group = fact.group or fact.key
        if group not in problems and (problem := _difference(fact, posted)):
            problems[group] = problem
    found = list(problems.values())
    more = [Problem("", f"{len(found) - _PROBLEMS} more differences")] if len(found) > _PROBLEMS else []
    return found[:_PROBLEMS] + more


def _difference(fact: Fact, posted: list[_Posted]) -> Problem | None:
    """The first difference in a fact: over all ranks, or within a host."""
    hosts: dict[int, list[int]] = defaultdict(list)
    for rank, other in enumerate(posted):
        hosts[other.builder if fact.is_per_host else 0].append(rank)
    for ranks in hosts.values():
        values: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            values[json.dumps(posted[rank].facts.get(fact.key), sort_keys=True)].append(rank)
        if len(values) > 1:
            by_size = sorted(values.items(), key=lambda item: (len(item[1]), -item[1][0]))
            told = [f"{_ranks(own, posted)}: {_shown(json.loads(value))}" for value, own in by_size]
            return Problem(fact.key, f"ranks differ ({'; '.join(told)})", fact.remedy)
    return None


def _ranks(ranks: list[int], posted: list[_Posted]) -> str:
    by_host: dict[str, list[str]] = defaultdict(list)
    for rank in ranks:
        by_host[posted[rank].host].append(str(rank))
    return named([f"rank{'s' * (len(own) > 1)} {named(own)} on {host}" for host, own in by_host.items()])


def _shown(value: Any) -> str:
    """A value as text; of a long one the beginning, the end, and a hash."""
    text = value if isinstance(value, str) else "not set" if value is None else json.dumps(value)
    if len(text) <= _SHOWN:
        return text
    digest = xxhash.xxh3_64(text.encode()).hexdigest()[:8]
    return f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]} (hash {digest})"


def _late(late: list[str], patience: timedelta) -> Problem:
    seconds = patience.total_seconds()
    return Problem("", f"{named(late)} did not arrive within {seconds:g} s", "Look at what its process says")


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flattened(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
