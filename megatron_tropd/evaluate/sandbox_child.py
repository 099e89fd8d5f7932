"""Confine a process before it runs a program nobody has read. Started by ``evaluate.sandbox``, never imported.

Only the standard library, because it runs with an empty environment and isolated from every package. In order: a
control group where there is one, a new user where that is possible, new namespaces (user, mount, process, network, IPC)
with a file system that shows the interpreter and nothing else, by this file or by bubblewrap, which runs this file
again inside; limits, the filter of system calls, then ``exec``. Any step that fails ends it with ``SETUP_FAILED`` and
one line. Whether the program was started is written to a pipe of which no program ever has an end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from typing import Any

SETUP_FAILED = 125
STARTED = b"started"  # written at the last moment before a program runs
_LIBC = ctypes.CDLL(None, use_errno=True)
# linux/sched.h, sys/mount.h, sys/prctl.h
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE, _DETACH = 2, 4, 4096, 16384, 1 << 18, 2
_PDEATHSIG, _DUMPABLE, _SECCOMP, _SUBREAPER, _NO_NEW_PRIVS = 1, 4, 22, 36, 38
_FILTER = 2  # linux/seccomp.h
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_MOUNT_SETATTR, _RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, 0x8000, 1, 2
# what a Python program needs of the machine, besides the interpreter itself
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_WORK = "/sandbox"  # not /tmp, where the interpreter may live


def main() -> None:
    config: dict[str, Any] = json.loads(sys.argv[1])
    try:
        _check(_LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        if config["group"]:
            with open(config["group"], "w") as group:
                group.write("0")
        if config["bubblewrap"]:
            _become_bubblewrap(config)
        program = sys.stdin.buffer.read()
        if config["inside"]:
            work = _WORK
            _become(config, work)
        elif config["namespaces"]:
            _enter_namespaces(config)
            work = _WORK
        else:
            _check(_LIBC.prctl(_SUBREAPER, 1, 0, 0, 0), "prctl")
            work = str(config["directory"])
            _become(config, work)
        _run(program, config, work)
    except OSError as error:
        print(f"sandbox: {error}", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):  # closed by then in all processes but the one that becomes the program
            os.write(config["started"], b"not")
        os._exit(SETUP_FAILED)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


# --------------------------------------------------------------------------- namespaces by bubblewrap


def _become_bubblewrap(config: dict[str, Any]) -> None:
    """Turn into bubblewrap, which makes the namespaces and the file system and runs this file again as process 1."""
    own = {**config, "bubblewrap": "", "group": "", "inside": True}
    # root needs no user namespace to make the others, and leaves being root inside
    kinds = ("user", "ipc", "pid", "net", "uts")[os.getuid() == 0 :]
    arguments = [f"--unshare-{kind}" for kind in kinds] + ["--die-with-parent", "--as-pid-1"]
    shown = (*_SYSTEM, *_interpreter())
    for folder in _folders_above(shown + _DEVICES):  # which bubblewrap would make for their owner alone
        arguments += ["--perms", "0755", "--dir", folder]
    for path in shown:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            arguments += ["--ro-bind", path, path]
    for path in _DEVICES:
        arguments += ["--dev-bind", path, path]
    if not any(path.startswith("/tmp/") for path in shown):
        arguments += ["--symlink", _WORK, "/tmp"]
    arguments += ["--proc", "/proc", "--size", str(config["file_bytes"]), "--tmpfs", _WORK]
    arguments += ["--remount-ro", "/", "--chdir", _WORK, "--", sys.executable, "-I", "-B", "-c", config["child"]]
    os.execv(config["bubblewrap"], [config["bubblewrap"], *arguments, json.dumps(own)])


def _folders_above(paths: Iterable[str]) -> list[str]:
    """List the directories above the paths, outermost first, that are not among them."""
    above = {path[:end] for path in paths for end, letter in enumerate(path) if letter == "/" and end}
    return sorted(above - set(paths))


# --------------------------------------------------------------------------- namespaces by ourselves


def _enter_namespaces(config: dict[str, Any]) -> None:
    """Return in process 1 of a new world; the one that called waits for it and ends as it ended."""
    user, group = os.getuid(), os.getgid()
    kinds = _NEWNS | _NEWUTS | _NEWIPC | _NEWPID | _NEWNET
    # root needs no user namespace to make the others, and leaves being root once they are made
    _check(_LIBC.unshare(kinds if user == 0 else kinds | _NEWUSER), "unshare")
    if user != 0:
        for file, line in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(line)
    first = os.fork()
    if first:
        _end_like(os.waitpid(first, 0)[1])
    # when the process outside is killed, so is this one, and with it everything in here
    _check(_LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    _make_root(str(config["directory"]), config)
    _become(config, _WORK)


def _make_root(root: str, config: dict[str, Any]) -> None:
    """Make a file system of its own: the system's libraries and the interpreter, read-only, and one empty directory."""
    _mount(None, "/", None, _REC | _PRIVATE)
    _mount("tmpfs", root, "tmpfs", _NOSUID, "size=1m,mode=755")
    for path in (*_SYSTEM, *_DEVICES, *_interpreter()):
        _show(root, path)
    for place in ("/proc", _WORK):
        os.makedirs(root + place, exist_ok=True)
    if not os.path.lexists(f"{root}/tmp"):
        os.symlink(_WORK, f"{root}/tmp")
    # a container may forbid a new /proc; programs that do without it still run
    with contextlib.suppress(OSError):
        _mount("proc", f"{root}/proc", "proc", _NOSUID | _NODEV)
    os.chdir(root)
    _check(_LIBC.syscall(_PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(_LIBC.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    _check(
        _LIBC.syscall(_MOUNT_SETATTR, -100, b"/", _RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)),
        "mount_setattr",
    )
    _mount("tmpfs", _WORK, "tmpfs", _NOSUID | _NODEV, f"size={config['file_bytes']},mode=1777")


def _interpreter() -> list[str]:
    """List the directories this very interpreter is made of: its prefixes, and whatever else it has mapped."""
    with open("/proc/self/maps") as maps:
        mapped = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    libraries = {os.path.dirname(path) for path in mapped if path.startswith("/") and os.path.exists(path)}
    wanted = {sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable)), *libraries}
    shown = [*_SYSTEM]
    for path in sorted(wanted):
        if not any(path == other or path.startswith(f"{other}/") for other in shown):
            shown.append(path)
    return shown[len(_SYSTEM) :]


def _show(root: str, path: str) -> None:
    place = root + path
    if not os.path.exists(path) or os.path.lexists(place):
        return
    os.makedirs(os.path.dirname(place), mode=0o755, exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), place)
        return
    if os.path.isdir(path):
        os.makedirs(place, mode=0o755)
    else:
        open(place, "w").close()
    _mount(path, place, None, _BIND | _REC)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    def raw(text: str | None) -> bytes | None:
        return None if text is None else text.encode()

    _check(
        _LIBC.mount(raw(source), raw(target), raw(kind), ctypes.c_ulong(flags), raw(options)),
        f"mount {target}",
    )


# --------------------------------------------------------------------------- user, limits, program


def _become(config: dict[str, Any], work: str) -> None:
    """Become a user that owns nothing but the working directory, where whoever started us can."""
    if os.getuid() == 0 and config["user"]:
        os.chown(work, config["user"], config["user"])
        os.setgroups([])
        os.setresgid(config["user"], config["user"], config["user"])
        os.setresuid(config["user"], config["user"], config["user"])
        # changing user undid both
        _check(_LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _check(_LIBC.prctl(_DUMPABLE, 1, 0, 0, 0), "prctl")
    _check(_LIBC.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")


def _run(program: bytes, config: dict[str, Any], work: str) -> None:
    """Run the program in a child, so that what it leaves running has a parent to end it."""
    os.chdir(work)
    with open("task.json", "wb") as file:
        file.write(program)
    child = os.fork()
    if child == 0:
        os.set_inheritable(config["started"], False)  # the program must not say for us whether it was started
        os.setsid()
        _check(_LIBC.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _limit(config)
        environment = {**os.environ, "PATH": "/usr/bin:/bin", "HOME": work, "LANG": "C.UTF-8", "TMPDIR": work}
        environment |= {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        command = [sys.executable, "-I", "-B", "-c", config["driver"], *map(str, config["fds"])]
        _filter_calls(bytes.fromhex(config["filter"]))
        os.write(config["started"], STARTED)
        os.execve(sys.executable, command, environment)
    os.close(config["started"])  # nor find it open here
    status = _wait_for(child)
    if not config["namespaces"]:
        _end_descendants()
    _end_like(status)


def _limit(config: dict[str, Any]) -> None:
    for name, most in (
        ("AS", config["memory_bytes"]),
        ("CPU", config["cpu_seconds"]),
        ("FSIZE", config["file_bytes"]),
        ("NPROC", config["processes"]),
        ("NOFILE", config["open_files"]),
        ("CORE", 0),
        ("MSGQUEUE", 0),
        ("MEMLOCK", 0),
    ):
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # at the lower limit of CPU time comes a signal that says so, at the upper one SIGKILL, which says nothing
        upper = most + 1 if name == "CPU" and (hard == resource.RLIM_INFINITY or hard > most) else most
        resource.setrlimit(kind, (most, upper))


def _filter_calls(instructions: bytes) -> None:
    """Let the kernel refuse, from now on and in all that this process becomes, what the filter refuses."""
    if not instructions:
        return
    array = ctypes.create_string_buffer(instructions, len(instructions))
    # struct sock_fprog: the number of instructions, of 8 bytes each, and where they are
    program = struct.pack("@HP", len(instructions) // 8, ctypes.addressof(array))
    _check(_LIBC.prctl(_SECCOMP, _FILTER, program, 0, 0), "prctl")


def _wait_for(child: int) -> int:
    while True:
        pid, status = os.wait()  # orphans of the program come to us too
        if pid == child:
            return status


def _end_descendants() -> None:
    """End what the program left behind. Orphans come to us (we are their subreaper), so in the end none is missed."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            left = [int(pid) for pid in children.read().split()]
        if not left:
            return
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        for pid in left:
            os.waitpid(pid, 0)


def _end_like(status: int) -> None:
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
