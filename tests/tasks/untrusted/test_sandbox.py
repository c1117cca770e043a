"""A function in a child process can only answer or fail its own request (T6, T20, F22)."""

import ctypes
import importlib
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tasks.untrusted.sandbox import Limits, Sandbox, SandboxFault
from unclip.errors import StageError

HOSTILE = '''
import ctypes, os, signal, socket, subprocess, sys, time

def run(request):
    """Carry out the order in the request and return its outcome."""
    order, _, argument = request.decode().partition(" ")
    return str(ORDERS[order](argument)).encode()

def attempt(action):
    try:
        return f"did {action()}"
    except Exception as error:
        return f"{type(error).__name__}"

def endless():
    while True:
        pass

libc = ctypes.CDLL(None)
NATIVE = {name: getattr(libc, name) for name in (
    "socket", "open", "execve", "fork", "kill", "unlink", "rmdir", "ptrace", "setrlimit", "prctl", "dup"
)}

def native(call):
    """Call a function of the C library, which raises no audit event."""
    name, *arguments = call.split()
    return NATIVE[name](*(int(each) if each.lstrip("-").isdigit() else each.encode() for each in arguments))

ORDERS = {
    "native": native,
    "echo": lambda text: text,
    "pid": lambda _: os.getpid(),
    "signal": lambda number: os.kill(os.getpid(), int(number)),
    "exit": lambda status: os._exit(int(status)),
    "raise": lambda text: 1 / 0,
    "sleep": lambda seconds: time.sleep(float(seconds)),
    "spin": lambda _: endless(),
    "allocate": lambda size: len(bytearray(int(size))),
    "recurse": lambda _: (lambda f: f(f))(lambda f: f(f)),
    "reply": lambda size: "x" * int(size),
    "lie": lambda _: os.write(next(d for d in range(3, 20) if is_pipe_for_writing(d)), b"\\xff" * 8) and time.sleep(60),
    "print": lambda text: (print(text, flush=True), os.write(1, b"native"), os.write(2, b"native"))[1],
    "connect": lambda port: attempt(lambda: socket.create_connection(("127.0.0.1", int(port)), 1)),
    "udp": lambda port: attempt(lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", int(port)))),
    "write": lambda path: attempt(lambda: open(path, "w").write("x")),
    "append": lambda path: attempt(lambda: os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"x")),
    "remove": lambda path: attempt(lambda: os.remove(path)),
    "spawn": lambda path: attempt(lambda: subprocess.run(["touch", path])),
    "shell": lambda path: attempt(lambda: os.system(f"touch {path}")),
    "fork": lambda _: attempt(os.fork),
    "environment": lambda name: os.environ.get(name),
    "modules": lambda names: sorted(set(names.split()) & set(sys.modules)),
}

def is_pipe_for_writing(descriptor):
    try:
        return not os.read(descriptor, 0) and False
    except OSError as error:
        return error.errno == 9 and os.path.exists(f"/proc/self/fd/{descriptor}")
'''


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    folder = tmp_path_factory.mktemp("hostile")
    Path(folder, "hostile_work.py").write_text(HOSTILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("SECRET_KEY", "canary")
        yield importlib.import_module("hostile_work")


@pytest.fixture(scope="module")
def sandbox(hostile: ModuleType) -> Iterator[Sandbox]:
    limits = Limits(wall_seconds=2.0, memory_bytes=1 << 28, reply_bytes=1 << 20)
    with Sandbox(hostile.run, limits=limits) as sandbox:
        yield sandbox


def ask(sandbox: Sandbox, order: str) -> str:
    return sandbox.call(order.encode()).decode()


def fault(sandbox: Sandbox, order: str) -> str:
    with pytest.raises(SandboxFault) as caught:
        ask(sandbox, order)
    return caught.value.kind


def test_a_child_answers_again_and_again(sandbox: Sandbox) -> None:
    assert ask(sandbox, "pid") == ask(sandbox, "pid") != str(os.getpid())
    for size in (0, 1, 65_536, 5_000_000):  # more than a pipe holds
        text = "y" * size
        assert sandbox.call(f"echo {text[:500_000]}".encode()) == text[:500_000].encode()
    assert len(ask(sandbox, f"reply {1 << 20}")) == 1 << 20


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE])
def test_t6_a_child_that_dies_costs_one_request(sandbox: Sandbox, number: int) -> None:
    before = ask(sandbox, "pid")
    assert fault(sandbox, f"signal {int(number)}") == "crash"
    assert ask(sandbox, "echo neighbour") == "neighbour"
    assert ask(sandbox, "pid") != before


@pytest.mark.parametrize(
    ("order", "kind"),
    [
        ("raise", "crash"),
        ("exit 0", "crash"),
        ("exit 3", "crash"),
        ("recurse", "crash"),
        ("lie", "crash"),
        (f"reply {(1 << 20) + 1}", "crash"),
        ("sleep 60", "timeout"),
        ("spin", "timeout"),
        (f"signal {int(signal.SIGXCPU)}", "timeout"),
        (f"signal {int(signal.SIGSTOP)}", "timeout"),
        (f"allocate {1 << 29}", "memory"),
        (f"signal {int(signal.SIGKILL)}", "memory"),  # as the kernel does when memory runs out
    ],
)
def test_f22_each_way_of_dying_has_its_kind(sandbox: Sandbox, order: str, kind: str) -> None:
    assert fault(sandbox, order) == kind
    assert ask(sandbox, "echo neighbour") == "neighbour"


def test_requests_within_the_limits_succeed(sandbox: Sandbox) -> None:
    assert ask(sandbox, f"allocate {1 << 27}") == str(1 << 27)
    assert ask(sandbox, "sleep 0.1") == "None"
    assert ask(sandbox, "print hello") == "6"
    assert ask(sandbox, "echo the reply is whole") == "the reply is whole"


def test_a_request_too_large_for_the_child(hostile: ModuleType) -> None:
    with Sandbox(hostile.run, limits=Limits(memory_bytes=1 << 25)) as sandbox:
        with pytest.raises(SandboxFault, match="memory"):
            sandbox.call(b"echo " + bytes(1 << 26))
        assert ask(sandbox, "echo neighbour") == "neighbour"


def test_t6_no_network_no_files_no_processes(sandbox: Sandbox, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("unchanged")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert ask(sandbox, f"connect {port}") == "PermissionError"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert ask(sandbox, f"udp {port}") == "PermissionError"
    for order in ("write", "append", "remove", "spawn", "shell"):
        assert ask(sandbox, f"{order} {tmp_path}/new") in ("PermissionError", "FileNotFoundError"), order
        assert ask(sandbox, f"{order} {kept}") == "PermissionError", order
    assert ask(sandbox, "fork") == "PermissionError"
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and kept.read_text() == "unchanged"


def test_t20_a_child_has_neither_secrets_nor_heavy_modules(sandbox: Sandbox) -> None:
    assert ask(sandbox, "environment SECRET_KEY") == "None"
    assert ask(sandbox, "modules ray torch pyarrow img2dataset scipy") == "[]"


def test_even_native_code_cannot_grow_a_file(sandbox: Sandbox) -> None:
    limits = Path(f"/proc/{sandbox.pids[0]}/limits").read_text().splitlines()
    assert [line.split()[-3:] for line in limits if line.startswith("Max file size")] == [["0", "0", "bytes"]]


@pytest.fixture(scope="module")
def reader(hostile: ModuleType) -> Iterator[Sandbox]:
    """A child that may open files for reading, as the one for Parquet lists."""
    with Sandbox(hostile.run, limits=Limits(wall_seconds=10.0, open_files=4)) as sandbox:
        yield sandbox


@pytest.mark.parametrize("kind", ["sandbox", "reader"])
def test_f50_native_code_gets_no_sockets_files_processes_or_signals(
    hostile: ModuleType, tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    child: Sandbox = request.getfixturevalue(kind)
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    kept.write_text("unchanged")
    folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        refused = {
            "socket": f"socket {int(socket.AF_INET)} {int(socket.SOCK_STREAM)} 0",
            "write": f"open {kept} {os.O_WRONLY}",
            "create": f"open {tmp_path}/new {os.O_CREAT | os.O_WRONLY} 420",
            "environment of the worker": f"open /proc/{os.getpid()}/environ {os.O_RDONLY}",
            "environment of a sibling": f"open /proc/{other.pid}/environ {os.O_RDONLY}",
            "memory of the worker": f"open /proc/{os.getpid()}/mem {os.O_RDONLY}",
            "exec": "execve /bin/true 0 0",
            "fork": "fork",
            "signal": f"kill {other.pid} {int(signal.SIGKILL)}",
            "signal to all": f"kill -1 {int(signal.SIGKILL)}",
            "trace": f"ptrace 16 {other.pid} 0 0",
            "remove": f"unlink {kept}",
            "remove a folder": f"rmdir {folder}",
            "be readable again": "prctl 4 1 0 0 0",
        }
        if kind == "reader":
            refused.pop("environment of a sibling")  # an ordinary process of this user, with ordinary rights
            assert int(ask(child, f"native open {kept} {os.O_RDONLY}")) > 0
            descriptors = [int(ask(child, f"native open /dev/null {os.O_RDONLY}")) for _ in range(8)]
            assert descriptors[-1] == -1, "a reader can open only a few files"
        else:
            refused |= {"read": "open /etc/passwd 0", "another descriptor": "dup 0"}
        results = {name: ask(child, f"native {call}") for name, call in refused.items()}
        assert results == dict.fromkeys(refused, "-1")
        assert other.poll() is None and kept.read_text() == "unchanged" and folder.is_dir()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept"]
        # the same calls work in a process that is not confined
        for name in set(refused) & {"socket", "read", "write", "environment of a sibling"}:
            os.close(hostile.native(refused[name]))
        assert hostile.native(refused["signal"]) == 0


def test_f50_the_worker_of_a_child_cannot_be_read_by_other_processes(sandbox: Sandbox) -> None:
    get_dumpable = ctypes.CDLL(None).prctl
    assert sandbox.pids and get_dumpable(3, 0, 0, 0, 0) == 0
    status = Path(f"/proc/{sandbox.pids[0]}/status").read_text()
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert values["Seccomp"] == "2" and values["NoNewPrivs"] == "1" and int(values["CapEff"], 16) == 0


def test_f50_a_kernel_without_filters_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Path(tmp_path, "unusual_work.py").write_text(
        "import platform\nplatform.machine = lambda: 'riscv64'\ndef run(request):\n    return request"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with monkeypatch.context() as context:
        context.setattr(platform, "machine", platform.machine)  # undoes what importing the module does
        unusual = importlib.import_module("unusual_work")
    with Sandbox(unusual.run, num_children=2) as sandbox:
        assert sandbox.call(b"still answered") == b"still answered"
    messages = [record.message for record in caplog.records if record.name == "tasks.untrusted.sandbox"]
    assert messages == [
        "Child processes that handle untrusted bytes are confined by limits and an audit hook only: no seccomp filter for "
        "linux on riscv64."
    ]


def test_threads_share_children(hostile: ModuleType) -> None:
    with Sandbox(hostile.run, num_children=2, limits=Limits(wall_seconds=30)) as sandbox:
        answers: dict[int, str] = {}

        def work(number: int) -> None:
            for turn in range(20):
                answers[number * 100 + turn] = ask(sandbox, f"echo {number}/{turn}")

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert answers == {n * 100 + t: f"{n}/{t}" for n in range(8) for t in range(20)}
        assert len(sandbox.pids) == 2


def wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_children_end_with_the_sandbox_and_with_the_worker(hostile: ModuleType) -> None:
    with Sandbox(hostile.run, num_children=2) as sandbox:
        pids = sandbox.pids
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)

    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import hostile_work; from tasks.untrusted.sandbox import Sandbox\n"
        "sandbox = Sandbox(hostile_work.run); print(sandbox.pids[0], flush=True); sys.stdin.read()"
    )
    folder = str(Path(hostile.__file__ or "").parent)
    worker = subprocess.Popen(
        [sys.executable, "-c", script, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout
    child = int(worker.stdout.readline())
    worker.kill()
    worker.communicate()
    assert wait_until(lambda: has_ended(child)), "a child outlived its worker"


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_the_error_of_a_child_that_cannot_start_gives_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(tmp_path, "broken_work.py").write_text(
        "def warm_up():\n    raise OSError('no such library')\ndef run(request): ..."
    )
    monkeypatch.syspath_prepend(tmp_path)
    broken = importlib.import_module("broken_work")
    with pytest.raises(StageError, match=r"broken_work.run did not start: OSError: no such library\. Check"):
        Sandbox(broken.run)
