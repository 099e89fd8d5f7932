"""Torch's compiler stays out until something is compiled, and compiles the same functions as ever."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from megatron_tropd.engine.patches.compiler import building_optimizers, compiled_at_first_call

# what `tropd check` imports and does before its self check: the engine, and an optimizer
CODE = """
import sys
import torch
import megatron_tropd.commands.check
from megatron_tropd.engine.patches.compiler import building_optimizers
kept = torch.compile
with building_optimizers():
    torch.optim.AdamW([torch.zeros(3, requires_grad=True)])
assert torch.compile is kept and kept.__module__ == "torch"
assert "__dynamo_disable" not in vars(torch.optim.Optimizer.add_param_group.__wrapped__)
print([name for name in ("torch._dynamo", "torch._inductor", "tensorboard") if name in sys.modules])
"""


@pytest.mark.slow
def test_a_check_starts_without_the_compiler():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.stderr, done.returncode) == ("[]\n", "", 0)


def test_a_function_is_compiled_when_it_is_first_called_and_once(monkeypatch: pytest.MonkeyPatch):
    compiled: list[Any] = []

    def compile_(function: Any) -> Any:
        compiled.append(function)
        return lambda x, *, by: function(x, by=by) + 1

    monkeypatch.setattr(torch, "compile", compile_)

    def scale(x: int, *, by: int) -> int:
        """Scale."""
        return x * by

    later = compiled_at_first_call(scale)
    assert compiled == [] and later.__doc__ == "Scale."
    assert [later(3, by=2), later(5, by=7)] == [7, 36]  # from what compiling has made
    assert compiled == [scale]


def test_an_optimizer_that_is_built_while_another_is_leaves_nothing_behind():
    plain = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]
    known = hasattr(plain, "__dynamo_disable")  # some other test has stepped
    with building_optimizers(), building_optimizers():
        optimizer = torch.optim.SGD([torch.ones(3, requires_grad=True)], lr=0.5)
    assert hasattr(plain, "__dynamo_disable") == known
    (parameter,) = optimizer.param_groups[0]["params"]
    parameter.grad = torch.full((3,), 2.0)
    optimizer.step()
    assert parameter.tolist() == [0.0, 0.0, 0.0]
