"""A frozen Megatron teacher with its own architecture and its own layout, over the student's ranks or over others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tropd.engine.context import own_predictions
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.losses.end_class import with_ends
from megatron_tropd.losses.vocab_parallel import linear_logprobs, linear_topk
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.parallel.partition import PointToPoint
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.schema import check_finite
from megatron_tropd.teacher.sharded import ShardedTeacher
from megatron_tropd.teacher.transfer import Key, ReplicaMap, Wire
from megatron_tropd.teacher.wire import HiddenKind, to_wire
from megatron_tropd.types import Pack, TeacherOutputs


class MegatronTeacher(ShardedTeacher):
    """Implement ``teacher.protocol.Teacher``."""

    def __init__(
        self,
        model: Model,
        student: Groups | ReplicaMap,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        role: str = "teacher",
        first_rank: int = 0,
        post: PointToPoint | None = None,
    ) -> None:
        """Take a ``model``, which is not changed, nor its gradients.

        ``student``: the layout outputs are delivered to; where that is of another part of the launch, ``post`` carries
        them, and ``first_rank`` is the launch's number for the first rank of the model. ``vocab_size``: ids all models
        know (default: all of this one's). ``role``: what the model is called in messages.
        """
        hidden = HiddenKind(model.architecture.hidden_size, model.dtype)
        own = ReplicaMap.local(model.groups, round_robin=True, first_rank=first_rank)
        receivers = student if isinstance(student, ReplicaMap) else ReplicaMap.local(student, round_robin=False)
        super().__init__(own, receivers, model.device, hidden, post=post)
        self.model = model
        self.temperature = temperature
        self._vocab_size = vocab_size or model.architecture.vocab_size
        self._role = role

    def _score_assigned(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        groups, keys = self.model.groups, self._own.mine(packs)
        assigned = [packs[replica][number].scored for replica, number in keys]
        # replicas that share experts run the same number of passes: one without a pack repeats another's, for nothing
        missing = -(-sum(map(len, packs)) // groups.num_replicas) - len(assigned)
        assigned += [packs[0][0].scored] * missing if groups.layout.expert > 1 else []
        if not assigned:
            return {}

        def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> Wire:
            if number >= len(keys):
                return []
            outputs = self._score(assigned[number], hidden_ND, weight_vD, request, query_ids.get(keys[number]))
            check_finite(outputs, role=self._role)
            return to_wire(outputs, request)

        with self.model.present():
            collected = run_packs(self.model, assigned, last_stage)
        return dict(zip(keys, collected, strict=False))

    def _score(
        self, pack: Pack, hidden_ND: Tensor, weight_vD: Tensor, request: TeacherRequest, query_NJ: Tensor | None
    ) -> TeacherOutputs:
        groups, device = self.model.groups, self.model.device
        ids = torch.from_numpy(own_predictions(pack, groups).target_N).to(device)[:, None]
        if query_NJ is not None:
            ids = torch.cat([ids, query_NJ], dim=1)
        ids = with_ends(ids, request.end_ids)
        if not request.top_k:
            out = linear_logprobs(
                hidden_ND,
                weight_vD,
                ids,
                group=groups.tp,
                vocab_size=self._vocab_size,
                temperature=self.temperature,
                tail=request.has_tail,
            )
            return _outputs(request, out.logprob_TK, out.entropy_T, out.logtail_T, hidden_ND)
        top = linear_topk(
            hidden_ND,
            weight_vD,
            request.top_k,
            group=groups.tp,
            vocab_size=self._vocab_size,
            temperature=self.temperature,
            ids_TJ=ids,
            tail=request.has_tail,
        )
        assert top.picked_logprob_TJ is not None
        outputs = _outputs(request, top.picked_logprob_TJ, top.entropy_T, top.logtail_T, hidden_ND)
        return replace(outputs, topk_ids_NK=top.ids_TK, topk_logprob_NK=top.logprob_TK)


def _outputs(
    request: TeacherRequest, picked_NJ: Tensor, entropy_N: Tensor, logtail_N: Tensor | None, hidden_NE: Tensor
) -> TeacherOutputs:
    """Build outputs from ``picked_NJ``: log-probs of the target, of the query ids, then of the ends of responses."""
    ends = picked_NJ.shape[1] - len(request.end_ids)
    return TeacherOutputs(
        logprob_N=picked_NJ[:, 0],
        query_logprob_NJ=picked_NJ[:, 1:ends] if request.queries else None,
        end_logprob_NX=picked_NJ[:, ends:] if request.end_ids else None,
        logtail_N=logtail_N,
        entropy_N=entropy_N if request.entropy else None,
        hidden_NE=hidden_NE if request.hidden_states else None,
    )
