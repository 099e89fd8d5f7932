"""The card of an exported model, README.md: from what, how, on what, and how well."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd import __version__
from megatron_tropd.report.records import Evaluation

_LIBRARIES = ("torch", "megatron-core", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """The parts of a card that are the same throughout a run. Models and data by the names their user gave."""

    student: str
    teachers: Sequence[str]
    data: Sequence[str]
    method: Mapping[str, Any]  # its name and options
    settings: Mapping[str, Any]  # keys of the configuration and their values, for the table
    steps: int


def model_card(facts: CardFacts, evaluations: Sequence[Evaluation], *, step: int) -> str:
    """Write the card of the weights after ``step`` steps, in Markdown with the hub's header."""
    method = str(facts.method["name"])
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    header["tags"] = ["on-policy-distillation", method]
    if names := [name for name in (facts.student,) if _on_hub(name)]:
        header["base_model"] = names[0].partition("@")[0]
    if sets := sorted({name.partition(":")[0].partition("@")[0] for name in facts.data if _on_hub(name)}):
        header["datasets"] = sets
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n",
        f"# {_last(facts.student)}, distilled from {', '.join(map(_last, facts.teachers))}\n",
        f"On-policy distillation with `{method}` by megatron_tropd, {step} of {facts.steps} steps.\n",
        _table(("", ""), [("student", facts.student), ("teacher", ", ".join(facts.teachers)), *_data(facts.data)]),
        "## Method\n",
        _table(("key", "value"), [*((f"method.{k}", v) for k, v in facts.method.items()), *facts.settings.items()]),
        "## Accuracy\n",
        _accuracies(evaluations, step),
        "## Versions\n",
        _table(("", ""), [("megatron_tropd", __version__), ("Python", platform.python_version()), *_versions()]),
    ]
    return "\n".join(parts)


def _accuracies(evaluations: Sequence[Evaluation], step: int) -> str:
    known = [one for one in evaluations if one.step is None or one.step in (0, step)]
    if not known:
        return "Not measured.\n"
    rows = [
        (
            one.model if one.step in (None, 0) else f"{one.model}, step {one.step}",
            one.suite,
            f"{100 * one.accuracy:.1f} [{100 * one.low:.1f}, {100 * one.high:.1f}]",
            f"{one.problems} x {one.samples}",
        )
        for one in known
    ]
    return "In %, with the 95 % interval.\n\n" + _table(("model", "suite", "accuracy", "problems x answers"), rows)


def _data(names: Iterable[str]) -> list[tuple[str, str]]:
    return [("data", name) for name in names]


def _versions() -> list[tuple[str, str]]:
    found = []
    for library in _LIBRARIES:
        try:
            found.append((library, version(library)))
        except PackageNotFoundError:
            continue
    return found


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _on_hub(name: str) -> bool:
    """Say whether a name is one of the hub's, which a run writes with its commit."""
    return "@" in name and not Path(name).exists()


def _last(name: str) -> str:
    return name.partition("@")[0].rstrip("/").rpartition("/")[2]
