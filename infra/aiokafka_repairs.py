"""What aiokafka 0.14 does not do right on uvloop, put right; importing this module is enough, :mod:`infra.kafka` does.

- A write to a connection that has just broken raises RuntimeError on uvloop where asyncio's own loop only warns. aiokafka expects OSError:
  its background tasks die of it, and the client hangs for good. Seen in one of four restarts of a broker. Here it becomes the error that
  aiokafka handles by connecting again.
- During an outage it logs some 400 lines a second. Here each kind of line comes once in a while, with the number of those left out.
- A client whose background task has died looks like one without data. :func:`check_alive` tells them apart.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.errors import KafkaConnectionError, KafkaError

#: The same kind of line is logged again after this, s.
_REPEAT_S = 10.0
_LOGGERS = (
    "aiokafka",
    "aiokafka.conn",
    "aiokafka.consumer.fetcher",
    "aiokafka.consumer.group_coordinator",
    "aiokafka.producer.producer",
    "aiokafka.producer.sender",
)
_original_send = AIOKafkaConnection.send


def _send(self: AIOKafkaConnection, request: Any, expect_response: bool = True) -> Any:
    try:
        return _original_send(self, request, expect_response)
    except RuntimeError as error:
        self.close(reason=CloseReason.CONNECTION_BROKEN)
        raise KafkaConnectionError(f"the connection broke: {error}") from error


class Seldom(logging.Filter):
    """Lets each kind of message through once per :data:`_REPEAT_S`; a kind is the text before values are put in."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether the record is logged."""
        now = time.monotonic()
        last, left_out = self._seen.get(str(record.msg), (0.0, 0))
        if now - last < _REPEAT_S and last:
            self._seen[str(record.msg)] = (last, left_out + 1)
            return False
        self._seen[str(record.msg)] = (now, 0)
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like this in between)", None
        return True


def check_alive(client: Any) -> None:
    """Notice that a producer or consumer has died inside.

    Raises:
        KafkaError: one of its background tasks has ended; it does nothing any more.
    """
    fetcher, coordinator, sender = (getattr(client, name, None) for name in ("_fetcher", "_coordinator", "_sender"))
    tasks: list[asyncio.Task[Any] | None] = [
        getattr(getattr(client, "_client", None) or client.client, "_sync_task", None),
        getattr(fetcher, "_fetch_task", None),
        getattr(coordinator, "_coordination_task", None),
        getattr(sender, "_sender_task", None),
    ]
    for task in tasks:
        if task is not None and task.done():
            error = None if task.cancelled() else task.exception()
            raise KafkaError(f"the Kafka client has stopped working: {error or 'its task ended'}")


AIOKafkaConnection.send = _send
for _name in _LOGGERS:
    logging.getLogger(_name).addFilter(Seldom())
# What is said of a failure is said again, readably, by the error that is raised: a command line without logging shows only that.
logging.getLogger("aiokafka").addHandler(logging.NullHandler())
