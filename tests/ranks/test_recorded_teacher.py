"""Rollouts and grades on disk: a replay is the run it was recorded from, and anything else is refused."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tropd.errors import DataError
from megatron_tropd.rollout.engines.recorded import RecordedSampler, read_rollouts, write_rollouts
from megatron_tropd.types import Region, Rollout, RolloutRequest, SamplingParams, single_turn
from tests.support.run_inputs import (
    TEACHER,
    Task,
    assert_metrics_agree,
    commands,
    make_task,
    save_model,
    steady_metrics,
)

QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "checkpoint.every=0", "train.steps=5")
PARAMS = SamplingParams(max_new_tokens=9)


# --------------------------------------------------------------------------- rollouts: files


def rollout(number: int, *, prompt: int, prefix: int, written: int) -> Rollout:
    rng = np.random.default_rng(number)
    return Rollout(
        sequence_id=number,
        prompt_index=10 + number,
        token_ids=rng.integers(0, 2**40, prompt + prefix + written),
        region_L=single_turn(prompt=prompt, prefix=prefix, continuation=written),
        sampling_logprob=rng.normal(size=written).astype(np.float32),
        model_logprob=rng.normal(size=written).astype(np.float32),
        finished=bool(number % 2),
        weight_version=4,
    )


def request_of(rollout: Rollout) -> RolloutRequest:
    given = np.flatnonzero(rollout.region_L > Region.PREFIX)
    ends = rollout.prompt_length, int(given[0]) if len(given) else len(rollout.region_L)
    return RolloutRequest(
        sequence_id=rollout.sequence_id,
        prompt_index=rollout.prompt_index,
        prompt_ids=rollout.token_ids[: ends[0]],
        prefix_ids=rollout.token_ids[ends[0] : ends[1]],
        max_new_tokens=9,
    )


@pytest.fixture
def recorded() -> list[Rollout]:
    """One that wrote nothing, a guided one, one of a single token, a plain one, one of several turns."""
    shapes = [(3, 5, 0), (4, 2, 7), (1, 0, 0), (6, 0, 9), (2, 0, 6)]
    found = [rollout(i, prompt=p, prefix=f, written=w) for i, (p, f, w) in enumerate(shapes)]
    turns = np.array([0, 0, 2, 2, 4, 4, 1, 2, 2, 4, 2, 2], np.uint8)
    return [*found[:-1], replace(found[-1], token_ids=np.arange(70, 82), region_L=turns)]


def assert_same(found: list[Rollout], expected: list[Rollout]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        for name in Rollout.__dataclass_fields__:
            x, y = getattr(a, name), getattr(b, name)
            assert type(x) is type(y), name
            if isinstance(y, np.ndarray):
                assert x.dtype == y.dtype, name
                np.testing.assert_array_equal(x, y)
            else:
                assert x == y, name


def test_rollouts_come_back_as_they_were_written(tmp_path: Path, recorded: list[Rollout]):
    write_rollouts(tmp_path, 3, recorded)
    assert_same(read_rollouts(tmp_path, 3), recorded)
    write_rollouts(tmp_path, 4, [])
    assert read_rollouts(tmp_path, 4) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003.npz", "step-00000004.npz"]


def test_a_recording_of_format_1_is_read_and_one_of_a_later_format_is_refused_by_name(tmp_path: Path):
    # as format 1 had it: rows of six columns, among them prompt and prefix lengths, and no regions
    old = {
        "rows": np.array([[7, 3, 2, 1, 1, 4], [9, 5, 1, 0, 0, 4]]),
        "lengths": np.array([5, 3]),
        "token_ids": np.arange(8),
        "sampling_logprob": np.float32([-1, -2, -3, -4]),
        "model_logprob": np.float32([-5, -6, -7, -8]),
        "token_versions": np.array([3, 4, 4, 4]),
    }
    np.savez(tmp_path / "step-00000002.npz", **old)
    first, second = read_rollouts(tmp_path, 2)
    assert (first.sequence_id, first.prompt_index, first.finished, first.weight_version) == (7, 3, True, 4)
    assert first.region_L.tolist() == [0, 0, 1, 2, 2] and second.region_L.tolist() == [0, 2, 2]
    assert first.model_logprob.tolist() == [-5, -6] and second.token_ids.tolist() == [5, 6, 7]
    assert first.token_versions is not None and first.token_versions.tolist() == [3, 4]
    np.savez(tmp_path / "step-00000002.npz", format=np.array(3), **old)
    with pytest.raises(DataError, match=r"step-00000002.npz is a recording of format 3; read are formats up to 2\."):
        read_rollouts(tmp_path, 2)


def test_a_step_that_was_not_recorded_is_named_with_those_that_were(tmp_path: Path, recorded: list[Rollout]):
    with pytest.raises(DataError, match=r"step-00000009.npz was not recorded \(the directory holds none\)"):
        read_rollouts(tmp_path, 9)
    for step in (3, 4):
        write_rollouts(tmp_path, step, recorded)
    with pytest.raises(DataError, match=r"holds step-00000003 to step-00000004\). Record as many steps as train.steps"):
        read_rollouts(tmp_path, 5)


def test_a_recording_torn_anywhere_is_one_error(tmp_path: Path, recorded: list[Rollout]):
    path = write_rollouts(tmp_path, 0, recorded)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"token_ids.npy") + 200] ^= 1
    torn: list[bytes] = [b"", b"nonsense", bytes(flipped), *(whole[:end] for end in range(1, len(whole), 97))]
    for content in torn:
        path.write_bytes(content)
        with pytest.raises(DataError, match="is torn or not a recording: "):
            read_rollouts(tmp_path, 0)


def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path: Path, recorded: list[Rollout]):
    path = write_rollouts(tmp_path, 0, recorded)
    with np.load(path) as stored:
        arrays = dict(stored)
    changes: list[dict[str, Any]] = [
        {"token_ids": arrays["token_ids"][:-1]},
        {"model_logprob": np.append(arrays["model_logprob"], np.float32(0))},
        {"lengths": arrays["lengths"][::-1]},
        {"regions": arrays["regions"][:-1]},
        {"regions": np.roll(arrays["regions"], 1)},
        {"regions": np.where(arrays["regions"] == 4, 3, arrays["regions"])},
        {"rows": arrays["rows"][:, :-1]},
        {"rows": arrays["rows"][:-1]},
        {"lengths": np.array([[1, 2]])},
    ]
    for change in changes:
        np.savez(path, **{**arrays, **change})
        with pytest.raises(DataError, match="is torn or not a recording"):
            read_rollouts(tmp_path, 0)
    np.savez(path, **{name: array for name, array in arrays.items() if name != "rows"})
    with pytest.raises(DataError, match="is torn or not a recording"):
        read_rollouts(tmp_path, 0)
    np.save(path.with_suffix(".npy"), arrays["token_ids"])
    os.replace(path.with_suffix(".npy"), path)
    with pytest.raises(DataError, match="is torn or not a recording"):
        read_rollouts(tmp_path, 0)
    np.savez(path, **{**arrays, "rows": np.array([{"pickled": "object"}], dtype=object)})
    with pytest.raises(DataError, match="is torn or not a recording: Object arrays cannot be loaded"):
        read_rollouts(tmp_path, 0)


def test_a_recording_that_answers_other_requests_is_refused(tmp_path: Path, recorded: list[Rollout]):
    write_rollouts(tmp_path, 0, recorded)
    sampler = RecordedSampler(tmp_path)
    asked = [request_of(rollout) for rollout in recorded]
    assert_same(sampler.generate(asked, PARAMS, seed=0, step=0), recorded)

    with pytest.raises(DataError, match="holds 5 sequences, but 4 are requested"):
        sampler.generate(asked[:-1], PARAMS, seed=0, step=0)

    changes: list[dict[str, Any]] = [
        {"prompt_index": 99},
        {"sequence_id": 99},
        {"prompt_ids": asked[1].prompt_ids + 1},
        {"prefix_ids": asked[1].prefix_ids[:-1]},
        {"prompt_ids": np.append(asked[1].prompt_ids, asked[1].prefix_ids[0]), "prefix_ids": asked[1].prefix_ids[1:]},
    ]
    for change in changes:
        with pytest.raises(DataError, match="answers other prompts: sequence"):
            sampler.generate([asked[0], replace(asked[1], **change), *asked[2:]], PARAMS, seed=0, step=0)


# --------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def source(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on one process that records what it samples and how it is graded."""
    home = tmp_path_factory.mktemp("source")
    record = (f"rollout.record={home}/rollouts", f"teacher.record={home}/grades", "teacher.record_values=fp32")
    commands().run("train", task.config, f"run_dir={home}", *QUIET, *record).expect_success()
    assert len(list((home / "rollouts").glob("step-*.npz"))) == 5
    return home


def replay(task: Task, source: Path, run_dir: Path, *overrides: str, ranks: int = 0) -> Any:
    rollouts = ("rollout.engine=recorded", f"rollout.recorded_from={source}/rollouts")
    return commands().run("train", task.config, f"run_dir={run_dir}", *QUIET, *rollouts, *overrides, ranks=ranks)


def test_a_replay_of_rollouts_and_grades_has_the_metrics_of_the_run(task: Task, source: Path, tmp_path: Path):
    replay(task, source, tmp_path / "rollouts").expect_success()
    assert steady_metrics(tmp_path / "rollouts") == steady_metrics(source)

    # the grades suffice: not even the teacher's weights are read; the report has samples without a gate
    bare = tmp_path / "teacher"
    shutil.copytree(task.teacher, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    grades = (f"teacher.recorded_from={source}/grades", f"teacher.model={bare}", "report.samples=1")
    replay(task, source, tmp_path / "grades", *grades).expect_success()
    assert steady_metrics(tmp_path / "grades") == steady_metrics(source)


@pytest.mark.parametrize(
    ("layout", "graded"),
    [
        (("student.parallel.tensor=2", "student.parallel.sequence=true", "teacher.parallel.pipeline=2"), False),
        pytest.param(
            ("train.pack_tokens=90", "train.minibatches=1", "student.recompute=full"), False, marks=pytest.mark.long
        ),
        pytest.param(("student.parallel.tensor=2", "student.parallel.sequence=true"), True, marks=pytest.mark.long),
        (("student.parallel.context=2",), True),
        pytest.param(("train.pack_tokens=90",), True, marks=pytest.mark.long),
    ],
    ids=[
        "sequence-parallel",
        "data-parallel",
        "grades sequence-parallel",
        "grades context-parallel",
        "grades dp packs",
    ],
)
def test_a_replay_under_another_layout_agrees_for_five_steps(
    task: Task, source: Path, tmp_path: Path, layout: tuple[str, ...], graded: bool
):
    grades = (f"teacher.recorded_from={source}/grades",) if graded else ()
    replay(task, source, tmp_path, *layout, *grades, ranks=2).expect_success()
    assert_metrics_agree(steady_metrics(tmp_path), steady_metrics(source))


def test_a_replay_of_what_the_student_asked_about_has_the_metrics_of_the_run(task: Task, source: Path, tmp_path: Path):
    union = ("method.support=union", "method.tail=bucket")
    record = (f"rollout.record={tmp_path}/rollouts", f"teacher.record={tmp_path}/grades", "teacher.record_values=fp32")
    commands().run("train", task.config, f"run_dir={tmp_path}", *QUIET, *union, *record).expect_success()
    assert steady_metrics(tmp_path) != steady_metrics(source)
    grades = f"teacher.recorded_from={tmp_path}/grades"
    replay(task, tmp_path, tmp_path / "again", *union, grades).expect_success()
    assert steady_metrics(tmp_path / "again") == steady_metrics(tmp_path)

    refusals = [
        # what was recorded for the teacher's candidates alone
        ((source, f"teacher.recorded_from={source}/grades"), "scores of the student's 7 likeliest tokens (it has 0)"),
        ((tmp_path, grades, f"student.model={task.teacher}"), "was recorded for another student: "),
    ]
    for number, ((home, *changes), message) in enumerate(refusals):
        outcome = replay(task, home, tmp_path / f"{number}", *union, *changes)
        assert outcome.status == 2 and message in outcome.output.replace("\n", " "), outcome.output
        assert outcome.output.count("DataError") == 1 and "Traceback" not in outcome.output, outcome.output


def test_the_base_model_s_grades_are_recorded_beside_the_teacher_s(task: Task, tmp_path: Path):
    configs = {name: tmp_path / f"{name}.yaml" for name in ("opd", "exopd")}
    for name, path in configs.items():
        path.write_text(task.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", f"name: {name}"))

    def train(name: str, run_dir: str, *overrides: str) -> Any:
        settings = (*QUIET, "train.steps=2", f"run_dir={tmp_path}/{run_dir}", *overrides)
        return commands().run("train", configs[name], *settings)

    base = save_model(tmp_path / "base", TEACHER, tied=False, seed=9)
    for name in configs:
        recorded = (
            f"rollout.record={tmp_path}/{name}/rollouts",
            f"teacher.record={tmp_path}/{name}/grades",
            "teacher.record_values=fp32",
        )
        train(name, name, *recorded, f"base.model={base}").expect_success()
    metrics = steady_metrics(tmp_path / "exopd")
    assert metrics[0]["loss"] != steady_metrics(tmp_path / "opd")[0]["loss"]

    # not even the base model's weights are read
    bare = tmp_path / "bare"
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    rollouts = ("rollout.engine=recorded", f"rollout.recorded_from={tmp_path}/exopd/rollouts")
    grades = (*rollouts, f"teacher.recorded_from={tmp_path}/exopd/grades")
    train("exopd", "again", *grades, f"base.model={bare}").expect_success()
    assert steady_metrics(tmp_path / "again") == metrics

    refusals = [
        (f"teacher.recorded_from={tmp_path}/opd/grades", "was recorded without base model. Use the models and method"),
        ("base.model=null", "was recorded with base model {"),
    ]
    for number, (override, message) in enumerate(refusals):
        outcome = train("exopd", f"{number}", *grades, f"base.model={bare}", override)
        assert outcome.status == 2 and message in outcome.output, outcome.output
        assert outcome.output.count("DataError") == 1 and "Traceback" not in outcome.output, outcome.output


def test_a_replay_that_does_not_fit_is_one_error_naming_what_to_change(task: Task, source: Path, tmp_path: Path):
    cases = [
        (("seed=8",), "answers other prompts: sequence "),
        (("rollout.samples_per_prompt=3",), "holds 9 sequences, but 12 are requested"),
        (("method.prefix_schedule=linear",), "answers other prompts"),
        (("train.steps=6",), "step-00000005.npz was not recorded (the directory holds step-00000000 to step-00000004)"),
        ((f"teacher.recorded_from={source}/grades", "method.k=8"), "lacks the 8 likeliest tokens (it has 7), which"),
        (
            (f"teacher.recorded_from={source}/grades", "method.temperature=0.9"),
            "was recorded with temperature 1.0, not 0.9",
        ),
        (
            (f"teacher.recorded_from={source}/grades", "method.trusted=rkl_full"),
            "lacks hidden states, which the method",
        ),
        ((f"teacher.record={source}/grades", "method.temperature=0.9"), "Record into another directory."),
    ]
    for number, (overrides, message) in enumerate(cases):
        outcome = replay(task, source, tmp_path / f"{number}", *overrides)
        assert outcome.status == 2 and message in outcome.output, (overrides, outcome.output)
        assert outcome.output.count("DataError") == 1 and "Traceback" not in outcome.output, outcome.output


# --------------------------------------------------------------------------- grades


def test_recorded_grades_are_the_live_ones_bit_for_bit(tmp_path: Path):
    for ranks in (1, 2):
        commands().call(record_and_read_grades, tmp_path / f"{ranks}", ranks=ranks)


def record_and_read_grades(directory: str) -> None:
    """On the ranks: a teacher of made-up signals, recorded and read under each layout the ranks allow."""
    import torch
    import torch.distributed as dist

    from megatron_tropd.config.sections import Layout
    from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
    from megatron_tropd.teacher.engines.recorded import RecordedTeacher, RecordingTeacher

    device = initialize_distributed()
    facts = {"temperature": 0.7, "sizes": (3, 4), "vocab_size": 2**31}
    world = dist.get_world_size()
    for layout in {Layout(), Layout(tensor=world), Layout(pipeline=world), Layout(context=world)}:
        student = GroupBuilder().build(layout)
        for dtype in (torch.float32, torch.bfloat16):
            packs = made_up_packs(student.num_replicas)
            live = MadeUpTeacher(student, dtype)
            home = Path(directory) / f"{layout.tensor}{layout.pipeline}{layout.context}{dtype}"
            asked = live.asks(packs, live.spec(top_k=5))
            recording = RecordingTeacher(live, home, student, facts=facts, values="fp32")
            expected = recording.score(packs, live.spec(top_k=5), asked)
            dist.barrier()
            reading = RecordedTeacher(home, student, device, facts=facts)
            for k, entropy, hidden in ((5, True, True), (2, False, False), (0, True, False)):
                spec = live.spec(top_k=k, entropy=entropy, hidden_states=hidden, tail_mass=k != 2)
                found = reading.score(packs, spec, live.asks(packs, spec))
                assert_same_signals(found, expected, top_k=k, entropy=entropy, hidden=hidden)
            if layout.context == 1:
                reread_under_context_parallelism(home, packs[student.replica], expected, live, facts)
            if student.is_last_stage:
                assert_refusals(reading, live, home, packs, student, device, facts)
            dist.barrier()


def reread_under_context_parallelism(home: Path, mine: Any, expected: Any, live: Any, facts: dict[str, Any]) -> None:
    """Every rank of a larger world finds its own rows in what ranks without context parallelism have recorded."""
    from types import SimpleNamespace

    import torch

    from megatron_tropd.config.sections import Layout
    from megatron_tropd.engine.context import valid_positions
    from megatron_tropd.teacher.engines.recorded import RecordedTeacher

    if expected[0] is None:
        return
    for rank in range(2):
        reader = SimpleNamespace(replica=0, context_rank=rank, layout=Layout(context=2), is_last_stage=True)
        reading = RecordedTeacher(home, reader, torch.device("cpu"), facts=facts)
        found = reading.score([mine], live.spec(top_k=5))
        for part, whole, pack in zip(found, expected, mine, strict=True):
            rows = np.isin(valid_positions(pack), valid_positions(pack, rank=rank, ranks=2))
            assert torch.equal(part.topk_ids_NK, whole.topk_ids_NK[rows])
            assert torch.equal(part.query_logprob_NJ, whole.query_logprob_NJ[rows])
            assert torch.equal(part.hidden_NE, whole.hidden_NE[rows])


def made_up_packs(replicas: int) -> Any:
    from megatron_tropd.data.packing import pack

    rng = np.random.default_rng(3)
    rollouts = [rollout(i, prompt=3, prefix=i % 3, written=int(rng.integers(0, 9)) + 1) for i in range(7)]
    return pack(rollouts, max_tokens=32, multiple_of=4, num_replicas=replicas)


class MadeUpTeacher:
    """A live teacher in all but its origin; nothing where the student has no last stage."""

    def __init__(self, student: Any, dtype: Any) -> None:
        self._student, self._dtype = student, dtype

    @staticmethod
    def spec(*, top_k: int, entropy: bool = True, hidden_states: bool = True, tail_mass: bool = True) -> Any:
        """As many ids are asked about as the top k has, and one more of a whole top k."""
        from megatron_tropd.teacher.protocol import TeacherRequest

        asked = top_k + (top_k == 5)
        return TeacherRequest(
            top_k=top_k, queries=asked, entropy=entropy, hidden_states=hidden_states, tail_mass=tail_mass
        )

    def asks(self, packs: Any, spec: Any) -> Any:
        """Distinct ids for every prediction."""
        import torch

        from megatron_tropd.engine.context import own_valid_positions

        if not spec.queries or not self._student.is_last_stage:
            return None
        ids_J = 1000 - torch.arange(spec.queries)
        mine = packs[self._student.replica]
        return [ids_J.repeat(len(own_valid_positions(pack, self._student)), 1) for pack in mine]

    def score(self, packs: Any, spec: Any, asked: Any = None) -> list[Any]:
        import torch

        from megatron_tropd.engine.context import own_valid_positions, valid_positions
        from megatron_tropd.types import TeacherOutputs

        mine = packs[self._student.replica]
        if not self._student.is_last_stage:
            return [None] * len(mine)
        generator = torch.Generator().manual_seed(self._student.replica)
        signals = []
        for pack, ids in zip(mine, asked, strict=True):
            n = pack.num_valid
            own = np.isin(valid_positions(pack), own_valid_positions(pack, self._student))
            signals.append(
                TeacherOutputs(
                    logprob_N=-torch.rand(n, generator=generator)[own],
                    topk_ids_NK=torch.randint(0, 2**31 - 1, (n, spec.top_k), generator=generator)[own],
                    topk_logprob_NK=-torch.rand(n, spec.top_k, generator=generator)[own],
                    query_ids_NJ=ids,
                    query_logprob_NJ=-torch.rand(n, spec.queries, generator=generator)[own],
                    logtail_N=-torch.rand(n, generator=generator)[own] if spec.tail_mass else None,
                    entropy_N=torch.rand(n, generator=generator)[own],
                    hidden_NE=torch.randn(n, 11, generator=generator).to(self._dtype)[own],
                )
            )
        return signals


def assert_same_signals(found: list[Any], expected: list[Any], *, top_k: int, entropy: bool, hidden: bool) -> None:
    import torch

    from megatron_tropd.types import TeacherOutputs

    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
            continue
        wanted = {"logprob_N": b.logprob_N}
        wanted |= (
            {"topk_ids_NK": b.topk_ids_NK[:, :top_k], "topk_logprob_NK": b.topk_logprob_NK[:, :top_k]} if top_k else {}
        )
        if top_k:
            asked = top_k + (top_k == 5)
            wanted |= {name: getattr(b, name)[:, :asked] for name in ("query_ids_NJ", "query_logprob_NJ")}
        wanted |= {"logtail_N": b.logtail_N} if top_k == 5 else {}
        wanted |= {"entropy_N": b.entropy_N} if entropy else {}
        wanted |= {"hidden_NE": b.hidden_NE} if hidden else {}
        for name in TeacherOutputs.__dataclass_fields__:
            value = getattr(a, name)
            assert (value is None) == (name not in wanted), name
            if value is not None:
                assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name


def assert_refusals(
    reading: Any, live: MadeUpTeacher, home: Path, packs: Any, student: Any, device: Any, facts: dict[str, Any]
) -> None:
    from megatron_tropd.teacher.engines.recorded import RecordedTeacher

    asked = live.asks(packs, live.spec(top_k=5))
    with pytest.raises(DataError, match=r"lacks the 6 likeliest tokens \(it has 5\), which the method needs"):
        reading.score(packs, live.spec(top_k=6), asked)
    with pytest.raises(DataError, match=r"was recorded for another student: 33% of the present one's likeliest tokens"):
        reading.score(packs, live.spec(top_k=5), [ids_NJ + 2 for ids_NJ in asked])
    with pytest.raises(DataError, match=r"was recorded with temperature 0.7, not 1.0. Use the models and method of"):
        RecordedTeacher(home, student, device, facts={**facts, "temperature": 1.0})
    with pytest.raises(DataError, match="is not a recording of a teacher"):
        RecordedTeacher(home.parent / "gone", student, device, facts=facts)
    # a copy per rank: the other ranks still read the original
    mine = home.with_name(f"{home.name}-{student.replica}-{student.context_rank}-{student.tensor_rank}")
    shutil.copytree(home, mine)
    for path in mine.glob("*.parquet"):
        path.unlink()
    reading = RecordedTeacher(mine, student, device, facts=facts)
    with pytest.raises(DataError, match="holds no scores for a sequence of "):
        reading.score(packs, live.spec(top_k=5), asked)


@pytest.mark.parametrize(("top_k", "asked"), [(7, 6), (3, 2), (0, 6), (4, 0), (1, 0), (7, 0)])
def test_candidates_that_are_no_longer_asked_for_become_part_of_the_tail(top_k: int, asked: int):
    """Recorded: the top 7, six more ids (some of them the same) and the mass of all else; expected: a sum over ids."""
    import torch

    from megatron_tropd.teacher.engines.recorded import fitted
    from megatron_tropd.teacher.protocol import TeacherRequest

    torch.manual_seed(0)
    logp_NV = (2 * torch.randn(33, 41, dtype=torch.float64)).log_softmax(-1)
    target_N = torch.randint(41, (33,))
    student_NJ = (logp_NV + torch.randn_like(logp_NV)).topk(6).indices
    top = logp_NV.topk(7)
    assert (student_NJ[:, :, None] == top.indices[:, None]).any() and (target_N[:, None] == student_NJ).any()

    def outside(*listed: torch.Tensor) -> torch.Tensor:
        return logp_NV.scatter(1, torch.cat([target_N[:, None], *listed], dim=1), -torch.inf).logsumexp(-1)

    recorded = {
        "logprob": logp_NV.gather(1, target_N[:, None])[:, 0],
        "topk_ids": top.indices,
        "topk_logprob": top.values,
        "query_ids": student_NJ,
        "query_logprob": logp_NV.gather(1, student_NJ),
        "logtail": outside(top.indices, student_NJ),
    }
    spec = TeacherRequest(top_k=top_k, queries=asked, entropy=False, tail_mass=True)
    found = fitted(recorded, target_N, spec)
    torch.testing.assert_close(found.logtail_N, outside(top.indices[:, :top_k], student_NJ[:, :asked]))
