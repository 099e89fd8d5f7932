"""Train and evaluate from a program or a notebook, in one process or under torchrun: what the commands do, called."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tropd.commands.locate import locate
from megatron_tropd.config.python import Config
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Device
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.parallel.device import use_device
from megatron_tropd.parallel.launch import check_launcher, check_variables
from megatron_tropd.progress.phases import Heartbeat, Phase
from megatron_tropd.report.records import Evaluation, read_evaluations
from megatron_tropd.report.sinks import read_jsonl
from megatron_tropd.report.terminal import say
from megatron_tropd.storage.write_aside import make_directory, storage_errors
from megatron_tropd.train.callbacks import Callbacks, check_callbacks

Source = RunConfig | Mapping[str, Any] | str | Path
Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """A finished run, by what it has left on disk."""

    run_dir: Path
    export: Path | None  # the trained student as a Hugging Face directory, where export.hf names one

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Read the metrics, a dictionary per step."""
        return read_jsonl(self.run_dir / "metrics.jsonl")[0]

    @property
    def evaluations(self) -> list[Evaluation]:
        """Read the accuracies, of student and teacher on every suite."""
        return read_evaluations(self.run_dir)


def train(config: Source, *, callbacks: Callbacks | None = None, prompts: Rows | None = None) -> TrainingResult:
    """Train as a configuration says, from the newest checkpoint in its run directory if there is one. Collective.

    Args:
        config: a ``Config``, or what makes one: a YAML file, or a tree of keys.
        callbacks: called while the run trains.
        prompts: rows to train on (``{"prompt": ..., "answer": ...}``, as a data file has them) instead of
            ``data.prompts``. They are written to a file in the run directory first; under torchrun every rank is to
            give the same ones.

    Raises:
        TropdError: what is wrong with configuration, models or data.
        Preempted: Ctrl-C or a signal has asked to stop, and there is a checkpoint: the same call resumes.
    """
    _prepare()
    followed = None if callbacks is None else check_callbacks(callbacks)
    settings = _on_this_machine(_configured(config) if prompts is None else _with_rows(config, prompts), told=True)
    if settings.teacher.ranks and dist.is_initialized():
        raise ConfigError(
            f"teacher.ranks = {settings.teacher.ranks} divides a launch that has not been joined yet, and this process "
            "has joined one. Train once per process, or set teacher.ranks to 0."
        )
    from megatron_tropd.commands.responses import with_responses
    from megatron_tropd.train.session import run_training  # takes seconds: after what a configuration has wrong

    with _session("train", settings.device):
        run_training(settings, callbacks=followed, own_process=False, responses=with_responses)
    return TrainingResult(settings.run_dir, settings.export.hf)


def evaluate(config: Source, *, limit: int | None = None) -> list[Evaluation]:
    """Grade the student of a configuration, and with ``evaluate.teacher`` the teacher, without training. Collective.

    Args:
        config: as of ``train``.
        limit: pose the first so many problems of every suite.

    Raises:
        TropdError: what is wrong with configuration, models or data.
    """
    _prepare()
    settings = _on_this_machine(_configured(config))
    if not settings.evaluate.prompts and not any(suite.prompts for suite in settings.evaluate.suites):
        raise ConfigError("evaluate.prompts is null: there is nothing to evaluate on. Give a file of problems.")
    # all ranks answer
    settings = settings.model_copy(update={"teacher": settings.teacher.model_copy(update={"ranks": 0})})
    settings.check_world(int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_tropd.commands.evaluate import evaluate_models

    with _session("evaluate", settings.device):
        return evaluate_models(settings, limit=limit)


def _prepare() -> None:
    check_variables(os.environ)
    check_launcher(os.environ)
    # as on the command line: there is nothing for a user to do
    warnings.filterwarnings("ignore", module=r"megatron\.core.*")
    warnings.filterwarnings("ignore", message=r".*deprecating ShardedTensor")


@contextmanager
def _session(what: str, device: Device) -> Iterator[None]:
    """Name what is done while it takes long. A process group that is made within is ended: with the block that of one
    rank, which a notebook makes again, else with the program.
    """
    use_device(device)
    was_there = dist.is_initialized()
    with Heartbeat(enabled=_is_first() and Heartbeat.speaking is None), Phase(what):
        yield
    if was_there or not dist.is_initialized():
        return
    if dist.get_world_size() == 1:
        dist.destroy_process_group()
    else:
        atexit.register(_leave)


def _leave() -> None:
    """End the process group, unless the program ends with an error: others may wait elsewhere then."""
    import torch

    if dist.is_initialized() and getattr(sys, "last_value", None) is None:
        dist.all_reduce(torch.zeros(1))  # no rank goes while another still talks to it
        dist.destroy_process_group()


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _on_this_machine(config: RunConfig, *, told: bool = False) -> RunConfig:
    """Return the configuration with what is on this machine, and nothing left open; ``told``: what was chosen."""
    located = locate(config)
    located.check_paths()
    use_device(located.device)
    from megatron_tropd.commands.fitting import fit

    fitted = fit(located)
    for line in fitted.lines() if told and _is_first() else ():
        say(line)
    if fitted.warning is not None:
        warnings.warn(fitted.warning, stacklevel=3)
    return fitted.config


def _configured(source: Source) -> RunConfig:
    return source if isinstance(source, RunConfig) else Config(source)


# --------------------------------------------------------------------------- rows of a program's own


def _with_rows(source: Source, rows: Rows) -> RunConfig:
    """Return the configuration that trains on these rows, which are in a file of its run directory then."""
    if isinstance(source, RunConfig):
        run_dir, data = source.run_dir, source.data
        if (data.prompts or data.sources) and _is_first():
            say("train got rows as prompts: they are trained on, and what data.prompts or data.sources names is not")
        file = _write_rows(run_dir, rows)
        return source.model_copy(update={"data": data.model_copy(update={"prompts": (file,), "sources": ()})})
    # the rules of the data want it named: a stand-in until the directory is known
    standing_in = Config(source, data={"prompts": "rows", "sources": []})
    file = _write_rows(standing_in.run_dir, rows)
    return standing_in.model_copy(update={"data": standing_in.data.model_copy(update={"prompts": (file,)})})


def _write_rows(run_dir: Path, rows: Rows) -> Path:
    """Write rows as JSON lines to a file that is named by its content; return where. Every rank does."""
    make_directory(run_dir)
    digest, count = hashlib.sha256(), 0
    with storage_errors(run_dir), tempfile.NamedTemporaryFile(dir=run_dir, suffix=".partial") as file:
        with Phase("writing rows") as phase:
            for row in phase.watch(rows):
                line = _line(row, count)
                digest.update(line)
                file.write(line)
                count += 1
        if not count:
            raise DataError("prompts holds no row: give some, or leave it out to train on data.prompts.")
        file.flush()
        os.fsync(file.fileno())
        target = run_dir / f"prompts-{digest.hexdigest()[:16]}.jsonl"
        if not target.exists():
            aside = Path(f"{file.name}.whole")
            os.link(file.name, aside)
            os.replace(aside, target)
    if _is_first():
        say(f"{count:,} rows to train on: {target}")
    return target


def _line(row: Mapping[str, Any], number: int) -> bytes:
    if not isinstance(row, Mapping):
        raise DataError(f"row {number} of prompts is {type(row).__name__}, expected a mapping with a prompt.")
    try:
        return (json.dumps(dict(row), ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(f"row {number} of prompts cannot be written as JSON: {error}.") from None
