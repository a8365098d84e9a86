"""Stored and logged text has no secrets, and no control character reaches a console."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.configs import with_values
from tests.harness import run_command
from trainer.config.load import check_config
from trainer.distributed import configure_logging
from trainer.errors import ConfigError
from trainer.run_identity import refuse_identity_change
from trainer.sanitize import SafeFormatter, redact, sanitize_text

TRAIN = str(Path(__file__).parent.parent / "launch" / "train.py")


@pytest.mark.fast
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://KEY:SECRET@bucket/run", "s3://***@bucket/run"),
        ("https://TOKEN@host/x and ftp://u:p@w@h/", "https://***@host/x and ftp://***@h/"),
        ("filecache::sftp://user:pass@host:22/x", "filecache::sftp://***@host:22/x"),
        ("https://h/x?sv=1&sig=AB%2Fc&se=2", "https://h/x?sv=1&sig=***&se=2"),
        (
            "https://h/x?X-Amz-Signature=ab&X-Amz-Credential=cd&X-Amz-Date=1",
            "https://h/x?X-Amz-Signature=***&X-Amz-Credential=***&X-Amz-Date=1",
        ),
        ("abfs://h/x?account_key=ab&apikey=cd&keys=1", "abfs://h/x?account_key=***&apikey=***&keys=1"),
        ("hf://datasets/a/b@main/x", "hf://datasets/a/b@main/x"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("someone@example.org", "someone@example.org"),
    ],
)
def test_redact_removes_secrets(text: str, expected: str) -> None:
    assert redact(text) == expected
    assert redact(expected) == expected


@pytest.mark.fast
def test_control_characters_are_escaped() -> None:
    assert sanitize_text("a\x1b[2Jb\x07\x9b\r\u202e\udcff\tc\nd") == r"a\x1b[2Jb\x07\x9b\x0d\u202e\udcff" + "\tc\nd"
    record = logging.LogRecord("trainer", logging.INFO, "x", 1, "%s", ("a\n2026 ERROR forged\x1b",), None)
    assert SafeFormatter("%(message)s").format(record) == "a\n    2026 ERROR forged" + r"\x1b"


@pytest.mark.fast
def test_console_and_log_files_are_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, tmp_path)
    logging.getLogger("trainer.test").info("from %s", "s3://user:pa55w0rd@host/\x1b[2J")
    configure_logging(0)  # closes the file
    for text in (capsys.readouterr().out, (tmp_path / "rank-0.log").read_text()):
        assert r"from s3://***@host/\x1b[2J" in text
        assert "pa55w0rd" not in text


@pytest.mark.fast
def test_resumed_run_is_compared_without_secrets(tiny: dict[str, Any]) -> None:
    def loaded(secret: str) -> object:
        config = with_values(tiny, checkpoint__upload=f"memory://user:{secret}@host/run")
        return check_config(config, world_size=1, device="cpu")

    first, second = loaded("first-secret"), loaded("second-secret")
    assert "first-secret" not in json.dumps(first.resolved())
    assert first.config.checkpoint.upload == "memory://user:first-secret@host/run"
    refuse_identity_change(first.resolved(), second, "the run directory")
    with pytest.raises(ConfigError, match=r"checkpoint.upload: its secret was removed"):
        check_config(first.resolved(), world_size=1, device="cpu")


def test_run_files_do_not_contain_secret(tiny: dict[str, Any], tmp_path: Path) -> None:
    config = with_values(
        tiny,
        checkpoint__upload="memory://user:pa55w0rd@host/run?sig=s1gn",
        checkpoint__every_steps=2,
        tracking__wandb={"mode": "offline"},
        training__max_steps=2,
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"))
    assert ended.status == 0, ended.err
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert any(file.name == "manifest.json" for file in files)
    assert not [file for file in files if b"pa55w0rd" in file.read_bytes() or b"s1gn" in file.read_bytes()]
    assert "pa55w0rd" not in ended.out + ended.err
    assert "***@host" in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.fast
@pytest.mark.parametrize(
    "override",
    [
        "a",
        "=1",
        "a..b=1",
        ".a=1",
        "a.=1",
        "model=3",
        "run=null",
        "training.max_steps=" + "9" * 400,
        "run.seed=NaN",
        "training.z_loss=1e400",
        "model.config=" + "[" * 100_000,
        'run.name={"a":' * 300,
        "run.\x1b[2J=1",
        "data.train.99999999999999999999=1",
        "data.train.-1=1",
        "run.output_dir=\x00",
        "run.name=\udcff",
        "a." * 5000 + "b=1",
        "data.train.0.path=\x1b[31m",
        "deepspeed=/",
        "deepspeed=\x00",
        "model.path=\x00",
        "data.tokenizer=./\x00",
        "data.train.0.path=\x00",
        "checkpoint.upload=\x00",
        "run.output_dir=" + "a" * 5000,
    ],
    ids=lambda override: ascii(override[:24]),
)
def test_absurd_override_ends_without_traceback(override: str, tiny: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    ended = run_command(TRAIN, "--config", str(tmp_path / "config.json"), "--set", override)
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err
    assert "\x1b" not in ended.out + ended.err
