"""Responses of several turns: what neither model wrote carries no loss, wherever it stands, under any layout."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_tropd.data.packing import pack
from megatron_tropd.engine.batch import BatchFacts, token_view
from megatron_tropd.engine.context import own_predictions, own_valid_positions
from megatron_tropd.errors import DataError
from megatron_tropd.parallel.groups import GroupBuilder, Groups
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.engines.recorded import read_rollouts, write_rollouts
from megatron_tropd.teacher.engines.recorded import RecordedTeacher, RecordingTeacher
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import pack_rollouts, score_rollouts
from megatron_tropd.types import LOSS_REGIONS, Pack, Region, Rollout
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import VOCAB, Case, assemble, batch_of, config_of, save_models, whole_gradients
from tests.support.run_inputs import assert_metrics_agree, commands, make_task, steady_metrics
from tests.support.tiny_families import load_transformers, on_disk_gradients, save_family
from tests.support.tiny_models import Objective, Reference, hf_logprobs, load_hf, relative_error

CASES = [
    Case(name="alone", turns=True, pack_tokens=64),
    Case(name="cut", ranks=2, turns=True, student={"context": 2}, teacher={"tensor": 2}, pack_tokens=64),
    Case(name="stages", ranks=2, turns=True, student={"pipeline": 2}, teacher={"context": 2}, pack_tokens=64),
    Case(name="shards", ranks=2, turns=True, student={"tensor": 2, "sequence": True}, teacher={"pipeline": 2}),
]
EXPERTS = ("experts", "teacher")
BALANCE = 0.3  # large enough that a wrong share of it is no rounding
# experts are spread over replicas, each of which balances the predictions of its own packs
MIXTURES = [
    Case(name="experts", turns=True, models=EXPERTS, balance=BALANCE),
    Case(name="experts spread", ranks=2, turns=True, models=EXPERTS, balance=BALANCE, student={"expert": 2}),
    Case(
        name="experts shards",
        ranks=2,
        turns=True,
        models=EXPERTS,
        balance=BALANCE,
        student={"tensor": 2, "sequence": True},
    ),
    Case(name="experts cut", ranks=2, turns=True, models=EXPERTS, balance=BALANCE, student={"context": 2}),
]
BATCH = batch_of(CASES[0], 0)


def observed(one: Rollout) -> np.ndarray:
    """Positions whose prediction is of an observation."""
    return np.flatnonzero(one.region_L[1:] == Region.OBSERVATION)


def test_the_sequences_of_these_tests_have_what_they_are_about():
    stretches = [np.diff(np.isin(one.region_L, LOSS_REGIONS).astype(int)) for one in BATCH]
    assert sum((steps == 1).sum() >= 2 for steps in stretches) > 4  # two stretches that carry loss, or more
    pairs = {(int(a), int(b)) for one in BATCH for a, b in zip(one.region_L[:-1], one.region_L[1:], strict=True)}
    assert {(2, 4), (4, 2), (4, 1), (1, 4), (2, 1), (1, 2), (0, 4)} <= pairs


# --------------------------------------------------------------------------- loss and gradients


def keep_gradient(into: list[Tensor], module: torch.nn.Module, inputs: Any, out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(into.append)


def gradients(cases: list[Case], models: str) -> dict[str, Any]:
    """Loss and gradients of the batch; and those of the final hidden states of a model on one rank."""
    builder = GroupBuilder()
    return {case.name: _gradients(case, assemble(config_of(case, Path(models)), builder)) for case in cases}


def _gradients(case: Case, run: Any) -> dict[str, Any]:
    hidden: list[Tensor] = []
    if case.ranks == 1:
        norm = run.student.chunks[-1].decoder.final_layernorm
        norm.register_forward_hook(partial(keep_gradient, hidden))
    scored = score_rollouts(run, batch_of(case, 0), watch=Stopwatch())
    [packs] = score_and_pack(run, scored, step=0, watch=Stopwatch())
    result = run.trainer.probe(packs)
    rows = {}
    for item, grad in zip(packs, hidden, strict=False):
        for start, sequence in zip(item.pack.cu_seqlens.tolist(), item.pack.sequence_ids.tolist(), strict=False):
            length = len(next(one for one in BATCH if one.sequence_id == sequence).token_ids)
            rows[sequence] = grad[start : start + length, 0].clone()
    return {"loss": result.loss, "stats": dict(result.stats), "weights": whole_gradients(run.student), "hidden": rows}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    save_family(folder / "experts", "qwen3-moe", sizes={"vocab_size": VOCAB})
    return folder


@pytest.fixture(scope="module")
def measured(models: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for ranks in (1, 2):
        chosen = [case for case in (*CASES, *MIXTURES) if case.ranks == ranks]
        found |= run_on_ranks(gradients, chosen, str(models), world_size=ranks)[0]
    return found


@pytest.fixture(scope="module")
def truth(models: Path) -> dict[str, Any]:
    """Plain autograd in fp64: the mean over the tokens that carry loss, one sequence at a time."""
    student = load_hf(models / "untied")
    plain = Reference(student, load_hf(models / "teacher"), Objective(), VOCAB)
    states: list[Tensor] = []
    student.model.norm.register_forward_hook(lambda module, inputs, out: states.append(out))
    losses, outliers, sequences = [], 0, {}
    for one in BATCH:
        with torch.no_grad():
            old_LV = hf_logprobs(student, one.token_ids, VOCAB)
        loss_N, outside = plain._token_losses(one, old_LV, 0)
        states[-1].retain_grad()
        losses.append(loss_N)
        outliers += outside
        sequences[one.sequence_id] = states[-1]
    torch.cat(losses).sum().backward()
    count = len(torch.cat(losses))
    return {
        "loss": float(torch.cat(losses).detach().mean()),
        "outliers": outliers / sum(one.count(Region.CONTINUATION) for one in BATCH),
        "weights": {name: p.grad / count for name, p in student.named_parameters()},
        "hidden": {sequence: state.grad[0] for sequence, state in sequences.items()},
    }


@pytest.mark.parametrize("case", [case.name for case in CASES])
def test_loss_and_gradients_are_those_of_plain_autograd_in_fp64(case, measured, truth):
    found = measured[case]
    assert found["loss"] == pytest.approx(truth["loss"], rel=1e-5)
    assert 0.0 < truth["outliers"] < 1.0
    assert found["stats"]["outlier_fraction"] == pytest.approx(truth["outliers"], abs=1e-9)
    assert set(found["weights"]) == set(truth["weights"])
    for name, expected in truth["weights"].items():
        actual = found["weights"][name].double()
        assert relative_error(actual, expected) < 1e-5, name
        assert float((actual * expected).sum() / expected.square().sum()) == pytest.approx(1.0, abs=1e-5), name


def test_hidden_states_that_predict_observations_have_a_gradient_of_exactly_0_and_others_that_of_fp64(measured, truth):
    rows = measured["alone"]["hidden"]
    assert set(rows) == {one.sequence_id for one in BATCH}
    for one in BATCH:
        actual, expected = rows[one.sequence_id], truth["hidden"][one.sequence_id]
        silent = observed(one)
        assert (actual[silent] == 0).all() and (expected[silent] == 0).all()
        loud = np.flatnonzero(np.isin(one.region_L[1:], LOSS_REGIONS))
        if len(loud):
            assert (actual[loud].abs().amax(-1) > 0).all()
            assert relative_error(actual.double(), expected) < 1e-5


# --------------------------------------------------------------------------- mixtures of experts


class WithRouters:
    """A mixture of `transformers` that keeps what its routers say, by layer, of the last sequence."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, token_ids: Tensor) -> Any:
        out = self.model(token_ids, output_router_logits=True)
        self.routers = out.router_logits
        return out


def of_a_mixture(models: Path, replicas: int) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by plain autograd in fp64, with the balance over the predictions that carry loss alone."""
    model = load_transformers(models / "experts").double()
    student = WithRouters(model)
    plain = Reference(student, load_hf(models / "teacher"), Objective(), VOCAB)
    losses, probabilities = {}, {}
    for one in BATCH:
        with torch.no_grad():
            old_LV = hf_logprobs(student, one.token_ids, VOCAB)
        losses[one.sequence_id] = plain._token_losses(one, old_LV, 0)[0]
        carrying = torch.from_numpy(np.isin(one.region_L[1:], LOSS_REGIONS))
        probabilities[one.sequence_id] = [layer[:-1][carrying].softmax(-1) for layer in student.routers]
    count, chosen, experts = (
        len(torch.cat([*losses.values()])),
        model.config.num_experts_per_tok,
        model.config.num_experts,
    )
    balance: Any = 0.0
    for [item] in pack(BATCH, max_tokens=4096, num_replicas=replicas):
        for layer in zip(*(probabilities[i] for i in item.sequence_ids.tolist() if i >= 0), strict=True):
            p_NE = torch.cat(layer)
            assert len(p_NE) == item.num_valid
            f_E = torch.bincount(p_NE.topk(chosen).indices.flatten(), minlength=experts) / (chosen * len(p_NE))
            balance = balance + experts * (f_E * p_NE.mean(0)).sum() * len(p_NE) / count
    loss = torch.cat([*losses.values()]).mean()
    (loss + BALANCE * balance).backward()
    return float(loss.detach()), on_disk_gradients(models / "experts", model)


@pytest.mark.parametrize("case", MIXTURES, ids=lambda case: case.name)
def test_experts_are_balanced_over_what_models_wrote_and_observations_weigh_nothing(case, measured, models):
    loss, weights = of_a_mixture(models, replicas=2 if "expert" in case.student else 1)
    found = measured[case.name]
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert set(found["weights"]) == set(weights)
    for name, expected in weights.items():
        actual = found["weights"][name].double()
        assert relative_error(actual, expected) < 1e-5, name


# --------------------------------------------------------------------------- teachers


def scores(case: Case, models: str, recording: str) -> dict[str, Any]:
    """Log-probs by sequence of a live teacher, of its recording, and of that for fewer and for more predictions."""
    run = assemble(config_of(case, Path(models)), GroupBuilder())
    groups, request, facts = run.world.student, TeacherRequest(top_k=3), {"vocab_size": VOCAB}
    packs = pack_rollouts(run, BATCH)
    live = RecordingTeacher(run.teacher, recording, groups, facts=facts, values="fp32").score(packs, request)
    torch.distributed.barrier()
    recorded = RecordedTeacher(recording, groups, run.world.device, facts=facts)
    found = {
        "live": by_sequence(packs, live, groups),
        "recorded": by_sequence(packs, recorded.score(packs, request), groups),
    }
    fewer, more = (pack_rollouts(run, [changed(one, to) for one in BATCH]) for to in ("fewer", "more"))
    # scores of predictions that were never made are not invented
    with pytest.raises(DataError, match="holds no scores for a sequence"):
        recorded.score(more, request)
    return found | {"fewer": by_sequence(fewer, recorded.score(fewer, request), groups)}


def changed(one: Rollout, to: str) -> Rollout:
    """Every second token that carries loss an observation; or every observation one that carries loss."""
    region_L = one.region_L.copy()
    if to == "fewer":
        region_L[np.flatnonzero(np.isin(region_L, LOSS_REGIONS))[::2]] = Region.OBSERVATION
    else:
        region_L[region_L == Region.OBSERVATION] = Region.PREFIX
    return replace(one, region_L=region_L)


def by_sequence(packs: list[list[Pack]], outputs: Any, groups: Groups) -> dict[int, Any]:
    """Positions, log-probs and the likeliest ids' log-probs of this rank's predictions."""
    found = {}
    for item, signal in zip(packs[groups.replica], outputs, strict=True):
        rows = own_valid_positions(item, groups)
        assert (own_predictions(item, groups).read_N == rows).all()
        for sequence in item.sequence_ids.tolist():
            own = item.sequence_T[rows] == sequence
            mask = torch.from_numpy(own)
            position = torch.from_numpy(item.position_T[rows[own]])
            found[sequence] = position, signal.logprob_N[mask], signal.topk_logprob_NK[mask]
    return found


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_a_teacher_and_its_recording_score_every_stretch_as_transformers_does(case, models, tmp_path):
    ranks = run_on_ranks(scores, case, str(models), str(tmp_path / "recording"), world_size=case.ranks)
    teacher = load_hf(models / "teacher")
    for one in BATCH:
        with torch.no_grad():
            logp_LV = hf_logprobs(teacher, one.token_ids, VOCAB)
        target_L1 = torch.from_numpy(one.token_ids[1:, None])
        for kind in ranks[0]:
            parts = zip(*(found[kind][one.sequence_id] for found in ranks), strict=True)
            position, logprob, top = (torch.cat(part) for part in parts)
            expected = changed(one, "fewer") if kind == "fewer" else one
            wanted = np.flatnonzero(np.isin(expected.region_L[1:], LOSS_REGIONS))
            assert sorted(position.tolist()) == wanted.tolist(), kind
            truth_N = logp_LV.gather(1, target_L1)[position, 0]
            torch.testing.assert_close(logprob.double(), truth_N, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(top.double(), logp_LV[position].topk(3).values, atol=2e-5, rtol=2e-5)


# --------------------------------------------------------------------------- what the sampler said


class OneRank:
    """As much of a model as ``token_view`` looks at."""

    device = torch.device("cpu")

    class groups:
        context_rank = 0

        class layout:
            context = 1


def test_the_sampler_s_log_probs_are_those_of_continuation_tokens_wherever_they_stand():
    by_id = {one.sequence_id: one for one in BATCH}
    facts = BatchFacts(seed=3, step=2, progress=0.0)
    model: Any = OneRank()
    for item in pack(BATCH, max_tokens=96, multiple_of=8)[0]:
        tokens = token_view(item, by_id, facts, model)
        for sequence in item.sequence_ids.tolist():
            one = by_id[sequence]
            said = dict(zip(np.flatnonzero(one.region_L == Region.CONTINUATION) - 1, one.model_logprob, strict=True))
            own = tokens.sequence_T == sequence
            positions, sampled = tokens.position_T[own].tolist(), tokens.rollout_logprob_T[own].numpy()
            np.testing.assert_array_equal(sampled, np.float32([said.get(t, np.nan) for t in positions]))
            assert positions == np.flatnonzero(np.isin(one.region_L[1:], LOSS_REGIONS)).tolist()
            assert tokens.region_T[own].tolist() == one.region_L[1:][positions].tolist()
            assert tokens.target_T[own].tolist() == one.token_ids[1:][positions].tolist()


def test_log_probs_that_do_not_fit_the_continuation_tokens_are_refused():
    one = replace(BATCH[0], model_logprob=np.append(BATCH[0].model_logprob, np.float32(0.0)))
    [[item]] = pack([one], max_tokens=96)
    count = one.count(Region.CONTINUATION)
    model: Any = OneRank()
    with pytest.raises(DataError, match=f"sequence 0 has {count} CONTINUATION tokens and {count + 1} log-probs"):
        token_view(item, {0: one}, BatchFacts(seed=0, step=0, progress=0.0), model)


# --------------------------------------------------------------------------- whole runs


QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "checkpoint.every=0", "train.steps=2")


def test_a_replay_of_several_turns_counts_what_models_wrote_and_is_the_same_under_another_layout(tmp_path):
    task = make_task(tmp_path / "task")
    written, turns = tmp_path / "written", tmp_path / "turns"
    commands().run(
        "train", task.config, f"run_dir={tmp_path}/source", *QUIET, f"rollout.record={written}"
    ).expect_success()
    batches = [[interrupted(one) for one in read_rollouts(written, step)] for step in range(2)]
    for step, rollouts in enumerate(batches):
        write_rollouts(turns, step, rollouts)
    replay = (*QUIET, "rollout.engine=recorded", f"rollout.recorded_from={turns}")
    commands().run("train", task.config, f"run_dir={tmp_path}/alone", *replay).expect_success()
    cut = ("student.parallel.context=2", "train.minibatches=1")
    commands().run("train", task.config, f"run_dir={tmp_path}/cut", *replay, *cut, ranks=2).expect_success()
    rows = steady_metrics(tmp_path / "alone")
    assert_metrics_agree(steady_metrics(tmp_path / "cut"), rows)
    for row, rollouts in zip(rows, batches, strict=True):
        masks = [np.isin(one.region_L, LOSS_REGIONS) for one in rollouts]
        assert row["tokens"] == sum(mask.sum() for mask in masks)
        assert row["response_length"] == np.mean([mask.sum() for mask in masks])
        assert row["observation_length"] == np.mean([(one.region_L == 4).sum() for one in rollouts]) > 0
        assert row["continuation_length"] == np.mean([len(one.model_logprob) for one in rollouts])


def interrupted(one: Rollout) -> Rollout:
    """As if a tool had written the second and third of every four tokens that the student did."""
    written = np.flatnonzero(one.region_L == Region.CONTINUATION)
    kept = np.isin(np.arange(len(written)) % 4, (0, 3))
    region_L = one.region_L.copy()
    region_L[written[~kept]] = Region.OBSERVATION
    return replace(
        one, region_L=region_L, sampling_logprob=one.sampling_logprob[kept], model_logprob=one.model_logprob[kept]
    )
