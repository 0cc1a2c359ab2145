from __future__ import annotations

import pytest
from click.testing import CliRunner

from infra.errors import KafkaUnavailable
from infra.settings import load
from thaw.simulate import simulate


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "either --trace or --from-topic"),
        (["--trace", ".", "--from-topic"], "either --trace or --from-topic"),
        (["--from-topic", "--subset", "100"], "--subset does not go with --from-topic"),
        (["--trace", ".", "--since-hours", "2"], "--since-hours goes with --from-topic only"),
        (["--from-topic", "--resolution", "minute"], "--from-topic does not go with --resolution minute"),
        (["--from-topic", "--since-hours", "0"], "--since-hours"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], says: str) -> None:
    result = CliRunner().invoke(simulate, arguments)
    assert result.exit_code == 2
    assert says in result.stderr


@pytest.mark.parametrize(("address", "says"), [("", "no Kafka broker is known"), ("127.0.0.1:1", "127.0.0.1:1")])
def test_without_a_broker_the_error_says_so(address: str, says: str) -> None:
    settings = load(environment={}, flags={"kafka.bootstrap_servers": address, "kafka.request_timeout_ms": 1000})
    result = CliRunner().invoke(simulate, ["--from-topic"], obj=settings)
    assert isinstance(result.exception, KafkaUnavailable)
    assert says in str(result.exception)
