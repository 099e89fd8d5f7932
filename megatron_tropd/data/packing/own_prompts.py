"""Pack sequences that the teacher reads behind prompts of its own: each pack has a second one, the teacher's.

The two hold the same sequences in the same order, the student's prompts in the one and the teacher's in the other, and
so the same valid predictions in the same order: what the teacher says in row n of its pack is about row n of the
student's. Neither exceeds the budget. The student computes its own pack, and never meets the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from megatron_tropd.data.packing.api import pack, pack_in_order
from megatron_tropd.data.packing.validate import flatten
from megatron_tropd.errors import DataError
from megatron_tropd.types import Int64Array, Pack, Rollout, single_turn


def pack_for_both(
    sequences: Sequence[Rollout],
    *,
    max_tokens: int,
    multiple_of: int,
    num_replicas: int,
    linear_work: int,
    share_prefixes: bool,
) -> list[list[Pack]]:
    """Pack as ``pack`` does; every pack has its ``teacher_pack``.

    Who goes where is decided by the longer of a sequence's two readings, so that both fit. Where sharing makes more of
    the one reading than of the other, and only then, the batch is assigned by whole lengths instead.

    Raises:
        DataError: as of ``pack``, for either reading; or a prompt is empty, on whose last token a first response token
            is predicted.
    """
    read = [as_teacher_reads(sequence) for sequence in sequences]
    longer = [max(pair, key=lambda one: len(one.token_ids)) for pair in zip(read, sequences, strict=True)]
    for shared in (True, False) if share_prefixes else (False,):
        assigned = pack(
            longer,
            max_tokens=max_tokens,
            multiple_of=multiple_of,
            num_replicas=num_replicas,
            linear_work=linear_work,
            share_prefixes=shared,
        )
        flat = [one for replica in assigned for one in replica]
        groups = [one.sequence_ids for one in flat]
        both = [
            _packs_of(each, groups, multiple_of=multiple_of, share_prefixes=share_prefixes)
            for each in (sequences, read)
        ]
        if all(_size(one) <= max_tokens for packs in both for one in packs):
            break
    packs = [replace(one, teacher_pack=other) for one, other in zip(*both, strict=True)]
    share = len(packs) // num_replicas
    return [packs[replica * share : (replica + 1) * share] for replica in range(num_replicas)]


def as_teacher_reads(sequence: Rollout) -> Rollout:
    """Return the sequence behind the teacher's own prompt; as it stands where the teacher has none.

    Raises:
        DataError: one of the two prompts is empty.
    """
    own, prompt = sequence.teacher_prompt_ids, sequence.prompt_length
    if own is None:
        return sequence
    if not len(own) or not prompt:
        whose = "teacher's own" if prompt else "student's"
        raise DataError(
            f"sequence {sequence.sequence_id} has an empty prompt, the {whose}: nothing would predict its first token."
        )
    return replace(
        sequence,
        token_ids=np.concatenate([own, sequence.token_ids[prompt:]]),
        region_L=np.concatenate([single_turn(prompt=len(own)), sequence.region_L[prompt:]]),
    )


def _packs_of(
    sequences: Sequence[Rollout], groups: Sequence[Int64Array], *, multiple_of: int, share_prefixes: bool
) -> list[Pack]:
    """Build the packs that hold these groups of sequences, by their ids."""
    number = {sequence.sequence_id: i for i, sequence in enumerate(sequences)}
    order = np.array([number[i] for group in groups for i in group.tolist()], np.int64)
    offsets = np.cumsum([0, *map(len, groups)]).astype(np.int64)
    return pack_in_order(flatten(sequences), order, offsets, multiple_of=multiple_of, share_prefixes=share_prefixes)


def _size(one: Pack) -> int:
    """Return what the budget limits: tokens, or the rows and valid predictions of a forest."""
    return len(one.token_T) if one.row_T is None else max(one.num_rows, one.num_valid)
