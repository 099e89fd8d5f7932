"""What is dropped of an adapter's inputs: the share that is asked for, by history and column alone."""

from __future__ import annotations

import numpy as np
import torch

from megatron_tropd.data.packing import pack
from megatron_tropd.engine.dropout import kept, row_histories
from megatron_tropd.engine.rows import computed_rows, row_of
from tests.support.tiny_models import grouped_rollouts


def test_a_share_of_each_row_and_column_is_dropped_and_ranks_see_their_own_columns():
    history = torch.arange(1500) * 7919 - 4000
    mask = kept(history, key=-12345, columns=range(900), share=0.3)
    # of n draws the share is off by sqrt(p (1 - p) / n), and by five times that in one of millions of cases
    assert (mask.double().mean() - 0.7).abs() < 5 * (0.21 / mask.numel()) ** 0.5
    assert ((mask.double().mean(0) - 0.7).abs() < 5 * (0.21 / 1500) ** 0.5).all()
    assert ((mask.double().mean(1) - 0.7).abs() < 5 * (0.21 / 900) ** 0.5).all()
    assert kept(history, key=-12345, columns=range(300, 500), share=0.3).equal(mask[:, 300:500])
    other = kept(history, key=-12344, columns=range(900), share=0.3)
    # two masks that know nothing of one another agree where both keep, or both drop
    assert ((mask == other).double().mean() - (0.49 + 0.09)).abs() < 5 * (0.25 / mask.numel()) ** 0.5


def test_a_history_is_that_of_the_tokens_up_to_a_row_however_it_is_packed():
    rollouts = grouped_rollouts(0, vocab_size=97)
    told: dict[tuple[int, ...], int] = {}
    for share in (False, True):
        for one in pack(rollouts, max_tokens=64, multiple_of=4, num_replicas=1, share_prefixes=share)[0]:
            histories, row_T = row_histories(one), row_of(one)
            assert len(histories) == computed_rows(one)
            starts = np.repeat(one.cu_seqlens[:-1], np.diff(one.cu_seqlens))
            for t in range(int(one.cu_seqlens[len(one.sequence_ids)])):
                tokens = tuple(one.token_T[starts[t] : t + 1].tolist())
                assert told.setdefault(tokens, int(histories[row_T[t]])) == histories[row_T[t]]
    assert len(set(told.values())) == len(told) > 50
