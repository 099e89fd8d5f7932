"""The sampler's cache against attention over whole sequences in fp64, and which contexts are computed once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_tropd.engine.cache import DistinctContexts, KeyValueCache, PrefillAttention
from tests.unit.engine.test_engine_attention import DIM, HEADS, KEY_HEADS, SCALE, close, one_by_one, streams

GROUP = HEADS // KEY_HEADS


def contexts_of(*texts: str) -> list[np.ndarray]:
    return [np.array([ord(letter) for letter in text]) for text in texts]


def test_a_context_that_another_begins_with_is_not_computed_on_its_own():
    texts = ["abc", "ab", "abc", "b", "abcde", "abd", "ab"]
    found = DistinctContexts.of(contexts_of(*texts))
    computed = ["".join(map(chr, context)) for context in found.contexts]
    assert sorted(computed) == ["abcde", "abd", "b"]
    for text, source in zip(texts, found.source_B.tolist(), strict=True):
        assert computed[source].startswith(text)
    padded = found.padded()
    assert padded.shape == (3, 5)
    for row, text in enumerate(computed):
        assert padded[row].tolist() == [ord(letter) for letter in text] + [0] * (5 - len(text))


def test_ids_of_several_bytes_are_compared_as_numbers():
    """256 is one byte followed by zeros in one order of bytes, and zeros followed by one in the other."""
    found = DistinctContexts.of([np.array([1]), np.array([256, 1]), np.array([256]), np.array([1, 256])])
    assert sorted(map(list, found.contexts)) == [[1, 256], [256, 1]]
    assert [found.contexts[source].tolist() for source in found.source_B] == [[1, 256], [256, 1], [256, 1], [1, 256]]


@pytest.mark.parametrize("seed", range(5))
def test_every_random_context_is_read_from_one_that_begins_with_it(seed):
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, 3, rng.integers(1, 6)) for _ in range(23)]
    found = DistinctContexts.of(contexts)
    for context, source in zip(contexts, found.source_B, strict=True):
        assert found.contexts[source][: len(context)].tolist() == context.tolist()
    texts = ["".join(map(str, context)) for context in found.contexts]
    assert not any(a != b and b.startswith(a) for a in texts for b in texts) and len(set(texts)) == len(texts)


def halves(rows: list[list[Tensor]], part: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Queries by group, keys and values of rows, one after the other."""
    query, key, value = (torch.cat([row[i][part, 0] for row in rows]) for i in range(3))
    return query.unflatten(1, (KEY_HEADS, GROUP)), key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cached_decoding_attends_as_the_whole_sequence_would(dtype):
    """Rows of different lengths, two of which begin alike, are cached and then continued each at its own position."""
    prompts, total = [3, 7, 1, 5], 12
    rows = [[x.detach() for x in streams(total, dtype, seed=10 + row)] for row in range(3)]
    rows.append([torch.cat([rows[1][i][:5], rows[0][i][5:]]) for i in range(3)])  # five tokens of the second row
    truth = [one_by_one([x.double() for x in row], [total]) for row in rows]
    limit = 1e-6 if dtype == torch.float32 else 1e-2

    distinct = DistinctContexts.of(contexts_of("abc", "fghijkl", "x", "fghij"))
    order = [{"a": 0, "f": 1, "x": 2}[chr(context[0])] for context in distinct.contexts]
    cache = KeyValueCache(distinct, torch.tensor(prompts), room=12)
    prefill = PrefillAttention(cache, len(order))
    for layer in range(2):  # the second has other values
        query, key, value = halves([rows[row] for row in order], slice(0, max(prompts)))
        output = prefill.attend(layer, query, key, value * (1 + layer), SCALE).unflatten(0, (len(order), -1))
        for number, row in enumerate(order):
            found = output[number, : prompts[row]].unflatten(-1, (HEADS, DIM))
            assert close(found / (1 + layer), truth[row][: prompts[row]], limit)
    for step in range(total - max(prompts)):
        at = [length + step for length in prompts]
        if step == 2:  # the first row leaves
            cache.keep(torch.tensor([1, 2, 3]))
            rows, truth, prompts, at = rows[1:], truth[1:], prompts[1:], at[1:]
        new = [[row[i][t : t + 1] for i in range(3)] for row, t in zip(rows, at, strict=True)]
        query, key, value = halves(new, slice(0, 1))
        for layer in range(2):
            output = cache.attend(layer, query, key, value * (1 + layer), SCALE).unflatten(-1, (HEADS, DIM))
            for row, t in enumerate(at):
                assert close(output[row] / (1 + layer), truth[row][t], limit)
        cache.column += 1
