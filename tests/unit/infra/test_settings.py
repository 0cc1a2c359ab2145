"""Settings: file, then environment, then flags; what is wrong is named."""

import json
from pathlib import Path

import pytest

from infra.errors import SettingsError
from infra.settings import Settings, load, with_assignments


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "thaw.toml"
    file.write_text('[agent]\nnode_name = "from-file"\npool_size = 3\nlog_mb = 5\n')
    environment = {"THAW_AGENT_POOL_SIZE": "4", "THAW_AGENT_LOG_MB": "6", "THAW_PATHS_STATE_DIR": str(tmp_path)}
    settings = load(file, environment, {"agent.log_mb": 7, "agent.subnet": None})
    assert (settings.agent.node_name, settings.agent.pool_size, settings.agent.log_mb) == ("from-file", 4, 7)
    assert settings.agent.subnet == "198.18.0.0/16"


@pytest.mark.parametrize(
    ("environment", "flags", "said"),
    [
        ({"THAW_AGENT_POOL_SIZE": "many"}, {}, "agent.pool_size must be int, not 'many'"),
        ({}, {"agent.pool": 3}, "unknown setting agent.pool; known: "),
        ({}, {"agents.pool_size": 3}, "unknown settings section 'agents'"),
        ({"THAW_CONFIG": "/no/such/file"}, {}, "/no/such/file"),
    ],
)
def test_what_is_wrong_is_named(environment: dict[str, str], flags: dict[str, object], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load(None, environment, flags)


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    for text in ("agent = 3", "[agent"):
        file.write_text(text)
        with pytest.raises(SettingsError, match=r"x\.toml"):
            load(file, {})


def test_the_embedded_stack_fills_in_only_what_is_not_set(tmp_path: Path) -> None:
    found = {
        "kafka": {"bootstrap_servers": "127.0.0.1:1"},
        "s3": {"endpoint_url": "http://127.0.0.1:2", "access_key": "a", "secret_key": "s"},
    }
    (tmp_path / "stack.json").write_text(json.dumps(found))
    environment = {"THAW_PATHS_STATE_DIR": str(tmp_path)}
    settings = load(None, environment)
    assert (settings.kafka.bootstrap_servers, settings.s3.secret_key) == ("127.0.0.1:1", "s")
    settings = load(None, {**environment, "THAW_S3_ENDPOINT_URL": "http://mine", "THAW_S3_SECRET_KEY": "own"})
    assert (settings.s3.endpoint_url, settings.s3.secret_key, settings.s3.access_key) == ("http://mine", "own", "")


def test_some_settings_are_replaced_as_on_the_command_line() -> None:
    before = Settings()
    after = with_assignments(before, ["agent.pool_size=3", "kafka.bootstrap_servers=a=b:1", "agent.lease_s=2.5"])
    assert (after.agent.pool_size, after.kafka.bootstrap_servers, after.agent.lease_s) == (3, "a=b:1", 2.5)
    assert after.s3 == before.s3 and after.agent.bridge == before.agent.bridge
    for wrong in ("agent.pool_size", "agent.nothing=1", "nothing.pool_size=1", "agent=1"):
        with pytest.raises(SettingsError, match=wrong.partition("=")[0]):
            with_assignments(before, [wrong])
    with pytest.raises(SettingsError, match="must be int"):
        with_assignments(before, ["agent.pool_size=many"])
