"""Confinement of a process by the Linux kernel, for native code that no audit hook of Python sees.

`confine` drops all capabilities and installs a seccomp filter: system calls outside a short list, or with other arguments
than a computation needs, fail with EPERM. `hide` keeps other processes of the same user from reading this one's memory and
environment. Both work on x86-64 and ARM64; elsewhere `confine` says what is missing.

Source: seccomp(2), prctl(2) and capset(2) of the Linux manual pages.
"""

import ctypes
import functools
import os
import platform
import resource
import sys
from typing import Any, NamedTuple

_NUMBERS = {
    # Memory, time, waiting, signals to itself; reading and writing what is open already.
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "lseek": (8, 62), "close": (3, 57),
    "fstat": (5, 80), "newfstatat": (262, 79),
    "mmap": (9, 222), "munmap": (11, 215), "mprotect": (10, 226), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "membarrier": (324, 283), "rseq": (334, 293), "set_robust_list": (273, 99),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "getrusage": (98, 165),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "getpid": (39, 172), "gettid": (186, 178), "getrandom": (318, 278), "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip
"""System calls that are allowed with any arguments -> their numbers on x86-64 and on ARM64."""

_READING = {"pread64": (17, 67), "preadv": (295, 69), "fadvise64": (221, 223)}
_KILL, _TGKILL, _PRLIMIT, _OPENAT = (62, 129), (234, 131), (302, 261), (257, 56)
_SECCOMP, _CAPSET = (317, 277), (126, 91)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Machine -> column in the tables above, and its AUDIT_ARCH."""

_PR_SET_DUMPABLE, _PR_SET_NO_NEW_PRIVS = 4, 38
_SET_MODE_FILTER, _ALL_THREADS, _KEEP_SPECULATION = 1, 1, 4  # without the last, old kernels slow the child down
_CAPABILITY_VERSION_3 = 0x20080522

_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06  # instructions of classic BPF
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM


class _Instruction(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    ]


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction))]


class _Condition(NamedTuple):
    """Condition on the lower half of an argument of a system call."""

    argument: int
    value: int
    none_of_the_bits: bool = False
    """True if no bit of the value may be set, instead of equality."""


@functools.cache
def hide() -> None:
    """Keep other processes of this user from reading this one's memory, environment and descriptors, and from tracing it."""
    if sys.platform == "linux":
        _libc().prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def confine(*, reads_files: bool) -> str:
    """Confine all threads of this process, irrevocably.

    Args:
        reads_files: allow files to be opened for reading.

    Returns:
        What is missing on this machine, or an empty text.
    """
    machine = platform.machine()
    if sys.platform != "linux" or machine not in _MACHINES or sys.maxsize < 1 << 32:
        return f"no seccomp filter for {sys.platform} on {machine}"
    column, architecture = _MACHINES[machine]
    libc = _libc()
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return f"the kernel refused PR_SET_NO_NEW_PRIVS ({os.strerror(ctypes.get_errno())})"
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    libc.syscall(_CAPSET[column], header, (ctypes.c_uint32 * 6)())
    rules = _filter(column, architecture, reads_files)
    instructions = (_Instruction * len(rules))(*rules)
    program = _Program(len(rules), instructions)
    for flags in (_ALL_THREADS | _KEEP_SPECULATION, _ALL_THREADS):
        if libc.syscall(_SECCOMP[column], _SET_MODE_FILTER, flags, ctypes.byref(program)) == 0:
            return ""
    return f"the kernel refused a seccomp filter ({os.strerror(ctypes.get_errno())})"


def _filter(column: int, architecture: int, reads_files: bool) -> list[tuple[int, int, int, int]]:
    """Instructions (code, jump if true, jump if false, value) that look at struct seccomp_data."""
    own_process = _Condition(0, os.getpid())
    conditional = {
        _KILL: (own_process,),
        _TGKILL: (own_process,),
        _PRLIMIT: (_Condition(0, 0), _Condition(1, resource.RLIMIT_CPU)),
    }
    free = [numbers[column] for numbers in _NUMBERS.values()]
    if reads_files:
        free += [numbers[column] for numbers in _READING.values()]
        conditional[_OPENAT] = (_Condition(2, _WRITING, none_of_the_bits=True),)
    rules = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _REFUSE), (_LOAD, 0, 0, 0)]
    for number in free:
        rules += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    for numbers, conditions in conditional.items():
        body: list[tuple[int, int, int, int]] = []
        for condition in conditions:
            body.append((_LOAD, 0, 0, 16 + 8 * condition.argument))  # both machines are little-endian
            if condition.none_of_the_bits:
                body += [(_ANY_BIT, 0, 1, condition.value), (_RETURN, 0, 0, _REFUSE)]
            else:
                body += [(_EQUAL, 1, 0, condition.value), (_RETURN, 0, 0, _REFUSE)]
        body.append((_RETURN, 0, 0, _ALLOW))
        rules += [(_EQUAL, 0, len(body), numbers[column]), *body]
    return [*rules, (_RETURN, 0, 0, _REFUSE)]


@functools.cache
def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)
