"""Claims about ``losses.terms`` and ``losses.support``: gradients w.r.t. student logits, by hand and by plain torch."""

from __future__ import annotations

import math
from dataclasses import replace

import mpmath
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from megatron_tropd.errors import ConfigError, EngineError
from megatron_tropd.losses import terms
from megatron_tropd.losses.support import kl_on_support, log_tail, tail_beside
from megatron_tropd.types import StudentView, TeacherView
from tests.support.method_views import K, T, V, divergence, gradient, log_outside, rows, views

close = torch.testing.assert_close


def probabilities(data) -> tuple[Tensor, Tensor]:
    """Student q and teacher p as plain numbers, [T, V]."""
    return data.student_TV.detach().softmax(-1), data.teacher_TV.softmax(-1)


def one_hot(data) -> Tensor:
    return torch.nn.functional.one_hot(data.target_T, V).double()


def in_support(teacher) -> Tensor:
    return torch.zeros(T, V, dtype=torch.float64).scatter_(1, teacher.support_ids_TK, 1.0)


def log_ratio(data) -> Tensor:
    """log p(y) - log q(y), [T, 1]."""
    q, p = probabilities(data)
    return (p.log() - q.log()).gather(1, data.target_T[:, None])


def equal_models(seed: int = 3):
    data = rows(seed)
    return replace(data, teacher_TV=data.student_TV.detach().clone())


# --------------------------------------------------------------------------- sampled-token terms


def test_k1_pg_has_the_policy_gradient_of_the_log_ratio():
    data = rows()
    student, teacher, _ = views(data)
    loss_T = terms.k1_pg().loss(student, teacher)
    q, _ = probabilities(data)
    close(gradient(loss_T, data), -log_ratio(data) * (one_hot(data) - q))
    close(loss_T, -log_ratio(data)[:, 0] * q.log().gather(1, data.target_T[:, None])[:, 0])


def test_k1_pg_averaged_over_the_students_samples_is_the_gradient_of_exact_reverse_kl():
    data = rows()
    q, _ = probabilities(data)
    expected_TV = gradient(
        divergence(data.student_TV.log_softmax(-1), data.teacher_TV.log_softmax(-1), "reverse_kl", 0), data
    )
    mean_TV = torch.zeros(T, V, dtype=torch.float64)
    for y in range(V):
        drawn = replace(data, target_T=torch.full((T,), y))
        student, teacher, _ = views(drawn)
        mean_TV += q[:, y : y + 1] * gradient(terms.k1_pg().loss(student, teacher), drawn)
    close(mean_TV, expected_TV)


def test_descent_on_k1_pg_raises_a_token_that_the_teacher_prefers():
    data = rows()
    student, teacher, _ = views(data)
    preferred_T = log_ratio(data)[:, 0] > 0
    grad_T = gradient(terms.k1_pg().loss(student, teacher), data).gather(1, data.target_T[:, None])[:, 0]
    assert 0 < preferred_T.sum() < T
    assert ((grad_T < 0) == preferred_T).all()


def test_clipped_k1_pg_follows_the_ppo_rule():
    """Old q is 0.5; new q, p and the expected loss and d loss / d log q by hand with e = 0.2."""
    cases = [  # q_new, p, gradient factor: -w r inside the range or when the clip does not bind, else 0
        (0.5, 0.8, -math.log(1.6)),
        (0.55, 0.8, -1.1 * math.log(1.6)),
        (0.8, 0.8, 0.0),  # w = 1.6 > 1.2 and r > 0: clipped
        (0.8, 0.2, -1.6 * math.log(0.4)),  # w > 1.2 and r < 0: the worse of both, unclipped
        (0.3, 0.8, -0.6 * math.log(1.6)),  # w = 0.6 < 0.8 and r > 0: unclipped
        (0.3, 0.2, 0.0),  # w < 0.8 and r < 0: clipped
    ]
    values = [-math.log(1.6), -1.1 * math.log(1.6), -1.2 * math.log(1.6), -1.6 * math.log(0.4), -0.6 * math.log(1.6)]
    values.append(-0.8 * math.log(0.4))
    new_T = torch.tensor([c[0] for c in cases], dtype=torch.float64).log().requires_grad_()
    student, teacher, _ = views(rows(tokens=len(cases)))
    student = replace(student, logprob_T=new_T, old_logprob_T=torch.full((len(cases),), math.log(0.5)).double())
    teacher = replace(teacher, logprob_T=torch.tensor([c[1] for c in cases], dtype=torch.float64).log())
    loss_T = terms.k1_pg(clip=0.2).loss(student, teacher)
    loss_T.sum().backward()
    close(loss_T.detach(), torch.tensor(values, dtype=torch.float64))
    close(new_T.grad, torch.tensor([c[2] for c in cases], dtype=torch.float64))


def test_clipped_k1_pg_has_the_plain_gradient_at_the_first_update():
    data = rows()
    student, teacher, _ = views(data)
    plain, clipped = terms.k1_pg().loss(student, teacher), terms.k1_pg(clip=0.2).loss(student, teacher)
    close(gradient(clipped, data), gradient(plain, data))


def test_reward_floor_bounds_the_reward_from_below_only():
    data = rows()
    student, teacher, _ = views(data)
    q, _ = probabilities(data)
    floor = -0.3
    assert (log_ratio(data) < floor).any() and (log_ratio(data) > 0.3).any()
    expected_TV = -torch.maximum(log_ratio(data), torch.tensor(floor)) * (one_hot(data) - q)
    close(gradient(terms.k1_pg(floor=floor).loss(student, teacher), data), expected_TV)


def test_k2_and_k3_carry_their_derivative_through_log_q():
    data = rows()
    student, teacher, _ = views(data)
    q, _ = probabilities(data)
    r = log_ratio(data)
    score_TV = one_hot(data) - q
    close(terms.k2().loss(student, teacher), 0.5 * r[:, 0] ** 2)
    close(gradient(terms.k2().loss(student, teacher), data), -r * score_TV)
    close(terms.k3().loss(student, teacher), r[:, 0].exp() - 1 - r[:, 0])
    close(gradient(terms.k3().loss(student, teacher), data), -(r.exp() - 1) * score_TV)


def test_k3_grows_along_its_tangent_beyond_the_bound_by_hand():
    logq_T = torch.tensor([-30.0, -1.0, -0.1, -5.0], dtype=torch.float64, requires_grad=True)
    logp_T = torch.tensor([-0.2, -2.0, -0.1, -2.0], dtype=torch.float64)  # r = 29.8, -1, 0, 3: the bound itself
    student, teacher = StudentView(logprob_T=logq_T, old_logprob_T=logq_T.detach()), TeacherView(logprob_T=logp_T)
    loss_T = terms.k3().loss(student, teacher)
    slope, at_bound = math.e**3 - 1, math.e**3 - 4
    expected_T = torch.tensor([at_bound + 26.8 * slope, 1 / math.e, 0.0, at_bound], dtype=torch.float64)
    close(loss_T, expected_T)
    (grad_T,) = torch.autograd.grad(loss_T.sum(), logq_T)
    close(grad_T[:3], torch.tensor([-slope, 1 - 1 / math.e, 0.0], dtype=torch.float64))
    # as published: 8.7e12
    assert float(terms.k3(bound=None).loss(student, teacher)[0].detach()) == pytest.approx(math.exp(29.8) - 30.8)
    far = replace(student, logprob_T=torch.full((4,), -2000.0))
    assert torch.isfinite(terms.k3().loss(far, teacher)).all()
    with pytest.raises(ConfigError, match="k3 needs bound > 0 nats, got 0"):
        terms.k3(bound=0.0)


def test_reverse_kl_on_a_bare_support_warns_once_and_other_tails_never(caplog):
    terms._warn_of_leaking_support.cache_clear()
    for tail in ("bucket", "renorm"):
        terms.rkl_topk(k=K, tail=tail)
    terms.fkl_topk(k=K, tail="none")
    assert not caplog.records
    for _ in range(2):
        terms.rkl_topk(k=K, tail="none")
    (record,) = caplog.records
    assert "pushes probability out of the support" in record.message and "tail=bucket" in record.message


def test_extrapolated_reward_is_minus_student_plus_lam_teacher_over_base():
    data = rows()
    student, teacher, _ = views(data)
    q, p = (x.gather(1, data.target_T[:, None]).log() for x in probabilities(data))
    b = data.base_TV.log_softmax(-1).gather(1, data.target_T[:, None])
    expected_TV = ((q - b) - 1.25 * (p - b)) * (one_hot(data) - probabilities(data)[0])
    close(gradient(terms.extrapolated_pg(lam=1.25).loss(student, teacher), data), expected_TV)


def test_nll_gradient_is_q_minus_one_hot():
    data = rows()
    student, teacher, _ = views(data)
    close(gradient(terms.nll().loss(student, teacher), data), probabilities(data)[0] - one_hot(data))


def test_prefix_script_rewards_log_q_minus_log_p():
    data = rows()
    student, teacher, _ = views(data)
    loss_T = terms.prefix_pg_scalar().loss(student, teacher)
    close(gradient(loss_T, data), log_ratio(data) * (one_hot(data) - probabilities(data)[0]))


def test_outlier_script_moves_only_the_sampled_token_by_the_detached_kl():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    kl_T1 = (in_support(teacher) * p * (p.log() - q.log())).sum(-1, keepdim=True)
    loss_T = terms.fkl_pg_scalar(k=K).loss(student, teacher)
    close(gradient(loss_T, data), kl_T1 * (one_hot(data) - q))


# --------------------------------------------------------------------------- support terms


def coarse(probs_TV: Tensor, ids_TK: Tensor) -> Categorical:
    """The support's categories plus one for the rest."""
    kept_TK = probs_TV.gather(1, ids_TK)
    return Categorical(probs=torch.cat((kept_TK, 1.0 - kept_TK.sum(-1, keepdim=True)), dim=-1))


def test_truncated_forward_kl_matches_formula_and_textbook():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    a_TV = in_support(teacher)
    loss_T = terms.fkl_topk(k=K).loss(student, teacher)
    m_T1 = (a_TV * p).sum(-1, keepdim=True)
    close(gradient(loss_T, data), m_T1 * q - p * a_TV)
    textbook_TV = torch.nn.functional.kl_div(data.student_TV.log_softmax(-1), p, reduction="none")
    close(loss_T, (textbook_TV * a_TV).sum(-1))
    close(gradient(loss_T, data), gradient((textbook_TV * a_TV).sum(-1), data))


def test_negative_truncated_forward_kl_keeps_its_gradient():
    data = rows()
    # The student holds more mass on the teacher's top tokens than the teacher itself: the partial sum is negative.
    sharper = replace(data, student_TV=(2.0 * data.teacher_TV).requires_grad_())
    student, teacher, _ = views(sharper)
    loss_T = terms.fkl_topk(k=K).loss(student, teacher)
    assert (loss_T < 0).sum() >= 3
    q, p = probabilities(sharper)
    a_TV = in_support(teacher)
    close(gradient(loss_T, sharper), (a_TV * p).sum(-1, keepdim=True) * q - p * a_TV)
    assert (gradient(loss_T, sharper)[loss_T < 0].abs().sum(-1) > 1e-2).all()


def test_forward_kl_with_bucket_is_the_kl_of_the_coarsened_distributions():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    a_TV = in_support(teacher)
    loss_T = terms.fkl_topk(k=K, tail="bucket").loss(student, teacher)
    q_tail, p_tail = (((1 - a_TV) * x).sum(-1, keepdim=True) for x in (q, p))
    close(gradient(loss_T, data), a_TV * (q - p) + (1 - a_TV) * q * (1 - p_tail / q_tail))
    textbook_T = kl_divergence(
        coarse(p, teacher.support_ids_TK), coarse(data.student_TV.softmax(-1), teacher.support_ids_TK)
    )
    close(loss_T, textbook_T)
    close(gradient(loss_T, data), gradient(textbook_T, data))


def test_forward_kl_with_renorm_is_the_kl_on_the_support_alone():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    a_TV = in_support(teacher)
    loss_T = terms.fkl_topk(k=K, tail="renorm").loss(student, teacher)
    q_hat, p_hat = (a_TV * x / (a_TV * x).sum(-1, keepdim=True) for x in (q, p))
    close(gradient(loss_T, data), q_hat - p_hat)
    ids_TK = teacher.support_ids_TK
    close(
        loss_T,
        kl_divergence(
            Categorical(logits=data.teacher_TV.gather(1, ids_TK)), Categorical(logits=data.student_TV.gather(1, ids_TK))
        ),
    )


def test_reverse_kl_with_renorm_matches_formula_and_textbook():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    a_TV = in_support(teacher)
    loss_T = terms.rkl_topk(k=K).loss(student, teacher)
    q_hat, p_hat = (a_TV * x / (a_TV * x).sum(-1, keepdim=True) for x in (q, p))
    ratio_TV = torch.where(a_TV > 0, q_hat / p_hat, torch.ones_like(q_hat)).log()
    kl_T1 = (q_hat * ratio_TV).sum(-1, keepdim=True)
    close(loss_T, kl_T1[:, 0])
    close(gradient(loss_T, data), q_hat * (ratio_TV - kl_T1) * a_TV)
    ids_TK = teacher.support_ids_TK
    textbook_T = kl_divergence(
        Categorical(logits=data.student_TV.gather(1, ids_TK)), Categorical(logits=data.teacher_TV.gather(1, ids_TK))
    )
    close(gradient(loss_T, data), gradient(textbook_T, data))


def test_reverse_kl_with_bucket_is_the_kl_of_the_coarsened_distributions():
    data = rows()
    student, teacher, _ = views(data)
    _, p = probabilities(data)
    loss_T = terms.rkl_topk(k=K, tail="bucket").loss(student, teacher)
    textbook_T = kl_divergence(
        coarse(data.student_TV.softmax(-1), teacher.support_ids_TK), coarse(p, teacher.support_ids_TK)
    )
    close(loss_T, textbook_T)
    close(gradient(loss_T, data), gradient(textbook_T, data))


def test_truncated_reverse_kl_is_the_partial_sum():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    a_TV = in_support(teacher)
    loss_T = terms.rkl_topk(k=K, tail="none").loss(student, teacher)
    ratio_TV = (q / p).log()
    partial_T1, q_a_T1 = ((a_TV * q * x).sum(-1, keepdim=True) for x in (ratio_TV, 1.0))
    close(loss_T, partial_T1[:, 0])
    close(gradient(loss_T, data), q * (a_TV * (ratio_TV + 1) - partial_T1 - q_a_T1))


@pytest.mark.parametrize("tail", ["none", "bucket", "renorm"])
@pytest.mark.parametrize(("factory", "kind"), [(terms.fkl_topk, "forward_kl"), (terms.rkl_topk, "reverse_kl")])
def test_support_of_the_whole_vocabulary_gives_the_full_kl(factory, kind, tail):
    data = rows()
    student, teacher, _ = views(data, k=V)
    loss_T = factory(k=V, tail=tail).loss(student, teacher)
    expected_T = divergence(data.student_TV.log_softmax(-1), data.teacher_TV.log_softmax(-1), kind, 0)
    close(loss_T, expected_T, rtol=1e-9, atol=1e-9)
    close(gradient(loss_T, data), gradient(expected_T, data), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tail", ["none", "bucket", "renorm"])
@pytest.mark.parametrize("factory", [terms.fkl_topk, terms.rkl_topk])
def test_masked_duplicates_do_not_count(factory, tail):
    """Union of the teacher's and the student's top k: an id listed twice counts once."""
    data = rows()
    both_TK = torch.cat((data.teacher_TV.topk(K).indices, data.student_TV.topk(K).indices), dim=-1)
    first_TK = torch.stack([torch.tensor([x not in row[:i] for i, x in enumerate(row)]) for row in both_TK.tolist()])
    assert not first_TK.all()
    student, teacher, _ = views(data, ids_TK=both_TK, mask_TK=first_TK)
    loss_T = factory(k=K, tail=tail).loss(student, teacher)
    grad_TV = gradient(loss_T, data)
    for t in range(T):
        single = replace(data, target_T=data.target_T[t : t + 1], teacher_TV=data.teacher_TV[t : t + 1])
        single = replace(
            single, student_TV=data.student_TV[t : t + 1].detach().requires_grad_(), old_TV=data.old_TV[t : t + 1]
        )
        single = replace(single, base_TV=data.base_TV[t : t + 1])
        student_1, teacher_1, _ = views(single, ids_TK=both_TK[t][first_TK[t]][None])
        alone_T = factory(k=K, tail=tail).loss(student_1, teacher_1)
        close(loss_T[t : t + 1], alone_T)
        close(grad_TV[t : t + 1], gradient(alone_T, single))


# --------------------------------------------------------------------------- the tail


def peaked_logprobs(mass: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """64 log-probs holding ``mass`` together, each a quarter of the last, rounded from 40 digits; their exact tail."""
    with mpmath.workdps(40):
        shares = [mpmath.mpf(3) / 4 / 4**i for i in range(63)]
        shares.append(1 - mpmath.fsum(shares))
        logs = [mpmath.log(mpmath.mpf(mass) * s) for s in shares]
        given = torch.tensor([[float(x) for x in logs]], dtype=torch.float64).to(dtype)
        held = mpmath.fsum(mpmath.exp(mpmath.mpf(x)) for x in given.double()[0].tolist())
        return given, torch.tensor([float(mpmath.log(1 - held))], dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("mass", ["0.3", "0.5", "0.9", "0.999", "0.99999"])
def test_log_tail_loses_no_digit_of_its_input(mass, dtype):
    given_TK, exact_T = peaked_logprobs(mass, dtype)
    close(log_tail(given_TK), exact_T, rtol=0, atol=1e-9)


def test_log_tail_from_fp32_is_within_two_percent_at_a_mass_of_0_99999():
    given_TK, _ = peaked_logprobs("0.99999", torch.float32)
    assert log_tail(given_TK).exp().item() == pytest.approx(1e-5, rel=0.02)


@pytest.mark.parametrize("excess", [0.0, 1e-6, -1e-8], ids=["exact", "above one", "below noise"])
def test_log_tail_of_a_support_holding_everything_is_the_noise_of_its_input(excess):
    """fp32 noise can bring the sum of the support to 1 or above."""
    logprob_TK = torch.tensor([[0.75, 0.25]], dtype=torch.float32).log() + excess
    eps = torch.finfo(torch.float32).eps
    # a logarithm of -14 is rounded by half a step of 14, once as it is taken and once more as it is used
    assert log_tail(logprob_TK).exp().item() == pytest.approx(8 * eps, rel=eps * abs(math.log(8 * eps)))


@pytest.mark.parametrize("factory", [terms.fkl_topk, terms.rkl_topk])
def test_an_empty_tail_adds_nothing_and_leaves_no_nan(factory):
    data = rows(dtype=torch.float32)
    student, teacher, _ = views(data, k=V)
    assert student.support_logtail_T.isneginf().all() and teacher.support_logtail_T.isneginf().all()
    bucket_T, none_T = (factory(k=V, tail=tail).loss(student, teacher) for tail in ("bucket", "none"))
    assert torch.equal(bucket_T, none_T)
    assert torch.equal(gradient(bucket_T, data), gradient(none_T, data))


def test_bucket_without_the_tails_mass_is_refused():
    student, teacher, _ = views(rows())
    with pytest.raises(EngineError, match=r"TeacherView.support_logtail_T is None.*Needs.tail_mass"):
        terms.fkl_topk(k=K, tail="bucket").loss(student, replace(teacher, support_logtail_T=None))
    with pytest.raises(EngineError, match=r"StudentView.support_logtail_T is None.*Needs.tail_mass"):
        terms.rkl_topk(k=K, tail="bucket").loss(replace(student, support_logtail_T=None), teacher)
    assert terms.fkl_topk(k=K, tail="bucket").needs.tail_mass and not terms.fkl_topk(k=K).needs.tail_mass
    merged = terms.merge_needs(terms.fkl_topk(k=K).needs, terms.rkl_topk(k=K, tail="bucket").needs)
    assert merged.tail_mass


def test_tail_beside_adds_the_id_where_it_is_not_in_the_support():
    logtail_T = torch.tensor([0.2, 0.2, 0.0, 0.0], dtype=torch.float64).log().requires_grad_()
    logprob_T = torch.tensor([0.3, 0.3, 0.3, 0.3], dtype=torch.float64).log().requires_grad_()
    found_T = tail_beside(logtail_T, logprob_T, torch.tensor([False, True, False, True]))
    close(found_T.detach().exp(), torch.tensor([0.5, 0.2, 0.3, 0.0], dtype=torch.float64))
    found_T[:3].sum().backward()
    close(logtail_T.grad, torch.tensor([0.4, 1.0, 0.0, 0.0], dtype=torch.float64))
    close(logprob_T.grad, torch.tensor([0.6, 0.0, 1.0, 0.0], dtype=torch.float64))


def test_kl_with_bucket_is_never_negative():
    generator = torch.Generator().manual_seed(1)
    scale_T1 = torch.logspace(-2, 1.5, 501)[:, None]
    student_TV = (scale_T1 * torch.randn(501, 97, generator=generator)).log_softmax(-1)
    noise_TV = 0.1 * torch.randn(501, 97, generator=generator)
    teacher_TV = (student_TV + noise_TV).log_softmax(-1)
    ids_TK = teacher_TV.topk(K).indices
    student_TK, teacher_TK = student_TV.gather(1, ids_TK), teacher_TV.gather(1, ids_TK)
    # rounding of fp32 log-probs is first order, the divergence second: allow the former
    tails = (log_outside(teacher_TV, ids_TK), log_outside(student_TV, ids_TK))
    assert kl_on_support(teacher_TK, student_TK, tail="bucket", logtails=tails).min() > -2e-6
    assert kl_on_support(student_TK, teacher_TK, tail="bucket", logtails=tails[::-1]).min() > -2e-6
    assert (kl_on_support(teacher_TK, student_TK, tail="none") < -1e-3).any()


# --------------------------------------------------------------------------- full-vocabulary terms, equality, errors


def test_full_terms_match_their_formulas():
    data = rows()
    student, teacher, _ = views(data)
    q, p = probabilities(data)
    close(gradient(terms.fkl_full().loss(student, teacher), data), q - p)
    ratio_TV = (q / p).log()
    kl_T1 = (q * ratio_TV).sum(-1, keepdim=True)
    close(gradient(terms.rkl_full().loss(student, teacher), data), q * (ratio_TV - kl_T1))


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")])
def test_jsd_asks_for_its_kind_and_beta(beta, kind):
    asked = []
    student, teacher, _ = views(rows())
    student = replace(student, divergence=lambda *args: asked.append(args) or student.logprob_T)
    terms.jsd_full(beta=beta).loss(student, teacher)
    assert asked[0][0] == kind
    assert kind != "jsd" or asked[0][1] == beta


@pytest.mark.parametrize("support_tail", ["bucket", "renorm"])
def test_terms_vanish_when_student_and_teacher_agree(support_tail):
    data = equal_models()
    student, teacher, _ = views(data)
    for term in (
        terms.k1_pg(),
        terms.k1_pg(clip=0.2),
        terms.k1_pg(floor=-1.0),
        terms.k2(),
        terms.k3(),
        terms.fkl_topk(k=K, tail=support_tail),
        terms.rkl_topk(k=K, tail=support_tail),
        terms.fkl_pg_scalar(k=K),
        terms.prefix_pg_scalar(),
        terms.fkl_full(),
        terms.rkl_full(),
        terms.jsd_full(beta=0.5),
        terms.extrapolated_pg(lam=1.0),
    ):
        loss_T = term.loss(student, teacher)
        assert term.vanishes, term.name
        close(loss_T, torch.zeros_like(loss_T), atol=1e-12, rtol=0)
        close(gradient(loss_T, data), torch.zeros(T, V, dtype=torch.float64), atol=1e-12, rtol=0)


def test_terms_that_do_not_vanish_have_their_exact_gradient_at_equality():
    data = equal_models()
    student, teacher, _ = views(data)
    q, _ = probabilities(data)
    a_TV = in_support(teacher)
    m_T1 = (a_TV * q).sum(-1, keepdim=True)
    squeeze = terms.fkl_topk(k=K)
    close(gradient(squeeze.loss(student, teacher), data), q * (m_T1 - a_TV))
    close(gradient(terms.rkl_topk(k=K, tail="none").loss(student, teacher), data), q * (a_TV - m_T1))
    close(gradient(terms.nll().loss(student, teacher), data), q - one_hot(data))
    assert not squeeze.vanishes and not terms.nll().vanishes and not terms.extrapolated_pg(lam=1.25).vanishes


def test_uncertain_teacher_switches_a_term_on():
    data = rows()
    student, teacher, _ = views(data)
    limit = float(teacher.entropy_T.sort().values[3])
    inner = terms.fkl_topk(k=K)
    loss_T = terms.where_teacher_uncertain(inner, entropy=limit).loss(student, teacher)
    close(loss_T, inner.loss(student, teacher) * (teacher.entropy_T > limit))
    assert (loss_T != 0).sum() == T - 4


def test_a_missing_view_field_is_named():
    student, teacher, _ = views(rows())
    with pytest.raises(EngineError, match=r"TeacherView.base_logprob_T is None.*Needs.base_model"):
        terms.extrapolated_pg(lam=2.0).loss(student, replace(teacher, base_logprob_T=None))
    with pytest.raises(EngineError, match=r"StudentView.divergence is None.*Needs.hidden_states"):
        terms.rkl_full().loss(replace(student, divergence=None), teacher)


def test_wrong_parameters_are_refused_with_value_and_rule():
    with pytest.raises(ConfigError, match=r"tail='buckets' must be one of none, bucket, renorm"):
        terms.fkl_topk(k=3, tail="buckets")
    with pytest.raises(ConfigError, match=r"k >= 1 candidates, got 0"):
        terms.rkl_topk(k=0)
    with pytest.raises(ConfigError, match=r"beta in \[0, 1\], got 1.5"):
        terms.jsd_full(beta=1.5)
    with pytest.raises(ConfigError, match=r"one support, but its parts request teacher, union"):
        terms.merge_needs(terms.fkl_topk(k=3).needs, terms.rkl_topk(k=3, support="union").needs)
