"""One address per sandbox: a bridge on the node and a veth pair into each sandbox.

In: the subnet setting and the pid of a sandbox's PID 1. Out: :class:`Link` with an address that the node reaches and that other
sandboxes do not (bridge ports are isolated). Used by :mod:`agent.sandbox.local`. Netlink requests block (a deletion for 20 ms), so
they run in one thread of their own, which also keeps them in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pyroute2
from pyroute2.netlink.exceptions import NetlinkError

from agent.errors import SandboxError

logger = logging.getLogger(__name__)


class Link(msgspec.Struct, frozen=True):
    """A sandbox's network: ``eth0`` inside, ``name`` on the node."""

    name: str
    address: str
    netmask: str
    index: int


class Network:
    """The bridge and the addresses of one agent."""

    def __init__(self, bridge: str, subnet: str) -> None:
        try:
            self._net = ipaddress.IPv4Network(subnet)
        except ValueError as error:
            raise SandboxError(f"setting agent.subnet: {error}") from error
        if self._net.num_addresses < 8:
            raise SandboxError(f"setting agent.subnet: {subnet} is too small; use a /24 or larger")
        self._bridge = bridge
        self._prefix = f"{bridge[:6]}v"
        self._gateway = self._net.network_address + 1
        # Oldest-released first: an address is not used again before all others were, so a late packet finds nobody.
        count = min(self._net.num_addresses - 3, 16384)
        self._free: deque[str] = deque(str(self._net.network_address + 2 + offset) for offset in range(count))
        self._serial = 0
        self._adopted: set[str] = set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink")
        self._netlink: Any = None
        self._index = 0

    async def open(self) -> None:
        """Make the bridge."""
        await self._run(self._make_bridge)

    def adopt(self, link: Link) -> None:
        """Take over the link of a sandbox that an agent which is gone has made; before the first :meth:`attach`."""
        self._adopted.add(link.name)
        with contextlib.suppress(ValueError):
            self._free.remove(link.address)

    async def sweep(self) -> None:
        """Remove what an agent that is gone left on the bridge and nobody took over."""
        await self._run(self._sweep)

    async def attach(self, pid: int) -> Link:
        """Give the network namespace of ``pid`` an ``eth0`` and an address of its own (still to be set inside).

        Raises:
            SandboxError: no address is free, or the kernel refused.
        """
        link: Link = await self._run(self._attach, pid)
        return link

    async def detach(self, link: Link) -> None:
        """Remove the pair (if its namespace did not take it along) and free the address."""
        await self._run(self._detach, link)

    async def close(self) -> None:
        """Remove the bridge."""
        await self._run(self._close)
        self._thread.shutdown()

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def _make_bridge(self) -> None:
        self._netlink = pyroute2.IPRoute()
        try:
            found = self._netlink.link_lookup(ifname=self._bridge)
            self._check_subnet(int(found[0]) if found else 0)
            if not found:
                self._netlink.link("add", ifname=self._bridge, kind="bridge")
                found = self._netlink.link_lookup(ifname=self._bridge)
            self._index = index = int(found[0])
            try:
                self._netlink.addr("add", index=index, address=str(self._gateway), prefixlen=self._net.prefixlen)
            except NetlinkError as error:
                if error.code != errno.EEXIST:
                    raise
            # An address of its own: else the bridge takes the lowest of its ports', which changes as instances come and go, and answers
            # to the old one are lost until the sandbox asks again (seen: 1.4 and 3 s).
            self._netlink.link("set", index=index, state="up", address=_hardware(str(self._gateway)))
        except (NetlinkError, OSError) as error:
            raise SandboxError(f"cannot set up the bridge {self._bridge} with {self._net}: {error}", stage="network") from error

    def _sweep(self) -> None:
        for link in self._netlink.get_links(master=self._index):
            name = str(link.get_attr("IFLA_IFNAME"))
            if name.startswith(self._prefix) and name not in self._adopted:
                try:
                    self._netlink.link("del", index=link["index"])
                except NetlinkError as error:
                    logger.warning("veth %s was not removed: %s", name, error)

    def _check_subnet(self, index: int) -> None:
        """Two bridges with one subnet: the node would send half of its requests to the wrong one."""
        for address in self._netlink.get_addr(family=socket.AF_INET):
            other = ipaddress.ip_interface(f"{address.get_attr('IFA_ADDRESS')}/{address['prefixlen']}").network
            if address["index"] != index and other.overlaps(self._net) and other.prefixlen < 32:
                name = address.get_attr("IFA_LABEL") or f"link {address['index']}"
                raise SandboxError(f"the addresses {self._net} are in use on {name} ({other}); set agent.subnet", stage="network")

    def _attach(self, pid: int) -> Link:
        if not self._free:
            raise SandboxError(f"every address of {self._net} is in use; use a larger agent.subnet", stage="network")
        address = self._free.popleft()
        self._serial += 1
        while (name := f"{self._prefix}{self._serial:x}") in self._adopted:
            self._serial += 1
        peer = {"ifname": "eth0", "net_ns_pid": pid, "address": _hardware(address)}
        try:
            self._netlink.link("add", ifname=name, kind="veth", master=self._index, state="up", peer=peer)
            index = int(self._netlink.link_lookup(ifname=name)[0])
            self._netlink.brport("set", index=index, isolated=1)
        except (NetlinkError, OSError, IndexError) as error:
            self._free.append(address)
            raise SandboxError(f"cannot make the veth pair {name}: {error}", stage="network") from error
        return Link(name, address, str(self._net.netmask), index)

    def _detach(self, link: Link) -> None:
        try:
            self._netlink.link("del", index=link.index)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                logger.warning("veth %s was not removed: %s", link.name, error)
        self._free.append(link.address)

    def _close(self) -> None:
        if self._netlink is None:
            return
        if self._index:
            try:
                self._netlink.link("del", index=self._index)
            except NetlinkError as error:
                logger.warning("bridge %s was not removed: %s", self._bridge, error)
        self._netlink.close()


def _hardware(address: str) -> str:
    """A locally administered hardware address that follows from ``address``, so that a neighbour entry of an earlier owner stays right."""
    return "02:54:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(address).packed)
