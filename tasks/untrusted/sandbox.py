"""Disposable child processes that handle untrusted bytes, so that bad bytes can harm a child but never a worker.

A child runs one function `bytes -> bytes` for request after request, with bounded memory and time, without write access to
files, without network and without the worker's environment. Requests and replies are frames, a length and then that many
bytes; replies are never unpickled. A child that dies, hangs or exceeds its memory fails one request and is replaced.

Native code is confined by the kernel (`tasks.untrusted.confinement`), Python code also by an audit hook.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib
import json
import logging
import math
import os
import queue
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tasks.untrusted import confinement
from unclip.errors import StageError

log = logging.getLogger(__name__)

_LENGTH = struct.Struct(">Q")
_OUT_OF_MEMORY = 77  # exit status
_START_SECONDS = 180.0  # limit until a child is ready, which takes a third of a second on an idle machine
_BOOT = "; ".join(
    (
        "import json, sys",
        "path, *rest = json.loads(sys.argv[1])",
        "sys.path[:] = path",
        "from tasks.untrusted import sandbox",
        "sandbox.serve(*rest)",
    )
)
_REFUSED = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "os.remove",
            "os.rename", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.", "ctypes.")  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    wall_seconds: float = 10.0
    """Time from the request to the complete reply; then the child is killed."""
    memory_bytes: int = 1 << 30
    """Address space beyond that of a ready child."""
    reply_bytes: int = 1 << 28
    """Longest reply."""
    open_files: int = 0
    """Files that a child may have open for reading besides its pipes. None can be opened for writing."""


DEFAULT_LIMITS = Limits()

_PIPE_BYTES = 1 << 20  # large enough for an image in one piece


class SandboxFault(Exception):
    """A request that killed its child; the next request gets a new one."""

    def __init__(self, kind: Literal["crash", "timeout", "memory"]) -> None:
        super().__init__(kind)
        self.kind = kind


class Sandbox:
    """A thread-safe pool of children that run one function. Close it, or use it in a `with` statement."""

    def __init__(
        self, function: Callable[[bytes], bytes], num_children: int = 1, limits: Limits = DEFAULT_LIMITS
    ) -> None:
        """Start the children and wait until they are ready.

        Args:
            function: a function of an importable module. The module must import all that it needs at the top; its function
                `warm_up`, if any, is called before the limits apply.

        Raises:
            StageError: a child does not start.
        """
        self._children = [_Child(function, limits) for _ in range(num_children)]
        self._idle: queue.SimpleQueue[_Child] = queue.SimpleQueue()
        try:
            for child in self._children:
                child.wait_until_ready()
                self._idle.put(child)
        except BaseException:
            self.close()
            raise

    def call(self, request: bytes) -> bytes:
        """Return the function's reply, from the first free child.

        Raises:
            SandboxFault: the function raised or the child died ("crash"), took too long ("timeout") or ran out of memory
                ("memory").
            StageError: a replacement child does not start.
        """
        child = self._idle.get()
        try:
            return child.call(request)
        finally:
            self._idle.put(child)

    @property
    def pids(self) -> list[int]:
        """Process ids of the live children."""
        return [child.process.pid for child in self._children if child.process.poll() is None]

    def close(self) -> None:
        for child in self._children:
            child.stop()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Child:
    """One child process and its replacements."""

    process: subprocess.Popen[bytes]

    def __init__(self, function: Callable[[bytes], bytes], limits: Limits) -> None:
        self.function, self.limits = function, limits
        self._start()

    def call(self, request: bytes) -> bytes:
        if not self.is_ready:
            self.wait_until_ready()
        deadline = time.monotonic() + self.limits.wall_seconds
        try:
            self._send(request, deadline)
            return self._receive(deadline)
        except (TimeoutError, EOFError, BrokenPipeError) as error:
            kind: Any = "timeout" if isinstance(error, TimeoutError) else self._cause_of_death()
        except BaseException:
            self._replace()  # a late reply must not be taken for the reply to the next request
            raise
        self._replace()
        raise SandboxFault(kind)

    def wait_until_ready(self) -> None:
        try:
            problem, weakness = json.loads(self._receive(time.monotonic() + _START_SECONDS))
        except (TimeoutError, EOFError) as error:
            problem, weakness = f"{type(error).__name__}, exit status {self.process.poll()}", ""
        if problem:
            self.stop()
            name = f"{self.function.__module__}.{self.function.__qualname__}"
            raise StageError(f"sandbox: the child process for {name} did not start: {problem}. Check the installation.")
        if weakness:
            _warn(weakness)
        self.is_ready = True

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # also its own children
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = [root, *(os.path.abspath(entry) for entry in sys.path if os.path.abspath(entry) != root)]
        confinement.hide()
        job = [path, self.function.__module__, self.function.__qualname__, self.limits.memory_bytes]
        job += [math.ceil(self.limits.wall_seconds) + 1, self.limits.open_files]
        # One thread and one arena, since more would count as memory. The environment may hold secrets, so it is not passed on.
        environment = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        # Keep freed memory for the next call: returning it and faulting it in again takes a third of the decoding time.
        environment |= {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
        environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        self.is_ready = False
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", _BOOT, json.dumps(job)],
            bufsize=0,
            pipesize=_PIPE_BYTES,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout
        self._requests, self._replies = self.process.stdin.fileno(), self.process.stdout.fileno()
        for pipe in (self._requests, self._replies):
            os.set_blocking(pipe, False)

    def _replace(self) -> None:
        self.stop()
        self._start()

    def _cause_of_death(self) -> str:
        try:
            status = self.process.wait(timeout=1.0)  # the pipe breaks a moment before the exit
        except subprocess.TimeoutExpired:
            return "crash"
        if status in (_OUT_OF_MEMORY, -signal.SIGKILL):  # only the kernel kills a child that we wait for
            return "memory"
        return "timeout" if status == -signal.SIGXCPU else "crash"

    def _send(self, request: bytes, deadline: float) -> None:
        left = _framed(request)
        while left:
            try:
                left = _without_first(left, os.writev(self._requests, left))
            except BlockingIOError:
                _wait_for(self._requests, select.POLLOUT, deadline)

    def _receive(self, deadline: float) -> bytes:
        _wait_for(self._replies, select.POLLIN, deadline)  # a reply is never there at once
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if length > self.limits.reply_bytes:
            raise EOFError
        return self._read(length, deadline)

    def _read(self, length: int, deadline: float) -> bytes:
        data: bytes | bytearray = b""
        while len(data) < length:
            try:
                piece = os.read(self._replies, min(length - len(data), _PIPE_BYTES))
            except BlockingIOError:
                _wait_for(self._replies, select.POLLIN, deadline)
                continue
            if not piece:
                raise EOFError
            data = _joined(data, piece)
        return bytes(data)  # not a copy if it is one piece


def _wait_for(pipe: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(pipe, event)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise TimeoutError


@functools.cache
def _warn(weakness: str) -> None:
    """Log a warning, once in a process."""
    log.warning(
        "Child processes that handle untrusted bytes are confined by limits and an audit hook only: %s.", weakness
    )


def serve(module: str, name: str, memory_bytes: int, cpu_seconds: int, open_files: int) -> None:
    """Run in a child: answer requests until the pipe closes. Only `Sandbox` calls it."""
    requests, replies = os.dup(0), os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):  # prints of a library must not end up in a reply
        os.dup2(nowhere, standard)
    os.close(nowhere)
    try:
        imported = importlib.import_module(module)
        function = getattr(imported, name)
        getattr(imported, "warm_up", lambda: None)()
        weakness = _confine(memory_bytes, open_files)
        gc.freeze()  # excludes imported objects from garbage collection
    except BaseException as error:
        _write(replies, json.dumps([f"{type(error).__name__}: {error}", ""]).encode())
        raise
    _write(replies, json.dumps(["", weakness]).encode())
    try:
        while (request := _read_request(requests)) is not None:
            _allow_cpu(cpu_seconds)
            _write(replies, function(request))
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)


def _confine(memory_bytes: int, open_files: int) -> str:
    """Drop, irrevocably, all rights that decoding does not need; return what the kernel does not offer, or an empty text."""
    os.environ.clear()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    usage = Path("/proc/self/statm")
    if usage.exists():  # only on Linux can address space be read and limited
        limit = int(usage.read_text().split()[0]) * resource.getpagesize() + memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    descriptors = _next_descriptor() + open_files if open_files else 0  # open ones stay usable
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    weakness = confinement.confine(reads_files=open_files > 0)
    sys.addaudithook(_refuse)
    return weakness


def _next_descriptor() -> int:
    """Lowest descriptor above which none can be open, as descriptors are given out from below."""
    free = os.dup(0)
    os.close(free)
    return free


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open":
        _, mode, flags = arguments
        writes = bool(flags & _WRITING) if mode is None else bool(set(mode) & set("wax+"))
    else:
        writes = event.startswith(_REFUSED)
    if writes:
        raise PermissionError(f"{event} is not allowed in a child that handles untrusted bytes")


def _allow_cpu(seconds: int) -> None:
    """Let the kernel end a child that keeps computing after its worker has died."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time()) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _read_request(pipe: int) -> bytes | None:
    """Return the next request; None if the worker has closed the pipe."""
    head = _read_exactly(pipe, _LENGTH.size)
    return None if head is None else _read_exactly(pipe, *_LENGTH.unpack(head))


def _read_exactly(pipe: int, length: int) -> bytes | None:
    data: bytes | bytearray = b""
    while len(data) < length:
        piece = os.read(pipe, min(length - len(data), _PIPE_BYTES))
        if not piece:
            return None
        data = _joined(data, piece)
    return bytes(data)  # not a copy if it is one piece


def _joined(data: bytes | bytearray, piece: bytes) -> bytes | bytearray:
    """Append a piece; the first one is not copied, as most frames arrive in one."""
    if not data:
        return piece
    grown = data if isinstance(data, bytearray) else bytearray(data)
    grown += piece
    return grown


def _write(pipe: int, payload: bytes) -> None:
    left = _framed(payload)
    while left:
        left = _without_first(left, os.writev(pipe, left))


def _framed(payload: bytes) -> list[memoryview]:
    """A frame in pieces, for one system call: the length by itself would wake its reader for nothing."""
    return [memoryview(_LENGTH.pack(len(payload))), memoryview(payload)]


def _without_first(pieces: list[memoryview], count: int) -> list[memoryview]:
    """Return what is left of some pieces after their first `count` bytes."""
    left = []
    for piece in pieces:
        if count < len(piece):
            left.append(piece[count:])
        count = max(0, count - len(piece))
    return left
