"""What `auto` comes to: lengths and layouts by hand, explicit values untouched, two ways of saying a thing compared."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_tropd.commands.fitting import fit
from megatron_tropd.commands.init import write_configuration
from megatron_tropd.config.loading import dump_config, load_config
from megatron_tropd.config.messages import Named
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.planning.choice import budgets, machine
from megatron_tropd.planning.cluster import Cluster
from megatron_tropd.setup.datasets import read_tokenizer, read_training_prompts
from tests.support.run_inputs import POSITIONS, TEACHER, Task, make_task

LARGE = 2**36  # bytes, of which nothing here takes a thousandth


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"), teacher={**TEACHER, "max_position_embeddings": POSITIONS - 7})


def load(task: Task, *overrides: str, file: Path | None = None, prompts: Path | None = None) -> RunConfig:
    named = {
        "student.model": Named("--student", str(task.student)),
        "teacher.model": Named("--teacher", str(task.teacher)),
        "data.prompts": Named("--prompts", [str(prompts or task.prompts)]),
    }
    return load_config(file, overrides, named=named, fitted_later=True)


def ranks(count: int, memory_bytes: float = LARGE) -> Cluster:
    return machine(ranks=count, ranks_per_node=count, memory_bytes=memory_bytes, gpu=False)


@pytest.mark.parametrize(
    ("overrides", "prompt", "response"),
    [  # of 89 positions, which the teacher has
        ((), 44, 45),
        (("rollout.max_new_tokens=80",), 9, 80),
        (("data.max_prompt_tokens=20",), 20, 69),
        (("data.max_prompt_tokens=20", "rollout.max_new_tokens=auto"), 20, 69),
        (("train.pack_tokens=50",), 25, 25),
        (("data.max_prompt_tokens=64", "rollout.max_new_tokens=64"), 64, 64),  # refused later, by the data's lengths
    ],
)
def test_lengths_are_what_all_models_and_a_pack_have_room_for(
    task: Task, overrides: tuple[str, ...], prompt: int, response: int
):
    fitted = fit(load(task, *overrides), ranks(1)).config
    assert (fitted.data.max_prompt_tokens, fitted.rollout.max_new_tokens) == (prompt, response)
    assert fitted.train.pack_tokens >= prompt + response


def test_a_length_that_leaves_nothing_to_the_other_is_refused(task: Task):
    with pytest.raises(ConfigError, match=r"max_new_tokens = 89 leaves no token .* 89 positions\. Lower .* to 88 or l"):
        fit(load(task, "rollout.max_new_tokens=89"), ranks(1))


def test_layouts_divide_ranks_and_heads_and_are_as_small_as_the_memory_allows(task: Task):
    bare = load(task, "dtype=fp32", "train.pack_tokens=160")
    for count in (1, 2, 3, 4, 6):
        fitted = fit(bare, ranks(count)).config
        assert fitted.student.parallel == fitted.teacher.parallel == Layout()  # all that is left is data parallel
    # fp32 weights and gradients and two moments: 16 bytes of a parameter are more than three quarters of the memory
    parameters = sum(tensor.numel() for tensor in load_file(task.student / "model.safetensors").values())
    found = fit(bare, ranks(2, 16 * parameters / 0.75 * 0.99))
    assert found.config.student.parallel.model_ranks == 2
    assert "is estimated to fit" in (found.warning or "")  # the teacher and activations are there as well
    # three ranks divide neither the 2 key/value heads nor the teacher's 2 layers, but the student's 3 layers
    odd = fit(bare, ranks(3, 16 * parameters / 0.75 * 0.99)).config
    assert odd.student.parallel == Layout(pipeline=3) and odd.teacher.parallel == Layout()


def test_packs_are_halved_until_they_fit_and_hold_the_longest_sequence(task: Task):
    assert budgets(9216, 16384) == [16384, 9216]
    assert budgets(89, 512) == [512, 256, 128]
    assert budgets(20000, 16384) == [20096]
    roomy = fit(load(task), ranks(1)).config.train.pack_tokens
    # a layer keeps far more than 36 numbers of each of 16384 tokens
    tight = fit(load(task), ranks(1, 3 * 16384 * 36 * 4)).config.train.pack_tokens
    assert roomy == 16384 and 89 <= tight < roomy and math.log2(tight).is_integer()


def test_what_is_explicit_stays_and_what_was_chosen_is_read_back_as_numbers(task: Task, tmp_path: Path):
    config = load(task, "student.parallel.pipeline=2", "teacher.parallel=auto", "export.hf=null", f"run_dir={tmp_path}")
    fitted = fit(config, ranks(2))
    assert fitted.config.student.parallel == Layout(pipeline=2) and fitted.config.export.hf is None
    assert "student.parallel" not in fitted.chosen and "teacher.parallel" in fitted.chosen
    dump_config(fitted.config, tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml", fitted_later=True)
    assert again == fitted.config and not fit(again, ranks(7)).chosen


def test_a_run_that_resumes_takes_what_was_chosen_when_it_started(task: Task, tmp_path: Path):
    config = load(task, f"run_dir={tmp_path}")
    first = fit(config, ranks(1, 3 * 16384 * 36 * 4)).config
    dump_config(first, tmp_path / "config.yaml")
    assert fit(config, ranks(1)).config.train.pack_tokens == 16384  # nothing was learned yet
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert fit(config, ranks(1)).config == first
    # a layout for other ranks is chosen anew
    dump_config(first.model_copy(update={"student": first.student.model_copy(update={"parallel": Layout(pipeline=2)})}),
                tmp_path / "config.yaml")  # fmt: skip
    assert fit(config, ranks(2)).config.student.parallel == Layout(pipeline=2)
    assert fit(config, ranks(3)).config.student.parallel == Layout()


def test_the_directory_is_named_after_models_and_method(task: Task, monkeypatch: pytest.MonkeyPatch):
    assert load(task).run_dir == Path("runs/student-from-teacher-tropd")
    monkeypatch.chdir(task.student)
    one = load_config(None, ["student.model=.", f"teacher.model={task.teacher}/", "method.name=opd",
                             f"data.prompts={task.prompts}"])  # fmt: skip
    assert one.run_dir == Path("runs/student-from-teacher-opd")


def test_a_file_and_an_option_may_say_the_same_and_not_otherwise(task: Task, tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text(f"student: {{model: {task.student}/}}\n")
    assert load(task, file=file).student.model == task.student
    file.write_text(f"seed: 1\nstudent:\n  model: {task.teacher}\n")
    with pytest.raises(
        ConfigError, match=rf"--student says {task.student}, and {file}, line 3 says student.model = .*teacher"
    ):
        load(task, file=file)
    with pytest.raises(ConfigError, match=r"--prompts says .*, and override 'data.prompts=a' says data.prompts = a\."):
        load(task, "data.prompts=a")


def test_what_is_pushed_to_the_hub_is_the_export_that_was_chosen(task: Task):
    fitted = fit(load(task, "export.push_to_hub=own/new"), ranks(1)).config
    assert fitted.export.hf == fitted.run_dir / "student"
    with pytest.raises(ConfigError, match="Set hf to one"):
        load(task, "export.push_to_hub=own/new", "export.hf=null")


def test_three_keys_are_a_whole_configuration(task: Task, tmp_path: Path):
    file = tmp_path / "my.yaml"
    file.write_text(
        f"student: {{model: {task.student}}}\nteacher: {{model: {task.teacher}}}\ndata: {{prompts: {task.prompts}}}\n"
    )
    assert fit(load_config(file, fitted_later=True), ranks(1)).config == fit(load(task), ranks(1)).config


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (("data.responses=required",), "has nobody write them: set it to auto"),
        (("teacher.recorded_from=SCORES",), r"its scores are recorded ones \(teacher.recorded_from"),
        (("rollout.engine=recorded", "rollout.recorded_from=SCORES"), "rollouts are replayed"),
        (("teacher.engine=vllm_server", "teacher.vllm_server.urls=[http://127.0.0.1:1]"), "only scores"),
    ],
)
def test_where_no_teacher_can_write_responses_the_error_names_what_can_be_done(
    task: Task, tmp_path: Path, changes: tuple[str, ...], reason: str
):
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "1+1"}\n')
    (tmp_path / "SCORES").mkdir()
    config = load_config(
        task.config, [f"data.prompts={bare}", *(one.replace("SCORES", str(tmp_path)) for one in changes)]
    )
    with pytest.raises(DataError, match=f"{reason}.*tropd generate.*data.responses=none"):
        read_training_prompts(config, read_tokenizer(config), guided=True, may_lack=True)


def test_without_responses_no_sequence_is_guided(task: Task):
    assert load(task, "data.responses=none").rollout.guided_per_prompt == 0
    with pytest.raises(ConfigError, match=r"rollout\.guided_per_prompt = 1 starts sequences with a teacher's response"):
        load(task, "data.responses=none", "rollout.guided_per_prompt=1")


def test_init_writes_what_one_line_says_and_leaves_a_file_that_is_there(task: Task, tmp_path: Path):
    bare, out = tmp_path / "a b.jsonl", tmp_path / "my.yaml"
    bare.write_text(
        "".join(f'{{"prompt": {json.dumps(row["prompt"])}}}\n' for row in rows_of(task)[:3])
    )  # of which one is too long
    config = load(task, prompts=bare)
    write_configuration(config, out)
    text = out.read_text()
    assert "  responses: auto  # 2 prompts have none: the teacher writes them when a run starts\n" in text
    assert "  # max_new_tokens: 45  # of a response; the models have 89 positions\n" in text
    written = load_config(out, fitted_later=True)
    assert fit(written, ranks(1)).config == fit(config, ranks(1)).config
    # with its comments taken off, it says what was chosen
    explicit = tmp_path / "explicit.yaml"
    explicit.write_text(re.sub(r"^( *)# ((?:parallel|max_\w+|pack_tokens|export|  hf):)", r"\1\2", text, flags=re.M))
    again = load_config(explicit, fitted_later=True)
    assert "max_new_tokens" in again.rollout.model_fields_set and again.export.hf == Path(f"{config.run_dir}/student")
    assert fit(again, ranks(1)).config == fit(config, ranks(1)).config
    with pytest.raises(ConfigError, match="is there already, and stays as it is"):
        write_configuration(config, out)
    assert out.read_text() == text


def rows_of(task: Task) -> list[dict[str, str]]:
    return [json.loads(line) for line in task.prompts.read_text().splitlines()]
