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

from trainer.distributed import Launch, PrefixStore, Store, join_names, publish_value, receive_value, wait_for_keys
from trainer.errors import ConfigError, Problem, RanksDifferError

_COMPARE_TIMEOUT = timedelta(minutes=30)
"""How long rank 0 waits for the other ranks' facts, and these for its verdict."""

_READ_TIMEOUT = timedelta(seconds=10)
_MAX_PROBLEMS = 12
_MAX_VALUE_CHARACTERS = 160
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


class _RankFacts(NamedTuple):
    """What a rank has posted."""

    host: str
    first_rank_of_host: int
    """The first rank of its host."""

    facts: dict[str, Any]


def compare_ranks(
    launch: Launch, store: Store, purpose: str, facts: Iterable[Fact], timeout: timedelta = _COMPARE_TIMEOUT
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
    if launch.world_size == 1:
        return
    own, shared = list(facts), PrefixStore(f"compare/{purpose}", store)
    if shared.add(f"processes/{launch.rank}", 1) > 1:
        raise RanksDifferError(
            Problem("RANK", f"another process is rank {launch.rank} already",
                    "Start each rank once, and each run with a port of its own (MASTER_PORT)")
        )  # fmt: skip
    posted = _RankFacts(socket.gethostname(), launch.rank - launch.local_rank, {fact.key: fact.value for fact in own})
    shared.set(f"facts/{launch.rank}", json.dumps(posted))
    if launch.rank == 0:
        problems = _compare_facts(launch.world_size, shared, purpose, own, timeout)
        verdict = json.dumps(list(map(astuple, problems)))
        publish_value(shared, launch.world_size, "verdict", verdict, "read the verdict", min(timeout, _READ_TIMEOUT))
    else:
        descriptions = receive_value(shared, launch.rank, "verdict", "compare all ranks", timeout)
        if descriptions is None:
            raise ConfigError(_timeout_problem(["rank 0"], timeout))
        problems = [Problem(*problem) for problem in json.loads(descriptions)]
    if problems:
        raise RanksDifferError(problems)


def _compare_facts(world: int, store: Store, purpose: str, own: list[Fact], timeout: timedelta) -> list[Problem]:
    """What differs, on rank 0."""
    keys = {f"facts/{rank}": f"rank {rank}" for rank in range(world)}
    if missing := wait_for_keys(store, keys, purpose, timeout):
        return [_timeout_problem(missing, timeout)]
    posted = [_RankFacts(*json.loads(text)) for text in store.multi_get(list(keys))]
    known = {fact.key for fact in own}
    unknown = {key for other in posted for key in other.facts if key not in known}
    problems: dict[str, Problem] = {}
    for fact in [*own, *(Fact(key, None) for key in sorted(unknown))]:
        group = fact.group or fact.key
        if group not in problems and (problem := _find_difference(fact, posted)):
            problems[group] = problem
    reported = list(problems.values())
    summary = (
        [Problem("", f"{len(reported) - _MAX_PROBLEMS} more differences")] if len(reported) > _MAX_PROBLEMS else []
    )
    return reported[:_MAX_PROBLEMS] + summary


def _find_difference(fact: Fact, posted: list[_RankFacts]) -> Problem | None:
    """The first difference in a fact: over all ranks, or within a host."""
    hosts: dict[int, list[int]] = defaultdict(list)
    for rank, other in enumerate(posted):
        hosts[other.first_rank_of_host if fact.is_per_host else 0].append(rank)
    for ranks in hosts.values():
        values: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            values[json.dumps(posted[rank].facts.get(fact.key), sort_keys=True)].append(rank)
        if len(values) > 1:
            by_size = sorted(values.items(), key=lambda item: (len(item[1]), -item[1][0]))
            descriptions = [f"{_describe_ranks(own, posted)}: {_shorten(json.loads(value))}" for value, own in by_size]
            return Problem(fact.key, f"ranks differ ({'; '.join(descriptions)})", fact.remedy)
    return None


def _describe_ranks(ranks: list[int], posted: list[_RankFacts]) -> str:
    by_host: dict[str, list[str]] = defaultdict(list)
    for rank in ranks:
        by_host[posted[rank].host].append(str(rank))
    return join_names([f"rank{'s' * (len(own) > 1)} {join_names(own)} on {host}" for host, own in by_host.items()])


def _shorten(value: Any) -> str:
    """A value as text; of a long one the beginning, the end, and a hash."""
    text = value if isinstance(value, str) else "not set" if value is None else json.dumps(value)
    if len(text) <= _MAX_VALUE_CHARACTERS:
        return text
    digest = xxhash.xxh3_64(text.encode()).hexdigest()[:8]
    return f"{text[: _MAX_VALUE_CHARACTERS // 2]}...{text[-_MAX_VALUE_CHARACTERS // 2 :]} (hash {digest})"


def _timeout_problem(missing: list[str], timeout: timedelta) -> Problem:
    seconds = timeout.total_seconds()
    return Problem("", f"{join_names(missing)} did not arrive within {seconds:g} s", "Look at what its process says")


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
