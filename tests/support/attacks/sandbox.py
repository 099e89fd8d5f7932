"""Programs that a model might have written, run as whoever runs this, and as others where that can be arranged.

As root the full form tries them three times: as root, as an ordinary user who may make namespaces, and as one who may
not. The two are processes of another user (``setpriv``), the last behind a filter that refuses new namespaces.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.attacks import Attack, Hole

_KEY = "s3cret-key-of-the-attacked"
_USER = 12345
_PYTHON = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")  # that other users may run
_HERE = Path(__file__).resolve().parents[3]


@dataclass(frozen=True, slots=True)
class Target:
    """What programs are after: a process, a port, a socket without a file, a file."""

    pid: int
    port: int
    name: str
    file: str


_CALL = """
import ctypes, os
def call(name, *arguments):
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""
# by what is tried: a program that ends well when it has got what it was after
_PROGRAMS = {
    "read keys from the environment, its own and others'": """
        import glob, os
        found = str(dict(os.environ)).encode()
        for file in glob.glob("/proc/[0-9]*/environ") + ["/proc/{pid}/environ"]:
            try:
                found += open(file, "rb").read()
            except OSError:
                pass
        assert {key!r}.encode() in found
    """,
    "open the trainer's memory": "open('/proc/{pid}/mem', 'r+b')",
    "trace the trainer": "call('ptrace', 16, {pid}, 0, 0)",
    "end the trainer": "import os; os.kill({pid}, 0)",
    "reach the network": "import socket; socket.create_connection(('127.0.0.1', {port}), 5)",
    "reach a service of this machine by a socket without a file": """
        import socket
        socket.socket(socket.AF_UNIX).connect("\\0{name}")
    """,
    "open a socket to the machine's host (vsock)": "import socket; socket.socket(40, socket.SOCK_STREAM)",
    "read a file of the user's": "assert 'ours' in open({file!r}).read()",
    "write to it": "open({file!r}, 'a').write('theirs')",
    "write beside the interpreter": "import os; open(os.path.dirname(os.__file__) + '/theirs.py', 'w')",
    "make a user namespace": "call('unshare', 0x10000000)",
    "make one with clone": "call('syscall', 56, 0x10000000 | 17, 0, 0, 0, 0)",
    "mount a file system": "call('mount', b'tmpfs', b'/tmp', b'tmpfs', 0, None)",
    "become root": "import os; os.setuid(0); assert os.getuid() == 0 and open('/etc/shadow').read()",
    "hide 2 GiB in files without a name": """
        import os
        held = [os.memfd_create("x") for _ in range(128)]
        for one in held:
            os.write(one, bytes(16 << 20))
    """,
    "the same in System V memory": """
        for _ in range(128):
            call("shmget", 0, 16 << 20, 0o1600)
    """,
    "hold 2 GiB in eight processes": """
        import os, time
        for _ in range(8):
            if os.fork() == 0:
                held = b"x" * (256 << 20)
                time.sleep(5)
                os._exit(0)
        assert all(os.waitstatus_to_exitcode(os.wait()[1]) == 0 for _ in range(8))
    """,
    "start processes without end": """
        import os
        for _ in range(500):
            if os.fork() == 0:
                import time
                time.sleep(60)
    """,
    "write 1 GiB of files": """
        for number in range(64):
            open(f"big{{number}}", "wb").write(bytes(16 << 20))
    """,
    "print 100 MiB": "print('x' * (100 << 20), flush=True)",
    "load code into the kernel": "call('syscall', 321, 5, b'x' * 128, 128)",
    "open an io_uring": "call('syscall', 425, 4, b'x' * 256)",
}
# tests of the suite; ``tests/system/test_sandbox.py`` has others of its own
_QUICK = {
    "read keys from the environment, its own and others'",
    "open the trainer's memory",
    "reach a service of this machine by a socket without a file",
    "open a socket to the machine's host (vsock)",
    "read a file of the user's",
    "hide 2 GiB in files without a name",
}
# what nothing keeps a program from once evaluate.sandbox=none is said; docs/security.md says so
_UNCONFINED = {
    "end the trainer",
    "read a file of the user's",
    "write to it",
    "write 1 GiB of files",
    "write beside the interpreter",
    "become root",
}


@contextlib.contextmanager
def _target() -> Iterator[Target]:
    """Set a process, sockets and a file up as a trainer has them."""
    folder = Path(tempfile.mkdtemp(prefix="tropd-target-"))
    folder.chmod(0o755)
    (folder / "ours").write_text("ours")
    (folder / "ours").chmod(0o666)  # that it is not even seen counts
    name = f"tropd-target-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as service:
        service.bind("\0" + name)
        service.listen()
        try:
            yield Target(os.getpid(), server.getsockname()[1], name, str(folder / "ours"))
        finally:
            if (folder / "ours").read_text() != "ours":
                (folder / "ours").unlink()
                raise Hole("the file was changed")
            shutil.rmtree(folder)


def attempts(*, unconfined: bool, quick: bool | None) -> dict[str, tuple[bool, str]]:
    """Try programs as this user, the quick ones, the others, or all; whether each was held, and why it ended."""
    import textwrap

    from megatron_tropd.errors import ConfigError
    from megatron_tropd.evaluate.grader_pool import check_code_allowed
    from megatron_tropd.evaluate.sandbox import SandboxLimits, detect_isolation, run_program

    os.environ["SOME_API_KEY"] = _KEY  # not in this process's own block, which is why the target is a child, too
    found: dict[str, tuple[bool, str]] = {}
    if unconfined:
        try:
            check_code_allowed(True)
            found["run at all"] = (False, "no namespaces, and not refused")
        except ConfigError as error:
            found["run at all"] = (True, f"refused: {str(error)[:110]}...")
    try:
        check_code_allowed("unconfined" if unconfined else True)
    except ConfigError as error:  # whoever tries this has no namespaces: nothing is run, which holds
        return {name: (True, f"refused: {str(error)[:110]}...") for name in _PROGRAMS}
    limits = SandboxLimits(seconds=60.0, processes=16 if detect_isolation().namespaces else 4000)
    with _target() as target:
        for name, source in _PROGRAMS.items():
            if (unconfined and name in _UNCONFINED) or quick not in (None, name in _QUICK):
                continue
            values = {"pid": target.pid, "port": target.port, "name": target.name, "file": target.file, "key": _KEY}
            outcome = run_program(_CALL + textwrap.dedent(source).format(**values), limits=limits)
            # one that was not run shows nothing
            found[name] = (not outcome.ok and not outcome.unrun, outcome.reason[:100])
    return found


def main() -> None:
    """Print what ``attempts`` finds, as JSON: for the other users, who are other processes."""
    if "--no-namespaces" in sys.argv:
        _refuse_namespaces()
    quick = None if "--quick" not in sys.argv and "--slow" not in sys.argv else "--quick" in sys.argv
    print(json.dumps(attempts(unconfined="--no-namespaces" in sys.argv, quick=quick)), flush=True)


def _refuse_namespaces() -> None:
    """Put this process where a container without namespaces is: under a filter that refuses to make any."""
    import ctypes
    import struct

    from megatron_tropd.evaluate.syscall_filter import filter_for

    instructions = filter_for(os.uname().machine, network=True)
    assert instructions is not None
    libc, array = ctypes.CDLL(None, use_errno=True), ctypes.create_string_buffer(instructions, len(instructions))
    program = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(array))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program, 0, 0) == 0  # PR_SET_SECCOMP


@functools.cache
def _found(who: str) -> dict[str, tuple[bool, str]]:
    """Try everything as somebody, once, in a process whose environment holds a key."""
    command = [sys.executable]
    environment = {**os.environ, "PYTHONPATH": str(_HERE), "SOME_API_KEY": _KEY}
    if who not in ("--quick", "--slow"):
        packages = next(path for path in sys.path if path.endswith("site-packages"))
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{_HERE}:{packages}", "SOME_API_KEY": _KEY}
        command = ["setpriv", f"--reuid={_USER}", f"--regid={_USER}", "--clear-groups", "--inh-caps=-all", str(_PYTHON)]
    code = "from tests.support.attacks.sandbox import main; main()"
    arguments = ["--no-namespaces"] if who == "user without namespaces" else [who] if who.startswith("--") else []
    done = subprocess.run(
        [*command, "-c", code, *arguments], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Hole(f"as {who}: {done.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {name: (held, said) for name, (held, said) in found.items()}


def _attack(who: str, name: str) -> Callable[[Path], str]:
    def attempt(directory: Path) -> str:
        held, said = _found(who)[name]
        if not held:
            raise Hole(f"it did ({said})" if said else "it did")
        return said

    return attempt


def _rows() -> Iterator[Attack]:
    me = "root" if os.getuid() == 0 else "user"
    for name in _PROGRAMS:
        quick = name in _QUICK
        yield Attack(name=f"{me}: {name}", attempt=_attack("--quick" if quick else "--slow", name), quick=quick)
    if os.getuid() or not (_PYTHON.exists() and shutil.which("setpriv")):
        return
    for who in ("user", "user without namespaces"):
        for name in (*(("run at all",) if who != "user" else ()), *_PROGRAMS):
            if who == "user" or name not in _UNCONFINED:
                yield Attack(name=f"{who}: {name}", attempt=_attack(who, name), quick=False)


ATTACKS = tuple(_rows())
