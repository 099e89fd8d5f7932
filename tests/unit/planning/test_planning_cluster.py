"""What ``tropd check --cluster`` says: against figures worked out by hand, and against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_tropd.benchmarks.loss import Shape, _peak_extra, fused, make_inputs
from megatron_tropd.commands.cluster_plan import job_of, print_cluster_plan
from megatron_tropd.config.loading import load_config
from megatron_tropd.config.sections import Layout
from megatron_tropd.errors import ConfigError
from megatron_tropd.planning.activations import pack_bytes, packs_in_flight
from megatron_tropd.planning.cluster import best, checkpoint_bytes, chosen, read_cluster, room
from megatron_tropd.planning.parameters import total_parameters
from megatron_tropd.setup.validate import check_layouts, read_architectures
from tests.support.activation_cases import Case, kept
from tests.support.distributed import run_on_ranks
from tests.unit.planning.test_planning_parameters import DENSE, EXPERTS

SCALE = Path(__file__).resolve().parents[3] / "examples" / "scale"
CLUSTER = SCALE / "clusters" / "h100.yaml"
GIB = 2**30


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(SCALE.parent.parent)


def cluster_of(name: str) -> Path:
    """The one that the example's own first lines name."""
    text = (SCALE / f"{name}.yaml").read_text()
    return SCALE / "clusters" / text.split("clusters/")[1].split()[0]


EXAMPLES = sorted(path.stem for path in SCALE.glob("*.yaml"))


def test_a_teacher_with_gpus_of_its_own_is_planned_on_them():
    """The same on 32 + 32 GPUs: by hand, each half takes twice as long for its own work, at the same time."""
    path = SCALE / "8b-from-32b.yaml"
    shared = chosen(job_of(load_config(path, check_paths=False), CLUSTER))
    apart, ahead = (
        chosen(job_of(load_config(path, ["teacher.ranks=32", f"rollout.ahead={n}"], check_paths=False), CLUSTER))
        for n in (0, 1)
    )
    assert apart.memory["teacher"] == 0 and shared.teacher_memory == {}
    assert apart.teacher_memory["weights"] == shared.memory["teacher"] == pytest.approx(2 * 32.76e9 / 8, rel=0.005)
    # half as many replicas share the optimizer's states
    assert apart.memory["optimizer"] == pytest.approx(2 * shared.memory["optimizer"], rel=1e-3)
    for part in ("teacher: computing", "student: computing"):
        assert apart.seconds[part] == pytest.approx(2 * shared.seconds[part], rel=0.05), part
    # twice the sequences on a GPU, which read the same weights for each token, and twice the past
    assert 1.0 < apart.seconds["rollout"] / shared.seconds["rollout"] < 2.0
    teacher = apart.seconds["teacher: computing"] + apart.seconds["teacher: sending"]
    assert apart.step_seconds == pytest.approx(sum(apart.seconds.values()))
    assert ahead.step_seconds == pytest.approx(apart.step_seconds - teacher)


def test_the_ranking_gives_a_teacher_alone_more_of_its_gpus():
    """65 GB of weights in three quarters of 80 GiB: two ranks; beside a student, a quarter of it: four."""
    path = SCALE / "8b-from-32b.yaml"
    ranked = best(job_of(load_config(path, ["teacher.ranks=8"], check_paths=False), CLUSTER))
    assert ranked[0].teacher.tensor * ranked[0].teacher.pipeline == 2
    assert ranked[0].teacher_memory["weights"] == pytest.approx(32.76e9, rel=0.005)
    assert best(job_of(load_config(path, check_paths=False), CLUSTER))[0].teacher.tensor == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_scale_fits_its_cluster(name):
    job = job_of(load_config(SCALE / f"{name}.yaml", check_paths=False), cluster_of(name))
    asked, ranked = chosen(job), best(job)
    assert asked.total_memory < room(job.cluster)
    assert [x.step_seconds for x in ranked] == sorted(x.step_seconds for x in ranked)
    assert all(x.total_memory <= room(job.cluster) for x in ranked)


def test_there_is_an_example_of_every_class():
    assert EXAMPLES == ["1.5b-from-7b", "30b-a3b-from-235b-a22b", "70b-from-405b", "8b-from-32b"]


def test_the_setting_of_the_paper_is_planned_on_one_node():
    """Parameters as the two models' pages have them; batch, steps and rate as the paper does."""
    config = load_config(SCALE.parent / "reproduce" / "tropd_math.yaml", check_paths=False)
    job = job_of(config, SCALE / "clusters" / "h100-node.yaml")
    assert total_parameters(job.student) == 1_777_088_000
    assert total_parameters(job.teacher) == 7_615_616_512
    assert job.sequences == 128 * 5 and config.train.steps == 200 and config.optimizer.lr == 5e-6
    assert [(s.name, s.samples, s.max_new_tokens) for s in config.evaluate.suites] == [
        ("AIME24", 32, 8192),
        ("AIME25", 32, 8192),
        ("AMC23", 32, 8192),
    ]
    assert chosen(job).total_memory < room(job.cluster)


def test_a_plan_is_what_one_works_out_by_hand():
    """8B <- 32B on 64 GPUs, student TP 4 with sequence parallelism, teacher TP 8, full recompute."""
    config = load_config(SCALE / "8b-from-32b.yaml", ["train.share_prefixes=off"], check_paths=False)
    found = chosen(job_of(config, CLUSTER))
    student, teacher = 8.19e9, 32.76e9  # parameters, from the model cards
    memory = found.memory
    assert memory["weights"] == pytest.approx(2 * student / 4, rel=0.005)
    assert memory["gradients"] == pytest.approx(4 * student / 4, rel=0.005)
    assert memory["optimizer"] == pytest.approx(12 * student / 64, rel=0.005)
    assert memory["teacher"] == pytest.approx(2 * teacher / 8, rel=0.005)
    assert memory["sampler"] == pytest.approx(2 * student, rel=0.005)
    # 5 sequences of 9216 tokens; 36 layers, keys and values of 8 heads of 128
    assert memory["key-value cache"] == 5 * 9216 * 36 * 2 * 8 * 128 * 2
    # 320 sequences are 180 packs, 11.25 to each of 16 replicas, so 12; per layer and pack of 16384 x 4096 bf16:
    # forward 4 crossings, again in backward for the recomputation, 4 of gradients, 2 to have inputs whole
    crossings, whole = 36 * (4 + 4 + 4 + 2) + 4, 16384 * 4096 * 2
    assert found.sent["student: tensor, node"] == pytest.approx(12 * crossings * whole * 3 / 4, rel=0.01)
    # gradients in fp32 are scattered and weights gathered over 16 ranks
    assert found.sent["student: data, network"] == pytest.approx((4 + 2) * student / 4 * 15 / 16, rel=0.005)
    # student's and teacher's tensor ranks, their data ranks, the student's 4 and the teacher's 8 apart, and all ranks
    assert memory["communicators"] == 5 * 64 * 2**20
    # 8192 times all weights and, on average, half of the cache are read at 0.45 of 3350 GB/s: 13 ms each
    reads = 2 * student + memory["key-value cache"] / 2
    assert found.seconds["rollout"] == pytest.approx(8192 * reads / (0.45 * 3350e9), rel=0.005)
    # which are 4,172 calls of the embedded sampler: 21 ms
    embedded = ["rollout.engine=megatron"]
    in_python = chosen(job_of(load_config(SCALE / "8b-from-32b.yaml", embedded, check_paths=False), CLUSTER))
    assert in_python.seconds["rollout"] == pytest.approx(8192 * 4172 * 5e-6)
    # weights and two moments of a quarter of the model in fp32, on the first of its 16 data ranks
    job = job_of(load_config(SCALE / "8b-from-32b.yaml", check_paths=False), CLUSTER)
    assert checkpoint_bytes(job, found.student) == pytest.approx(12 * student / 4, rel=0.005)
    # six operations per parameter and two more for the recomputation, on all tokens; attention adds some
    products = 8 * (student - 151936 * 4096) * 320 * 9216 / 64 / (0.45 * 989e12)
    assert products < found.seconds["student: computing"] < 1.5 * products


def test_prompts_that_samples_share_are_planned_once():
    """64 prompts of 1,024 tokens with 5 samples of 8,192 each: 64 x 1,024 + 320 x 8,192 rows of 320 x 9,216 tokens."""
    path = SCALE / "8b-from-32b.yaml"
    on, off = (
        job_of(load_config(path, [f"train.share_prefixes={value}"], check_paths=False), CLUSTER)
        for value in ("auto", "off")
    )
    assert (on.rows, off.rows) == (2_686_976, 2_949_120)
    assert on.keys_per_row == pytest.approx(2_949_120 / 2_686_976) and off.keys_per_row == 1
    shared, alone = chosen(on), chosen(off)
    # 164 packs instead of 180: 11 to each of 16 replicas instead of 12
    name = "student: tensor, node"
    assert shared.sent[name] / alone.sent[name] == pytest.approx(11 / 12, rel=0.01)
    # products by rows; of 9,216**2 pairs of attention, 1,024**2 less where a prompt is there already
    ratio = shared.seconds["student: computing"] / alone.seconds["student: computing"]
    assert 2_686_976 / 2_949_120 < ratio < 1
    # with full recompute one layer is whole at a time: what its attention gathers is for tokens, not rows
    assert shared.memory["activations"] > alone.memory["activations"]


def test_what_leaves_the_device_is_counted_where_it_is_used():
    """The same with everything idle in host memory."""
    path, off = SCALE / "8b-from-32b.yaml", ["teacher.offload=true", "optimizer.offload=true"]
    kept, moved = (
        chosen(job_of(load_config(path, [*more, "train.minibatches=2"], check_paths=False), CLUSTER))
        for more in ([], off)
    )
    assert moved.memory == kept.memory
    part = kept.memory
    stays = part["weights"] + part["sampler"] + part["communicators"]
    assert moved.phases == pytest.approx(
        {
            "writing rollouts": stays + part["key-value cache"],
            "scoring": stays + part["teacher"],
            "learning": stays + part["gradients"] + part["activations"] + part["loss"],
            "updating": stays + part["gradients"] + part["optimizer"],
        }
    )
    stays += part["gradients"] + part["optimizer"] + part["teacher"]
    assert kept.phases == pytest.approx(
        {
            "writing rollouts": stays + part["key-value cache"],
            "scoring": stays,
            "learning": stays + part["activations"] + part["loss"],
            "updating": stays,
        }
    )
    assert (moved.total_memory, kept.total_memory) == (max(moved.phases.values()), max(kept.phases.values()))
    # both minibatches: the teacher's weights come, the states come and go; 64 GB/s, of which 0.45 are reached
    bytes_moved = 2 * (part["teacher"] + 2 * part["optimizer"])
    assert (moved.sent["to and from host memory"], kept.sent["to and from host memory"]) == (bytes_moved, 0)
    assert moved.seconds["host memory"] == pytest.approx(bytes_moved / (0.45 * 64e9))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gpus": 8}, "the smallest takes"),
        ({"memory_gib": 0}, "memory_gib: Input should be greater than 0"),
        ({"memory": 80}, "memory: Extra inputs are not permitted"),
        ({"gpus": 60}, "world size 60 is not a multiple"),
    ],
)
def test_a_cluster_that_will_not_do_is_refused(tmp_path, change, said):
    lines = [line for line in CLUSTER.read_text().splitlines() if line.split(":")[0] not in change]
    path = tmp_path / "cluster.yaml"
    path.write_text("\n".join([*lines, *(f"{name}: {value}" for name, value in change.items())]))
    config = load_config(SCALE / "8b-from-32b.yaml", check_paths=False)
    with pytest.raises(ConfigError, match=said):
        best(job_of(config, path))


def test_the_plan_is_printed(capsys):
    print_cluster_plan(load_config(SCALE / "8b-from-32b.yaml", check_paths=False), CLUSTER)
    text = capsys.readouterr().out
    parts = ("320 sequences", "key-value cache", "student: tensor, node", "rollout", "Layouts that fit")
    for words in (*parts, "the first data rank of each part of the model fills 22.9 GiB of host memory"):
        assert words in text
    assert read_cluster(CLUSTER).gpus == 64


# --------------------------------------------------------------------------- activations

WIDE = replace(
    DENSE, num_layers=4, hidden_size=64, ffn_size=160, num_heads=8, num_kv_heads=2, head_dim=16, max_positions=512
)
MIXED = replace(WIDE, family=EXPERTS.family, num_experts=4, experts_per_token=2, ffn_size=48)
LENGTHS = (100, 60, 50, 30, 16)
LAYOUTS = (Layout(), Layout(tensor=2, sequence=True), Layout(context=2), Layout(pipeline=2))
CASES: list[Case] = [
    (a, layout, "float32", recompute, LENGTHS)
    for a in (WIDE, MIXED)
    for layout in LAYOUTS
    for recompute in ("none", "selective", "full")
] + [(WIDE, Layout(tensor=2), "float32", "none", LENGTHS), (MIXED, Layout(expert=2), "float32", "none", LENGTHS)]


@pytest.mark.slow
def test_planned_activations_are_what_autograd_keeps():
    measured = run_on_ranks(kept, CASES, world_size=2)[-1]  # the last stage
    for (a, layout, _, recompute, lengths), found in zip(CASES, measured, strict=True):
        planned = pack_bytes(a, layout, sum(lengths), stage=layout.pipeline - 1, itemsize=4, recompute=recompute)
        assert planned == pytest.approx(found, rel=0.12), (bool(a.num_experts), layout, recompute)


def test_an_early_stage_holds_more_packs_than_a_late_one():
    four = Layout(pipeline=4)
    assert [packs_in_flight(four, stage) for stage in range(4)] == [4, 3, 2, 1]
    # two chunks each of half of a stage's layers: the first stage has 2 * 3 + 4 + 1 rank_split under way
    assert packs_in_flight(Layout(pipeline=4, virtual_pipeline=2), 0) == 5.5


def test_the_loss_needs_no_more_memory_for_a_longer_pack_than_its_listed_numbers():
    """Beyond the inputs and the gradients left behind; a token's whole logits would be 32 KiB."""
    extra = {}
    for tokens in (2048, 8192):
        shape = Shape(tokens=tokens, hidden=32, vocab=8192, candidates=16)
        x = make_inputs(shape, dtype=torch.float32, device=torch.device("cpu"), entropy=False)
        extra[tokens] = _peak_extra(fused, x)
    # log-probs and ids of 16 candidates, their gradients and what selects them, six statistics: some numbers of each
    per_token = (extra[8192] - extra[2048]) / (8192 - 2048)
    assert per_token < 16 * 8 * 6 + 6 * 4 * 4
    assert per_token < 0.03 * 4 * 8192
    assert extra[8192] < 1.5 * extra[2048]


# --------------------------------------------------------------------------- layouts that cannot be


@pytest.mark.parametrize(
    ("name", "axes", "said"),
    [
        ("8b-from-32b", {"tensor": 16}, "does not divide the model's 8 key/value heads. Choose a divisor of 8."),
        # 28 = 4 * 7, or nine stages of 3 and one of 1
        ("1.5b-from-7b", {"pipeline": 8}, "The nearest pipeline sizes that can: 7 and 10."),
        ("1.5b-from-7b", {"pipeline": 20}, "The nearest pipeline sizes that can: 14 and 28."),
        ("8b-from-32b", {"pipeline": 64}, "Use at most 36 stages."),
        (
            "8b-from-32b",
            {"pipeline": 5, "virtual_pipeline": 2},
            "The nearest that can: pipeline=6, virtual_pipeline=2.",
        ),
        ("8b-from-32b", {"virtual_pipeline": 2}, "Set virtual_pipeline to 1, or pipeline to 2 or more."),
        ("8b-from-32b", {"tensor": 1}, "Set sequence to false, or tensor to 2 or more."),
        ("8b-from-32b", {"expert": 2}, "Use expert=1."),
        ("30b-a3b-from-235b-a22b", {"expert": 6}, "Choose a divisor of 128."),
        ("30b-a3b-from-235b-a22b", {"sequence": "false"}, "Set sequence to true."),
        ("8b-from-32b", {"context": 3}, "Launch 12 ranks (or a multiple)"),
        ("30b-a3b-from-235b-a22b", {"expert": 64}, "Launch 256 ranks (or a multiple), or lower expert."),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_what_can(name, axes, said):
    overrides = [f"student.parallel.{axis}={size}" for axis, size in axes.items()]
    with pytest.raises(ConfigError) as caught:
        config = load_config(SCALE / f"{name}.yaml", overrides, check_paths=False)
        check_layouts(config, *read_architectures(config))
        config.check_world(64)
    assert said in str(caught.value)
