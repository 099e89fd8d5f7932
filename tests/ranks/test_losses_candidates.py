"""``losses._candidates`` finds the best k of many tiles, ties by the smaller id, whatever the order of the logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import linear_topk
from megatron_tropd.losses.vocab_parallel.candidates import NO_CANDIDATE, decode, entrants

FIRST, ROWS = 100, 7


def logits_of(pattern: str, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    drawn = torch.randn(ROWS, width, generator=generator) * 3
    return {
        "random": drawn,
        "ties": drawn.round(),
        "ascending": drawn.sort(dim=-1).values,  # every tile beats all before it
        "descending": drawn.sort(dim=-1, descending=True).values,
        "constant": torch.zeros(ROWS, width),
    }[pattern]


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("pattern", ["random", "ties", "ascending", "descending", "constant"])
def test_best_of_tiles_is_what_a_full_sort_finds(pattern: str, k: int) -> None:
    logits_RV = logits_of(pattern, 1501)  # no tile is a whole number of groups
    best_RK = torch.full((ROWS, k), NO_CANDIDATE)
    looked_at = []
    for left in range(0, 1501, 403):
        tile_Rw = logits_RV[:, left : left + 403]
        keys_RX = entrants(tile_Rw, best_RK, first_id=FIRST + left)
        looked_at.append(keys_RX.shape[1])
        best_RK = torch.cat([best_RK, keys_RX], dim=1).topk(k, sorted=False).values
    ids_RK = decode(best_RK.sort(dim=-1, descending=True).values)[1]
    order = [np.lexsort((np.arange(1501), -row.numpy()))[:k] + FIRST for row in logits_RV]
    assert torch.equal(ids_RK, torch.from_numpy(np.stack(order)))
    if k == 5 and pattern in ("random", "descending"):
        assert max(looked_at[1:]) < 50, looked_at  # few of 403 columns are candidates at all


def test_topk_over_several_default_tiles_matches_a_full_sort() -> None:
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randint(-2, 3, (1030, 5), generator=generator).float()  # exact logits with many ties
    weight = torch.randint(-2, 3, (5003, 5), generator=generator).float()
    top = linear_topk(hidden, weight, 9, vocab_size=5003)
    logits_TV = (hidden @ weight.t()).numpy()
    order = [np.lexsort((np.arange(5003), -row))[:9] for row in logits_TV]
    assert torch.equal(top.ids_TK, torch.from_numpy(np.stack(order)))
