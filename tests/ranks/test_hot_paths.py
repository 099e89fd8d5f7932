"""No torch-function mode wraps the calls of a step: on a CPU one costs a quarter of decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.config.sections import OptimizerConfig
from megatron_tropd.engine import decode
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.methods import build_method
from megatron_tropd.parallel.groups import GroupBuilder, Layout, initialize_distributed
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import SamplingParams
from tests.support.distributed import run_on_ranks
from tests.support.family_cases import items_of
from tests.support.tiny_families import SIZES, save_family

PLACES = {"sampling", "forward", "backward", "update"}


def modes_in_hot_paths(root: str) -> dict[str, int]:
    """How many torch-function modes are active in the calls of each part of a step."""
    seen: dict[str, int] = {}

    def look(place: str) -> None:
        seen[place] = max(seen.get(place, 0), torch._C._len_torch_function_stack())

    device, groups = initialize_distributed(), GroupBuilder().build(Layout())
    model = load_model(Path(root), groups, dtype=torch.bfloat16, device=device)
    draw = decode.sample

    def drawing(*args: Any, **kwargs: Any) -> Any:
        look("sampling")
        return draw(*args, **kwargs)

    decode.sample = drawing
    params = SamplingParams(max_new_tokens=3)
    decode.decode_batch(
        model, [np.arange(5)], [3], np.zeros((1, 3), np.float32), params, vocab_size=SIZES["vocab_size"]
    )
    optimization = optimize(model, OptimizerConfig(lr=1e-3, clip_grad=1e-3), steps=2)
    model.chunks[0].decoder.layers[0].register_forward_hook(lambda *_: look("forward"))
    model.chunks[0].decoder.final_layernorm.weight.register_hook(lambda _: look("backward"))
    optimization.optimizer.optimizer.register_step_pre_hook(lambda *_: look("update"))
    Trainer(model, optimization, build_method("sft")).step(items_of(model), update=0)
    return seen


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is no mode where there is CUDA")
def test_no_mode_wraps_the_calls_of_a_step(tmp_path: Path):
    save_family(tmp_path / "model", "qwen3")
    seen = run_on_ranks(modes_in_hot_paths, str(tmp_path / "model"), world_size=1, timeout_s=500)[0]
    assert seen == dict.fromkeys(PLACES, 0)
