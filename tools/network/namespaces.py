"""Network namespaces for `shaped_links.py`: one for each site, joined in one more, with limits and latency.

As a program it is what joins them while there is latency: `python namespaces.py MS PORT...` carries frames from
port to port, each so many milliseconds after it came. (The kernel's own `netem` is often not there.)
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import os
import re
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

PREFIX = f"fomoe{os.getpid()}-"  # of the tool's process, so that two of them do not meet
HUB, INTERFACE = f"{PREFIX}hub", "eth0"
NO_LIMIT = 100_000  # Mbit/s: the same queue as for a limit, so that its costs are the same
SIOCETHTOOL, CHECKSUMS_OFF = 0x8946, (0x17, 0x1F)  # of sent packets, and segmentation


def namespace(site: int) -> str:
    """Name of a site's namespace."""
    return f"{PREFIX}{site}"


def call(*words: str) -> str:
    """Run a command; its errors end the tool."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def build_commands(n_sites: int, mtu: int) -> list[list[str]]:
    """Commands that make the namespaces, the bridge and the links."""
    bridge = f"ip -n {HUB} link"
    lines = [f"ip netns add {HUB}", f"{bridge} add br0 type bridge", f"{bridge} set br0 up"]
    for site in range(n_sites):
        ns = namespace(site)
        lines += [
            f"ip netns add {ns}",
            f"ip -n {ns} link set lo up",
            f"ip -n {ns} link add {INTERFACE} type veth peer name port{site} netns {HUB}",
            # Frames as a real network has them: else counters and limits would see 64 KiB at once with one header.
            f"ip -n {ns} link set {INTERFACE} gso_max_segs 1 mtu {mtu}",
            f"ip -n {ns} addr add 10.77.0.{site + 1}/24 dev {INTERFACE}",
            f"ip -n {ns} link set {INTERFACE} up",
            f"{bridge} set port{site} mtu {mtu} master br0",
            f"{bridge} set port{site} up",
        ]
    return [line.split() for line in lines]


def limit_commands(n_sites: int, rate_mbit: float) -> list[list[str]]:
    """Commands that limit every link in both directions."""
    # A bucket of 2 ms at the rate, and no less than two jumbo frames; a queue of 50 ms.
    burst = max(int(rate_mbit * 1e6 / 8 * 0.002), 20_000)
    limit = f"root tbf rate {rate_mbit}mbit burst {burst} latency 50ms"
    places = [(namespace(site), INTERFACE) for site in range(n_sites)]
    places += [(HUB, f"port{site}") for site in range(n_sites)]
    return [f"tc -n {ns} qdisc replace dev {device} {limit}".split() for ns, device in places]


@contextmanager
def network(n_sites: int, mtu: int) -> Iterator[None]:
    """Namespaces for as long as the context lasts."""
    remove()
    try:
        for command in build_commands(n_sites, mtu):
            call(*command)
        yield
    finally:
        remove()


def remove() -> None:
    """Remove what this process has made, and what one that was killed has left."""
    for line in call("ip", "netns", "list").splitlines():
        name = line.split()[0]
        made = re.fullmatch(r"fomoe(\d+)-(hub|\d+)", name)
        if made and (name.startswith(PREFIX) or not Path("/proc", made[1]).exists()):
            call("ip", "netns", "del", name)


@contextmanager
def latency(n_sites: int, milliseconds: float) -> Iterator[None]:
    """Frames take so long from link to link: a program carries them in the bridge's place."""
    ports = [f"port{site}" for site in range(n_sites)]
    for port in ports:
        call("ip", "-n", HUB, "link", "set", port, "nomaster")
    command = ["ip", "netns", "exec", HUB, sys.executable, __file__, str(milliseconds), *ports]
    carrier = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert carrier.stdout is not None
        if not carrier.stdout.readline():
            raise RuntimeError("frames cannot be carried; the message is above")
        yield
    finally:
        carrier.terminate()
        carrier.wait()
        for port in ports:
            call("ip", "-n", HUB, "link", "set", port, "master", "br0")


def finish_checksums(interface: str) -> None:
    """Have packets leave with their checksums, which virtual links leave out and a program would carry on so."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for setting in CHECKSUMS_OFF:
            value = ctypes.create_string_buffer(struct.pack("II", setting, 0))
            fcntl.ioctl(any_socket, SIOCETHTOOL, struct.pack("16sP", interface.encode(), ctypes.addressof(value)))


def carry(seconds: float, ports: list[str]) -> None:
    """Carry frames between ports, each some seconds after it came, until this process is ended."""
    sockets = []
    for port in ports:
        own = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # frames of every protocol
        own.bind((port, 0))
        own.setblocking(False)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 26)
        sockets.append(own)
    poll = select.epoll()
    index = {own.fileno(): i for i, own in enumerate(sockets)}
    for own in sockets:
        poll.register(own.fileno(), select.EPOLLIN)
    port_of: dict[bytes, int] = {}  # by the sender's address
    waiting: list[tuple[float, int, int, bytes]] = []
    order = count()
    print("ready", flush=True)
    while True:
        for number, _ in poll.poll(max(0.0, waiting[0][0] - time.monotonic()) if waiting else None):
            i = index[number]
            for _ in range(64):
                try:
                    frame, sender = sockets[i].recvfrom(1 << 16)
                except BlockingIOError:
                    break
                if sender[2] != socket.PACKET_OUTGOING:
                    port_of[frame[6:12]] = i
                    heapq.heappush(waiting, (time.monotonic() + seconds, next(order), i, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, i, frame = heapq.heappop(waiting)
            to = port_of.get(frame[:6])
            for j in [to] if to is not None else [j for j in range(len(sockets)) if j != i]:
                try:
                    sockets[j].send(frame)
                except (BlockingIOError, OSError):
                    continue  # a full queue loses frames, as a real one does


if __name__ == "__main__":
    carry(float(sys.argv[1]) / 1e3, sys.argv[2:])
