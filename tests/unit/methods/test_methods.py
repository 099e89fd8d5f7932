"""Claims about the methods: what they coincide with, what they refuse, and that every preset yields a usable loss."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from megatron_tropd.config.loading import load_config
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods import PRESETS, build_method, method_of
from megatron_tropd.methods.base import Method
from megatron_tropd.types import Region
from tests.support.method_views import Rows, T, V, gradient, rows, views

close = torch.testing.assert_close
EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "methods"
PREFIX, CONTINUATION = int(Region.PREFIX), int(Region.CONTINUATION)
MIXED_T = torch.tensor([PREFIX, PREFIX, CONTINUATION, CONTINUATION, PREFIX, CONTINUATION, CONTINUATION])
ALWAYS_LOGGED = {
    *("outlier_fraction", "trusted_fraction", "total_variation", "stuck_fraction"),
    *("reverse_kl", "logprob_gap", "prefix_nll"),
}


def on(method: Method, data: Rows, **view_options):
    """The method's per-token loss and its gradient w.r.t. the logits; the support has the size it asks for."""
    seen = views(data, k=min(method.needs.top_k, V) or 5, **view_options)
    loss = method.token_loss(*seen)
    return loss, gradient(loss.loss_T, data)


def assert_same(first: Method, second: Method, **view_options) -> None:
    for seed, on_policy in ((0, True), (1, False)):
        data = rows(seed, on_policy=on_policy)
        one, other = on(first, data, **view_options), on(second, data, **view_options)
        close(one[0].loss_T, other[0].loss_T)
        close(one[1], other[1])
        assert one[1].abs().sum() > 0


# --------------------------------------------------------------------------- every preset


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("progress", [0.0, 0.9])
def test_preset_gives_finite_loss_and_gradient(name, progress):
    method = build_method(name)
    data = rows(2, dtype=torch.float32, on_policy=False)
    loss, grad_TV = on(method, data, region_T=MIXED_T, progress=progress)
    assert loss.loss_T.shape == (T,) and loss.loss_T.requires_grad
    assert torch.isfinite(loss.loss_T).all() and torch.isfinite(grad_TV).all() and grad_TV.abs().sum() > 0
    assert set(loss.stats) >= ALWAYS_LOGGED
    assert all(value.shape == (T,) and not value.requires_grad for value in loss.stats.values())
    assert method.name == name


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_takes_an_empty_batch(name):
    data = rows(tokens=0)
    loss, _ = on(build_method(name), data)
    assert loss.loss_T.shape == (0,) and loss.loss_T.requires_grad


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_treats_every_token_by_itself(name):
    """A batch in two parts has the losses of the whole (the drift gate: whole blocks per part)."""
    method = build_method(name, multiplier="drift_gate")
    data = rows(5, on_policy=False)
    _, _, tokens = views(data)
    uniform_T = tokens.uniform_T
    whole, grad_TV = on(method, data, region_T=MIXED_T, uniform_T=uniform_T)
    for part in (slice(0, 4), slice(4, T)):
        piece = Rows(**{f.name: getattr(data, f.name)[part] for f in fields(Rows)})
        piece = replace(piece, student_TV=piece.student_TV.detach().requires_grad_())
        seen = views(piece, k=min(method.needs.top_k, V) or 5, region_T=MIXED_T[part], uniform_T=uniform_T[part])
        seen = (*seen[:2], replace(seen[2], entropy_threshold=tokens.entropy_threshold))
        loss = method.token_loss(*seen)
        close(loss.loss_T, whole.loss_T[part])
        close(gradient(loss.loss_T, piece), grad_TV[part])
        close(loss.weight_T, whole.weight_T[part])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_vanishes_at_the_teacher_exactly_when_it_says_so(name):
    data = rows(3)
    data = replace(data, teacher_TV=data.student_TV.detach().clone())
    method = build_method(name)
    # a support smaller than the vocabulary, or truncation would be invisible
    loss = method.token_loss(*views(data, k=5, region_T=MIXED_T))
    grad_TV = gradient(loss.loss_T, data)
    assert (grad_TV.abs().max() < 1e-10) == method.vanishes_at_teacher


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_preset_has_an_example_that_builds(name):
    text = OmegaConf.load(EXAMPLES / f"{name}.yaml")
    assert set(text) <= {"method", "rollout", "teacher", "data", "reward"}
    options = OmegaConf.to_container(text.method)
    assert options["name"] == name
    example, default = build_method(**options), build_method(name)
    assert example.settings == default.settings and example.needs == default.needs
    assert example.guided == default.guided == ("guided_per_prompt" in text.get("rollout", {}))


def test_every_example_is_a_preset():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(PRESETS)


# --------------------------------------------------------------------------- tropd


def test_tropd_gives_each_token_the_term_of_its_kind():
    data = rows()
    method = build_method("tropd", k=5)
    seen = views(data, k=5, region_T=MIXED_T)
    student, teacher, tokens = seen
    accepted_T = tokens.uniform_T < (teacher.logprob_T - student.old_logprob_T).detach().exp()
    trusted_T = (MIXED_T == CONTINUATION) & accepted_T
    outlier_T = (MIXED_T == CONTINUATION) & ~accepted_T
    assert trusted_T.any() and outlier_T.any()
    grad_TV = gradient(method.token_loss(*seen).loss_T, data)
    q, p = data.student_TV.detach().softmax(-1), data.teacher_TV.softmax(-1)
    score_TV = torch.nn.functional.one_hot(data.target_T, V) - q
    a_TV = torch.zeros(T, V, dtype=torch.float64).scatter_(1, teacher.support_ids_TK, 1.0)
    r_T1 = (teacher.logprob_T - student.old_logprob_T).detach()[:, None]
    expected_TV = torch.where(trusted_T[:, None], -r_T1 * score_TV, (a_TV * p).sum(-1, keepdim=True) * q - a_TV * p)
    expected_TV = torch.where((MIXED_T == PREFIX)[:, None], -1e-3 * score_TV, expected_TV)
    close(grad_TV, expected_TV)


def test_tropd_that_trusts_everything_unguided_is_opd():
    tropd, opd = build_method("tropd", gate="all", prefix_schedule="none"), build_method("opd")
    assert_same(tropd, opd, region_T=MIXED_T)
    assert tropd.needs == opd.needs and tropd.guided == opd.guided


def test_tropd_that_trusts_nothing_is_truncated_forward_kl():
    fkl = build_method("fkl", form="topk", tail="none", k=5)
    assert_same(build_method("tropd", gate="none", prefix_schedule="none", k=5), fkl)


def test_aopd_is_tropd_with_a_probability_gap_unguided_up_to_normalization():
    aopd = build_method("aopd")
    assert_same(aopd, build_method("tropd", gate="probability_gap", prefix_schedule="none"))
    assert aopd.normalization == "sequence" and build_method("tropd").normalization == "token"


def test_tropd_aopd_with_a_gap_of_zero_trusts_whom_aopd_trusts():
    """p > q makes acceptance certain, so the conjunction is AOPD's gate; a negative gap makes it stricter."""
    seen = views(rows(4), uniform_T=torch.full((T,), 0.999))
    close(build_method("tropd_aopd").gate_weight(*seen), build_method("aopd").gate_weight(*seen))
    loose = {"gate_gap": -1.0, "k": 5}
    close(build_method("tropd_aopd", **loose).gate_weight(*seen), build_method("tropd").gate_weight(*seen))


def test_ablations_change_outliers_only():
    data = rows()
    whole, masked, clipped = (on(build_method(n, k=5), data)[1] for n in ("tropd", "tropd_mask", "tropd_clip"))
    outlier_T = build_method("tropd").gate_weight(*views(data)) == 0
    assert 0 < outlier_T.sum() < T
    assert (masked[outlier_T] == 0).all()
    close(masked[~outlier_T], whole[~outlier_T])
    close(clipped[~outlier_T], whole[~outlier_T])
    floored, _ = on(build_method("opd"), data)
    r_T = -floored.stats["reverse_kl"]
    assert (r_T[outlier_T] < math.log(0.1) / 0.9).any()
    q_TV = data.student_TV.detach().softmax(-1)
    score_TV = torch.nn.functional.one_hot(data.target_T, V) - q_TV
    expected_TV = -r_T.clamp(min=-2.5584278811)[:, None] * score_TV
    close(clipped[outlier_T], expected_TV[outlier_T])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tropd", "tropd_rkl"])
def test_soft_gate_is_the_mean_of_the_bernoulli_gate_in_loss_and_gradient(name):
    data = rows()
    hard, soft = build_method(name, k=5), build_method(name, k=5, gate="soft")
    draws = 1001
    loss_T, grad_TV = torch.zeros(T, dtype=torch.float64), torch.zeros(T, V, dtype=torch.float64)
    for i in range(draws):
        loss, grad = on(hard, data, region_T=MIXED_T, uniform_T=torch.full((T,), (i + 0.5) / draws))
        loss_T, grad_TV = loss_T + loss.loss_T.detach() / draws, grad_TV + grad / draws
    soft_loss, soft_grad_TV = on(soft, data, region_T=MIXED_T)
    close(soft_loss.loss_T, loss_T, atol=0.01, rtol=0)
    close(soft_grad_TV, grad_TV, atol=0.005, rtol=0)


def test_logged_fractions_are_the_realised_gate_and_its_expectation():
    data = rows()
    q_TV, p_TV = data.student_TV.detach().softmax(-1), data.teacher_TV.softmax(-1)
    expected_T = torch.zeros(T, dtype=torch.float64)
    for y in range(V):
        stats = on(build_method("tropd", k=5), replace(data, target_T=torch.full((T,), y)))[0].stats
        expected_T += q_TV[:, y] * stats["total_variation"]
        close(stats["outlier_fraction"] + stats["trusted_fraction"], torch.ones(T, dtype=torch.float64))
    close(expected_T, 0.5 * (p_TV - q_TV).abs().sum(-1))
    loss, _ = on(build_method("tropd_soft", k=5), data)
    close(loss.stats["outlier_fraction"], loss.stats["total_variation"])


@pytest.mark.parametrize("name", ["opd", "tropd", "rkl"])
def test_stuck_outliers_weigh_what_the_acceptance_test_rejects_of_certain_tokens(name):
    """q of the sampled tokens .95, .89, .95, p .19, .089, .99. Rejected: .8, .9, 0; certain: first and last."""
    data = rows(tokens=3)

    def with_probability(values: list[float]) -> torch.Tensor:
        at_T = torch.tensor(values, dtype=torch.float64)
        logits_TV = torch.log((1.0 - at_T) / (V - 1))[:, None].repeat(1, V)
        return logits_TV.scatter(1, data.target_T[:, None], at_T.log()[:, None])

    q_TV, p_TV = with_probability([0.95, 0.89, 0.95]), with_probability([0.19, 0.089, 0.99])
    data = replace(data, student_TV=q_TV.requires_grad_(), old_TV=q_TV.detach(), teacher_TV=p_TV)
    loss, _ = on(build_method(name), data)
    close(loss.stats["stuck_fraction"], torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64))
    close(loss.stat_weights["stuck_fraction"], torch.tensor([0.8, 0.9, 0.0], dtype=torch.float64))


ALL_TERMS = {
    "k1_pg": terms.k1_pg(),
    "k1_pg_floor": terms.k1_pg(floor=-2.0),
    "k2": terms.k2(),
    "k3": terms.k3(),
    "nll": terms.nll(),
    "fkl_topk_none": terms.fkl_topk(k=3),
    "fkl_topk_bucket": terms.fkl_topk(k=3, tail="bucket"),
    "fkl_topk_renorm": terms.fkl_topk(k=3, tail="renorm"),
    "fkl_pg_scalar": terms.fkl_pg_scalar(k=3),
    "rkl_topk_bucket": terms.rkl_topk(k=3, tail="bucket", support="teacher"),
    "fkl_full": terms.fkl_full(),
    "rkl_full": terms.rkl_full(),
    "jsd_full": terms.jsd_full(beta=0.5),
    "none": terms.NONE,
}


@pytest.mark.parametrize("name", ALL_TERMS)
def test_only_terms_that_name_alternatives_move_a_student_that_is_certain(name):
    """1 - q(y) and p(y) are about 1e-7: a forward KL pushes y's logit down by about 1, all others by almost nothing."""
    data = rows()
    y_T1 = data.target_T[:, None]
    student_TV = data.student_TV.detach().scatter(1, y_T1, 20.0)
    teacher_TV = data.teacher_TV.scatter(1, y_T1, -16.0)
    data = replace(data, student_TV=student_TV.requires_grad_(), old_TV=student_TV.detach(), teacher_TV=teacher_TV)
    term = ALL_TERMS[name]
    student, teacher, _ = views(data, k=3)
    loss = term.loss(student, teacher).sum()
    push_T = gradient(loss, data).gather(1, y_T1)[:, 0] if loss.requires_grad else torch.zeros(T)
    assert (push_T > 0.3).all() if term.names_alternatives else (push_T.abs() < 1e-3).all(), push_T


def test_the_presets_that_move_a_certain_student_are_those_with_a_forward_kl_on_outliers():
    found = {name for name in PRESETS if build_method(name).teaches_certain_students}
    forward = {"aopd", "eopd", "fkl", "prompt_distillation"}
    assert found == {"tropd", "tropd_rkl", "tropd_resopd", "tropd_soft", "tropd_aopd", *forward}
    assert not build_method("tropd", support="student").teaches_certain_students  # names the student's own alone
    assert build_method("tropd", gate="none").teaches_certain_students
    assert not build_method("tropd", gate="all").teaches_certain_students


def test_gate_stays_when_the_weights_move():
    """Minibatches of one rollout batch: same gate at 'old', another at 'current'."""
    fresh, moved = rows(6), rows(6)
    moved = replace(moved, student_TV=(moved.student_TV.detach() * 3.0).requires_grad_())
    uniform_T = torch.full((T,), 0.5)

    def gate(data, source):
        return build_method("tropd", ratio=source).gate_weight(*views(data, uniform_T=uniform_T))

    close(gate(fresh, "old"), gate(moved, "old"))
    assert (gate(fresh, "current") != gate(moved, "current")).any()


def test_gate_weight_is_one_on_prefix_tokens():
    weight_T = build_method("tropd_mask", gate="none").gate_weight(*views(rows(), region_T=MIXED_T))
    close(weight_T, (MIXED_T == PREFIX).double())


def test_terms_that_blow_up_where_they_are_not_used_leave_no_trace():
    """exp(r) of k3 overflows on the first token, which the gate keeps out."""
    data = rows()
    student, teacher, tokens = views(data, k=5)
    far_T = torch.where(torch.arange(T) == 0, -2000.0, 0.0)
    student = replace(student, logprob_T=student.logprob_T + far_T)
    entropy_T = torch.arange(T).double()
    student = replace(student, old_entropy_T=entropy_T)
    tokens = replace(tokens, entropy_threshold=0.5)
    assert torch.isinf(terms.k3(bound=None).loss(student, teacher)[0])
    method = build_method("tropd", gate="entropy_top", trusted="k3", k3_bound=None, outlier="fkl_topk", k=5)
    loss_T = method.token_loss(student, teacher, tokens).loss_T
    assert torch.isfinite(loss_T).all() and torch.isfinite(gradient(loss_T, data)).all()


@pytest.mark.parametrize(
    "trusted", ["k1_pg", "k2", "k3", "rkl_full", "jsd_full", "rkl_topk", "fkl_topk", "nll", "none"]
)
@pytest.mark.parametrize("gate", ["bernoulli", "soft", "threshold", "teacher_topk", "teacher_topp", "none"])
def test_tropd_composes_any_gate_with_any_trusted_term(gate, trusted):
    method = build_method("tropd", gate=gate, trusted=trusted, gate_k=2, k=5, outlier="clip")
    loss, grad_TV = on(method, rows(), region_T=MIXED_T)
    assert torch.isfinite(loss.loss_T).all() and torch.isfinite(grad_TV).all()


def test_script_options_swap_the_gradients():
    data = rows()
    seen = views(data, k=5, region_T=MIXED_T)
    method = build_method(
        "tropd", gate="none", outlier_gradient="pg_scalar", prefix_gradient="pg_scalar", k=5, beta=0.1
    )
    expected_T = torch.where(
        MIXED_T == PREFIX,
        0.1 * terms.prefix_pg_scalar().loss(*seen[:2]),
        terms.fkl_pg_scalar(k=5).loss(*seen[:2]),
    )
    close(method.token_loss(*seen).loss_T, expected_T)
    close(gradient(method.token_loss(*seen).loss_T, data), gradient(expected_T, data))


def test_an_extra_term_acts_on_every_continuation_token_whatever_the_gate_says():
    student, teacher, tokens = views(rows(), region_T=MIXED_T)
    for gate in (gates.ALL, gates.NOTHING):
        method = Method(gate=gate, trusted=terms.NONE, extra=terms.nll())
        close(
            method.token_loss(student, teacher, tokens).loss_T,
            torch.where(MIXED_T == CONTINUATION, -student.logprob_T, 0.0),
        )


# --------------------------------------------------------------------------- the others


def test_gkd_at_beta_zero_is_forward_kl_and_at_one_reverse_kl():
    assert_same(build_method("gkd", beta=0.0), build_method("fkl"))
    assert_same(build_method("gkd", beta=1.0), build_method("rkl"))


def test_opsd_at_the_ends_of_beta_and_on_all_ids_is_what_it_says():
    assert_same(build_method("opsd", beta=0.0), build_method("fkl"))
    assert_same(build_method("opsd", beta=0.3), build_method("gkd", beta=0.3, temperature=1, on_policy_fraction=1))
    assert_same(build_method("opsd", form="topk", beta=1.0, k=5), build_method("rkl", form="topk", k=5))
    assert_same(
        build_method("sdft", beta=1.0, k=5, mismatch="none"), build_method("local_support", support="student", k=5)
    )
    for tail in ("none", "bucket", "renorm"):
        assert_same(build_method("opsd", form="topk", k=V, tail=tail), build_method("opsd"))
    assert_same(build_method("prompt_distillation"), build_method("fkl"))


def test_gkd_treats_teacher_sequences_alike_and_computes_its_term_once():
    method = build_method("gkd")
    assert method.temperature == 0.9 and method.guided
    student, teacher, tokens = views(rows(), region_T=MIXED_T)
    calls = []
    counted = replace(student, divergence=lambda *args: calls.append(args) or student.divergence(*args))
    close(method.token_loss(counted, teacher, tokens).loss_T, student.divergence("jsd", 0.5))
    assert calls == [("jsd", 0.5)]


def test_local_support_of_the_whole_vocabulary_is_reverse_kl():
    assert_same(build_method("local_support", k=V), build_method("rkl"))


def test_eopd_without_its_addition_is_clipped_opd():
    eopd, opd = build_method("eopd", alpha=0), build_method("opd", ppo_clip=0.2)
    assert_same(eopd, opd)
    assert eopd.needs == opd.needs


def test_eopd_adds_forward_kl_where_the_teacher_is_uncertain():
    data = rows()
    _, teacher, _ = seen = views(data, k=5)
    limit = float(teacher.entropy_T.sort().values[2])
    both = build_method("eopd", k=5, alpha=0.7, entropy=limit).token_loss(*seen).loss_T
    alone = build_method("opd", ppo_clip=0.2).token_loss(*seen).loss_T
    forward_T = build_method("fkl", form="topk", tail="none", k=5).token_loss(*seen).loss_T
    close(both, alone + 0.7 * forward_T * (teacher.entropy_T > limit))


def test_exopd_at_lam_one_is_opd():
    assert_same(build_method("exopd", lam=1.0), build_method("opd"))


def test_reopold_keeps_rewards_above_the_floor_first_and_uncertain_tokens_later():
    data = rows()
    student, teacher, tokens = views(data)
    floor = math.log(0.1) / 0.9
    r_T = (teacher.logprob_T - student.old_logprob_T).detach()
    assert (r_T < floor).any()
    method = build_method("reopold")
    early_T = method.gate_weight(student, teacher, replace(tokens, progress=0.49))
    close(early_T, (r_T >= floor).double())
    late_T = method.gate_weight(student, teacher, replace(tokens, progress=0.5))
    close(late_T, (student.old_entropy_T > tokens.entropy_threshold).double())
    clip_only = build_method("reopold", stages=1)
    assert clip_only.needs == build_method("opd").needs
    expected_T = -r_T.clamp(min=floor) * student.logprob_T
    close(clip_only.token_loss(student, teacher, tokens).loss_T, expected_T)


def test_reopold_has_two_readings_of_its_floor():
    data = rows()
    student, teacher, tokens = views(data)
    teacher = replace(teacher, logprob_T=student.old_logprob_T - 50.0)
    for reading, floor in (("log(lam)/(1-lam)", -2.558427881104495), ("log(lam/(1-lam))", -2.1972245773362196)):
        loss = build_method("reopold", stages=1, floor_reading=reading).token_loss(student, teacher, tokens)
        close(loss.loss_T, -floor * student.logprob_T)
    with pytest.raises(ConfigError, match=r"lam=0.6.*gives the floor 0.405, which must be negative: choose lam < 0.5"):
        build_method("reopold", lam=0.6, floor_reading="log(lam/(1-lam))")


def test_sft_is_nll_of_whole_teacher_responses():
    method = build_method("sft")
    student, teacher, tokens = views(rows(), region_T=MIXED_T)
    loss_T = method.token_loss(student, teacher, tokens).loss_T
    close(loss_T, torch.where(MIXED_T == PREFIX, -student.logprob_T, 0.0))
    assert [method.schedule.fraction(t, 9) for t in (0, 4, 8)] == [1.0, 1.0, 1.0] and method.guided


def test_drift_gate_weighs_but_does_not_change_the_loss():
    data = rows(on_policy=False)
    seen = views(data)
    gated, plain = build_method("drift_gate").token_loss(*seen), build_method("opd").token_loss(*seen)
    close(gated.loss_T, plain.loss_T)
    assert plain.weight_T is None
    drift_T = seen[0].old_logprob_T - seen[0].logprob_T.detach()
    expected_T = torch.cat(
        [(-drift_T[s].mean().abs()).exp().expand(len(drift_T[s])) for s in (slice(0, 4), slice(4, T))]
    )
    close(gated.weight_T, expected_T)


def test_prefix_drift_weighs_by_what_is_left_of_the_differences_by_hand():
    """Two sequences, of 4 and 3 tokens; |r| by hand, PREFIX tokens not in the sums."""
    seen = views(rows(on_policy=False), region_T=MIXED_T)
    gaps_T = torch.tensor([9.0, 9.0, 1.0, 3.0, 9.0, 0.0, 2.0], dtype=torch.float64)
    signs_T = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    seen = (seen[0], replace(seen[1], logprob_T=seen[0].old_logprob_T + signs_T * gaps_T), seen[2])
    loss = build_method("opd", multiplier="prefix_drift").token_loss(*seen)
    # shares that came before: 0, 1/4 of the first sequence's 4 nats; 0, 0 of the second's 2
    close(loss.weight_T, torch.tensor([1.0, 1.0, 1.5, 1.375, 1.0, 1.5, 1.5], dtype=torch.float64))
    close(loss.loss_T, build_method("opd").token_loss(*seen).loss_T)
    equal = (seen[0], replace(seen[1], logprob_T=seen[0].old_logprob_T), seen[2])
    agreed = build_method("opd", multiplier="prefix_drift", prefix_drift_gain=0.25).token_loss(*equal)
    close(agreed.weight_T, torch.where(MIXED_T == PREFIX, 1.0, 1.25).double())


def test_surprise_weighs_by_how_unsure_the_student_was():
    student, teacher, tokens = views(rows(on_policy=False), region_T=MIXED_T)
    student = replace(student, old_logprob_T=torch.full((T,), math.log(0.25), dtype=torch.float64))
    loss = build_method("opd", multiplier="surprise", surprise_gain=2.0).token_loss(student, teacher, tokens)
    close(loss.weight_T, torch.where(MIXED_T == PREFIX, 1.0, 2.5).double())


def test_shaped_rewards_keep_the_sign_and_bound_the_size_by_hand():
    student, teacher, tokens = views(rows())
    r_T = torch.tensor([math.e - 1, 1 - math.e, 0.0, 20.0, -20.0, 0.5, -0.5], dtype=torch.float64)
    teacher = replace(teacher, logprob_T=student.logprob_T.detach() + r_T)
    rewards = {
        "sign": [1, -1, 0, 1, -1, 1, -1],
        "log": [1, -1, 0, math.log(21), -math.log(21), math.log(1.5), -math.log(1.5)],
    }
    for name, expected in rewards.items():
        for method in (build_method("opd", reward=name), build_method("tropd", gate="all", reward=name)):
            loss_T = method.token_loss(student, teacher, tokens).loss_T
            close(loss_T, -torch.tensor(expected, dtype=torch.float64) * student.logprob_T)


def test_mismatch_weight_multiplies_continuation_tokens_only():
    data = rows()
    student, teacher, tokens = views(data, region_T=MIXED_T, k=5)
    tokens = replace(tokens, rollout_logprob_T=student.old_logprob_T - math.log(3.0))
    plain_T = build_method("tropd", k=5).token_loss(student, teacher, tokens).loss_T
    factor = {"truncate": 2.0, "mask": 0.0}
    for kind, weight in factor.items():
        loss_T = build_method("tropd", k=5, mismatch=kind).token_loss(student, teacher, tokens).loss_T
        close(loss_T, torch.where(MIXED_T == PREFIX, plain_T, weight * plain_T))


# --------------------------------------------------------------------------- schedules


def test_schedules_by_hand():
    cosine = build_method("tropd").schedule
    assert [cosine.fraction(t, 4) for t in (0, 1, 2, 4)] == pytest.approx([1.0, (1 + math.sqrt(0.5)) / 2, 0.5, 0.0])
    assert cosine.fraction(0, 7) == 1.0  # exactly: floor(alpha L) must be L at the first step
    linear = build_method("tropd", prefix_schedule="linear").schedule
    assert [linear.fraction(t, 4) for t in (0, 1, 4)] == [1.0, 0.75, 0.0]
    constant = build_method("tropd", prefix_schedule="constant", prefix_fraction=0.3).schedule
    assert constant.fraction(3, 4) == 0.3
    unguided = build_method("tropd", prefix_schedule="none")
    assert unguided.schedule.fraction(0, 4) == 0.0 and not unguided.guided
    with pytest.raises(ConfigError, match="step 5 of 4"):
        cosine.fraction(5, 4)


def test_gkd_mixes_whole_batches_in_the_given_share():
    for share, whole_responses in ((0.25, 15), (0.5, 10), (0.0, 20)):
        schedule = build_method("gkd", on_policy_fraction=share).schedule
        alphas = [schedule.fraction(t, 20) for t in range(20)]
        assert set(alphas) <= {0.0, 1.0} and sum(alphas) == whole_responses
    assert not build_method("gkd", on_policy_fraction=1.0).guided


# --------------------------------------------------------------------------- needs and errors


def test_needs_ask_for_nothing_more_than_the_parts():
    assert build_method("opd").needs.top_k == 0
    assert build_method("tropd").needs.top_k == 64
    assert build_method("tropd_mask").needs.top_k == 0
    assert build_method("eopd").needs.top_k == 16 and build_method("eopd").needs.teacher_entropy
    assert build_method("local_support").needs.top_k == 32
    assert build_method("local_support").special_tokens == "mask"
    assert build_method("tropd_rkl").needs.hidden_states
    assert not build_method("tropd_rkl", trusted="rkl_topk").needs.hidden_states
    assert build_method("exopd").needs.base_model
    assert build_method("entropy_opd").needs.entropy_top == 0.2 and build_method("entropy_opd").needs.old_logprob
    assert build_method("tropd", support="union").needs.support == "union"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trodp", {}, r"unknown method 'trodp'. Did you mean 'tropd'\? Methods: opd, tropd, .*sft"),
        ("zzz", {}, r"unknown method 'zzz'. Methods: opd"),
        (
            "tropd",
            {"beeta": 1},
            r"method 'tropd': beeta is not a key. Did you mean beta\? Valid keys of method 'tropd': .*gate, .*beta",
        ),
        (
            "opd",
            {"k": 64},
            r"'opd': k is not a key.* Valid keys of method 'opd': .*drift_block, .*k3_bound, ppo_clip, reward\.$",
        ),
        (
            "tropd",
            {"gate": "bernouli"},
            r"gate\[0\] = 'bernouli': must be one of bernoulli, soft.*Did you mean bernoulli\?",
        ),
        ("tropd", {"gate": ["bernoulli", "x"]}, r"gate\[1\] = 'x': must be one of bernoulli"),
        ("tropd", {"gate": []}, r"gate = \[\]: must not be empty"),
        ("tropd", {"gate": 3}, r"gate = 3: must be a list"),
        ("tropd", {"k": 0}, r"method 'tropd': k = 0: must be at least 1\."),
        ("tropd", {"k": 6.5}, r"k = 6.5: must be a whole number"),
        ("tropd", {"k": True}, r"k = true: must be a number, not true or false"),
        ("tropd", {"beta": "little"}, r"beta = 'little': must be a number"),
        ("tropd", {"beta": None}, r"beta = null: must be a number"),
        ("tropd", {"beta": math.nan}, r"beta = nan: must be at least 0"),
        ("tropd", {"tail": "bukket"}, r"tail = 'bukket': must be one of none, bucket, renorm\. Did you mean bucket\?"),
        (
            "tropd",
            {"k": 0, "tial": 1},
            r"method 'tropd': 2 problems\n  - k = 0: .*\n  - tial is not a key. Did you mean tail",
        ),
        ("tropd", {"gate": "teacher_topk", "gate_k": 65}, r"gate_k=65 exceeds k=64, the ids requested: raise k"),
        ("tropd", {"gate": "teacher_topp", "support": "student"}, r"support='student' lacks: use 'union'"),
        ("tropd", {"tail": "sampled"}, r"tail = 'sampled': must be one of none, bucket, renorm"),
        ("tropd", {"trusted": "fkl_topk", "trusted_tail": "sampled"}, r"corrects a reverse KL, which fkl_topk is not"),
        ("opd", {"ppo_clip": 1.0}, r"ppo_clip = 1.0: must be less than 1"),
        ("opd", {"temperature": 0}, r"temperature = 0: must be greater than 0"),
        ("opd", {"normalization": "batch"}, r"normalization = 'batch': must be one of token, sequence, region"),
        ("opd", {"mismatch_cap": 1.0}, r"mismatch_cap = 1.0: must be greater than 1"),
        ("reopold", {"stages": 3}, r"stages = 3: must be at most 2"),
    ],
)
def test_wrong_options_are_refused_with_value_rule_and_way_out(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build_method(name, **options)


def test_options_may_override_what_a_preset_sets():
    assert build_method("aopd", normalization="token").normalization == "token"
    assert build_method("gkd", temperature=1).temperature == 1.0
    assert build_method("tropd_mask", gate="threshold", gate_threshold=0.25).gate.name == "threshold"
    assert build_method("eopd", ppo_clip=None).trusted.name == "k1_pg"


@pytest.mark.parametrize(
    ("method", "overrides", "said"),
    [
        ("{name: opd,\n  ppo_clip: 7}", [], "FILE: method 'opd': line 6: ppo_clip = 7: must be less than 1."),
        ("{name: opd}", ["method.kk=3"], "FILE: method 'opd': override 'method.kk=3': kk is not a key. "),
        ("{name: odp}", [], "FILE: line 5: unknown method 'odp'. Did you mean 'opd'? Methods: opd, "),
        ("{name: opd}", ["method.name=zz"], "FILE: override 'method.name=zz': unknown method 'zz'. Methods: opd, "),
    ],
)
def test_a_mistake_in_an_option_is_found_at_its_line_or_override(tmp_path, method, overrides, said):
    file = tmp_path / "run.yaml"
    models = "student: {model: s}\nteacher: {model: t}\ndata: {prompts: p}\n"
    file.write_text(f"run_dir: r\n{models}method: {method}\n")
    section = load_config(file, overrides, check_paths=False).method
    with pytest.raises(ConfigError) as refused:
        method_of(section)
    assert str(refused.value).startswith(said.replace("FILE", str(file)))
    # where it was read is nothing that two configurations differ in
    elsewhere = tmp_path / "other.yaml"
    elsewhere.write_text(file.read_text() + "\n")
    assert load_config(elsewhere, overrides, check_paths=False).method == section
