"""Teachers of both kinds on the ranks: module-level functions for ``vllm_commands().call``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.config.sections import Layout, ServersConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.setup.build import load_model
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.engines.vllm import LocalScorer, Scorer, ServerScorer, VLLMTeacher
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.types import Pack, Rollout, TeacherOutputs, single_turn
from megatron_tropd.vllm_bridge.local_engine import LocalEngine, Scoring
from megatron_tropd.vllm_bridge.pool import Pool
from tests.support.vllm_cases import LONGEST, OPTIONS

TOLERANCE = 1e-4  # nats, fp32
TOP_K = 64


def rollouts_of(vocab_size: int, *, count: int = 9) -> list[Rollout]:
    """Sequences of odd lengths: one of a single response token, one without any, some with a prefix, two the same."""
    rng = np.random.default_rng(5)
    found = []
    for number in range(count):
        prompt, written = int(rng.integers(1, 30)), int(rng.integers(2, 60))
        prefix = number % 3
        written = {3: 1, 4: 0}.get(number, written)
        prefix = 0 if number in (3, 4) else prefix
        found.append(
            Rollout(
                sequence_id=10 * number,
                prompt_index=number,
                token_ids=rng.integers(0, vocab_size, prompt + prefix + written),
                region_L=single_turn(prompt=prompt, prefix=prefix, continuation=written),
                sampling_logprob=np.zeros(written, np.float32),
                model_logprob=np.zeros(written, np.float32),
                finished=True,
            )
        )
    return [*found, replace(found[0], sequence_id=99)]


def packs_for(groups: Groups, vocab_size: int) -> list[list[Pack]]:
    return pack(rollouts_of(vocab_size), max_tokens=LONGEST, multiple_of=4, num_replicas=groups.num_replicas)


def in_process(path: str) -> None:
    """Engines of one rank each, whatever the student's layout."""
    device, builder = initialize_distributed(), GroupBuilder()
    own, vocab_size = builder.build(Layout()), read_architecture(path).vocab_size
    engine = LocalEngine(
        path,
        own,
        dtype=torch.float32,
        device=device,
        max_tokens=LONGEST,
        scoring=Scoring(top_k=vocab_size, vocab_size=vocab_size),
        options=OPTIONS,
    )
    grader = LocalScorer(engine)
    layouts = [Layout(tensor=2), Layout(context=2), Layout()] if dist.get_world_size() > 1 else [Layout()]
    check_agreement(path, grader, own, [builder.build(layout) for layout in layouts])
    grader.close()
    dist.barrier()  # the process group outlives the engine


def over_http(path: str, urls: Sequence[str], key: str) -> None:
    """Every rank asks the same servers."""
    initialize_distributed()
    builder = GroupBuilder()
    own = builder.build(Layout())
    grader = ServerScorer(Pool(ServersConfig(urls=tuple(urls), patience_s=60), key=key), timeout_s=60)
    check_agreement(path, grader, own, [builder.build(Layout(tensor=dist.get_world_size()))])
    assert not grader._pool.counts, grader._pool.counts
    grader.close()
    dist.barrier()


def check_agreement(path: str, grader: Scorer, own: Groups, students: Sequence[Groups]) -> None:
    """vLLM's signals against Megatron's, for every student layout: what vLLM tells, and what follows from all ids."""
    device = torch.device("cpu")
    model = load_model(path, own, dtype=torch.float32, device=device).freeze()
    size = model.architecture.vocab_size
    for student in students:
        packs = packs_for(student, size)
        expected = MegatronTeacher(model, student)
        told = VLLMTeacher(grader, own, student, device, vocab_size=size)
        spec = TeacherRequest(top_k=TOP_K, tail_mass=True)
        found = told.score(packs, replace(spec, entropy=False, entropy_bound=True))
        for a, b in zip(found, expected.score(packs, spec), strict=True):
            check_told(a, b)
        bare = TeacherRequest(entropy=False)
        for a, b in zip(told.score(packs, bare), expected.score(packs, bare), strict=True):
            assert a is not None and b is not None and a.topk_ids_NK is None and a.entropy_bound_N is None
            torch.testing.assert_close(a.logprob_N, b.logprob_N, atol=TOLERANCE, rtol=0)

        # fewer ids than the teacher has, another temperature, ids that the student names
        smaller: dict[str, Any] = {"vocab_size": size - 9, "temperature": 0.7}
        kept = [[replace_ids(item, size - 9) for item in replica] for replica in packs]
        asked = [ids_of(item, student, size - 9) for item in kept[student.replica]]
        spec = TeacherRequest(top_k=TOP_K, queries=5, tail_mass=True)
        found = VLLMTeacher(grader, own, student, device, whole=True, **smaller).score(kept, spec, asked)
        wanted = MegatronTeacher(model, student, **smaller).score(kept, spec, asked)
        for a, b in zip(found, wanted, strict=True):
            check_exact(a, b)


def check_told(a: TeacherOutputs | None, b: TeacherOutputs | None) -> None:
    assert a is not None and b is not None and b.entropy_N is not None
    assert a.topk_logprob_NK is not None and a.logtail_N is not None and a.entropy_bound_N is not None
    same_candidates(a, b)
    # the mass outside, to the rounding of the log-probs it is made from
    torch.testing.assert_close(a.logtail_N.exp(), b.logtail_N.exp(), atol=TOLERANCE, rtol=0)
    assert a.entropy_N is None
    assert bool((a.entropy_bound_N > b.entropy_N - TOLERANCE).all())
    assert bool((a.entropy_bound_N - b.entropy_N < 0.2).all())


def check_exact(a: TeacherOutputs | None, b: TeacherOutputs | None) -> None:
    assert a is not None and b is not None and a.entropy_bound_N is None
    same_candidates(a, b)
    for name in ("query_logprob_NJ", "entropy_N", "logtail_N"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=TOLERANCE, rtol=0)
    assert torch.equal(a.query_ids_NJ, b.query_ids_NJ)


def same_candidates(a: TeacherOutputs, b: TeacherOutputs) -> None:
    torch.testing.assert_close(a.logprob_N, b.logprob_N, atol=TOLERANCE, rtol=0)
    assert a.logprob_N.dtype == b.logprob_N.dtype and a.topk_ids_NK.dtype == b.topk_ids_NK.dtype
    torch.testing.assert_close(a.topk_logprob_NK, b.topk_logprob_NK, atol=TOLERANCE, rtol=0)
    # where two ids differ, they are as likely as each other
    other = a.topk_ids_NK != b.topk_ids_NK
    assert float(other.double().mean()) < 0.01
    gaps = (a.topk_logprob_NK[:, :-1] - a.topk_logprob_NK[:, 1:])[other[:, :-1]]
    assert bool((gaps < TOLERANCE).any() or not other.any())


def replace_ids(item: Pack, vocab_size: int) -> Pack:
    return replace(item, token_T=item.token_T % vocab_size, target_T=item.target_T % vocab_size)


def ids_of(item: Pack, student: Groups, vocab_size: int) -> torch.Tensor:
    """Distinct ids for every prediction, the same on every rank that has it."""
    rows = own_valid_positions(item, student)
    start = item.token_T[rows] * 7
    return torch.from_numpy((start[:, None] + np.arange(5) * 3) % vocab_size)
