"""Which scaler may command which functions, by the identity in its certificate.

In: the setting ``agent.allowed``; of each command the sender's identity and the function's name. Out: nothing, or a refusal. Used by
:mod:`agent.server` before :mod:`agent.node` sees a command.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from agent.errors import NotAllowed
from infra.errors import SettingsError
from infra.settings import ALL_ALLOWED
from infra.tls import SCHEME, Identity


class Allowed:
    """The rules of one agent.

    Args:
        text: comma-separated ``IDENTITY=FUNCTION``, both with ``*`` and ``?``.

    Raises:
        SettingsError: a rule is none.
    """

    def __init__(self, text: str) -> None:
        self._rules: list[tuple[str, str]] = []
        for part in filter(None, (part.strip() for part in text.split(","))):
            identity, separator, function = part.partition("=")
            if not separator or not function or not identity.startswith(f"{SCHEME}://"):
                raise SettingsError(f"setting agent.allowed: {part!r} is not IDENTITY=FUNCTION, such as {SCHEME}://scaler/blue=blue-*")
            self._rules.append((identity, function))
        #: Whether anything is forbidden to anyone.
        self.limits = (ALL_ALLOWED.partition("=")[0], "*") not in self._rules

    def check(self, identity: Identity | None, function: str) -> None:
        """Nothing, if a command is allowed.

        Args:
            identity: the sender's; None without TLS, where there are no rules.
            function: that the command is about; empty for what does not exist here.

        Raises:
            NotAllowed: no rule lets this scaler command this function.
        """
        if not self.limits or identity is None or not function:
            return
        name = str(identity)
        if not any(fnmatchcase(name, who) and fnmatchcase(function, what) for who, what in self._rules):
            raise NotAllowed(f"{name} may not command function {function} on this node: no rule of its setting agent.allowed lets it")
