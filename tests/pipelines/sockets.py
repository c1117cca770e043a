"""Sockets that a process and its descendants listen on, and attempts to reach them from outside. Linux only."""

import contextlib
import dataclasses
import ipaddress
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Listener:
    """A listening socket."""

    process: str
    """Start of the command line of its process."""
    address: str
    port: int

    @property
    def is_loopback(self) -> bool:
        address = ipaddress.ip_address(self.address)
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@contextlib.contextmanager
def watched(pid: int) -> Iterator[dict[Listener, bool]]:
    """Collect the sockets that a process and its descendants open in the block; True if another address reached it."""
    found: dict[Listener, bool] = {}
    ended = threading.Event()
    outside = own_address()

    def watch() -> None:
        while not ended.wait(SECONDS):
            for listener in listeners(pid) - found.keys():
                found[listener] = outside is not None and accepts(outside, listener.port)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def own_address() -> str | None:
    """Address of this machine for others; None if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing
        address = str(probe.getsockname()[0])
        return None if ipaddress.ip_address(address).is_loopback else address
    return None


def accepts(address: str, port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((address, port), timeout=2):
        return True
    return False


def listeners(pid: int) -> set[Listener]:
    """Sockets that a process and its descendants listen on."""
    opened = _listening()
    found = set()
    for each in _family(pid):
        with contextlib.suppress(OSError):  # it has ended
            command = Path(f"/proc/{each}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            for descriptor in os.listdir(f"/proc/{each}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{each}/fd/{descriptor}")
                    if target in opened:
                        found.add(Listener(command[:200].strip(), *opened[target]))
    return found


def _listening() -> dict[str, tuple[str, int]]:
    """Name of each listening socket of this machine -> its address and port."""
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                digits, port = fields[1].split(":")
                words = [bytes.fromhex(digits[i : i + 8])[::-1] for i in range(0, len(digits), 8)]
                found[f"socket:[{fields[9]}]"] = (str(ipaddress.ip_address(b"".join(words))), int(port, 16))
    return found


def _family(pid: int) -> set[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
    found, new = set(), [pid]
    while new:
        each = new.pop()
        found.add(each)
        new += children.get(each, [])
    return found
