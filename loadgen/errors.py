"""Exceptions of the loadgen package.

LoadError
├── TraceInvalid         a trace file or arrival description cannot be read; names file and line
├── SampleUnavailable    a sample function cannot be prepared on this machine
├── TargetUnknown        load is asked for a function that nobody has applied
├── LoadImpossible       a broker or agent cannot be reached, so that no request could be answered
└── AttemptFailed        one try of one request failed; the driver tries again until the request's deadline
"""

from __future__ import annotations


class LoadError(Exception):
    """Anything the load generator cannot do. The message says what to do about it."""


class TraceInvalid(LoadError):
    """A trace or a description of arrivals cannot be read."""


class SampleUnavailable(LoadError):
    """A sample function needs something that this machine does not have."""


class TargetUnknown(LoadError):
    """The function that load is asked for does not exist."""


class LoadImpossible(LoadError):
    """The broker or an agent cannot be reached."""


class AttemptFailed(LoadError):
    """One try of one request failed."""
