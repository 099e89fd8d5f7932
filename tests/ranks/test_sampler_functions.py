"""The sampler's plain functions against Megatron's modules on the same weights and random numbers, family by family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.decode import decode_batch
from megatron_tropd.engine.model import Model
from megatron_tropd.parallel.groups import GroupBuilder, Layout, initialize_distributed
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import SamplingParams
from tests.support.decode_by_modules import decode_by_modules
from tests.support.distributed import run_on_ranks
from tests.support.long import few
from tests.support.tiny_families import FAMILIES, SIZES, save_family

RNG = np.random.default_rng(3)
PROMPT, OTHER, ANSWER = (RNG.integers(0, SIZES["vocab_size"], length) for length in (9, 13, 11))
# samples of one prompt, guided ones with two lengths of one answer, another prompt twice, and the shortest there is
CONTEXTS = [PROMPT, PROMPT, OTHER, PROMPT, *(np.concatenate([PROMPT, ANSWER[:n]]) for n in (4, 11)), OTHER, OTHER[:1]]
BUDGETS = [9, 3, 12, 7, 13, 5, 1, 11]
# every family that functions are written for has one model of its own; what differs in sizes alone waits
NAMES = few(FAMILIES, "llama2", "llama3-tied", "mistral", "qwen2", "qwen3", "qwen3-moe-raw", "mixtral")
PARAMS = {
    "plain": SamplingParams(max_new_tokens=13, stop_token_ids=(5, 17, 40), min_new_tokens=2),
    "shaped": SamplingParams(max_new_tokens=13, temperature=0.7, top_p=0.9, top_k=20),
}


def numbers() -> np.ndarray:
    count = max(BUDGETS)
    draws = [uniforms(seed=7, step=1, sequence_id=i, stream=Stream.SAMPLING, count=count) for i in range(len(CONTEXTS))]
    return np.stack(draws)


def answers(model: Model, decode: Any, name: str) -> list[tuple[list[int], list[float], list[float], bool]]:
    found = decode(model, CONTEXTS, BUDGETS, numbers(), PARAMS[name], vocab_size=SIZES["vocab_size"])
    return [(c.token_ids.tolist(), c.sampling_logprob.tolist(), c.model_logprob.tolist(), c.finished) for c in found]


def both_ways(root: str) -> list[dict[str, dict[str, Any]]]:
    """On two ranks: what every family writes by functions and by modules, each rank alone, then both together."""
    device, builder = initialize_distributed(), GroupBuilder()
    alone, together = (builder.build(Layout(tensor=tensor)) for tensor in (1, 2))
    found: list[dict[str, dict[str, Any]]] = []
    for groups, dtype in ((alone, (torch.float32, torch.bfloat16)[together.tensor_rank]), (together, torch.float32)):
        found.append({})
        for family in NAMES:
            model = load_model(Path(root) / family, groups, dtype=dtype, device=device).freeze()
            found[-1][family] = {
                name: (answers(model, decode_batch, name), answers(model, decode_by_modules, name)) for name in PARAMS
            }
    return found


Found = Callable[[str, str], Iterator[tuple[list[Any], list[Any]]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    root = tmp_path_factory.mktemp("functions")
    for seed, name in enumerate(NAMES):
        save_family(root / name, name, seed=seed)
    first, second = run_on_ranks(both_ways, str(root), world_size=2, timeout_s=550)
    runs = {"fp32": [first[0]], "bf16": [second[0]], "fp32-tp2": [first[1], second[1]]}

    def of(layout: str, family: str) -> Iterator[tuple[list[Any], list[Any]]]:
        """Yield what functions wrote and what modules wrote."""
        for run in runs[layout]:
            yield from run[family].values()

    return of


EVERY = pytest.mark.parametrize("family", NAMES)
LAYOUTS = pytest.mark.parametrize("layout", ["fp32", "bf16", "fp32-tp2"])


@EVERY
@LAYOUTS
def test_functions_write_the_tokens_that_the_modules_write(layout, family, found):
    for by_functions, by_modules in found(layout, family):
        assert [(row[0], row[3]) for row in by_functions] == [(row[0], row[3]) for row in by_modules]


@EVERY
@LAYOUTS
def test_the_log_probs_of_functions_are_those_of_the_modules_but_for_rounding(layout, family, found):
    """The two add up in other orders where keys are transposed and contexts end together, and nowhere else.

    Logits of up to 30 nats that differ by a few roundings of each of 2 layers: 40 steps of fp32 at 30. In bf16 a sum
    in fp32 that is rounded the other way moves what follows by 2**-8 of it, which few do: the median is exactly 0.
    """
    for by_functions, by_modules in found(layout, family):
        pairs = zip(by_functions, by_modules, strict=True)
        gaps = np.abs([x - y for a, b in pairs for i in (1, 2) for x, y in zip(a[i], b[i], strict=True)])
        if layout == "bf16":
            assert np.median(gaps) == 0.0 and gaps.max() <= 8 * 2**-8
        else:
            assert gaps.max() <= 40 * np.spacing(np.float32(30))
