"""``recording.json``: the facts that all scores of a directory depend on, compared before one of them is used."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.errors import DataError
from megatron_tropd.storage.write_aside import write_aside
from megatron_tropd.teacher.store import FORMAT

FILE = "recording.json"
# scores do not depend on it, but which tokens there are does: a difference is said, and a missing sequence an error
BUDGET = "budget"
# what may be recorded beside the scores that are there, later and by itself
_ADDED = ("base model", "base model weights")
UNKNOWN = "unknown"  # in a converted recording: the names of facts that the old format did not write down


def read_facts(directory: str | Path) -> dict[str, Any]:
    """Read the facts of a recording; DataError where there is none."""
    path = Path(directory) / FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path.parent.absolute()} is not a recording of a teacher ({FILE} is missing or broken). "
            "Give the directory of a run with teacher.record, or of `tropd score`."
        ) from error


def write_facts(directory: Path, facts: Mapping[str, Any]) -> None:
    """Write the facts; the file appears whole or not at all."""
    write_aside(directory / FILE, json.dumps({"format": FORMAT, **facts}, indent=2, sort_keys=True))


def check_facts(
    directory: Path, facts: Mapping[str, Any], *, fix: str, adding: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Compare a recording's facts with the present ones; return the recording's with what is new to it.

    ``adding``: a base model may be new to it, whose log-probs are a column of their own.

    What the recording does not know of itself, and another budget of tokens, is said in a warning, unless ``quiet``.

    Raises:
        DataError: the recording is of an old format, or one of the facts differs.
    """
    recorded = read_facts(directory)
    _check_format(directory, recorded.get("format"))
    unknown = recorded.get(UNKNOWN, ())
    wanted = json.loads(json.dumps(dict(facts)))
    budget = wanted.pop(BUDGET, None)
    changed = [
        f"with {key} {recorded[key]!r}, not {value!r}" if key in recorded else f"without {key}"
        for key, value in wanted.items()
        if recorded.get(key) != value and not (key not in recorded and (key in unknown or (adding and key in _ADDED)))
    ]
    if changed:
        raise DataError(f"{directory.absolute()} was recorded {'; '.join(changed)}. {fix}.")
    if quiet:
        return recorded
    unsaid = [key for key in wanted if key in unknown and key not in recorded]
    if unsaid:
        warnings.warn(
            f"{directory.absolute()} does not say with which {', '.join(unsaid)} it was recorded: not compared.",
            stacklevel=2,
        )
    if budget and recorded.get(BUDGET, budget) != budget:
        warnings.warn(
            f"{directory.absolute()} was recorded with {_tokens(recorded[BUDGET])}, not {_tokens(budget)}: sequences "
            "that are cut at another place are others. Score those that are missing with `tropd score`.",
            stacklevel=2,
        )
    return recorded | {key: wanted[key] for key in _ADDED if key in wanted}


def _tokens(budget: Mapping[str, int]) -> str:
    return f"at most {budget.get('prompt')} tokens of a prompt and {budget.get('response')} of a response"


def _check_format(directory: Path, found: Any) -> None:
    if found == FORMAT:
        return
    fix = f"Convert it: `tropd convert recording {directory} NEW`" if found == 2 else "Score its sequences again"
    raise DataError(
        f"{directory.absolute()} is a recording of format {found}, but this version reads format {FORMAT}. {fix}."
    )
