"""What a user can have wrong, or may not have meant, is said before a model is built."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from megatron_tropd.setup.validate import warn_of_few_prompts


@pytest.mark.parametrize(("prompts", "said"), [(3, "asks each of them 2.67 times"), (8, ""), (9, "")])
def test_a_step_that_asks_prompts_more_than_once_says_so(caplog, prompts: int, said: str):
    config = SimpleNamespace(train=SimpleNamespace(prompts_per_step=8))
    warn_of_few_prompts(config, SimpleNamespace(prompts=range(prompts)))  # type: ignore[arg-type]
    assert said in caplog.text and bool(said) == bool(caplog.text)
