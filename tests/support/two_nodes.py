"""Two nodes on one machine: two network namespaces with an address each, joined by a cable that can be pulled.

    with two_nodes() as (a, b):
        process = a.start("ping", "-c1", b.address)
        a.pull()       # packets vanish: nobody is told, as when a switch fails or a node loses power
        a.plug()

Everything happens inside a user namespace of its own, so no privilege is needed where the kernel allows those, and
nothing outside of it changes. What is started there sees the usual file system.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# node a is the outer namespace, node b one inside it; each says its process id, which names its namespace
_HOLDERS = """
ip link set lo up
unshare --net sleep infinity &
b=$!
until [ "$(readlink /proc/$b/ns/net)" != "$(readlink /proc/$$/ns/net)" ]; do sleep 0.02; done
ip link add eth_a type veth peer name eth_b
ip link set eth_b netns $b
ip addr add 10.123.0.1/24 dev eth_a
ip link set eth_a up
nsenter --net --target $b sh -c 'ip link set lo up; ip addr add 10.123.0.2/24 dev eth_b; ip link set eth_b up'
echo $$ $b
exec sleep infinity
"""


@dataclass(slots=True)
class Node:
    """One of the two: its network, and the processes started in it."""

    address: str
    interface: str
    holder: int  # a process that lives in its namespace
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, *argv: object, output: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Starts a command in this node, in a session of its own; ``output`` is appended to."""
        with output.open("ab") as file:
            process = subprocess.Popen(
                [*self._enter(), *map(str, argv)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "GLOO_SOCKET_IFNAME": self.interface, **environment},
            )
        self.processes.append(process)
        return process

    def pull(self) -> None:
        """Takes this node's end of the cable out."""
        self._run("ip", "link", "set", self.interface, "down")

    def plug(self) -> None:
        """Puts it back."""
        self._run("ip", "link", "set", self.interface, "up")

    def kill(self) -> None:
        """The power goes: SIGKILL to everything that runs here."""
        for process in self.processes:
            _kill_session(process.pid)
            process.wait(timeout=30)
        self.processes.clear()

    def _enter(self) -> list[str]:
        return ["nsenter", "--preserve-credentials", "--user", "--net", f"--target={self.holder}"]

    def _run(self, *argv: str) -> None:
        subprocess.run([*self._enter(), *argv], check=True, timeout=30)


# set where a machine without namespaces is to fail the tests of them instead of skipping them
NAMESPACES_REQUIRED = os.environ.get("MEGATRON_TROPD_REQUIRE_NAMESPACES", "0") not in ("", "0")


def why_not() -> str:
    """Why this machine cannot pose as two; empty when it can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not installed (packages iproute2, util-linux)"
    tried = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--net", "ip", "link", "add", "eth_a", "type", "veth"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"the kernel forbids network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


@contextlib.contextmanager
def two_nodes() -> Iterator[tuple[Node, Node]]:
    """Two nodes that can reach each other; everything in them is gone when the block is left."""
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--net", "sh", "-euc", _HOLDERS],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    nodes: list[Node] = []
    try:
        assert holder.stdout is not None
        pids = holder.stdout.readline().split()
        assert len(pids) == 2, f"the namespaces were not made (status {holder.poll()})"
        nodes = [Node(f"10.123.0.{n + 1}", f"eth_{'ab'[n]}", int(pid)) for n, pid in enumerate(pids)]
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        with holder:  # waits, and closes its output
            pass


def _kill_session(leader: int) -> None:
    """SIGKILL to a process and all that it has started, sessions of their own (torchrun's ranks) included."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        top = psutil.Process(leader)
        for process in [*top.children(recursive=True), top]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
