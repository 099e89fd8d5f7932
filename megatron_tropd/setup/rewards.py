"""A user's function that rewards answers, loaded from its file; and whether there is something to reward them by."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_tropd.config.run import RunConfig
from megatron_tropd.data.table import PromptTable
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import Method

logger = logging.getLogger(__name__)

GIVEN: tuple[str, ...] = ("prompt", "answer", "source", "responses", "finished", "tokens", "guided")
"""What a function may take, each by its name: of a prompt the first three, of every response to it the others."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A function of the user's that rewards all responses to a prompt at once."""

    written: str  # PATH.py:NAME
    call: Callable[..., Any]  # from what it ``takes``, by keyword, to a reward per response
    takes: tuple[str, ...]  # of GIVEN
    fingerprint: str  # of its file


def reward_function(written: str | None) -> RewardFunction | None:
    """Load ``PATH.py:NAME``, once in a process; None without one. The file is run as it is: the user's own program.

    Raises:
        ConfigError: there is no such file or function, running the file raises, or the function takes other things.
    """
    if written is None:
        return None
    place, _, name = written.rpartition(":")
    path = Path(place).expanduser()
    try:
        fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"reward.function={written}: cannot read {path.absolute()} ({error.strerror}). Give PATH.py:NAME."
        ) from error
    return _loaded(written, path.absolute(), name, fingerprint)


@cache
def _loaded(written: str, path: Path, name: str, fingerprint: str) -> RewardFunction:
    spec = importlib.util.spec_from_file_location(f"reward_function_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a file that ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(f"reward.function={written}: running {path} raises {_said(error)}. Mend the file.") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise ConfigError(f"reward.function={written}: {path} has no function {name!r}. {_functions_of(module)}")
    return RewardFunction(written, found, _parameters(written, found), fingerprint)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _functions_of(module: ModuleType) -> str:
    names = [name for name, thing in vars(module).items() if inspect.isfunction(thing) and not name.startswith("_")]
    return f"It has {', '.join(names)}." if names else "It has none at all."


def _parameters(written: str, function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names among GIVEN that a function takes; ConfigError when it wants others, or no responses."""
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"reward.function={written} is asynchronous, and would be called, not awaited. Use `def`.")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward.function={written} does not say what it takes ({error}). Use `def`.") from error
    if any(one.kind is one.VAR_KEYWORD for one in parameters):
        takes, others = GIVEN, list[str]()
    else:
        by_name = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
        takes = tuple(one.name for one in by_name if one.name in GIVEN)
        others = [one.name for one in parameters if one.default is one.empty and one.name not in takes]
    if others or "responses" not in takes:
        fault = f"takes {', '.join(others)}, which nobody gives it" if others else "does not take responses"
        raise ConfigError(
            f"reward.function={written} {fault}. It must take responses, and may take {', '.join(GIVEN)}, by these "
            "names, as in def reward(responses, answer)."
        )
    return takes


# --------------------------------------------------------------------------- checks


def check_rewards(config: RunConfig, method: Method) -> None:
    """Raise ConfigError when the method looks at rewards and there can be none, or rewards are given to none."""
    reward, rollout, wanted = config.reward, config.rollout, method.needs.reward
    if not wanted and reward != type(reward)():
        raise ConfigError(
            f"reward is set, but method.name={config.method.name} with these options does not look at rewards. Set "
            "method.reward_weight, or method.gate=correct where the method has it, or take reward out."
        )
    reward_function(reward.function)
    if not method.settings.reward_weight:
        return
    if not rollout.samples_per_prompt:
        raise ConfigError(
            "rollout.samples_per_prompt=0, but method.reward_weight rewards answers that the student writes by itself. "
            "Raise it."
        )
    if rollout.samples_per_prompt == 1 and reward.advantage != "raw":
        raise ConfigError(
            f"reward.advantage={reward.advantage} compares the answers to a prompt, and rollout.samples_per_prompt=1 "
            "leaves nothing to compare. Raise it, or set reward.advantage=raw."
        )


def check_answers(config: RunConfig, method: Method, prompts: PromptTable) -> None:
    """Raise ConfigError when answers are to be graded and no prompt has a reference answer; count those without."""
    if not method.needs.reward or config.reward.function is not None:
        return
    answered = prompts.answered()
    if not answered.any():
        raise ConfigError(
            f"method.name={config.method.name} with these options looks at the grades of answers, but no prompt has a "
            "reference answer. Give data.columns.answer the name of their column, or set reward.function."
        )
    if not answered.all():
        logger.warning(
            "%d of %d prompts have no reference answer, so answers to them have no reward.",
            int((~answered).sum()),
            len(prompts),
        )
