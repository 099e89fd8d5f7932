"""Run a program that nobody has read, such as a model's answer and its tests, where it can do no harm.

Every program has a process group, a process tree and a directory of its own, an empty environment, limits on wall
time, CPU time, memory, processes, files and output, and a filter of system calls. Where Linux namespaces are to be had
(with bubblewrap, as root, or with unprivileged user namespaces) it also has no network, sees no other process, and no
file but the system's and the interpreter's, all read-only. ``detect_isolation`` says what this machine can do, and what
it cannot; ``grader_pool.check_code_allowed`` refuses where there are no namespaces.

What no sandbox of this kind can do: a program that sets out to fool its own tests runs in one process with them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal

import psutil

from megatron_tropd.errors import ConfigError
from megatron_tropd.evaluate.memory_limit import MemoryGroup, memory_of, open_group
from megatron_tropd.evaluate.sandbox_child import STARTED
from megatron_tropd.evaluate.syscall_filter import filter_for

_CHILD = Path(__file__).with_name("sandbox_child.py")
_CHILD_SOURCE = _CHILD.read_text(encoding="utf-8")
_DRIVER = Path(__file__).with_name("sandbox_driver.py").read_text(encoding="utf-8")
_NOBODY = 65534
_SET_DUMPABLE = 4  # linux/prctl.h
_KEPT_OUTPUT = 4000  # bytes
_LOOK_EVERY_S = 0.2  # at memory, of all processes together
_SETUP_S = 60.0  # until a program is started: milliseconds, on a busy machine seconds
_PROBE_SHARE = 0.25  # of the time, for each of the programs that tests must not let pass


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxLimits:
    """The resources one program may use. Memory counts all its processes together, and each of them alone."""

    seconds: float = 10.0  # wall time
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    processes: int = 16  # threads count
    file_bytes: int = 32 << 20  # of one file, and of all files together where namespaces are to be had
    open_files: int = 64
    output_bytes: int = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Isolation:
    """The barriers between a program and this machine."""

    namespaces: bool  # no network, own processes, own files
    user: Literal["unique", "nobody", "same"]  # whom it runs as
    filtered: bool = True  # system calls
    bubblewrap: str = ""  # the program that makes the namespaces; empty: we do
    reason: str = ""  # why it is not a stronger one

    @property
    def missing(self) -> tuple[str, ...]:
        """Name in words what is not guarded here."""
        calls = () if self.filtered else ("make every system call",)
        if self.namespaces:
            return calls
        files = "read and write what this user can" if self.user == "same" else "read what everyone can"
        network = () if self.filtered else ("reach the network",)  # the filter allows no socket
        return (*network, f"{files} on this machine", "see and signal its processes", *calls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The end of a program: ``ok`` when every line of it ran; else ``reason`` says in one line why not."""

    ok: bool
    reason: str = ""
    output: str = ""  # the end of what it printed
    timed_out: bool = False
    unrun: bool = False  # the sandbox could not be set up: nothing is known of the program


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxTask:
    """A program, and what proves it right: ``tests``, or ``cases``; without either, that it ends."""

    program: str
    prelude: str = ""  # run before it, in its module
    tests: tuple[str, ...] = ()  # run after it, in its module, where ``__name__`` is then ``"__main__"``
    cases: tuple[tuple[str, str], ...] = ()  # run as a script: standard input, and what must be printed
    probes: tuple[str, ...] = ()  # run in its place: the task is ok when the tests let none of them pass


def run_program(
    program: str | SandboxTask, *, limits: SandboxLimits = SandboxLimits(), isolation: Isolation | None = None
) -> Outcome:
    """Run a Python program to its end, or to its limits. Nothing of it is left when this returns.

    Its time begins when it does. Where it cannot be started the outcome is ``unrun``.

    It is a real module, ``program``, which its tests run in as ``__main__``. There is nothing on its standard input
    but what a case gives.

    Raises:
        ConfigError: this machine cannot confine a program.
    """
    wanted = isolation or detect_isolation()
    task = program if isinstance(program, SandboxTask) else SandboxTask(program=program)
    content = asdict(task) | {"probe_seconds": limits.seconds * _PROBE_SHARE}
    try:
        with tempfile.TemporaryDirectory(prefix="tropd-sandbox-") as directory, tempfile.TemporaryFile() as source:
            source.write(json.dumps(content).encode())
            source.seek(0)
            group = open_group(limits.memory_bytes)
            try:
                return _Run(limits, wanted, directory, group).run(source)
            finally:
                if group is not None:
                    group.close()
    except OSError as error:  # no room for its directory, no process to be had
        return Outcome(ok=False, reason=f"sandbox: {error}"[:200], unrun=True)


@lru_cache(maxsize=1)
def detect_isolation() -> Isolation:
    """Return the strongest isolation that works here, found by trying.

    Raises:
        ConfigError: there is none.
    """
    if sys.platform != "linux":
        raise ConfigError(f"running programs of a model needs Linux, this is {sys.platform}. Evaluate code elsewhere.")
    users: tuple[Literal["unique", "nobody", "same"], ...] = ("unique", "nobody") if os.getuid() == 0 else ("same",)
    first, filtered = "", filter_for(os.uname().machine, network=False) is not None
    ways = [("", True), ("", False)]
    if found := shutil.which("bwrap"):  # it may be allowed to make namespaces where others are not
        ways.insert(0, (found, True))
    for bubblewrap, namespaces in ways:
        for user in users:
            choice = Isolation(namespaces=namespaces, user=user, filtered=filtered, bubblewrap=bubblewrap, reason=first)
            # nothing is at stake in a program that does nothing, so the machine may take its time
            tried = run_program("pass", limits=replace(SandboxLimits(), seconds=60.0), isolation=choice)
            if tried.ok:
                return choice
            first = first or tried.reason
    raise ConfigError(
        f"this machine cannot confine a program of a model ({first}), and as {'root' if users[0] != 'same' else 'is'} "
        "none is run. Evaluate code as a user whose interpreter others may execute, or where namespaces are allowed."
    )


def hide_from_programs() -> None:
    """Keep other processes of this user from the memory and the environment of this one (no core dumps either)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise ConfigError(
            f"this process cannot be hidden from the programs of a model (prctl: {os.strerror(ctypes.get_errno())}), "
            "and none is run. Evaluate code elsewhere."
        )


class _Run:
    """One program, from its start to the end of its last process."""

    def __init__(
        self, limits: SandboxLimits, isolation: Isolation, directory: str, group: MemoryGroup | None = None
    ) -> None:
        self._limits, self._isolation, self._directory, self._group = limits, isolation, directory, group
        self._word = secrets.token_hex(16).encode()
        self._output = bytearray()
        self._started = b""

    def run(self, source: IO[bytes]) -> Outcome:
        word_in, word_out = os.pipe()
        reply_in, reply_out = os.pipe()
        started_in, started_out = os.pipe()
        try:
            os.write(word_out, self._word)
            # whoever reads second finds the end and not a wait
            os.close(word_out)
            for end in (reply_in, started_in):
                os.set_blocking(end, False)
            process = self._start(source, (reply_out, word_in), started_out)
            try:
                stopped = self._watch(process, started_in)
            finally:
                self._end(process)
            replied = _read(reply_in)
            self._started += _read(started_in) or b""
        finally:
            for end in (word_in, reply_in, reply_out, started_in, started_out):
                os.close(end)
        if self._started != STARTED:
            return self._unrun(process.returncode, stopped)
        return self._outcome(process.returncode, stopped, replied or b"")

    def _start(self, source: IO[bytes], fds: tuple[int, int], started: int) -> subprocess.Popen[bytes]:
        calls = filter_for(os.uname().machine, network=self._isolation.namespaces) if self._isolation.filtered else None
        user = {"unique": 1_000_000_000 + secrets.randbelow(1_000_000_000), "nobody": _NOBODY, "same": 0}
        config = {
            **asdict(self._limits),
            "namespaces": self._isolation.namespaces,
            "bubblewrap": self._isolation.bubblewrap,
            "child": _CHILD_SOURCE if self._isolation.bubblewrap else "",
            "inside": False,
            "group": "" if self._group is None else self._group.join,
            "filter": (calls or b"").hex(),
            "user": user[self._isolation.user],
            "directory": self._directory,
            "driver": _DRIVER,
            "fds": fds,
            "started": started,
        }
        # an interpreter may need it to find its own libraries; nothing else is handed on
        environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
        return subprocess.Popen(
            [sys.executable, "-I", "-B", str(_CHILD), json.dumps(config)],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd="/",
            start_new_session=True,
            pass_fds=(*fds, started),
        )

    def _watch(self, process: subprocess.Popen[bytes], started: int) -> str:
        """Read output until the program ends; return why it must be ended, empty where it ends by itself.

        ``started``: where it is said that the program begins, and with it its time.
        """
        assert process.stdout is not None
        deadline, look = time.monotonic() + _SETUP_S, time.monotonic() + _LOOK_EVERY_S
        ended = os.pidfd_open(process.pid)
        try:
            os.set_blocking(process.stdout.fileno(), False)
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                selector.register(ended, selectors.EVENT_READ)
                selector.register(started, selectors.EVENT_READ)
                while process.poll() is None:
                    now = time.monotonic()
                    if now >= deadline:
                        return f"ran longer than {self._limits.seconds if self._started else _SETUP_S:g} s"
                    if now >= look:
                        look = now + _LOOK_EVERY_S
                        if self._is_full() or memory_of(process.pid) > self._limits.memory_bytes:
                            return self._too_much_memory
                    ready = [key.fileobj for key, _ in selector.select(timeout=min(deadline, look) - now)]
                    if started in ready:
                        self._started += _read(started) or b""
                        deadline = time.monotonic() + self._limits.seconds
                    if process.stdout in ready and not self._take(process.stdout):
                        selector.unregister(process.stdout)  # it closed its output and continues
                    if len(self._output) > self._limits.output_bytes:
                        return f"printed more than {self._limits.output_bytes >> 10} KiB"
        finally:
            os.close(ended)
        self._take(process.stdout)
        return ""

    def _is_full(self) -> bool:
        return self._group is not None and self._group.was_full()

    @property
    def _too_much_memory(self) -> str:
        return f"used more than {self._limits.memory_bytes >> 20} MiB of memory"

    def _take(self, stream: IO[bytes]) -> bool:
        """Take what there is; return False at the end of the stream."""
        part = _read(stream.fileno())
        self._output += part or b""
        return part != b""

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        """End whatever is left: in namespaces all of it dies with its first process, elsewhere one by one."""
        if process.poll() is None:
            _stop(process.pid)
            if self._isolation.namespaces:
                _end_world(process.pid)
            else:
                _end_descendants(process.pid)
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert process.stdout is not None
        process.stdout.close()

    def _unrun(self, status: int, stopped: str) -> Outcome:
        output = self._output[-_KEPT_OUTPUT:].decode("utf-8", "replace")
        why = stopped or _first_line(output, backwards=True) or f"ended with status {status} before the program ran"
        return Outcome(ok=False, reason=why[:200], output=output, unrun=True)

    def _outcome(self, status: int, stopped: str, replied: bytes) -> Outcome:
        output = self._output[-_KEPT_OUTPUT:].decode("utf-8", "replace")
        raised, printed = _first_line(replied.decode("utf-8", "replace")), _first_line(output, backwards=True)
        if stopped:
            return Outcome(ok=False, reason=stopped, output=output, timed_out="longer" in stopped)
        if replied == self._word:
            return Outcome(ok=True, output=output)
        if self._is_full():
            return Outcome(ok=False, reason=self._too_much_memory, output=output)
        if status == 128 + signal.SIGXCPU or (status == 128 + signal.SIGKILL and not printed):
            return Outcome(
                ok=False,
                reason=f"used more than {self._limits.cpu_seconds} s of CPU time",
                output=output,
                timed_out=True,
            )
        reason = raised or printed or f"ended with status {status} before its last line"
        return Outcome(ok=False, reason=reason[:200], output=output)


def _first_line(text: str, *, backwards: bool = False) -> str:
    """Return the first line, or the last, that is not blank; empty where there is none."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1 if backwards else 0] if lines else ""


def _read(fd: int) -> bytes | None:
    """Read what a pipe holds, up to 64 KiB; empty at its end, None where there is nothing yet."""
    try:
        return os.read(fd, 1 << 16)
    except BlockingIOError:
        return None


def _stop(pid: int) -> None:
    """Stop a child of ours and wait until it is stopped, or has ended: from then on it starts no other process."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def _end_world(outside: int) -> None:
    """End the first process of new namespaces, whose parent is ``outside``, stopped, which then ends by itself.

    The kernel lets the first process of a namespace end only after all others in it; the one outside waits for it.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(outside)
        for process in parent.children() or [parent]:
            process.kill()
    os.kill(outside, signal.SIGCONT)


def _end_descendants(pid: int) -> None:
    """End all descendants of a process; all are stopped before the first is ended, so none can start another."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        while found := [process for process in root.children(recursive=True) if _is_running(process)]:
            for stop in (psutil.Process.suspend, psutil.Process.kill):
                for process in found:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        stop(process)


def _is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
