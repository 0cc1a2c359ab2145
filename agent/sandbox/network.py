"""One address per sandbox: a bridge on the node and a veth pair into each sandbox.

In: the subnet setting and the pid of a sandbox's PID 1. Out: :class:`Link` with an address that the node reaches and that other
sandboxes do not (bridge ports are isolated). Used by :mod:`agent.sandbox.local`.

No sandbox begins a connection, not even to the node (:mod:`infra.nftables`): it answers.

Nobody asks for a hardware address in use: it follows from the address, so the node, the bridge and the sandbox are told each other's, and
no frame for a sandbox is flooded to the others. Netlink requests block: making a pair takes under a millisecond, removing one 20 ms of
waiting in the kernel. So each has a thread of its own, and no start waits for an end.
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

from agent.errors import SandboxError
from infra import netlink, nftables
from infra.netlink import Netlink

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
        self._prefix = prefix(bridge)
        #: The node's address in every sandbox's network.
        self.gateway = str(self._net.network_address + 1)
        # Oldest-released first: an address is not used again before all others were, so a late packet finds nobody. Numbers, because
        # text for all of them would take 0.1 s of the agent's start.
        first = int(self._net.network_address) + 2
        self._free: deque[int] = deque(range(first, first + min(self._net.num_addresses - 3, 16384)))
        self._serial = 0
        self._adopted: dict[str, str] = {}
        self._makers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink")
        self._removers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="netlink-remove")
        self._maker: Netlink
        self._remover: Netlink
        self._connections = contextlib.ExitStack()
        self._index = 0

    async def open(self) -> None:
        """Make the bridge."""
        await self._make(self._make_bridge)

    def adopt(self, link: Link) -> None:
        """Take over the link of a sandbox that an agent which is gone has made; before the first :meth:`attach`."""
        self._adopted[link.name] = link.address
        with contextlib.suppress(ValueError):
            self._free.remove(int(ipaddress.IPv4Address(link.address)))

    async def sweep(self) -> None:
        """Remove what an agent that is gone left on the bridge and nobody took over."""
        await self._make(self._sweep)

    async def attach(self, pid: int) -> Link:
        """Give the network namespace of ``pid`` an ``eth0`` and an address of its own (still to be set inside).

        Raises:
            SandboxError: no address is free, or the kernel refused.
        """
        making = asyncio.ensure_future(self._make(self._attach, pid))
        try:
            link: Link = await asyncio.shield(making)
        except asyncio.CancelledError:
            # The thread goes on; what it makes must not be left.
            making.add_done_callback(self._detach_unwanted)
            raise
        return link

    async def detach(self, link: Link) -> None:
        """Remove the pair (if its namespace did not take it along) and free the address."""
        await asyncio.get_running_loop().run_in_executor(self._removers, self._detach, link)

    async def close(self, *, keep_bridge: bool = False) -> None:
        """Remove the bridge, unless sandboxes on it are left to another agent."""
        await asyncio.to_thread(self._removers.shutdown)
        await self._make(self._close, keep_bridge)
        self._makers.shutdown()

    async def _make(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._makers, work, *arguments)

    def _detach_unwanted(self, making: asyncio.Future[Any]) -> None:
        if not making.cancelled() and not making.exception():
            # Refused at the end of the agent: then the sandbox's end and that of the bridge remove everything.
            with contextlib.suppress(RuntimeError):
                self._removers.submit(self._detach, making.result())

    def _make_bridge(self) -> None:
        try:
            # Connections are per thread; the other is used by _detach only.
            self._maker = self._connections.enter_context(Netlink())
            self._remover = self._connections.enter_context(Netlink())
            found = next((link for link in self._maker.links() if link.name == self._bridge), None)
            if found and found.kind != "bridge":
                raise SandboxError(f"the link {self._bridge} is no bridge; set agent.bridge to another name", stage="network")
            self._check_subnet(found.index if found else 0)
            # An address of its own: else the bridge takes the lowest of its ports', which changes as instances come and go, and answers
            # to the old one are lost until the sandbox asks again (seen: 1.4 and 3 s).
            self._maker.request(netlink.bridge(self._bridge, hardware_address(self.gateway)))
            self._index = socket.if_nametoindex(self._bridge)
            self._maker.request(netlink.link_address(self._index, self.gateway, self._net.prefixlen))
            self._close_ports()
        except OSError as error:
            raise SandboxError(
                f"cannot set up the bridge {self._bridge} with {self._net}: {error}; the agent must be root, and agent.bridge a free name",
                stage="network",
            ) from error

    def _close_ports(self) -> None:
        try:
            nftables.close(self._bridge)
        except OSError as error:
            logger.warning(
                "functions can reach what listens on all addresses of this node: %s; load nf_tables, or have services listen elsewhere",
                error,
            )

    def _sweep(self) -> None:
        wanted = set(self._adopted.values())
        leftovers = [
            netlink.no_link(link.index)
            for link in self._maker.links()
            if link.master == self._index and link.name.startswith(self._prefix) and link.name not in self._adopted
        ]
        leftovers += [
            netlink.no_neighbour(self._index, address) for address in self._maker.permanent_neighbours(self._index) if address not in wanted
        ]
        # Giving the bridge its hardware address again has made the kernel forget who is behind it.
        kept = [netlink.permanent_neighbour(self._index, address, hardware_address(address)) for address in wanted]
        for request in [*leftovers, *kept]:
            try:
                self._maker.request(request)
            except OSError as error:
                logger.warning("bridge %s: cannot %s", self._bridge, error)

    def _check_subnet(self, index: int) -> None:
        """Two bridges with one subnet: the node would send half of its requests to the wrong one."""
        for found in self._maker.addresses():
            other = ipaddress.ip_interface(f"{found.address}/{found.prefix_length}").network
            if found.index != index and other.overlaps(self._net) and other.prefixlen < 32:
                name = found.label or f"link {found.index}"
                raise SandboxError(f"the addresses {self._net} are in use on {name} ({other}); set agent.subnet", stage="network")

    def _attach(self, pid: int) -> Link:
        if not self._free:
            raise SandboxError(f"every address of {self._net} is in use; use a larger agent.subnet", stage="network")
        number = self._free.popleft()
        address = str(ipaddress.IPv4Address(number))
        hardware = hardware_address(address)
        self._serial += 1
        while (name := f"{self._prefix}{self._serial:x}") in self._adopted:
            self._serial += 1
        index = 0
        try:
            self._maker.request(netlink.veth(name, self._index, "eth0", hardware, pid))
            index = socket.if_nametoindex(name)
            self._maker.request(
                netlink.closed_port(index),
                netlink.port_neighbour(index, hardware),
                netlink.permanent_neighbour(self._index, address, hardware),
            )
        except OSError as error:
            self._removers.submit(self._detach, Link(name, address, str(self._net.netmask), index))
            raise SandboxError(f"cannot give process {pid} a network: {error}", stage="network") from error
        return Link(name, address, str(self._net.netmask), index)

    def _detach(self, link: Link) -> None:
        """Runs in the removers' thread. Index 0 stands for a link that was not made."""
        requests = [netlink.no_neighbour(self._index, link.address), *([netlink.no_link(link.index)] if link.index else [])]
        for request in requests:
            try:
                self._remover.request(request)
            except OSError as error:
                # The namespace has taken the pair along, or the neighbour was not made.
                if error.errno not in (errno.ENODEV, errno.ENOENT):
                    logger.warning("veth %s was not removed: cannot %s", link.name, error)
        self._free.append(int(ipaddress.IPv4Address(link.address)))

    def _close(self, keep_bridge: bool) -> None:
        if self._index and not keep_bridge:
            try:
                self._maker.request(netlink.no_link(self._index))  # takes its neighbours along
            except OSError as error:
                logger.warning("bridge %s was not removed: cannot %s", self._bridge, error)
            with contextlib.suppress(OSError):  # there are none where the kernel has no nf_tables
                nftables.forget(self._bridge)
        self._connections.close()


def prefix(bridge: str) -> str:
    """How the names of the pairs on a bridge begin."""
    return f"{bridge[:6]}v"


def hardware_address(address: str) -> str:
    """The locally administered hardware address of whoever has the IPv4 address ``address``."""
    return "02:54:" + ":".join(f"{byte:02x}" for byte in ipaddress.IPv4Address(address).packed)
