"""What the page says of versions, verbs, completion and exit statuses is what the program does."""

from __future__ import annotations

import errno
import re
import signal
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron_tropd import __version__, cli
from megatron_tropd.errors import EXIT_STATUSES, exit_statuses_table
from megatron_tropd.parallel.stopping import Stopped
from megatron_tropd.train import preemption

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "commands.md").read_text(encoding="utf-8")


@pytest.fixture
def status_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line on these words; return the exit status. ``fails``: what its first check raises."""

    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    def run(*words: str, fails: BaseException | None = None) -> int:
        def check(_: object) -> None:
            if fails is not None:
                raise fails

        monkeypatch.setattr(cli, "leave", leave)
        monkeypatch.setattr(cli, "check_variables", check)
        monkeypatch.setattr(sys, "argv", ["tropd", *words])
        # both are for the process, which here is the tests'
        monkeypatch.setattr(cli.logging, "basicConfig", lambda **_: None)
        with warnings.catch_warnings(), pytest.raises(SystemExit) as left:
            cli.main()
        return int(left.value.code or 0)

    return run


def test_the_page_has_the_table_of_statuses():
    assert exit_statuses_table() in PAGE


def test_every_verb_is_on_the_page():
    verbs = {one.name or one.callback.__name__ for one in cli.app.registered_commands if one.callback} | {"convert"}
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == verbs


def test_versions_are_printed_without_importing_what_they_are_of(status_of: Any, capsys: pytest.CaptureFixture[str]):
    assert status_of("--version") == 0
    said = capsys.readouterr().out
    assert f"megatron-tropd {__version__}\n" in said and f"torch {version('torch')}\n" in said
    assert "megatron-core 0.16.1\n" in said


def test_what_the_user_can_mend_is_status_2(status_of: Any, tmp_path: Path):
    assert status_of("frobnicate") == 2
    assert status_of("train", "--no-such-option") == 2
    assert status_of("train", str(tmp_path / "missing.yaml")) == 2
    assert status_of("health", fails=OSError(errno.ENOSPC, "no space")) == 2


def test_defects_keep_their_traceback(status_of: Any):
    with pytest.raises(OSError, match="input/output"):
        status_of("health", fails=OSError(errno.EIO, "input/output"))
    with pytest.raises(ZeroDivisionError):
        status_of("health", fails=ZeroDivisionError())


def test_signals_are_128_and_their_number_and_training_asks_to_be_resumed(status_of: Any):
    assert status_of("evaluate", fails=Stopped(signal.SIGTERM)) == 143
    assert status_of("evaluate", fails=Stopped(signal.SIGHUP)) == 129
    # of training, which has its own: sysexits.h calls 75 EX_TEMPFAIL
    assert [preemption._status(one) for one in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)] == [75, 75, 75]
    assert preemption._status(signal.SIGINT) == 130
    assert EXIT_STATUSES.keys() == {"0", "1", "2", "75", "130", "128 + n"}


def test_shells_complete_verbs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("_TROPD_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "tropd ev")
    monkeypatch.setenv("COMP_CWORD", "1")
    with pytest.raises(SystemExit) as left:
        cli.app(prog_name="tropd")
    assert not left.value.code
    assert capsys.readouterr().out.split() == ["evaluate"]
