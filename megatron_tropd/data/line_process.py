"""A module of this package in a process of its own, which exists to be ended: a JSON object per line in, one out."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PACKAGE_PARENT = str(Path(__file__).resolve().parents[2])
# all of the environment that such a process is given: programs of a model may run beside it, so it has no keys to lose
_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "HOME", "PYTHONHOME", "VIRTUAL_ENV", "TZ")


class LineProcess:
    """The process, started by ``start`` and ended by ``end``, or when it has no answer in time."""

    def __init__(self, module: str, *, environment: Mapping[str, str]) -> None:
        """Start nothing yet.

        Args:
            module: its ``main`` reads standard input and answers every line.
            environment: variables beside those that are handed on.
        """
        self._module, self._environment = module, dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a process that is forked shares it with its parent, and must not

    @property
    def pid(self) -> int | None:
        """Return its number; None where there is none."""
        return None if self._process is None else self._process.pid

    def is_running(self) -> bool:
        """Say whether it is there, and ours."""
        return self._process is not None and self._owner == os.getpid() and self._process.poll() is None

    def start(self) -> bool:
        """Start it where it is not running; say whether it is new."""
        if self.is_running():
            return False
        self.end()
        paths = [_PACKAGE_PARENT, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={
                **{name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ},
                "PYTHONPATH": os.pathsep.join(paths),
                "OMP_NUM_THREADS": "1",
                **self._environment,
            },
            start_new_session=True,
        )
        return True

    def exchange(self, message: bytes, seconds: float) -> dict[str, Any] | None:
        """Send a line, or nothing, and return what one line says; None when that takes too long, or the process ends.

        It is ended then: a late answer would be taken for one to the next line.
        """
        reply = self._exchange(message, seconds)
        if reply is None:
            self.end()
        return reply

    def _exchange(self, message: bytes, seconds: float) -> dict[str, Any] | None:
        assert self._process is not None and self._process.stdin is not None and self._process.stdout is not None
        deadline, parts = time.monotonic() + seconds, list[bytes]()
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while not parts or not parts[-1].endswith(b"\n"):
                if not selector.select(timeout=max(deadline - time.monotonic(), 0.0)):
                    return None
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    return None
                parts.append(part)
        reply: dict[str, Any] = json.loads(b"".join(parts))
        return reply

    def end(self) -> None:
        """End it, if it is there and ours."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # what was not taken any more
                stream.close()
