"""``thaw stack`` and ``thaw doctor`` as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from infra import settings as settings_module
from infra.errors import StackError
from infra.settings import Settings
from thaw import stack as commands

pytestmark = pytest.mark.stack


def typed(settings: Settings, *words: str) -> Result:
    group = commands.doctor if words[0] == "doctor" else commands.stack
    return CliRunner().invoke(group, words[1:] if words[0] == "doctor" else words, obj=settings)


def test_status_of_a_running_stack(stack_settings: Settings) -> None:
    shown = typed(stack_settings, "status")
    assert shown.exit_code == 0
    assert "running" in shown.output
    assert stack_settings.kafka.bootstrap_servers in shown.output
    as_json = json.loads(typed(stack_settings, "status", "--json").output)
    assert [part["state"] for part in as_json] == ["running", "running"]


def test_status_of_a_stopped_stack_fails_and_says_how_to_start(tmp_path: Path) -> None:
    settings = settings_module.load(environment={}, flags={"paths.state_dir": tmp_path})
    shown = typed(settings, "status")
    assert shown.exit_code == 1
    assert "thaw stack up" in shown.output


def test_logs_of_one_part_and_of_an_unknown_one(stack_settings: Settings) -> None:
    shown = typed(stack_settings, "logs", "kafka", "-n", "3")
    assert shown.exit_code == 0
    assert "kafka.log <==" in shown.output
    wrong = typed(stack_settings, "logs", "redis")
    assert isinstance(wrong.exception, StackError)
    assert str(wrong.exception) == "the stack has no part 'redis'; it has kafka, s3"


def test_credentials_are_never_shown(stack_settings: Settings) -> None:
    shown = [typed(stack_settings, *words).output for words in (["status"], ["logs"], ["up"], ["status", "--json"])]
    assert not any(stack_settings.s3.secret_key in text for text in shown)


def test_errors_are_one_line_without_traceback(tmp_path: Path) -> None:
    command = ["thaw", "--state-dir", str(tmp_path), "--set", "kafka.bootstrap_servers=nonsense", "stack", "up"]
    shown = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], capture_output=True, text=True)
    assert shown.returncode == 1
    assert shown.stderr == "thaw: 'nonsense' in kafka.bootstrap_servers is not host:port\n"


def test_doctor_knows_the_running_stack(stack_settings: Settings) -> None:
    found = {check["name"]: check for check in json.loads(typed(stack_settings, "doctor", "--json").output)}
    assert found["kernel"]["ok"]
    assert "criu check passes" in found["CRIU"]["detail"]
    assert all(check["remedy"] for check in found.values() if not check["ok"])
    shown = typed(stack_settings, "doctor")
    lacking = [check for check in found.values() if check["needed"] and not check["ok"]]
    assert shown.exit_code == (1 if lacking else 0)
    assert "userfaultfd" in shown.output
