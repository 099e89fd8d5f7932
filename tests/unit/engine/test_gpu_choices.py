"""What a GPU changes in model, router and optimizer: chosen by predicates, with the numbers that a CPU has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
from megatron.core.transformer.moe.router import TopKRouter

from megatron_tropd.engine.experts import expert_options
from megatron_tropd.engine.model import fuses_activations
from megatron_tropd.engine.optimizer import Optimization, fuse_adam

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def adam(values: list[float], **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW([torch.nn.Parameter(torch.tensor(values))], lr=0.1, weight_decay=0.01, **options)


def test_torchs_adam_is_fused_on_a_gpu_alone_and_makes_the_steps_of_a_fused_one():
    plain, fused, made_so = adam([1.0, -2.0]), adam([1.0, -2.0]), adam([1.0, -2.0], fused=True)
    fuse_adam(plain, CPU)
    fuse_adam(fused, GPU)
    assert [group.get("fused") for optimizer in (plain, fused) for group in optimizer.param_groups] == [None, True]
    for gradient in (0.3, -0.7, 0.2):
        for optimizer in (plain, fused, made_so):
            (parameter,) = optimizer.param_groups[0]["params"]
            parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
    first, second, third = (optimizer.param_groups[0]["params"][0] for optimizer in (plain, fused, made_so))
    assert second.equal(third)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_an_optimizer_of_another_kind_is_left_as_it_is():
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    before = dict(sgd.param_groups[0])
    fuse_adam(sgd, GPU)
    assert sgd.param_groups[0] == before


def test_swiglu_is_fused_on_a_gpu_alone_and_is_the_same_function():
    assert (fuses_activations(True), fuses_activations(False)) == (True, False)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 1, 14, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 1, 7, generator=generator, dtype=torch.float64)
    gate, up = x.chunk(2, dim=-1)
    expected = F.silu(gate) * up
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), x)
    with torch.compiler.set_stance("force_eager"):
        found = bias_swiglu_impl(x, None, False, False)
        (found_grad,) = torch.autograd.grad((found * weight).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_grad, expected_grad, rtol=1e-12, atol=1e-12)


def test_experts_near_a_tie_are_told_apart_by_more_than_bf16(monkeypatch: pytest.MonkeyPatch):
    """Two experts whose logits, 256 and 257, are one number in bf16."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: CPU)
    of_a_mixture: Any = SimpleNamespace(num_experts=2, ffn_size=8, experts_per_token=1, normalize_experts=True)
    options = expert_options(of_a_mixture, balance=0.0)
    config = SimpleNamespace(moe_router_dtype=options.get("moe_router_dtype"))
    x = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    router: Any = SimpleNamespace(config=config, weight=weight, bias=None)
    assert TopKRouter.gating(router, x).tolist() == [[256.0, 257.0]]


def test_an_update_clips_by_the_norm_it_is_given_and_takes_no_other(monkeypatch: pytest.MonkeyPatch):
    class Part:
        """One of Megatron's optimizers; a norm or a copy of gradients taken again is a failure."""

        config = SimpleNamespace(clip_grad=1.0)
        parameter = torch.nn.Parameter(torch.zeros(2))
        stepped = 0

        def get_parameters(self) -> list[torch.nn.Parameter]:
            return [self.parameter]

        def step_with_ready_grads(self) -> bool:
            self.stepped += 1
            return True

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was used")

    part = Part()
    part.chained_optimizers = [part]  # type: ignore[attr-defined]
    part.is_stub_optimizer = False  # type: ignore[attr-defined]
    part.parameter.grad = torch.tensor([6.0, 8.0])
    nothing: Any = None
    Optimization([], part, nothing, nothing, nothing, False).apply(10.0)
    # by hand: norm 10, clipped to 1
    torch.testing.assert_close(part.parameter.grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    assert part.stepped == 1
