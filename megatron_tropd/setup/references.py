"""Check reference answers before a model is built: what cannot be graded against is refused, or counted and named."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from megatron_tropd.config.sections import CodeConfig, CodeExecution, DataConfig, SuiteConfig
from megatron_tropd.data.table import PromptTable
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.evaluate.grader_pool import check_code_allowed, shared_pool
from megatron_tropd.evaluate.rules import CODE, GradingRule
from megatron_tropd.evaluate.suites import rule_of_source
from megatron_tropd.progress.phases import Phase

logger = logging.getLogger(__name__)

_MOST_CHECKED = {"math": 2_000, "regex": 2_000}  # references: milliseconds each; others are checked all
_MOST_OF_TRAINING = {"math": 256, "regex": 256, CODE: 256}
_MOST_AT_ALL = 100_000


def answer_template(template: str | None, *, code: CodeConfig | None) -> str | None:
    """Return the template of a reference: the one given, or for programs one that takes the tests as they stand.

    Tests may be text, or lists and objects, which become JSON, as do the columns that ``code`` adds to them.

    Args:
        code: None for other graders.

    Raises:
        ConfigError: ``code`` adds columns to a template.
    """
    if code is None:
        return template
    named = {key: column for key, column in (("entry_point", code.entry_point), ("prelude", code.prelude)) if column}
    if template is not None and named:
        raise ConfigError(
            f"answer_template and code.{next(iter(named))} both say what the tests are. Leave answer_template out: the "
            "answer column holds the tests."
        )
    if template is not None:
        return template
    parts = "".join(f', "{key}": {column}' for key, column in named.items())
    as_json = '{{ {"tests": answer' + parts + "} | tojson }}"
    as_text = "" if named else "{% if answer is string %}{{ answer }}{% else %}"
    inner = f"{as_text}{as_json}" + ("" if named else "{% endif %}")
    return "{% if answer is defined and answer is not none %}" + inner + "{% endif %}"


def check_problem_answers(suite: SuiteConfig, problems: PromptTable, *, allow_code: CodeExecution) -> None:
    """Raise DataError unless every problem of a (complete) suite has an answer that it can be graded against.

    Under ``math`` a few that cannot be read are counted and named instead: an answer that repeats one is right.
    """
    bare = np.flatnonzero(~problems.answered())
    assert suite.columns is not None and suite.grader is not None
    if bare.size:
        raise DataError(
            f"{bare.size} of {len(problems)} problems have no reference answer in column {suite.columns.answer!r} (the "
            f"first is {problems.place(int(bare[0]))}). Name the column that holds it with data.columns.answer, or set "
            "evaluate.prompts=null."
        )
    rows = _spread(np.arange(len(problems)), _MOST_CHECKED.get(suite.grader, _MOST_AT_ALL))
    rule = GradingRule(kind=suite.grader, seconds=suite.timeout_s)
    bad = _unusable(problems, rows, rule, allow_code=allow_code)
    if not bad:
        return
    places = _named(problems, bad)
    if suite.grader != "math" or len(bad) == len(rows):
        raise DataError(f"{suite.name}: {len(bad)} of {len(rows)} reference answers cannot be graded against.{places}")
    logger.warning(
        "%s: %d of %d reference answers cannot be read; only an answer that repeats one counts as right.%s",
        suite.name,
        len(bad),
        len(rows),
        places,
    )


def check_training_answers(data: DataConfig, prompts: PromptTable, *, allow_code: CodeExecution) -> None:
    """Warn of reference answers of training prompts that ``accuracy_train`` will leave out, source by source.

    Raises:
        ConfigError: programs would be run, which ``allow_code`` does not allow.
    """
    answered = prompts.answered()
    for source, rows_N in prompts.sources().items():
        rows = rows_N[answered[rows_N]]
        if not len(rows):
            continue
        if len(rows) < len(rows_N):
            bare = int(rows_N[~answered[rows_N]][0])
            logger.warning(
                "%s%d of %d prompts have no reference answer: accuracy_train leaves them out. The first is %s.",
                f"{source}: " if source else "",
                len(rows_N) - len(rows),
                len(rows_N),
                prompts.place(bare),
            )
        rule = rule_of_source(data, source)
        if rule.kind == CODE:
            check_code_allowed(allow_code)
        rows = _spread(rows, _MOST_OF_TRAINING.get(rule.kind, _MOST_AT_ALL))
        bad = _unusable(prompts, rows, rule, allow_code=allow_code)
        if bad:
            logger.warning(
                "%s%d of %d reference answers cannot be graded against by %r: accuracy_train leaves them out.%s",
                f"{source}: " if source else "",
                len(bad),
                len(rows),
                rule.kind,
                _named(prompts, bad),
            )


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """Choose at most so many rows, all over the data."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]


def _unusable(
    prompts: PromptTable, rows: Sequence[int] | np.ndarray, rule: GradingRule, *, allow_code: CodeExecution
) -> dict[int, str]:
    """Say by row why it cannot be graded against."""
    answers = [prompts[int(row)].answer or "" for row in rows]
    with Phase(f"checking {len(answers):,} reference answers"):
        reasons = shared_pool(allow_code).check(rule, answers)
    return {int(row): reason for row, reason in zip(rows, reasons, strict=True) if reason}


def _named(prompts: PromptTable, bad: dict[int, str]) -> str:
    return "".join(f"\n  {prompts.place(row)}: {reason}" for row, reason in list(bad.items())[:3])
