"""Comparison of the configuration, code and data of all ranks through the store.

Every rank posts facts; rank 0 compares them and posts the verdict; all ranks raise the same error. Only rank 0 prints
it, and the launcher ends the other ranks together with rank 0.
"""

from __future__ import annotations

import json
import socket
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from datetime import timedelta
from typing import NamedTuple

import xxhash

from trainer.distributed import Launch, PrefixStore, Store, join_names, publish_value, receive_value, wait_for_keys
from trainer.errors import ConfigError, Problem, RanksDifferError
from trainer.json_types import Json

_COMPARE_TIMEOUT = timedelta(minutes=30)
"""Timeout of rank 0 for the facts of the other ranks, and of the other ranks for the verdict."""

_READ_TIMEOUT = timedelta(seconds=10)
_MAX_PROBLEMS = 12
_MAX_VALUE_CHARACTERS = 160
"""Longest value that is shown unabridged in a message."""


class Fact(NamedTuple):
    """A value that must be equal on all ranks."""

    key: str
    """Name in messages: a configuration key, a package, a file."""

    value: Json
    """Strings are shown without quotes."""

    remedy: str = "Start all ranks with the same configuration and command line"
    is_per_host: bool = False
    """True if it may differ between hosts."""

    group: str = ""
    """Only the first different fact of a group is reported; empty for a group of its own."""


class _RankFacts(NamedTuple):
    """Facts that a rank has posted."""

    host: str
    first_rank_of_host: int
    """Identifies the host."""

    facts: dict[str, Json]


def compare_ranks(
    launch: Launch, store: Store, purpose: str, facts: Iterable[Fact], *, timeout: timedelta = _COMPARE_TIMEOUT
) -> None:
    """Compare facts of all ranks. Collective: all ranks must call it with the same purpose.

    Args:
        launch: This process, as the launcher describes it.
        store: Store of all ranks.
        purpose: Activity before this comparison, such as "start"; used once in a run.
        facts: Facts of this rank.
        timeout: How long ranks wait for each other.

    Raises:
        RanksDifferError: on all ranks: names the key, ranks, hosts and values. Only on a process whose rank another
            process has: names that rank.
        ConfigError: a rank did not arrive within `timeout`.
    """
    if launch.world_size == 1:
        return
    local, shared = list(facts), PrefixStore(f"compare/{purpose}", store)
    if shared.add(f"processes/{launch.rank}", 1) > 1:
        reason = f"another process has rank {launch.rank} already"
        raise RanksDifferError(Problem("RANK", reason, "Start each rank once, and each run with its own MASTER_PORT"))
    posted = _RankFacts(socket.gethostname(), launch.rank - launch.local_rank, {fact.key: fact.value for fact in local})
    shared.set(f"facts/{launch.rank}", json.dumps(posted))
    if launch.rank == 0:
        problems = _compare_facts(launch.world_size, shared, purpose, local, timeout=timeout)
        verdict = json.dumps(list(map(astuple, problems)))
        read_timeout = min(timeout, _READ_TIMEOUT)
        publish_value(shared, launch.world_size, "verdict", verdict, purpose="read the verdict", timeout=read_timeout)
    else:
        received = receive_value(shared, launch.rank, "verdict", purpose="compare all ranks", timeout=timeout)
        if received is None:
            raise ConfigError(_timeout_problem(["rank 0"], timeout))
        problems = [Problem(*problem) for problem in json.loads(received)]
    if problems:
        raise RanksDifferError(problems)


def _compare_facts(
    world_size: int, store: Store, purpose: str, local: list[Fact], *, timeout: timedelta
) -> list[Problem]:
    """Find the differences, on rank 0."""
    keys = {f"facts/{rank}": f"rank {rank}" for rank in range(world_size)}
    if missing := wait_for_keys(store, keys, purpose, timeout):
        return [_timeout_problem(missing, timeout)]
    posted = [_RankFacts(*json.loads(text)) for text in store.multi_get(list(keys))]
    known = {fact.key for fact in local}
    unknown = {key for other in posted for key in other.facts if key not in known}
    problems: dict[str, Problem] = {}
    for fact in [*local, *(Fact(key, None) for key in sorted(unknown))]:
        group = fact.group or fact.key
        if group not in problems and (problem := _find_difference(fact, posted)):
            problems[group] = problem
    reported = list(problems.values())
    if len(reported) <= _MAX_PROBLEMS:
        return reported
    return [*reported[:_MAX_PROBLEMS], Problem("", f"{len(reported) - _MAX_PROBLEMS} more differences")]


def _find_difference(fact: Fact, posted: list[_RankFacts]) -> Problem | None:
    """Find the first difference in a fact, over all ranks or within a host."""
    hosts: dict[int, list[int]] = defaultdict(list)
    for rank, other in enumerate(posted):
        hosts[other.first_rank_of_host if fact.is_per_host else 0].append(rank)
    for ranks in hosts.values():
        values: dict[str, list[int]] = defaultdict(list)
        for rank in ranks:
            values[json.dumps(posted[rank].facts.get(fact.key), sort_keys=True)].append(rank)
        if len(values) > 1:
            by_size = sorted(values.items(), key=lambda item: (len(item[1]), -item[1][0]))
            descriptions = [
                f"{_describe_ranks(ranks, posted)}: {_shorten(json.loads(value))}" for value, ranks in by_size
            ]
            return Problem(fact.key, f"ranks differ ({'; '.join(descriptions)})", fact.remedy)
    return None


def _describe_ranks(ranks: list[int], posted: list[_RankFacts]) -> str:
    by_host: dict[str, list[str]] = defaultdict(list)
    for rank in ranks:
        by_host[posted[rank].host].append(str(rank))
    return join_names(
        [f"rank{'s' * (len(names) > 1)} {join_names(names)} on {host}" for host, names in by_host.items()]
    )


def _shorten(value: Json) -> str:
    """Format a value; abridge a long one to its ends and a hash."""
    text = value if isinstance(value, str) else "not set" if value is None else json.dumps(value)
    if len(text) <= _MAX_VALUE_CHARACTERS:
        return text
    digest = xxhash.xxh3_64(text.encode()).hexdigest()[:8]
    return f"{text[: _MAX_VALUE_CHARACTERS // 2]}...{text[-_MAX_VALUE_CHARACTERS // 2 :]} (hash {digest})"


def _timeout_problem(missing: list[str], timeout: timedelta) -> Problem:
    seconds = timeout.total_seconds()
    return Problem("", f"{join_names(missing)} did not arrive within {seconds:g} s", "See the output of its process")


def flatten(tree: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """Map dotted keys to the leaves of nested objects."""
    leaves: dict[str, Json] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
