"""Real vLLM servers for tests: started, killed, paused and started again as processes of their own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEY = "a key for tests"


class ServerProcess:
    """``tropd serve ROLE`` with its workers, in a process group of their own."""

    def __init__(self, config: Path, log: Path, settings: Sequence[str] = (), *, role: str = "student") -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self._config = config
        self._role = role
        self._log = log
        self._settings = tuple(settings)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Does not wait for it to be ready."""
        command = [sys.executable, "-m", "megatron_tropd", "serve", self._role, str(self._config)]
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "TROPD_API_KEY": KEY,
            "VLLM_WORKER_MULTIPROCESSING_METHOD": "fork",  # saves a second import of everything
        }
        with self._log.open("ab") as file:
            self._process = subprocess.Popen(
                [*command, f"--port={self.port}", *self._settings],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def wait_until_ready(self, timeout_s: float = 240) -> None:
        """Fails with the server's log when it ends, or takes longer."""
        deadline = time.monotonic() + timeout_s
        while not self._healthy():
            assert self._process is not None
            ended = self._process.poll() is not None
            assert not ended and time.monotonic() < deadline, self._log.read_text(errors="replace")[-3000:]
            time.sleep(0.3)

    def _healthy(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """To the server and its workers alike."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL to all of it; nothing when it does not run."""
        if self._process is not None and self._process.poll() is None:
            self.signal(signal.SIGKILL)
            self._process.wait()
