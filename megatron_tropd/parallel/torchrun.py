"""torchrun without its traceback: what went wrong has been said by the rank that it went wrong on.

``python -m megatron_tropd.parallel.torchrun OPTIONS -m megatron_tropd VERB ...`` takes torchrun's options, starts ranks
as torchrun does, and ends with the status of the rank that failed first. ``tropd launch`` is the same, and so does
torchrun itself end, where this package is installed (``megatron_tropd_torchrun``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

from megatron_tropd.parallel.stopping import handlers

MODULE = "megatron_tropd.parallel.torchrun"
_SAID = (2, 75)  # statuses with which a rank, or the first one, has said why: an error of ours, a run asked to stop
_LEAVING_S = 5.0
# what comes later among the options counts: a rank that saves may take longer than torchrun's 30 seconds
_DEFAULTS = ("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "--shutdown-timeout=600")


def main(arguments: Sequence[str]) -> int:
    """Run torchrun's own main with these arguments; return the exit status."""
    from torch.distributed.run import main as torchrun

    be_quiet()
    try:
        torchrun([*_DEFAULTS, *arguments])
    except Exception as error:
        status = status_of(error)
        if status is None:
            raise
        return status
    return 0


def be_quiet() -> None:
    """Have torchrun not say of a rank that failed what ``status_of`` says in a line, nor of OMP_NUM_THREADS."""
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.run").setLevel(logging.ERROR)


def status_of(error: BaseException) -> int | None:
    """Return the exit status for what torchrun raises, with a line where no rank has said why; None for other errors.

    Ranks that are still there are ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if isinstance(error, ChildFailedError):
        rank, failure = error.get_first_failure()
        status = int(failure.exitcode)
        if status not in _SAID:
            how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
            print(f"rank {rank} (process {failure.pid}) {how}", file=sys.stderr, flush=True)
        return status if status >= 0 else 128 - status
    if isinstance(error, SignalException):
        _end(_children(os.getpid()))  # there are some when a second signal has come while the first was passed on
        return 128 + int(error.sigval)
    return None


def run_ranks(options: Sequence[str], command: Sequence[str], *, environment: Mapping[str, str], cwd: Path) -> int:
    """Run ``python COMMAND`` on several ranks of this machine; pass on what signals come. Return the exit status.

    The launcher gets a session of its own: a terminal would send Ctrl-C to it as well, and it would count it twice.
    """
    line = [sys.executable, "-m", MODULE, *options, *command]
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        for ranks in started:
            ranks.send_signal(number)

    with handlers((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1), pass_on):
        started.append(
            subprocess.Popen(line, cwd=cwd, env=dict(environment), stdin=subprocess.DEVNULL, start_new_session=True)
        )
        return started[0].wait()


def _children(parent: int) -> list[int]:
    """List the processes that this one has started and that are still there."""
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if _state(path)[1] == str(parent)]


def _end(pids: Sequence[int]) -> None:
    """Have ranks leave at once: they are asked again, and ended when that does not help."""
    for number, patience in ((signal.SIGINT, _LEAVING_S), (signal.SIGKILL, _LEAVING_S)):
        deadline = time.monotonic() + patience
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while time.monotonic() < deadline and _running(pids):
            time.sleep(0.05)


def _running(pids: Sequence[int]) -> list[int]:
    return [pid for pid in pids if _state(Path(f"/proc/{pid}"))[0] not in ("", "Z")]


def _state(process: Path) -> tuple[str, str]:
    """Return the state of a process, a letter, and its parent; empty where it has ended."""
    try:
        state, parent = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except (OSError, ValueError):
        return "", ""
    return state, parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
