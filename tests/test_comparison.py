"""Ranks that are started differently are refused before training, by key; legal differences are accepted."""

from __future__ import annotations

import json
import shutil
import socket
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.configs import tiny_config, with_values
from tests.harness import RankOverride, captured_messages, run_command, run_ranks
from trainer.config.load import check_config
from trainer.distributed import Launch, open_store, waiting
from trainer.distributed.store import HashStore
from trainer.errors import ConfigError, RanksDifferError
from trainer.fault_tolerance import Fact, compare_ranks, start_facts

ROOT = Path(__file__).parent.parent
TRAIN = str(ROOT / "launch" / "train.py")
HOST = socket.gethostname()


@pytest.fixture
def config(corpus: Path, shared_cache: Path, tmp_path: Path) -> dict[str, Any]:
    return with_values(tiny_config(corpus, shared_cache, tmp_path / "run"), evaluation={"max_batches": 1})


def launch_ranks(tmp_path: Path, config: dict[str, Any], *, world: int = 2, **variants: RankOverride) -> Any:
    """Run the command with the ranks `r1`, ... started as their variants describe."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    ranks = {int(name[1:]): variant for name, variant in variants.items()}
    return run_command(TRAIN, "--config", str(tmp_path / "config.json"), world=world, variants=ranks)


# Refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "key", "values"),
    [
        ("deepspeed.optimizer.params.lr=0.01", "deepspeed.optimizer.params.lr", ("0.01", "0.002")),
        ("run.seed=12", "run.seed", ("12", "11")),
        ("deepspeed.gradient_clipping=1.0", "deepspeed.gradient_clipping", ("1.0", "0.5")),
        ("training.max_steps=8", "training.max_steps", ("8", "4")),  # hung
        ('deepspeed.zero_optimization={"stage":2}', "deepspeed.zero_optimization.stage", ("2", "0")),  # hung
    ],
)
def test_different_configuration_is_refused(
    setting: str, key: str, values: tuple[str, str], config: dict[str, Any], tmp_path: Path
) -> None:
    ended = launch_ranks(tmp_path, config, r1=RankOverride(("--set", setting)))
    assert ended.status == 2, ended.err
    own, other = values
    expected = (
        f"{key}: ranks differ (rank 1 on {HOST}: {own}; rank 0 on {HOST}: {other}). Start all ranks with the same"
    )
    assert expected in ended.err
    assert ended.errors[1] == "", "it is said once"
    assert not (tmp_path / "run").exists()


def test_difference_names_the_minority(config: dict[str, Any], tmp_path: Path) -> None:
    values = with_values(config, deepspeed__train_batch_size=12)
    ended = launch_ranks(
        tmp_path, values, world=3, r0=RankOverride(("--set", "run.seed=12", "--set", "training.z_loss=0.1"))
    )
    assert ended.status == 2, ended.err
    assert "error: 2 mistakes" in ended.err
    assert f"run.seed: ranks differ (rank 0 on {HOST}: 12; ranks 1, 2 on {HOST}: 11)" in ended.err
    assert "training.z_loss: ranks differ" in ended.err


def test_different_data_is_refused_before_reading(config: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """By a relative path in another working directory; the rank would wait 600 s for a builder of its files."""
    for rank in range(2):
        (tmp_path / f"at-{rank}").mkdir()
        shutil.copy(corpus / "train.jsonl", tmp_path / f"at-{rank}")
    with (tmp_path / "at-1" / "train.jsonl").open("a") as file:
        file.write('{"text": "one more document"}\n')
    values = with_values(config, data__train=[{"path": "train.jsonl"}], data__cache_dir=str(tmp_path / "cache"))
    places = {f"r{rank}": RankOverride(working_folder=tmp_path / f"at-{rank}") for rank in range(2)}
    ended = launch_ranks(tmp_path, values, **places)
    assert ended.status == 2, ended.err
    assert f"data.train.0.path: ranks differ (rank 1 on {HOST}: " in ended.err
    sizes = [(tmp_path / f"at-{rank}" / "train.jsonl").stat().st_size for rank in range(2)]
    assert all(f"at-{rank}/train.jsonl, {size} bytes" in ended.err for rank, size in enumerate(sizes))
    assert not (tmp_path / "cache").exists()


def on_hosts(**variants: RankOverride) -> dict[str, RankOverride]:
    """Put each rank on a host of its own."""
    alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return {
        name: RankOverride(variant.arguments, variant.working_folder, {**alone, **variant.environment})
        for name, variant in variants.items()
    }


def test_different_data_on_another_host_is_refused_after_preparation(
    config: dict[str, Any], corpus: Path, tmp_path: Path
) -> None:
    """Hosts have their own files and caches, so that the prepared data are compare_in_threads."""
    variants = {}
    for rank in range(2):
        place = tmp_path / f"at-{rank}"
        place.mkdir()
        text = (corpus / "train.jsonl").read_text()
        (place / "train.jsonl").write_text(text.replace("wizards", "witches", rank))
        variants[f"r{rank}"] = RankOverride(("--set", f"data.cache_dir={place}/cache"), place)
    values = with_values(config, data__train=[{"path": "train.jsonl"}], data__validation=[])
    ended = launch_ranks(tmp_path, values, **on_hosts(**variants))
    assert ended.status == 2, ended.err
    assert "data.train, token file 0: ranks differ (rank 1 on" in ended.err
    assert "Give all hosts the same data files and tokenizer" in ended.err


def test_legal_differences_between_hosts_are_accepted(config: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    """Another cache, home directory, path and time of the same files, and other variables."""
    variants = {}
    for rank in range(2):
        place = tmp_path / f"at-{rank}"
        place.mkdir()
        shutil.copyfile(corpus / "train.jsonl", place / "train.jsonl")
        variants[f"r{rank}"] = RankOverride(
            ("--set", f"data.cache_dir={place}/cache"), place, {"HOME": str(place), "HOSTNAME": f"host-{rank}"}
        )
    values = with_values(config, data__train=[{"path": "~/train.jsonl"}], data__validation=[], training__max_steps=1)
    ended = launch_ranks(tmp_path, values, **on_hosts(**variants))
    assert ended.status == 0, ended.err


# Facts ---------------------------------------------------------------------------------------------------------------


def compare_sources(config: dict[str, Any], roots: list[str]) -> str:
    """Return the error of ranks whose source code is in different directories."""
    launch = Launch.from_environment()
    facts = start_facts(
        check_config(config, world_size=launch.world_size, device="cpu"), launch, Path(roots[launch.rank])
    )
    try:
        compare_ranks(launch, open_store(launch), "start", facts)
    except RanksDifferError as error:
        return str(error)
    return ""


def test_different_source_is_refused_by_file(config: dict[str, Any], tmp_path: Path) -> None:
    roots = [tmp_path / name for name in ("first", "equal", "other")]
    for root in roots:
        for folder in ("trainer", "launch"):
            shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (roots[2] / "trainer" / "engine" / "plain.py").open("a") as file:
        file.write("# patched\n")
    (roots[2] / "trainer" / "units.py").unlink()  # after that one: only the first is named
    same, *_ = run_ranks(compare_sources, 2, config, [str(root) for root in roots[:2]])
    assert same == ""
    messages = run_ranks(compare_sources, 2, config, [str(roots[0]), str(roots[2])])
    assert messages[0] == messages[1]
    (line,) = messages[0].splitlines()
    assert line.startswith(f"trainer/engine/plain.py: ranks differ (rank 1 on {HOST}: ")
    assert line.endswith("Install the same version of the project on every host")


@pytest.mark.fast
def test_start_facts_contain_versions_and_source_but_no_secret(config: dict[str, Any], tmp_path: Path) -> None:
    secret = "s3://user:password@bucket/run"
    loaded = check_config(with_values(config, checkpoint={"upload": secret}), world_size=2, device="cpu")
    facts = {fact.key: fact for fact in start_facts(loaded, Launch(0, 2, 0, 2))}
    for key in (
        "WORLD_SIZE",
        "device",
        "version of torch",
        "version of deepspeed",
        "version of python",
        "trainer/loop.py",
        "launch/train.py",
        "model.config.hidden_size",
        "model: vocabulary_size",
        "deepspeed.optimizer.params.lr",
        "data.train",
        "data.sequence_length",
    ):
        assert key in facts, key
    assert "password" not in json.dumps([fact.value for fact in facts.values()])
    assert [key for key, fact in facts.items() if fact.is_per_host] == [
        "data.cache_dir",
        "run.output_dir (resolved)",
    ]


@pytest.mark.fast
def test_different_model_folders_are_refused_by_file(config: dict[str, Any], tmp_path: Path) -> None:
    values = []
    for number in range(2):
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**config["model"]["config"], "rms_norm_eps": 1e-6 + number}))
        loaded = check_config(
            with_values(config, model={"path": str(folder), "initialize": "random"}), world_size=2, device="cpu"
        )
        values.append({fact.key: fact.value for fact in start_facts(loaded, Launch(0, 2, 0, 2))})
    different = {key for key in values[0] if values[0][key] != values[1][key]}
    assert different == {"model.path", "model.path: config.json"}


# The exchange --------------------------------------------------------------------------------------------------------


def compare_in_threads(ranks: list[tuple[int, list[Fact]]], world: int, timeout: float = 5.0) -> list[str]:
    """Return the error of each of several processes, run as threads over one store."""
    store, messages = HashStore(), [""] * len(ranks)

    def compare(number: int, rank: int, facts: list[Fact]) -> None:
        try:
            launch = Launch(rank, world, rank % 2, 2)  # two to a host
            compare_ranks(launch, store, "start", facts, timeout=timedelta(seconds=timeout))
        except ConfigError as error:
            messages[number] = str(error)

    threads = [
        threading.Thread(target=compare, args=(n, rank, facts), daemon=True) for n, (rank, facts) in enumerate(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return messages


@pytest.mark.fast
def test_per_host_facts_are_compared_within_a_host() -> None:
    hosts = [(rank, [Fact("cache", f"/disk-{rank // 2}", is_per_host=True)]) for rank in range(4)]
    assert compare_in_threads(hosts, 4) == [""] * 4
    hosts[3] = (3, [Fact("cache", "/elsewhere", is_per_host=True)])
    messages = compare_in_threads(hosts, 4)
    assert set(messages) == {
        f"cache: ranks differ (rank 3 on {HOST}: /elsewhere; rank 2 on {HOST}: /disk-1). Start all ranks with the same "
        "configuration and command line"
    }


@pytest.mark.fast
def test_missing_fact_is_a_difference() -> None:
    messages = compare_in_threads([(0, [Fact("a", 1)]), (1, [Fact("a", 1), Fact("b", 2)])], 2)
    assert all("b: ranks differ" in message and "not set" in message for message in messages)


@pytest.mark.fast
def test_excess_differences_are_counted() -> None:
    facts = [[Fact(f"key {number:02d}", number + rank) for number in range(30)] for rank in range(2)]
    lines = compare_in_threads(list(enumerate(facts)), 2)[0].splitlines()
    assert len(lines) == 13
    assert lines[-1] == "18 more differences"


@pytest.mark.fast
def test_missing_rank_is_named_during_and_after_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "LOG_INTERVAL_SECONDS", 0.2)
    with captured_messages("trainer.distributed.waiting") as lines:
        messages = compare_in_threads([(0, []), (1, []), (3, [])], 4, timeout=0.7)
    assert messages[0] == "rank 2 did not arrive within 0.7 s. See the output of its process"
    assert set(messages[1:]) <= {messages[0], "rank 0 did not arrive within 0.7 s. See the output of its process"}
    assert any("for rank 2 to start" in line for line in lines)


@pytest.mark.fast
def test_duplicate_rank_is_refused_alone() -> None:
    """As when two runs use one port: the first run must not be disturbed."""
    facts = [Fact("a", 1)]
    messages = compare_in_threads([(0, facts), (1, facts), (1, facts)], 2)
    assert sorted(messages)[:2] == ["", ""]
    assert sorted(messages)[2].startswith("RANK: another process has rank 1 already")
