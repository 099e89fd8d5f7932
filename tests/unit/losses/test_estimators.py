"""Which terms have the reverse KL's gradient on average, and with how much noise: by enumeration, in fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import terms
from tests.support.estimators import ESTIMATORS, K, exact_gradient, judged, position_rows
from tests.support.method_views import Rows, gradient, views

RESOPD, BUCKET, SAMPLED = (
    "`rkl_topk`, tail `sampled` | `resopd`",
    "`rkl_topk`, tail `bucket` | `rkl`",
    "`k1_pg` | `opd`",
)


def test_resopd_has_the_gradient_of_the_full_reverse_kl_on_average_on_policy_and_reused():
    assert judged(RESOPD).bias < 1e-12 and judged(RESOPD).reused_bias < 1e-12
    # what it mends: the coarsened divergence alone is another objective
    assert judged(BUCKET).bias > 0.01


def test_resopd_has_less_noise_than_the_sampled_token_alone():
    assert 0.0 < judged(RESOPD).covariance < 0.9 * judged(SAMPLED).covariance
    assert abs(judged(BUCKET).covariance) < 1e-12


def test_without_an_importance_ratio_a_reused_rollout_biases_k1_pg_and_shaped_rewards_are_biased_anyway():
    assert judged(SAMPLED).bias < 1e-12 < 0.01 < judged(SAMPLED).reused_bias
    assert min(judged(name).bias for name in ESTIMATORS if "reward" in name) > 0.01


def test_a_sampled_token_inside_the_support_adds_nothing():
    data = position_rows(reused=False)
    inside_T = data.teacher_TV.topk(K).indices[:, 1]
    drawn = Rows(data.student_TV, data.old_TV, data.teacher_TV, data.base_TV, inside_T)
    student, teacher, _ = views(drawn, k=K)
    coarse, sampled = (terms.rkl_topk(k=K, tail=tail).loss(student, teacher) for tail in ("bucket", "sampled"))
    assert torch.equal(coarse, sampled) and torch.equal(gradient(coarse, drawn), gradient(sampled, drawn))


def test_a_support_of_the_whole_vocabulary_has_no_residual():
    data = position_rows(reused=True)
    student, teacher, _ = views(data, k=7)
    torch.testing.assert_close(
        gradient(terms.rkl_topk(k=7, tail="sampled").loss(student, teacher), data), exact_gradient(data)
    )


@pytest.mark.parametrize("factory", [terms.fkl_topk, terms.fkl_pg_scalar])
def test_the_sampled_tail_is_refused_where_it_corrects_nothing(factory):
    with pytest.raises(ConfigError, match="tail=sampled corrects a reverse KL, which fkl_topk is not"):
        factory(k=3, tail="sampled")
