"""Every mistake in a config is one readable ConfigError; a good config survives a round trip through YAML."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_tropd.config.loading import dump_config, load_config, parse_config
from megatron_tropd.config.reference import config_reference
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout, RolloutEngine, TrainConfig
from megatron_tropd.errors import ConfigError

MINIMAL = """\
run_dir: runs/first
student:
  model: student
teacher: {model: teacher}
data:
  prompts: prompts.jsonl
"""


TWO_TEACHERS = (
    "data.prompts=null",
    "data.sources=[{name: a, prompts: prompts.jsonl}, {name: b, prompts: prompts.jsonl, teacher: t}]",
    "teachers=[{name: t, model: teacher}]",
)


def minimal_tree(**changes: Any) -> dict[str, Any]:
    return {
        "run_dir": "runs/first",
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "data": {"prompts": "prompts.jsonl"},
        **changes,
    }


@pytest.fixture
def config_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A minimal good config in the current directory, with the models and data it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "prompts.jsonl").touch()
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str, world_size: int | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, world_size=world_size)
    return str(caught.value)


# --------------------------------------------------------------------------- what is read


def test_defaults_are_the_papers_settings(config_path: Path):
    config = load_config(config_path)
    assert (config.train.steps, config.train.prompts_per_step, config.rollout.samples_per_prompt) == (200, 128, 4)
    assert (config.optimizer.lr, config.rollout.temperature, config.rollout.top_p) == (5e-6, 1.0, 1.0)
    assert (config.method.name, config.method.options, config.rollout.guided_per_prompt) == ("tropd", {}, 1)
    suites = [(s.name, s.samples, s.temperature, s.top_p) for s in config.evaluate.suites]
    assert suites == [("greedy", 1, 0, 1), ("mean@4 T=0.6", 4, 0.6, 0.95), ("mean@4 T=1", 4, 1, 1)]


def test_overrides_win_over_the_file_and_later_ones_over_earlier(config_path: Path):
    config_path.write_text(MINIMAL + "seed: 1\ntrain: {steps: 7}\n")
    config = load_config(config_path, ["train.steps=8", "train.steps=9", "optimizer.lr=1e-4", "report.html=false"])
    assert (config.seed, config.train.steps, config.optimizer.lr, config.report.html) == (1, 9, 1e-4, False)


def test_items_of_a_list_in_the_file_can_be_overridden(config_path: Path):
    config_path.write_text(MINIMAL + "evaluate: {suites: [{name: a}, {name: b, temperature: 1}]}\n")
    assert load_config(config_path, ["evaluate.suites[1].samples=3"]).evaluate.suites[1].samples == 3


def test_interpolations_are_resolved(config_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HERE", "somewhere")
    config = load_config(config_path, ["export.hf=${run_dir}/hf", "rollout.record=${oc.env:HERE}/rollouts"])
    assert (config.export.hf, config.rollout.record) == (Path("runs/first/hf"), Path("somewhere/rollouts"))


def test_method_collects_its_options_unchecked(config_path: Path):
    config = load_config(config_path, ["method.name=opd", "method.top_k=64", "method.gate={kind: threshold, c: 0.5}"])
    assert config.method.name == "opd"
    assert config.method.options == {"top_k": 64, "gate": {"kind": "threshold", "c": 0.5}}


@pytest.mark.parametrize(
    ("written", "project"), [("true", "megatron_tropd"), ("false", None), ("null", None), ("mine", "mine")]
)
def test_wandb_is_a_project_or_off(config_path: Path, written: str, project: str | None):
    assert load_config(config_path, [f"report.wandb={written}"]).report.wandb == project


def test_paths_expand_the_home_directory(config_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_config(config_path, ["run_dir=~/runs"]).run_dir == Path("/home/someone/runs")


def test_a_config_cannot_be_changed(config_path: Path):
    with pytest.raises(ValidationError, match="frozen"):
        load_config(config_path).seed = 3


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.step=3", "train.step is not a key. Did you mean train.steps?"),
        ("student.paralel.tensor=2", "student.paralel is not a key. Did you mean student.parallel?"),
        ("student.parallel.tensr=2", "student.parallel.tensr is not a key. Did you mean student.parallel.tensor?"),
        ("train.lr=3", "train.lr is not a key. Did you mean optimizer.lr?"),
        ("zzz=1", "zzz is not a key. Valid keys of the config: run_dir, seed, dtype, "),
        (
            "export.qqqq=1",
            "export.qqqq is not a key. Valid keys of export: hf, adapter, megatron, megatron_layout, push_to_hub, "
            "private, every, keep, best.",
        ),
        ("dtype=bf15", "dtype = 'bf15': must be one of fp32, bf16. Did you mean bf16?"),
        ("rollout.engine=12", f"rollout.engine = 12: must be one of {', '.join(get_args(RolloutEngine))}."),
        ("train.steps=zehn", "train.steps = 'zehn': must be a whole number."),
        ("train.steps=1.5", "train.steps = 1.5: must be a whole number."),
        ("train.steps=0", "train.steps = 0: must be at least 1."),
        ("train.steps=true", "train.steps = true: must be a number, not true or false."),
        ("train.steps=", "train.steps = null: must be a whole number."),
        ("train.minibatches=0", "train.minibatches = 0: must be at least 1."),
        ("seed=-1", "seed = -1: must be at least 0."),
        ("optimizer.lr=fast", "optimizer.lr = 'fast': must be a number."),
        ("optimizer.lr=.inf", "optimizer.lr = inf: must be a finite number."),
        ("rollout.temperature=0", "rollout.temperature = 0: must be greater than 0."),
        ("rollout.top_p=0", "rollout.top_p = 0: must be greater than 0."),
        ("rollout.top_p=1.01", "rollout.top_p = 1.01: must be at most 1."),
        ("report.html=maybe", "report.html = 'maybe': must be true or false."),
        ("data.columns.prompt=3", "data.columns.prompt = 3: must be text; put it in quotes"),
        ("data.columns.prompt=''", "data.columns.prompt = '': must not be empty."),
        ("run_dir=", "run_dir = null: must be a path, as text."),
        ("run_dir=''", "run_dir = '': must not be empty."),
        ("run_dir=~nobody-of-this-name/x", "names a home directory that does not exist."),
        ("student=3", "student = 3: is a section, not a value; set keys of it, such as student.model."),
        ("method=opd", "method = 'opd': is a section, not a value; set keys of it, such as method.name."),
        ("evaluate.suites=3", "evaluate.suites = 3: must be a list."),
        ("evaluate.suites=[{samples: 2}]", "evaluate.suites[0].name must be set: Name of the suite"),
    ],
)
def test_a_bad_override_is_named_with_key_value_and_rule(config_path: Path, override: str, problem: str):
    text = message(config_path, override)
    assert text.startswith(f"{config_path}: override {override!r}: ")
    assert problem in text


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["student.parallel.virtual_pipeline=2"], "student.parallel: virtual_pipeline = 2 needs pipeline > 1"),
        (["teacher.parallel.sequence=true"], "teacher.parallel: sequence = true needs tensor > 1, got tensor = 1."),
        (["rollout.engine=recorded"], "rollout: engine = 'recorded' needs recorded_from"),
        (["rollout.recorded_from=x"], "recorded_from = 'x' is only read by engine 'recorded'"),
        (["rollout.engine=recorded", "rollout.record=x", "rollout.recorded_from=x"], "would overwrite itself"),
        (
            ["teacher.engine=vllm_server"],
            "teacher: engine = 'vllm_server' needs vllm_server.urls, addresses of servers",
        ),
        (
            ["teacher.engine=vllm", "teacher.parallel.pipeline=2"],
            "teacher: parallel.pipeline = 2 does not go with engine = 'vllm': vLLM's engines are cut by",
        ),
        (
            ["teacher.engine=vllm_server", "teacher.vllm_server.urls=['http://a:1']", "teacher.parallel.tensor=2"],
            "parallel.tensor = 2 does not go with engine = 'vllm_server': servers are laid out by vllm_server.tensor.",
        ),
        (["teacher.whole_vocabulary=true"], "teacher: whole_vocabulary = true is for engine vllm or vllm_server"),
        (["teacher.record=x", "teacher.recorded_from=y"], "teacher: record = 'x' has nothing to record while"),
        (["rollout.samples_per_prompt=0", "rollout.guided_per_prompt=0"], "are both 0: nothing would be trained on."),
        (["train.pack_tokens=9215"], "train.pack_tokens = 9215 cannot hold the longest sequence: "),
        (["train.pack_tokens=9215"], "1024 + 8192 = 9216. Raise train.pack_tokens to 9216"),
        (["train.minibatches=641"], "train.minibatches = 641 is more than the 640 sequences of a step."),
        (["optimizer.warmup_steps=200"], "optimizer.warmup_steps = 200 never ends: train.steps = 200."),
        (["optimizer.min_lr=1"], "optimizer: min_lr = 1.0 is above lr = 5e-06."),
        (["optimizer.momentum=0.9"], "momentum = 0.9 is not read with name = adam."),
        (["optimizer.name=sgd", "optimizer.beta1=0.8"], "beta1 = 0.8 is not read with name = sgd."),
        (["optimizer.min_lr=1e-7"], "min_lr = 1e-07 is not read with schedule = constant."),
        (["optimizer.eps=1e-50"], "optimizer.eps = 1e-50: must be"),  # 0 in fp32: Adam would divide 0 by 0
        (["optimizer.name=sgd", "optimizer.distributed=true"], "Set distributed to false, or name to adam."),
        (["export.hf=./student"], "export.hf = 'student' is student.model, which would be overwritten."),
        (["export.hf=${teacher.model}"], "export.hf = 'teacher' is teacher.model, which would be overwritten."),
        (["base.model=x", "export.hf=x"], "export.hf = 'x' is base.model, which would be overwritten."),
        (["evaluate.every=3"], "evaluate: every = 3 needs prompts"),
        (["evaluate.suites=[]"], "suites is empty."),
        (["evaluate.suites=[{name: a}, {name: a}]"], "suites holds 2 suites named 'a'."),
        (["evaluate.suites=[{name: a, samples: 4}]"], "samples = 4 at temperature 0 would repeat one greedy answer."),
        (["foo"], "override 'foo' is not key=value."),
        (["a..b=1"], "override 'a..b=1' is not key=value."),
        (["=1"], "override '=1' is not key=value."),
        (["seed=[1"], "override 'seed=[1' cannot be applied: "),
        (["seed=${oops"], "override 'seed=${oops' cannot be applied: "),
        (["seed=${nope}"], "seed: Interpolation key 'nope' not found. An interpolation ${...} sees only keys"),
        (["run_dir=${oc.env:NO_SUCH_VARIABLE}"], "run_dir needs the environment variable NO_SUCH_VARIABLE"),
        (["run_dir=${oc.env:NO_SUCH_VARIABLE}"], "Set it first: `export NO_SUCH_VARIABLE=...`"),
        (["data.prompts=$GONE/train.jsonl"], "write ${oc.env:GONE}, after `export GONE=...`"),
        (["run_dir=???"], "run_dir is '???', which means that you must set it."),
        (["student.model=Qwen/Qwen3-0.6B"], "or a name on the hub"),
        (["checkpoint.resume=gone"], "checkpoint.resume = 'gone': there is nothing at "),
        (["data.sources=[{name: a, prompts: x}]"], "prompts or sources names the data to train on: both are set."),
        (["data.prompts=null"], "prompts or sources names the data to train on: neither is set."),
        (
            ["data.prompts=null", "data.sources=[{name: a, prompts: x, weight: 2}, {name: b, prompts: x}]"],
            "sources gives a weight to some, but not to 'b'. Weigh all of them, or none.",
        ),
        (["data.prompts=null", "data.sources=[{name: a, prompts: x}, {name: a, prompts: x}]"], "2 sources named 'a'."),
        (["teachers=[{name: t, model: teacher}]"], "teachers holds 't', which no source names"),
        (
            ["data.prompts=null", "data.sources=[{name: a, prompts: x, teacher: t}]"],
            "data.sources[0].teacher = 't' is not one of teachers (none).",
        ),
        (
            [
                "data.prompts=null",
                "data.sources=[{name: a, prompts: x, teacher: t}]",
                "teachers=[{name: t, model: teacher}]",
            ],
            "every source names one of teachers, so that teacher.model would score nothing.",
        ),
        ([*TWO_TEACHERS, "teachers[0].model=gone"], "teachers[0].model = 'gone': there is nothing at "),
        ([*TWO_TEACHERS, "teachers[0].parallel.tensor=0"], "teachers[0].parallel.tensor"),
        ([*TWO_TEACHERS, "teacher.record=there"], "teacher.record = 'there' is for runs with one teacher"),
        ([*TWO_TEACHERS, "teacher.recorded_from=student"], "teacher.recorded_from = 'student' is for runs with one"),
        (
            [*TWO_TEACHERS[:2], "teachers=[{name: t, model: teacher}, {name: t, model: teacher}]"],
            "teachers holds 2 teachers named 't'.",
        ),
        (
            ["data.prompts=null", "data.sources=[{name: a, prompts: ['*.jsonl', gone]}]"],
            "data.sources[0].prompts = 'gone': there is nothing at ",
        ),
        (["data.prompts=x*.parquet"], "data.prompts = 'x*.parquet': there is nothing at "),
        (["evaluate.prompts=gone"], "evaluate.prompts = 'gone': there is nothing at "),
        (["teacher.recorded_from=gone"], "teacher.recorded_from = 'gone': there is nothing at "),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, list) else "",
)
def test_keys_that_do_not_fit_together_are_explained(config_path: Path, overrides: list[str], problem: str):
    assert problem in message(config_path, *overrides)


@pytest.mark.parametrize("key", ["student.model", "teacher.model", "base.model", "data.prompts"])
def test_a_missing_input_is_named_with_its_absolute_path(config_path: Path, key: str):
    text = message(config_path, f"{key}=not/here")
    assert text.startswith(f"{key} = 'not/here': there is nothing at {config_path.parent / 'not/here'} ")


def test_the_base_model_is_the_student_before_training_unless_another_is_named(config_path: Path):
    cut = ["student.parallel.tensor=2", "teacher.parallel.pipeline=2"]
    default = load_config(config_path, cut)
    assert (default.base_model, default.base_parallel) == (default.student.model, default.student.parallel)
    named = load_config(config_path, [*cut, "base.model=${teacher.model}"])
    assert (named.base_model, named.base_parallel) == (named.teacher.model, named.teacher.parallel)
    cut_itself = load_config(config_path, [*cut, "base.model=${teacher.model}", "base.parallel.tensor=4"])
    assert cut_itself.base_parallel.tensor == 4 and cut_itself.base_parallel.pipeline == 1
    with pytest.raises(ConfigError, match=r"base.parallel: world size 2 is not a multiple of .* = 4\. Launch 4"):
        cut_itself.check_world(2)


def test_inputs_need_not_exist_where_a_finished_run_is_read(config_path: Path):
    assert load_config(config_path, ["student.model=gone"], check_paths=False).student.model == Path("gone")


def test_every_problem_of_a_file_is_listed_with_its_line(config_path: Path):
    config_path.write_text(MINIMAL + "dtype: fp8\ntrain:\n  steps: many\n  pack: 3\nevaluate:\n  suites:\n  - nam: x\n")
    lines = message(config_path).splitlines()
    assert lines[0] == f"{config_path}: 5 problems"
    assert any(line.startswith("  - line 7: dtype = 'fp8': must be one of fp32, bf16.") for line in lines)
    assert "  - line 9: train.steps = 'many': must be a whole number." in lines
    assert "  - line 10: train.pack is not a key. Did you mean train.pack_tokens?" in lines
    assert "  - line 13: evaluate.suites[0].nam is not a key. Did you mean evaluate.suites[0].name?" in lines
    assert "  - evaluate.suites[0].name must be set: Name of the suite, a column of the result table." in lines


def test_missing_sections_name_the_keys_to_set(config_path: Path):
    config_path.write_text("seed: 1\n")
    text = message(config_path)
    for key in ("student.model", "teacher.model", "data"):
        assert f"{key} must be set: " in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: [1\nrun_dir: x\n", ", line 2, column 8: not valid YAML: "),
        ("seed: 1\nseed: 2\n", ", line 2, column 1: not valid YAML: found duplicate key seed."),
        ("seed: 1\n\tdtype: fp32\n", ", line 2, column 1: not valid YAML: "),
        ("seed: !!python/object/apply:os.getcwd []\n", ", line 1, column 7: not valid YAML: could not determine a con"),
        ("- 1\n- 2\n", ": the file must hold `key: value` lines, got a list."),
        ("hello\n", ": the file must hold `key: value` lines, got only 'hello'."),
        ("run_dir: ${oops\n", ": run_dir: "),
        ("1: 2\n", "1 is not a key."),
        ("", "student.model must be set: "),
    ],
)
def test_bad_yaml_is_refused_with_its_line(config_path: Path, text: str, problem: str):
    config_path.write_text(text)
    found = message(config_path)
    assert found.startswith(str(config_path))
    assert problem in found


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    assert message(tmp_path / "no.yaml") == (
        f"there is no config file {tmp_path / 'no.yaml'} ({tmp_path / 'no.yaml'}). Check the path."
    )
    assert "is a directory" in message(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "It must be a UTF-8 text file." in message(tmp_path / "binary.yaml")


def test_errors_in_python_trees_are_config_errors_too():
    with pytest.raises(ConfigError, match=r"demo: train\.steps = -3: must be at least 1\."):
        parse_config(minimal_tree(train={"steps": -3}), source="demo")


# --------------------------------------------------------------------------- layout


def test_data_parallel_size_is_what_is_left_of_the_world():
    assert Layout(tensor=2, pipeline=3, context=1).data_size(24) == 4


def test_a_layout_that_does_not_divide_the_world_is_refused(config_path: Path):
    with pytest.raises(ConfigError) as caught:
        Layout(tensor=2, pipeline=2, context=2).data_size(12)
    assert str(caught.value) == (
        "world size 12 is not a multiple of tensor*pipeline*context = 2*2*2 = 8. "
        "Launch 8 ranks (or a multiple), as in `torchrun --nproc-per-node 8 -m megatron_tropd ...`, or lower one axis."
    )
    for role in ("student", "teacher", "rollout"):
        text = message(config_path, f"{role}.parallel.tensor=3", world_size=4)
        assert text.startswith(f"{role}.parallel: world size 4 is not a multiple")
    assert load_config(config_path, ["teacher.parallel.tensor=3"], world_size=6).teacher.parallel.data_size(6) == 2


# --------------------------------------------------------------------------- writing


def test_dumped_config_is_complete_deterministic_and_reads_back_equal(config_path: Path, tmp_path: Path):
    config = load_config(config_path, ["method.top_k=64", "optimizer.lr=1e-4", "export.hf=${run_dir}/hf"])
    dump_config(config, tmp_path / "a.yaml")
    dump_config(load_config(tmp_path / "a.yaml"), tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml") == config
    text = (tmp_path / "a.yaml").read_text()
    assert text == (tmp_path / "b.yaml").read_text()
    assert "hf: runs/first/hf" in text and "name: tropd\n  top_k: 64" in text
    assert not list(tmp_path.glob("*.partial"))


OPTIONS = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False)
    | st.text(st.sampled_from("ab1e-$\\{}.: \n'\"#é!~"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(OPTIONS)
@example("${seed}")
@example("a\\${seed}")
@example("1e-4")
@example({"c": -math.inf})
def test_any_method_option_survives_the_round_trip(tmp_path_factory: pytest.TempPathFactory, value: Any):
    config = parse_config(minimal_tree(method={"name": "opd", "strange": value}))
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    dump_config(config, path)
    assert load_config(path, check_paths=False) == config


def test_reference_describes_every_key():
    rows = [line.split(" | ") for line in config_reference().splitlines()[2:]]
    keys = {row[0].strip("| `") for row in rows}
    assert {"run_dir", "student.parallel.tensor", "rollout.guided_per_prompt", "evaluate.suites[i].top_p"} <= keys
    assert {key.split(".")[0].split("[")[0] for key in keys} == set(RunConfig.model_fields)
    assert all(len(row[-1].strip(" |")) > 10 for row in rows)
    assert "| `optimizer.lr` | number > 0 | `5e-06` | Peak learning rate. |" in config_reference()
    assert "| `evaluate.max_problems` | whole number >= 1 \\| null | `null` |" in config_reference()


def test_the_configuration_reference_in_the_docs_is_up_to_date():
    page = (Path(__file__).resolve().parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page.endswith(config_reference()), "write docs/configuration.md again: its first lines say how."


def test_a_bare_off_is_the_word_and_not_the_truth_value_that_yaml_reads():
    assert TrainConfig.model_validate(yaml.safe_load("share_prefixes: off")).share_prefixes == "off"
    assert TrainConfig().share_prefixes == "auto"
    with pytest.raises(ValidationError, match="'auto' or 'off'"):
        TrainConfig.model_validate(yaml.safe_load("share_prefixes: on"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["export.best=true"], ("export.best = true", "evaluate.every")),
        (["train.stop_after_no_gain=2"], ("train.stop_after_no_gain = 2", "evaluate.every")),
        (["evaluate.best_by=other"], ("best_by = 'other'", "'greedy'")),
        (["export.megatron_layout=bridge"], ("megatron_layout = bridge is not read", "set megatron")),
        (
            ["export.megatron=out", "student.lora.rank=4"],
            ("export.megatron = 'out'", "convert hf-to-megatron DIR TARGET"),
        ),
        (["export.push_to_hub=own/new"], ("push_to_hub = 'own/new'", "Set hf")),
        (["export.push_to_hub=new", "export.hf=out"], ("'new' is no name on the hub", "owner/name")),
    ],
)
def test_exports_that_cannot_be_are_refused(config_path, changes, words):
    said = message(config_path, *changes)
    assert all(word in said for word in words), said
