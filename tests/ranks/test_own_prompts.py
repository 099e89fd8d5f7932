"""A teacher that reads prompts of its own: scores are those of a second run, and the student sees no such token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tropd.config.sections import Layout
from megatron_tropd.data.packing import pack_for_both
from megatron_tropd.engine.batch import BatchFacts, batch_weights, train_packs
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.engine.rows import is_forest
from megatron_tropd.errors import DataError
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.setup.build import load_model, pack_for
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.engines.recorded import RecordedTeacher, RecordingTeacher
from megatron_tropd.teacher.engines.remote import decode_request, encode_request
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.types import LOSS_REGIONS, Pack, Region, Rollout, TeacherOutputs
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import Case, assemble, config_of, save_models, whole_gradients
from tests.support.tiny_models import (
    TEACHER,
    grouped_rollouts,
    hf_logprobs,
    load_hf,
    random_rollouts,
    relative_error,
    save_qwen3,
    with_turns,
)

VOCAB, SECRET = 97, 7  # the last ids stand in the teacher's prompts alone
REQUEST = TeacherRequest(top_k=3, queries=2, end_ids=(90, 3))
LAYOUTS = {
    "context ranks hold other rows of either": (Layout(context=2), Layout(context=2)),
    "context ranks beside stages": (Layout(context=2), Layout(pipeline=2)),
    "two teachers for one student": (Layout(tensor=2), Layout()),
}


def with_own_prompts(rollouts: list[Rollout]) -> list[Rollout]:
    """Longer, shorter and equally long ones, of ids that stand nowhere else; one sequence has none.

    Samples of one prompt have one of the teacher's, and all of these begin alike.
    """
    rng = np.random.default_rng(5)
    found, made = [], dict[bytes, Any]()
    for number, one in enumerate(rollouts):
        asked = one.token_ids[: one.prompt_length]
        length = [len(asked) + 15, max(1, len(asked) - 3), len(asked)][len(made) % 3]
        secret = np.append([VOCAB - 1] * 4, rng.integers(VOCAB - SECRET, VOCAB, 40))[:length]
        own = made.setdefault(asked.tobytes(), secret)
        found.append(one if number == 2 else replace(one, teacher_prompt_ids=own))
    return found


def sequences() -> dict[str, list[Rollout]]:
    return {
        "of several turns": with_own_prompts(with_turns(random_rollouts(0, vocab_size=VOCAB - SECRET))),
        "that begin alike": with_own_prompts(grouped_rollouts(0, vocab_size=VOCAB - SECRET)),
    }


def packed(rollouts: list[Rollout], replicas: int, *, share: bool = True) -> list[list[Pack]]:
    options = {"multiple_of": 8, "num_replicas": replicas, "linear_work": 100}
    return pack_for_both(rollouts, max_tokens=96, share_prefixes=share, **options)


def queries_of(pack: Pack, groups: Groups) -> torch.Tensor | None:
    """Two ids of every prediction that this rank computes, known from the token alone."""
    if not groups.is_last_stage:
        return None
    target_N = torch.from_numpy(pack.target_T[own_valid_positions(pack, groups)])
    return torch.stack([(target_N + 1) % VOCAB, (3 * target_N + 5) % VOCAB], dim=1)


Rows = dict[int, list[list[float]]]


def by_sequence(packs: list[Pack], outputs: list[TeacherOutputs | None], groups: Groups) -> Rows:
    """Of every prediction: its number among the sequence's, and all that is said of it."""
    found: Rows = {}
    for pack, output in zip(packs, outputs, strict=True):
        if output is None:
            continue
        read_N = own_valid_positions(pack, groups)
        parts = (
            *(output.logprob_N, output.entropy_N, output.topk_logprob_NK),
            *(output.query_logprob_NJ, output.end_logprob_NX),
        )
        said = torch.cat([part[:, None] if part.dim() == 1 else part for part in parts if part is not None], dim=1)
        for read, row in zip(read_N.tolist(), said.tolist(), strict=True):
            found.setdefault(int(pack.sequence_T[read]), []).append([float(pack.position_T[read]), *row])
    return found


def scores(root: str, directory: str) -> dict[str, Rows]:
    """On every rank: what a teacher says under every pair of layouts, live and from a recording of it."""
    builder, device = GroupBuilder(), initialize_distributed()
    found: dict[str, Rows] = {}
    for name, (student_layout, teacher_layout) in LAYOUTS.items():
        student, own = builder.build(student_layout), builder.build(teacher_layout)
        model = load_model(Path(root), own, dtype=torch.float32, device=device).freeze()
        live = MegatronTeacher(model, student, vocab_size=VOCAB)
        facts = {"vocab_size": VOCAB}
        recording = RecordingTeacher(live, f"{directory}/{name}", student, facts=facts, values="fp32")
        for kind, rollouts in sequences().items():
            for share in (True, False):
                packs = packed(rollouts, student.num_replicas, share=share)
                mine = packs[student.replica]
                queries = [queries_of(pack, student) for pack in mine]
                teacher = live if share else recording  # one recording of each: another has rounding of its own
                said = by_sequence(mine, teacher.score(packs, REQUEST, queries), student)
                found[f"{name}, {kind}, share={share}"] = said
            dist.barrier()  # what other ranks write is there
            replayed = RecordedTeacher(f"{directory}/{name}", student, device, facts=facts)
            again = by_sequence(mine, replayed.score(packs, REQUEST, queries), student)
            assert again == said, "a replay is the live teacher, to the last bit"
            _refuse_other_prompts(replayed, rollouts, student)
    return found


def _refuse_other_prompts(replayed: RecordedTeacher, rollouts: list[Rollout], student: Groups) -> None:
    other = [replace(one, teacher_prompt_ids=np.array([1, 2, 3])) for one in rollouts]
    plain = [replace(one, teacher_prompt_ids=None) for one in rollouts]
    for changed in (other, plain):
        packs = packed(changed, student.num_replicas)
        if not student.is_last_stage:
            continue
        with pytest.raises(DataError, match="holds no scores for a sequence"):
            replayed.score(packs, replace(REQUEST, queries=0))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("teacher"), TEACHER, seed=3)


def by_hand(model: Any, rollout: Rollout) -> np.ndarray:
    """A second run, of `transformers`, over the teacher's own prompt and the response."""
    own = (
        rollout.token_ids[: rollout.prompt_length] if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
    )
    response = rollout.token_ids[rollout.prompt_length :]
    with torch.no_grad():
        logprob_LV = hf_logprobs(model, np.append(own, response), VOCAB)[len(own) - 1 :]
    rows = []
    for number in np.flatnonzero(np.isin(rollout.region_L[rollout.prompt_length :], LOSS_REGIONS)).tolist():
        logprob_V, target = logprob_LV[number], int(response[number])
        named = [(target + 1) % VOCAB, (3 * target + 5) % VOCAB, *REQUEST.end_ids]
        rows.append(
            [
                *(float(rollout.prompt_length - 1 + number), float(logprob_V[target])),
                float(-(logprob_V.exp() * logprob_V).sum()),
                *logprob_V.topk(REQUEST.top_k).values.tolist(),
                *logprob_V[named].tolist(),
            ]
        )
    return np.array(rows)


def test_scores_are_those_of_a_second_run_by_hand(teacher: Path, tmp_path: Path):
    found = run_on_ranks(scores, str(teacher), str(tmp_path), world_size=2, timeout_s=900)
    model = load_hf(teacher)
    truth = {kind: {one.sequence_id: by_hand(model, one) for one in some} for kind, some in sequences().items()}
    for name in found[0]:
        rows: dict[int, dict[float, list[float]]] = {}
        for rank in found:
            for sequence, said in rank[name].items():
                rows.setdefault(sequence, {}).update({row[0]: row for row in said})
        expected = next(those for kind, those in truth.items() if kind in name)
        assert rows.keys() == {sequence for sequence, hand in expected.items() if len(hand)}, name
        for sequence, said in rows.items():
            np.testing.assert_allclose(
                [said[at] for at in sorted(said)], expected[sequence], rtol=0, atol=1e-5, err_msg=f"{name}, {sequence}"
            )


# --------------------------------------------------------------------------- gradients

LEARNED = {
    "context ranks": {"student": {"context": 2}, "teacher": {"pipeline": 2}},
    "tensor ranks beside replicas": {"student": {"tensor": 2}, "teacher": {}},
    "stages": {"student": {"pipeline": 2}, "teacher": {"context": 2}},
    "replicas": {"student": {}, "teacher": {"tensor": 2}},
}
METHODS = {"prompt_distillation": {}, "opsd": {"beta": 0.3}, "opd": {}}


def learned_from() -> list[Rollout]:
    """Responses that begin where the prompt ends: every prediction of theirs is the student's own."""
    some = random_rollouts(0, vocab_size=VOCAB - SECRET)
    own = [np.where(one.region_L == Region.PREFIX, Region.PROMPT, one.region_L).astype(np.uint8) for one in some]
    return with_own_prompts([replace(one, region_L=region) for one, region in zip(some, own, strict=True)])


def gradients(root: str) -> dict[str, dict[str, torch.Tensor]]:
    """On every rank: the student's gradients and loss, whole, by layout and method."""
    builder, rollouts, found = GroupBuilder(), learned_from(), dict[str, dict[str, torch.Tensor]]()
    for name, layouts in LEARNED.items():
        for method, options in METHODS.items():
            case = Case(name=name, ranks=2, method={"name": method} | options, share=True, **layouts)
            run = assemble(config_of(case, Path(root)), builder)
            groups = run.world.student
            packs = pack_for(run.world, rollouts, pack_tokens=96, hidden_size=52)
            mine, facts = packs[groups.replica], BatchFacts(seed=0, step=0, progress=0.0)
            items = train_packs(
                mine,
                batch_weights(packs, run.method, facts, groups),
                run.teacher.score(packs, run.teacher_request),
                [None] * len(mine),
                rollouts={one.sequence_id: one for one in rollouts},
                method=run.method,
                facts=facts,
                model=run.student,
            )
            loss = run.trainer.probe(items).loss
            found[f"{name}, {method}"] = whole_gradients(run.student) | {"loss": torch.tensor(loss)}
    return found


def gradients_by_hand(root: Path, method: str) -> dict[str, torch.Tensor]:
    """By `transformers` and plain autograd in fp64: each model reads its own prompt before the same response."""
    student, teacher = load_hf(root / "untied"), load_hf(root / "teacher")
    losses = []
    for rollout in learned_from():
        start, whole = rollout.prompt_length, rollout.token_ids
        own = whole[:start] if rollout.teacher_prompt_ids is None else rollout.teacher_prompt_ids
        logq = hf_logprobs(student, whole, VOCAB)[start - 1 :]
        logp = hf_logprobs(teacher, np.append(own, whole[start:]), VOCAB)[len(own) - 1 :].detach()
        kept = torch.from_numpy(np.isin(rollout.region_L[start:], LOSS_REGIONS))
        if method == "opd":
            target = torch.from_numpy(whole[start:])[:, None]
            logq, logp = logq.gather(1, target), logp.gather(1, target)
            loss = -(logp - logq).detach() * logq
        elif method == "opsd":
            beta = METHODS["opsd"]["beta"]
            mixed = (beta * logp.exp() + (1 - beta) * logq.exp()).log()
            loss = beta * logp.exp() * (logp - mixed) + (1 - beta) * logq.exp() * (logq - mixed)
        else:
            loss = logp.exp() * (logp - logq)
        losses.append(loss.sum(1)[kept])
    torch.cat(losses).mean().backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, dict[str, torch.Tensor]]]]:
    root = save_models(tmp_path_factory.mktemp("models"))
    return root, run_on_ranks(gradients, str(root), world_size=2, timeout_s=500)


@pytest.mark.parametrize("method", METHODS)
def test_every_gradient_is_that_of_a_teacher_that_reads_its_own_prompt(learned, method: str):
    root, ranks = learned
    expected = gradients_by_hand(root, method)
    for name in LEARNED:
        for rank in ranks:
            found = rank[f"{name}, {method}"]
            assert found.keys() - {"loss"} == expected.keys()
            errors = {key: relative_error(found[key], gradient) for key, gradient in expected.items()}
            assert max(errors.values()) < 1e-5, (name, max(errors.items(), key=lambda one: one[1]))


# --------------------------------------------------------------------------- packs


@pytest.mark.parametrize("share", [True, False])
def test_both_packs_hold_the_same_predictions_in_order_within_the_budget(share: bool):
    for rollouts in sequences().values():
        by_id = {one.sequence_id: one for one in rollouts}
        replicas = packed(rollouts, 3, share=share)
        assert len({len(packs) for packs in replicas}) == 1
        seen: list[int] = []
        for pack in (one for packs in replicas for one in packs):
            read = pack.scored
            seen += pack.sequence_ids.tolist()
            assert read is not pack and read.sequence_ids.tolist() == pack.sequence_ids.tolist()
            rows = [np.flatnonzero(np.isin(one.region_T, LOSS_REGIONS)) for one in (pack, read)]
            for name in ("target_T", "region_T", "sequence_T"):
                np.testing.assert_array_equal(getattr(pack, name)[rows[0]], getattr(read, name)[rows[1]])
            for one in (pack, read):
                assert (one.num_rows if one.row_T is not None else len(one.token_T)) <= 96
            for sequence in pack.sequence_ids.tolist():
                rollout, own = by_id[sequence], by_id[sequence].teacher_prompt_ids
                whole = rollout.token_ids
                np.testing.assert_array_equal(pack.token_T[pack.sequence_T == sequence], whole)
                behind = whole if own is None else np.append(own, whole[rollout.prompt_length :])
                np.testing.assert_array_equal(read.token_T[read.sequence_T == sequence], behind)
        assert sorted(seen) == sorted(by_id)
        assert any(is_forest(one.scored) for packs in replicas for one in packs) or not share or len(by_id) == 11


def test_no_pack_of_the_student_holds_a_token_of_the_teachers_prompts():
    for rollouts in sequences().values():
        packs = [one for packs in packed(rollouts, 2) for one in packs]
        ids = np.concatenate([part for one in packs for part in (one.token_T, one.target_T)])
        assert ids.max() < VOCAB - SECRET
        assert max(one.scored.token_T.max() for one in packs) == VOCAB - 1


def test_a_request_to_other_ranks_carries_both_packs():
    for rollouts in sequences().values():
        packs = packed(rollouts, 2)
        plain = [[replace(one, teacher_pack=None) for one in packs[0]], packs[1]]
        for sent in (packs, plain):
            got, request, _ = decode_request(encode_request(sent, REQUEST, {}))
            assert request == REQUEST
            for ours, theirs in zip([*sent[0], *sent[1]], [*got[0], *got[1]], strict=True):
                assert (ours.teacher_pack is None) == (theirs.teacher_pack is None)
                for one, other in ((ours, theirs), (ours.scored, theirs.scored)):
                    for name in (
                        "token_T",
                        "target_T",
                        "position_T",
                        "region_T",
                        "cu_seqlens",
                        "num_valid",
                        "num_rows",
                    ):
                        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


def test_where_sharing_helps_the_longer_reading_alone_whole_lengths_are_packed():
    # eight prompts of the student's that have nothing in common, all under one long prompt of the teacher's
    rng, secret = np.random.default_rng(0), np.full(30, VOCAB - 1)
    single = random_rollouts(1, vocab_size=50)[0]
    shape = partial(replace, single, region_L=np.repeat([0, 2], [20, 5]).astype(np.uint8))
    some = [
        shape(sequence_id=i, token_ids=rng.integers(0, 50, 25), teacher_prompt_ids=np.append(secret, [i]))
        for i in range(8)
    ]
    packs = packed(some, 1)[0]
    assert all(max(one.num_rows if one.row_T is not None else len(one.token_T), 0) <= 96 for one in packs)
    assert len(packs) > 2


def test_an_empty_prompt_of_either_is_refused():
    one = random_rollouts(0, vocab_size=50)[0]
    with pytest.raises(DataError, match=f"sequence {one.sequence_id} has an empty prompt, the teacher's own"):
        packed([replace(one, teacher_prompt_ids=np.empty(0, np.int64))], 1)
