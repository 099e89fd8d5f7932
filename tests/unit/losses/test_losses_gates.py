"""Claims about ``losses.gates`` and ``losses.multipliers``: who is trusted, by hand and by enumerating y."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError, EngineError
from megatron_tropd.losses import gates
from megatron_tropd.losses.multipliers import drift_weight, mismatch_weight
from tests.support.method_views import K, T, V, rows, views

close = torch.testing.assert_close


def hand_views(teacher: list[float], student: list[float], uniform: list[float] | None = None):
    """Views of tokens with the given probabilities of y."""
    count = len(teacher)
    s, t, tokens = views(rows(tokens=count))
    log_q_T = torch.tensor(student, dtype=torch.float64).log()
    s = replace(s, logprob_T=log_q_T, old_logprob_T=log_q_T)
    t = replace(t, logprob_T=torch.tensor(teacher, dtype=torch.float64).log())
    uniform_T = torch.zeros(count) if uniform is None else torch.tensor(uniform, dtype=torch.float64)
    return s, t, replace(tokens, uniform_T=uniform_T, rollout_logprob_T=log_q_T)


def trusted(gate: gates.Gate, student, teacher, tokens) -> list[float]:
    reference_T = gates.reference_logprob(student, tokens, "old")
    return gate.trust(reference_T, student, teacher, tokens).double().tolist()


def test_bernoulli_accepts_below_the_ratio():
    seen = hand_views(
        [0.2, 0.2, 0.2, 0.9, 0.5], [0.8, 0.8, 0.8, 0.1, 0.5], uniform=[0.0, 0.2499, 0.2501, 0.999, 0.999999]
    )
    assert trusted(gates.bernoulli(), *seen) == [1, 1, 0, 1, 1]


def test_soft_weight_is_the_share_of_uniforms_that_bernoulli_accepts():
    data = rows()
    student, teacher, tokens = views(data)
    draws = [(i + 0.5) / 4001 for i in range(4001)]
    mean_T = torch.zeros(T, dtype=torch.float64)
    for u in draws:
        mean_T += torch.tensor(
            trusted(gates.bernoulli(), student, teacher, replace(tokens, uniform_T=torch.full((T,), u)))
        )
    soft_T = torch.tensor(trusted(gates.soft(), student, teacher, tokens), dtype=torch.float64)
    assert (soft_T < 1).any()
    close(mean_T / len(draws), soft_T, atol=1 / 4000, rtol=0)


def test_untrusted_share_under_the_student_is_the_total_variation():
    """E over y ~ q of 1 - min(1, p/q) = 1/2 sum |p - q|, by enumerating y."""
    data = rows()
    q_TV, p_TV = data.student_TV.detach().softmax(-1), data.teacher_TV.softmax(-1)
    outlier_T = torch.zeros(T, dtype=torch.float64)
    for y in range(V):
        seen = views(replace(data, target_T=torch.full((T,), y)))
        outlier_T += q_TV[:, y] * (1 - torch.tensor(trusted(gates.soft(), *seen), dtype=torch.float64))
    close(outlier_T, 0.5 * (p_TV - q_TV).abs().sum(-1))


def test_threshold_includes_its_bound_and_probability_gap_excludes_it():
    seen = hand_views([0.25, 0.24, 0.9], [0.5, 0.5, 0.1])
    assert trusted(gates.threshold(0.5), *seen) == [1, 0, 1]
    seen = hand_views([0.5, 0.5, 0.75, 0.2], [0.5, 0.25, 0.25, 0.8])
    assert trusted(gates.probability_gap(0.0), *seen) == [0, 1, 1, 0]
    assert trusted(gates.probability_gap(0.3), *seen) == [0, 0, 1, 0]
    assert trusted(gates.probability_gap(-0.1), *seen) == [1, 1, 1, 0]


@pytest.mark.parametrize(("source", "expected"), [("old", 0.0), ("current", 1.0), ("rollout", 0.5)])
def test_ratio_source_picks_the_students_logprob_without_gradient(source, expected):
    student, _, tokens = hand_views([0.5], [0.5])
    one = torch.ones(1, dtype=torch.float64)
    student = replace(student, logprob_T=one.clone().requires_grad_(), old_logprob_T=0 * one)
    reference_T = gates.reference_logprob(student, replace(tokens, rollout_logprob_T=0.5 * one), source)
    assert reference_T.item() == expected and not reference_T.requires_grad


def ranked(target: list[int], *, ids: list[int], probs: list[float], mask: list[bool] | None = None):
    """Tokens that share one support."""
    count = len(target)
    student, teacher, tokens = views(rows(tokens=count))
    repeat = (count, 1)
    mask_TK: Tensor | None = None if mask is None else torch.tensor([mask]).repeat(repeat)
    teacher = replace(
        teacher,
        support_ids_TK=torch.tensor([ids]).repeat(repeat),
        support_logprob_TK=torch.tensor([probs], dtype=torch.float64).log().repeat(repeat),
        support_mask_TK=mask_TK,
    )
    return student, teacher, replace(tokens, target_T=torch.tensor(target))


def test_rank_gates_follow_the_teachers_order():
    seen = ranked([7, 3, 9, 4, 0], ids=[7, 3, 9, 4], probs=[0.5, 0.25, 0.125, 0.0625])
    assert trusted(gates.teacher_topk(2), *seen) == [1, 1, 0, 0, 0]
    # nucleus of 0.75: 7 and 3 hold it; of 0.76: 9 is needed as well
    assert trusted(gates.teacher_topp(0.75, k=4), *seen) == [1, 1, 0, 0, 0]
    assert trusted(gates.teacher_topp(0.76, k=4), *seen) == [1, 1, 1, 0, 0]
    assert trusted(gates.teacher_topp(0.1, k=4), *seen) == [1, 0, 0, 0, 0]


def test_rank_gates_ignore_the_sampled_token_added_to_the_support_and_duplicates():
    """Support of the teacher's top 2 plus the sampled token: column 2, masked when it repeats a top-2 id."""
    outsider = ranked([4], ids=[7, 3, 4], probs=[0.5, 0.25, 0.01])
    assert trusted(gates.teacher_topk(2, support="teacher_and_sampled"), *outsider) == [0]
    assert trusted(gates.teacher_topp(0.9, k=2, support="teacher_and_sampled"), *outsider) == [0]
    repeated = ranked([7], ids=[7, 3, 7], probs=[0.5, 0.25, 0.5], mask=[True, True, False])
    assert trusted(gates.teacher_topk(1, support="teacher_and_sampled"), *repeated) == [1]
    second = ranked([3], ids=[7, 3, 7], probs=[0.5, 0.25, 0.5], mask=[True, True, False])
    assert trusted(gates.teacher_topp(0.8, k=2, support="teacher_and_sampled"), *second) == [1]


def test_entropy_gate_uses_the_rollouts_entropy():
    student, teacher, tokens = views(rows())
    entropy_T = torch.arange(T).double()
    student = replace(student, old_entropy_T=entropy_T, entropy_T=-entropy_T)
    assert trusted(gates.entropy_top(0.2), student, teacher, replace(tokens, entropy_threshold=4.0)) == [
        0,
        0,
        0,
        0,
        0,
        1,
        1,
    ]
    fallback = replace(student, old_entropy_T=None)
    assert trusted(gates.entropy_top(0.2), fallback, teacher, replace(tokens, entropy_threshold=-1.5)) == [
        1,
        1,
        0,
        0,
        0,
        0,
        0,
    ]
    needs = gates.entropy_top(0.2).needs
    assert needs.student_entropy and needs.old_logprob and needs.entropy_top == 0.2


def test_constant_and_combined_gates():
    seen = hand_views([0.9, 0.1, 0.4], [0.1, 0.9, 0.8], uniform=[0.5, 0.5, 0.1])
    assert trusted(gates.ALL, *seen) == [1, 1, 1]
    assert trusted(gates.NOTHING, *seen) == [0, 0, 0]
    assert trusted(gates.both(gates.bernoulli(), gates.probability_gap()), *seen) == [1, 0, 0]
    assert trusted(gates.both(gates.soft(), gates.threshold(0.3)), *seen) == pytest.approx([1, 0, 0.5])
    staged = gates.staged(gates.ALL, gates.NOTHING)
    student, teacher, tokens = seen
    assert trusted(staged, student, teacher, replace(tokens, progress=0.499)) == [1, 1, 1]
    assert trusted(staged, student, teacher, replace(tokens, progress=0.5)) == [0, 0, 0]


def test_gates_refuse_impossible_parameters():
    with pytest.raises(ConfigError, match=r"threshold gate needs c > 0, got 0"):
        gates.threshold(0.0)
    with pytest.raises(ConfigError, match=r"needs c in \[-1, 1\), got 1"):
        gates.probability_gap(1.0)
    with pytest.raises(ConfigError, match=r"support='student' lacks: use 'union'"):
        gates.teacher_topk(4, support="student")
    with pytest.raises(ConfigError, match=r"p in \(0, 1\], got 0"):
        gates.teacher_topp(0.0, k=4)
    student, teacher, tokens = views(rows(), k=K)
    with pytest.raises(EngineError, match="support_ids_TK is None"):
        trusted(gates.teacher_topk(2), student, replace(teacher, support_ids_TK=None), tokens)


# --------------------------------------------------------------------------- multipliers


def test_drift_weight_averages_the_drift_over_blocks_of_one_sequence():
    student, _, tokens = views(rows(tokens=6))
    drift = [0.2, -0.4, 0.3, 1.0, -3.0, 0.5]
    student = replace(
        student, logprob_T=-torch.tensor(drift).double().requires_grad_(), old_logprob_T=torch.zeros(6).double()
    )
    # blocks: (5: 62, 63), (5: 64), (8: 64, 70), (8: 128)
    tokens = replace(
        tokens, sequence_T=torch.tensor([5, 5, 5, 8, 8, 8]), position_T=torch.tensor([62, 63, 64, 64, 70, 128])
    )
    weight_T = drift_weight(student, tokens, tau=2.0, block=64)
    exponents = [0.1, 0.1, 0.3, 1.0, 1.0, 0.5]  # |mean| of each token's block
    close(weight_T, torch.tensor([math.exp(-2.0 * x) for x in exponents], dtype=torch.float64))
    assert not weight_T.requires_grad


def test_drift_weight_of_a_fresh_rollout_is_one():
    student, _, tokens = views(rows())
    close(drift_weight(student, tokens, tau=3.0, block=64), torch.ones(T, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("truncate", [1.0, 1.5, 2.0, 2.0, 0.4, 0.5]),
        ("mask", [1.0, 1.0, 1.0, 0.0, 0.0, 1.0]),
        ("truncate_and_mask", [1.0, 1.5, 2.0, 0.0, 0.0, 0.5]),
        ("none", [1.0] * 6),
    ],
)
def test_mismatch_weight_caps_or_drops_tokens_that_the_sampler_saw_differently(kind, expected):
    student, _, tokens = views(rows(tokens=6))
    ratio_T = torch.tensor([1.0, 1.5, 2.0, 3.0, 0.4, 0.5], dtype=torch.float64)
    log_cap_safe_T = ratio_T.log() * (1 - 1e-12)  # bounds themselves are inside
    student = replace(student, old_logprob_T=log_cap_safe_T - 1.0)
    tokens = replace(tokens, rollout_logprob_T=torch.full((6,), -1.0, dtype=torch.float64))
    close(mismatch_weight(student, tokens, kind=kind, cap=2.0), torch.tensor(expected, dtype=torch.float64))


def test_unknown_mismatch_is_refused():
    student, _, tokens = views(rows())
    with pytest.raises(ConfigError, match="mismatch='clip' must be one of none, truncate, mask, truncate_and_mask"):
        mismatch_weight(student, tokens, kind="clip", cap=2.0)
