"""Programs of a model are confined: what they may not do fails inside, and nothing of them is left outside."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_tropd.errors import ConfigError
from megatron_tropd.evaluate import grader_pool, sandbox
from megatron_tropd.evaluate.memory_limit import MemoryGroup, open_group
from megatron_tropd.evaluate.sandbox import Isolation, Outcome, SandboxLimits, run_program
from tests.support.two_nodes import NAMESPACES_REQUIRED

# of time there is enough for a machine that does much else: wherever another limit is meant, that one strikes first
ROOMY = SandboxLimits(seconds=120.0, cpu_seconds=60)
TIGHT = replace(ROOMY, memory_bytes=256 << 20, processes=8, file_bytes=1 << 20, output_bytes=1 << 16)
ONE_CPU_SECOND = replace(ROOMY, cpu_seconds=1)
TWO_SECONDS = replace(ROOMY, seconds=2.0)


def run(program: str, limits: SandboxLimits = ROOMY) -> Outcome:
    return run_program(textwrap.dedent(program), limits=limits)


@pytest.fixture(scope="module")
def isolated() -> Isolation:
    return sandbox.detect_isolation()


def needs_namespaces(isolated: Isolation) -> None:
    if not isolated.namespaces and not NAMESPACES_REQUIRED:
        pytest.skip(f"no namespaces for this user on this machine: programs could {'; '.join(isolated.missing)}")


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch, tmp_path_factory):
    """Neither a process nor a directory of a program outlives it."""
    tmp_path_factory.getbasetemp()  # pytest's own are made elsewhere
    # of our own, as this machine may run more of these tests; everybody may enter, as programs are other users
    ours = tempfile.mkdtemp(prefix="tropd-test-", dir="/tmp")
    os.chmod(ours, 0o755)
    monkeypatch.setattr(tempfile, "tempdir", ours)
    yield
    assert not [p for p in psutil.Process().children(recursive=True) if "sandbox_child.py" in command_of(p)]
    os.rmdir(ours)


def command_of(process: psutil.Process) -> str:
    """Empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def test_a_program_passes_when_its_last_line_has_run():
    assert run("print('hello')\nassert 1 + 1 == 2") == Outcome(ok=True, output="hello\n")
    assert run("if __name__ == '__main__':\n    assert input()").ok  # a demonstration at its end does not run


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("assert 1 + 1 == 3, 'sum'", "AssertionError: sum"),
        ("def f(:\n", "SyntaxError: invalid syntax"),
        ("import os; os._exit(0)", "ended with status 0 before its last line"),
        ("raise SystemExit(0)", "ended with status 0 before its last line"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with status 139 before its last line"),
        ("input()", "EOFError: EOF when reading a line"),
        ("import torch_that_is_not_there", "ModuleNotFoundError: No module named 'torch_that_is_not_there'"),
    ],
)
def test_everything_else_fails_with_its_reason(program, reason):
    outcome = run(program)
    assert not outcome.ok and outcome.reason == reason and not outcome.timed_out


@pytest.mark.parametrize(
    ("program", "limits", "reason"),
    [
        ("import time\nwhile True: time.sleep(1)", TWO_SECONDS, "^ran longer than 2 s$"),
        ("print('so far', flush=True)\nwhile True: pass", ONE_CPU_SECOND, "^used more than 1 s of CPU time$"),
        (
            "import sys\nsys.stdout.close()\nimport os\nos.close(1)\nos.close(2)\nwhile True: pass",
            ONE_CPU_SECOND,
            "^used more than 1 s of CPU time$",
        ),
        (
            "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
            ONE_CPU_SECOND,
            "^used more than 1 s of CPU time$",
        ),
        ("hold = bytearray(10**9)", TIGHT, "^MemoryError$"),
        # the last piece is refused, or all processes together had too much before
        (
            "hold = [bytearray(10**7) for _ in range(10**3)]",
            TIGHT,
            "^MemoryError$|^used more than 256 MiB of memory$",
        ),
        ("import os\nwhile True: os.fork()", TIGHT, "^BlockingIOError: .* Resource temporarily unavailable$"),
        ("while True: print('x' * 1000)", TIGHT, "^printed more than 64 KiB$"),
        ("open('big', 'wb').write(bytes(10**7))", TIGHT, r"^OSError: \[Errno 2[78]\]"),
        ("hold = [open('/dev/null') for _ in range(1000)]", TIGHT, r"^OSError: \[Errno 24\]"),
    ],
    ids=[
        "sleep",
        "loop",
        "silent loop",
        "deaf loop",
        "memory",
        "bit by bit",
        "fork bomb",
        "output",
        "file",
        "open files",
    ],
)
def test_what_uses_too_much_is_ended_and_said(program, limits, reason):
    started = time.monotonic()
    outcome = run(program, limits)
    assert not outcome.ok
    assert re.search(reason, outcome.reason), outcome
    assert outcome.timed_out == ("longer" in reason or "CPU" in reason)
    assert time.monotonic() - started < limits.seconds + 20


def test_processes_of_a_program_do_not_answer_for_it():
    passes = """
        import os
        if os.fork():
            os.wait()
            raise ValueError("of the program")
    """
    assert run(passes).reason == "ValueError: of the program"
    fails = """
        import os
        if os.fork() == 0:
            raise ValueError("of a child")
        os.wait()
    """
    outcome = run(fails)
    assert outcome.ok and "ValueError: of a child" in outcome.output


def test_what_other_processes_print_does_not_hide_why_a_program_failed():
    outcome = run(
        """
        import os, time
        read, write = os.pipe()
        if os.fork() == 0:
            for _ in range(10**5):
                os.write(1, b"noise ")
                os.write(write, b"x")
                time.sleep(0.0001)
        os.read(read, 1)
        raise ValueError("of the program")
        """,
        replace(ROOMY, output_bytes=1 << 24),
    )
    assert not outcome.ok and outcome.reason == "ValueError: of the program"


def test_memory_is_counted_over_all_processes_together():
    hungry = """
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                hold = b"x" * (100 << 20)
                time.sleep(600)
        time.sleep(600)
    """
    assert run(hungry, TIGHT).reason == "used more than 256 MiB of memory"


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    outcome = run(
        """
        import glob, os
        assert "SECRET_TOKEN" not in os.environ and "s3cret" not in str(dict(os.environ))
        assert os.environ["HOME"] == os.getcwd()
        for file in glob.glob("/proc/[0-9]*/environ"):
            try:
                content = open(file, "rb").read()
            except OSError:
                continue
            assert b"s3cret" not in content, file
        """
    )
    assert outcome.ok or sandbox.detect_isolation().user == "same", outcome


def test_the_file_system_is_read_only_and_shows_nothing_of_ours(isolated, tmp_path):
    needs_namespaces(isolated)
    (tmp_path / "ours").write_text("ours")
    os.chmod(tmp_path, 0o777)
    outcome = run(
        f"""
        import os, pathlib, sys
        pathlib.Path("mine").write_text("x")  # its own directory is there to write in
        assert sorted(os.listdir(".")) == ["mine", "program.py"]
        assert not os.path.exists({str(tmp_path)!r}) and not os.path.exists({str(Path(__file__).parent)!r})
        assert not {{"home", "run", "var", "sys", "opt"}} & set(os.listdir("/"))
        for place in ("/", "/usr", "/etc", "/dev", os.path.dirname(sys.executable), os.path.dirname(os.__file__)):
            try:
                open(place + "/written", "w")
            except OSError:
                continue
            raise AssertionError(place)
        """
    )
    assert outcome.ok, outcome


def test_other_processes_are_neither_seen_nor_reached(isolated):
    needs_namespaces(isolated)
    outcome = run(
        f"""
        import os, signal
        assert max(int(name) for name in os.listdir("/proc") if name.isdigit()) < 10
        assert os.getuid() != 0
        try:
            os.kill({os.getpid()}, signal.SIGKILL)
        except OSError:
            pass
        """
    )
    assert outcome.ok, outcome


def test_the_network_is_not_reached(isolated):
    needs_namespaces(isolated)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        outcome = run(f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)")
        # bubblewrap's own network has a loopback, on which nobody listens
        assert re.search("Network is unreachable|Connection refused", outcome.reason)
        with pytest.raises(TimeoutError):
            server.accept()
    outcome = run("import socket\nsocket.getaddrinfo('example.org', 80)")
    assert not outcome.ok and "gaierror" in outcome.reason


def test_privileges_cannot_be_got_back(isolated):
    needs_namespaces(isolated)
    outcome = run(
        """
        import ctypes, os
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mount(b"tmpfs", b"/usr", b"tmpfs", 0, None) != 0
        assert libc.umount2(os.getcwd().encode(), 2) != 0
        for change in (os.setuid, os.setgid):
            try:
                change(0)
            except OSError:  # not permitted, or nobody of that number in here
                continue
            raise AssertionError("root again")
        assert "NoNewPrivs:\\t1" in open("/proc/self/status").read()
        assert "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
        """
    )
    assert outcome.ok, outcome


# goes on only once the daemon runs
DAEMON = """
import os, time
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, b"x")
        while True:
            time.sleep(0.05)
    os._exit(0)
os.wait()
os.read(read, 1)
"""
DRIVER = "REPLY, WORD, DRIVER = "  # in the command of a program's processes, and of no other
PLAIN = Isolation(namespaces=False, user="same")


BUBBLEWRAP = shutil.which("bwrap")
# without namespaces all processes of this user count
MANY = replace(ROOMY, processes=100_000, memory_bytes=4 << 30, output_bytes=1 << 16)


@pytest.fixture(params=[False, True], ids=["isolated", "plain"])
def isolation(request, isolated) -> Isolation:
    return PLAIN if request.param else isolated


@pytest.fixture
def running(monkeypatch):
    """How many processes of this test's programs there are, found out quickly: the newest first."""
    mark = secrets.token_hex(16)
    monkeypatch.setattr(sandbox, "_DRIVER", f"# {mark}\n{sandbox._DRIVER}")

    def count() -> int:
        found = 0
        for pid in sorted(psutil.pids(), reverse=True):
            with contextlib.suppress(OSError):
                found += mark in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
        return found

    return count


@pytest.mark.parametrize("then", ["", "while True: print('x' * 1000)"], ids=["ends itself", "is ended"])
def test_a_daemon_ends_with_its_program(then, isolation, running):
    outcome = run_program(DAEMON + then, limits=MANY, isolation=isolation)
    assert running() == 0
    assert outcome.ok == (not then) and outcome.reason == ("printed more than 64 KiB" if then else "")


def test_of_many_daemons_none_is_left_when_their_program_was_ended(isolation, running):
    program = textwrap.dedent(
        """
        import os, time
        read, write = os.pipe()
        for _ in range(60):
            if os.fork() == 0:
                os.setsid()
                hold = b"x" * 5_000_000  # takes a while to give back
                os.write(write, b"x")
                while True:
                    time.sleep(0.05)
        for _ in range(60):
            os.read(read, 1)
        while True:
            print("x" * 1000)
        """
    )
    for _ in range(5):
        assert run_program(program, limits=MANY, isolation=isolation).reason == "printed more than 64 KiB"
        # one look, without patience: that is the promise
        assert running() == 0


def test_a_program_ends_with_whoever_runs_it(tmp_path):
    # how is found out here: there, the program that finds it out would be taken for this one
    how = f"limits=SandboxLimits(seconds=900.0), isolation={sandbox.detect_isolation()!r}"
    call = f"run_program({DAEMON + 'time.sleep(1000)'!r}, {how})"
    code = f"from megatron_tropd.evaluate.sandbox import *\n{call}"
    environment = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[2]), "TMPDIR": str(tmp_path)}
    runner = subprocess.Popen([sys.executable, "-c", code], env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while sum(DRIVER in command_of(p) for p in psutil.Process(runner.pid).children(recursive=True)) < 2:
            assert time.monotonic() < deadline and runner.poll() is None
            time.sleep(0.1)
        family = psutil.Process(runner.pid).children(recursive=True)
    finally:
        os.kill(runner.pid, signal.SIGKILL)
        runner.wait()
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert not alive and len(gone) >= 3


def test_many_programs_run_side_by_side():
    outcomes: list[Outcome] = []
    threads = [
        threading.Thread(target=lambda n=n: outcomes.append(run(f"import os\nos.fork()\nassert {n} % 2 == 0")))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.ok for outcome in outcomes) == [False] * 4 + [True] * 4


def test_without_namespaces_limits_hold_and_what_is_missing_is_said():
    files = ("read and write what this user can on this machine", "see and signal its processes")
    assert PLAIN.missing == files
    unfiltered = replace(PLAIN, filtered=False)
    assert unfiltered.missing == ("reach the network", *files, "make every system call")
    for program, limits, ok, reason in (
        ("assert True", TIGHT, True, ""),
        ("while True: print('x' * 1000)", TIGHT, False, "printed more than 64 KiB"),
        (DAEMON + "while True: time.sleep(1)", replace(MANY, seconds=2.0), False, "ran longer than 2 s"),
    ):
        outcome = run_program(program, limits=limits, isolation=PLAIN)
        assert (outcome.ok, outcome.reason) == (ok, reason)


@pytest.mark.parametrize("fault", ["no group", "no bubblewrap", "no process", "no directory"])
def test_a_program_whose_sandbox_cannot_be_set_up_is_not_said_to_have_failed(fault, isolated, monkeypatch):
    choice, reason = isolated, r"^sandbox: \[Errno 2\]"
    if fault == "no group":  # the first step of the child
        nowhere = MemoryGroup(Path(tempfile.gettempdir()) / "no-group", legacy=True)
        monkeypatch.setattr(sandbox, "open_group", lambda memory_bytes: nowhere)
    elif fault == "no bubblewrap":
        choice, reason = replace(isolated, bubblewrap="/bin/false"), "^ended with status 1 before the program ran$"
    elif fault == "no process":  # an argument longer than the kernel takes
        monkeypatch.setattr(sandbox, "_DRIVER", "#" * (1 << 18))
        reason = r"^sandbox: \[Errno 7\]"
    else:
        monkeypatch.setattr(tempfile, "tempdir", tempfile.gettempdir() + "/nowhere")
    outcome = run_program("pass", limits=ROOMY, isolation=choice)
    assert outcome.unrun and not outcome.ok and re.search(reason, outcome.reason), outcome


def test_no_program_can_pass_for_one_that_was_not_started(isolation):
    """It may end as setting up ends, and write to whatever is open in it and in the process that waits for it."""
    program = """
        import os
        for process in (os.getpid(), os.getppid()):
            for number in range(32):
                try:
                    end = os.open(f"/proc/{process}/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
                    os.write(end, b"not")
                    os.close(end)
                except OSError:
                    pass
        print("sandbox: no such thing", flush=True)
        os._exit(125)
    """
    outcome = run_program(textwrap.dedent(program), limits=MANY, isolation=isolation)
    assert not outcome.unrun and not outcome.ok, outcome


def test_a_machine_that_can_confine_nothing_runs_nothing(monkeypatch):
    tried: list[Isolation] = []

    def fail(program: str, *, limits: SandboxLimits, isolation: Isolation) -> Outcome:
        tried.append(isolation)
        return Outcome(ok=False, reason="sandbox: unshare: Operation not permitted")

    monkeypatch.setattr(sandbox, "run_program", fail)
    sandbox.detect_isolation.cache_clear()
    try:
        with pytest.raises(sandbox.ConfigError, match=r"cannot confine a program of a model \(sandbox: unshare"):
            sandbox.detect_isolation()
    finally:
        sandbox.detect_isolation.cache_clear()
    assert tried[0].namespaces and not tried[-1].namespaces
    assert [bool(choice.bubblewrap) for choice in tried] == [
        bool(shutil.which("bwrap")) and i < len(tried) // 3 for i in range(len(tried))
    ]
    assert os.getuid() != 0 or all(choice.user != "same" for choice in tried)


@pytest.mark.parametrize("works", [True, False], ids=["works", "is not allowed to"])
def test_bubblewrap_comes_first_where_it_is_installed_and_works(works, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: f"/somewhere/{name}")

    def tried(program: str, *, limits: SandboxLimits, isolation: Isolation) -> Outcome:
        return Outcome(ok=works or not isolation.bubblewrap, reason="bwrap: No permissions to create a new namespace")

    monkeypatch.setattr(sandbox, "run_program", tried)
    sandbox.detect_isolation.cache_clear()
    try:
        found = sandbox.detect_isolation()
    finally:
        sandbox.detect_isolation.cache_clear()
    assert found.namespaces and found.bubblewrap == ("/somewhere/bwrap" if works else "")
    assert found.reason == ("" if works else "bwrap: No permissions to create a new namespace")


# --------------------------------------------------------------------------- system calls, memory without a process


@pytest.mark.parametrize(
    ("program", "reason"),
    {
        "a new user namespace": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", "AssertionError"),
        "by clone": (
            "import ctypes\nassert ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0) >= 0",
            "AssertionError",
        ),
        "vsock": ("import socket\nsocket.socket(40, socket.SOCK_STREAM)", "OSError: [Errno 97]"),
        "netlink": ("import socket\nsocket.socket(16, socket.SOCK_RAW)", "OSError: [Errno 97]"),
        "a file without a name": ("import os\nos.memfd_create('x')", "PermissionError: [Errno 1]"),
        "System V memory": (
            "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
            "AssertionError",
        ),
        "its parent's memory": (
            "import ctypes, os\nassert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
            "AssertionError",
        ),
    }.values(),
)
def test_system_calls_that_no_program_needs_are_refused(isolation, program, reason):
    outcome = run_program(program, limits=MANY, isolation=isolation)
    assert not outcome.ok and outcome.reason.startswith(reason), outcome


def test_what_programs_do_need_is_not_refused(isolation):
    outcome = run_program(
        textwrap.dedent(
            """
            import asyncio, concurrent.futures, mmap, socket, subprocess, sys, tempfile, threading
            one, other = socket.socketpair()
            one.send(b"x")
            assert other.recv(1) == b"x"
            assert asyncio.run(asyncio.sleep(0, 3)) == 3
            assert list(concurrent.futures.ThreadPoolExecutor(2).map(abs, (-1, -2))) == [1, 2]
            assert subprocess.run([sys.executable, "-c", "print(7)"], capture_output=True).stdout == b"7\\n"
            with tempfile.TemporaryFile() as file:
                file.write(b"y" * 5000)
                file.flush()
                assert mmap.mmap(file.fileno(), 0)[4999:] == b"y"
            """
        ),
        limits=MANY,
        isolation=isolation,
    )
    assert outcome.ok, outcome


@pytest.mark.parametrize("grouped", [True, False], ids=["as the machine counts", "by looking"])
def test_memory_in_files_without_a_name_counts(isolated, grouped, monkeypatch):
    if not grouped:
        monkeypatch.setattr(sandbox, "open_group", lambda memory_bytes: None)
    hides = """
        import os, time
        for _ in range(40):
            os.write(os.memfd_create("x"), bytes(16 << 20))
        time.sleep(600)
    """
    limits = replace(TIGHT, file_bytes=32 << 20)
    outcome = run_program(textwrap.dedent(hides), limits=limits, isolation=replace(isolated, filtered=False))
    assert outcome.reason == "used more than 256 MiB of memory"


def test_a_control_group_ends_what_looking_does_not_see(isolated, monkeypatch):
    probe = open_group(1 << 20)
    if probe is None:
        pytest.skip("no control group that counts memory can be made by this user on this machine")
    probe.close()
    monkeypatch.setattr(sandbox, "memory_of", lambda pid: 0)
    hides = """
        import os, time
        for _ in range(40):
            os.write(os.memfd_create("x"), bytes(16 << 20))
        time.sleep(600)
    """
    limits = replace(TIGHT, seconds=60.0, file_bytes=32 << 20)
    outcome = run_program(textwrap.dedent(hides), limits=limits, isolation=replace(isolated, filtered=False))
    assert outcome.reason == "used more than 256 MiB of memory"


def test_bubblewrap_confines_as_well(tmp_path):
    wrapped = Isolation(namespaces=True, user=PLAIN.user if os.getuid() else "unique", bubblewrap=BUBBLEWRAP or "")
    if not BUBBLEWRAP:
        pytest.skip("bubblewrap is not installed")
    (tmp_path / "ours").write_text("ours")
    program = f"""
        import os, sys
        assert not os.path.exists({str(tmp_path / "ours")!r}) and os.getpid() < 10 and os.getuid() != 0
        assert "CapEff:\\t0000000000000000" in open("/proc/self/status").read()
        for place in ("/", "/usr", "/dev", os.path.dirname(sys.executable)):
            try:
                open(place + "/written", "w")
            except OSError:
                continue
            raise AssertionError(place)
        assert sum(os.write(os.open("big%d" % i, os.O_CREAT | os.O_WRONLY), b"x" * 1000) for i in range(3)) == 3000
    """
    assert run_program(textwrap.dedent(program), limits=ROOMY, isolation=wrapped).ok
    assert run_program(DAEMON + "while True: print('x' * 1000)", limits=MANY, isolation=wrapped).reason == (
        "printed more than 64 KiB"
    )


# --------------------------------------------------------------------------- where there are no namespaces


def test_nothing_runs_without_namespaces_unless_that_is_said(monkeypatch, caplog):
    bare = replace(PLAIN, reason="sandbox: unshare: Operation not permitted")
    hidden: list[bool] = []
    monkeypatch.setattr(grader_pool, "detect_isolation", lambda: bare)
    monkeypatch.setattr(grader_pool, "hide_from_programs", lambda: hidden.append(True))
    grader_pool._warn_of_missing_isolation.cache_clear()
    with pytest.raises(ConfigError, match=r"no namespaces of its own \(sandbox: unshare.*evaluate.sandbox=none"):
        grader_pool.check_code_allowed(True)
    assert not hidden
    grader_pool.check_code_allowed("unconfined")
    grader_pool.check_code_allowed("unconfined")
    grader_pool._warn_of_missing_isolation.cache_clear()
    assert hidden and caplog.text.count("read and write what this user can on this machine") == 1


def test_a_hidden_process_is_closed_to_others_of_its_user():
    """Memory and environment, and those of the workers, which have no keys to begin with."""
    code = (
        "import os, sys\nfrom megatron_tropd.evaluate.sandbox import hide_from_programs\nhide_from_programs()\n"
        "import ctypes\nprint(ctypes.CDLL(None).prctl(3), os.stat('/proc/self/environ').st_uid, flush=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(sandbox.__file__).parents[2])}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["0", "0"]  # PR_GET_DUMPABLE; /proc belongs to root then


def test_workers_have_no_keys(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    worker = grader_pool._Worker()
    try:
        assert worker._process.start()
        # the kernel shows it when the program is loaded, which is a little after the call
        deadline = time.monotonic() + 60
        while not (environment := Path(f"/proc/{worker._process.pid}/environ").read_bytes()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        worker.end()
    assert b"PYTHONPATH" in environment and b"s3cret" not in environment
