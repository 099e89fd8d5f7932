"""Evaluation results and sampled answers as files of a run: ``RUN/evaluation.json`` and ``RUN/samples.jsonl``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

from megatron_tropd.errors import DataError
from megatron_tropd.report.sinks import read_jsonl
from megatron_tropd.storage.write_aside import make_directory, write_aside

EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "samples.jsonl"
PROVENANCE_FILE = "hub.json"  # the commit of every name on the hub, by the name as it was given
BEFORE, DURING, AFTER, TEACHER = "student before", "student", "student after", "teacher"  # Evaluation.model


When = Literal["before", "during", "after"]  # of training


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One model on one suite. Accuracies are fractions; ``low`` and ``high`` bound the 95 % interval."""

    model: str  # BEFORE, AFTER or TEACHER; DURING for one taken at ``step``
    suite: str
    accuracy: float
    low: float
    high: float
    problems: int
    samples: int  # answers per problem
    mean_length: float  # tokens per answer
    step: int | None = None  # training steps done when it was taken; None for the teacher
    pass_at: Mapping[str, Sequence[float]] = field(default_factory=dict)  # by k: pass@k and its 95 % interval
    finished: float | None = None  # share of answers that ended by themselves, not by their budget
    timed_out: int = 0  # answers whose grading was given up: they count as wrong
    left_out: int = 0  # problems of the files that were left unanswered: too long, or bad rows that were skipped


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecord:
    """One graded answer, a line of ``answers-MODEL-SUITE.jsonl``."""

    problem: int  # row number of the problem in its files
    sample: int  # which of the problem's answers
    prompt: str
    reference: str
    answer: str  # as it was graded: thinking that the prompt opened starts it
    correct: bool
    note: str  # why it could not be graded, or why its program failed
    finished: bool  # whether it ended by itself
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleToken:
    """One token of an answer. The last three are None where no teacher looked or no gate was drawn."""

    text: str
    region: Literal["prefix", "continuation", "observation"] = "continuation"
    trusted: bool | None = None  # trust > 0.5
    trust: float | None = None  # the gate's weight, in [0, 1]; its mean is the metric trusted_fraction
    log_ratio: float | None = None  # log p_teacher - log p_student, nats


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sampled answer to show in the report; those of during training are for the terminal."""

    when: When
    prompt: str
    tokens: tuple[SampleToken, ...]
    answer: str | None = None  # reference answer
    correct: bool | None = None


def record_evaluations(run_dir: str | Path, evaluations: Sequence[Evaluation]) -> None:
    """Add to ``RUN/evaluation.json``; a result of the same model, suite and step is replaced. Atomic."""
    kept = {_identity(evaluation): evaluation for evaluation in (*read_evaluations(run_dir), *evaluations)}
    _write_evaluations(run_dir, kept.values())


def _write_evaluations(run_dir: str | Path, evaluations: Iterable[Evaluation]) -> None:
    text = json.dumps([asdict(evaluation) for evaluation in evaluations], indent=1)
    _write(Path(run_dir) / EVALUATION_FILE, text + "\n")


def drop_evaluations_after(run_dir: str | Path, step: int) -> None:
    """Leave out of ``RUN/evaluation.json`` what a run measured after ``step``, from which it is resumed. Atomic."""
    found = read_evaluations(run_dir)
    kept = [evaluation for evaluation in found if evaluation.step is None or evaluation.step <= step]
    if len(kept) < len(found):
        _write_evaluations(run_dir, kept)


def record_answers(run_dir: str | Path, *, model: str, suite: str, answers: Sequence[AnswerRecord]) -> Path:
    """Write the answers of one model to one suite next to ``evaluation.json``; those of earlier are replaced."""
    path = Path(run_dir) / f"answers-{_file_name(model)}-{_file_name(suite)}.jsonl"
    _write(path, "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers))
    return path


def _file_name(name: str) -> str:
    """Make a name part of a file's; with a few digits of its own where it had to be changed."""
    plain = re.sub(r"[^A-Za-z0-9.=@_]+", "_", name).strip("_.")
    digest = hashlib.sha256(name.encode(errors="backslashreplace")).hexdigest()
    return plain if plain == name else f"{plain}-{digest[:6]}"


def read_evaluations(run_dir: str | Path) -> list[Evaluation]:
    """Read ``RUN/evaluation.json``; nothing when it does not exist. DataError when it cannot be read."""
    path = Path(run_dir) / EVALUATION_FILE
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list):
            raise ValueError(f"holds {type(rows).__name__}, expected a list")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}). Move it away and evaluate again.") from None
    return [_build(Evaluation, row, path) for row in rows]


def record_provenance(run_dir: str | Path, commits: Mapping[str, str]) -> None:
    """Write the commits of names on the hub to ``RUN/hub.json``. Atomic."""
    _write(Path(run_dir) / PROVENANCE_FILE, json.dumps(dict(commits), indent=1) + "\n")


def read_provenance(run_dir: str | Path) -> dict[str, str]:
    """Read the commits that ``RUN/hub.json`` holds, nothing when there is none; DataError when it cannot be read."""
    path = Path(run_dir) / PROVENANCE_FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"holds {type(found).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}). Restore it, or name commits in the config.") from None
    return {str(name): str(commit) for name, commit in found.items()}


def record_samples(run_dir: str | Path, samples: Sequence[Sample]) -> None:
    """Add to ``RUN/samples.jsonl``; earlier samples of the same ``when`` are replaced. Atomic."""
    replaced = {sample.when for sample in samples}
    kept = [sample for sample in read_samples(run_dir) if sample.when not in replaced]
    text = "".join(json.dumps(asdict(sample)) + "\n" for sample in (*kept, *samples))
    _write(Path(run_dir) / SAMPLES_FILE, text)


def read_samples(run_dir: str | Path) -> list[Sample]:
    """Read ``RUN/samples.jsonl``; nothing when it does not exist. DataError when it cannot be read."""
    path = Path(run_dir) / SAMPLES_FILE
    if not path.exists():
        return []
    samples = []
    for row in read_jsonl(path)[0]:
        tokens = tuple(_build(SampleToken, token, path) for token in _list_of(row.get("tokens", []), path))
        samples.append(_build(Sample, {**row, "tokens": tokens}, path))
    return samples


def distance_closed(evaluations: Sequence[Evaluation], suite: str) -> float | None:
    """Return the share of the accuracy gap to the teacher that training closed on ``suite``; None when
    unknown.
    """
    found = {evaluation.model: evaluation.accuracy for evaluation in evaluations if evaluation.suite == suite}
    if not {BEFORE, AFTER, TEACHER} <= found.keys() or found[TEACHER] <= found[BEFORE]:
        return None
    return (found[AFTER] - found[BEFORE]) / (found[TEACHER] - found[BEFORE])


def _identity(evaluation: Evaluation) -> tuple[str, str, int | None]:
    return evaluation.model, evaluation.suite, evaluation.step if evaluation.model == DURING else None


Record = TypeVar("Record", Evaluation, Sample, SampleToken)


def _build(kind: type[Record], row: Any, path: Path) -> Record:
    try:
        return kind(**{part.name: row[part.name] for part in fields(kind) if part.name in row})
    except (TypeError, AttributeError) as error:
        raise DataError(f"{path}: {error}. It was not written by this package, or by another version.") from None


def _list_of(value: Any, path: Path) -> list[Any]:
    if not isinstance(value, list):
        raise DataError(f"{path}: tokens are {type(value).__name__}, expected a list. Move the file away.")
    return value


def _write(path: Path, text: str) -> None:
    make_directory(path.parent)
    write_aside(path, text)
