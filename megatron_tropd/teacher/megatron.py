"""A frozen Megatron teacher in the student's processes, with its own architecture and its own layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.forward import run_packs, valid_positions
from megatron_tropd.engine.model import Model
from megatron_tropd.errors import EngineError
from megatron_tropd.losses.vocab_parallel import linear_topk
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.protocol import SignalSpec
from megatron_tropd.types import Pack, Signal


class MegatronTeacher:
    """Implements ``teacher.protocol.Teacher``.

    All packs of the batch are dealt to the teacher's replicas; signals then travel from the rank that has them to the
    ranks that compute the loss on them, directly, without padding: the two layouts need nothing in common.
    """

    def __init__(
        self, model: Model, student: Groups, *, vocab_size: int | None = None, temperature: float = 1.0
    ) -> None:
        """``model`` is not changed, nor its gradients.

        ``student``: the layout signals are delivered to. ``vocab_size``: ids both models know (default: all).
        """
        self.model = model
        self.temperature = temperature
        self._vocab_size = vocab_size or model.architecture.vocab_size
        self._student = student

    def score(self, packs: Sequence[Sequence[Pack]], spec: SignalSpec) -> list[Signal | None]:
        mine = _dealt_to(packs, self.model.groups)
        signals = self._score_mine([packs[r][i] for r, i in mine], spec)
        return _deliver(
            packs, dict(zip(mine, signals, strict=True)), self.model.groups, self._student, spec, self.model
        )

    def _score_mine(self, packs: Sequence[Pack], spec: SignalSpec) -> list[Signal | None]:
        if not packs:
            return []
        model = self.model

        def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> Signal:
            pack = packs[number]
            target_N = torch.from_numpy(pack.target_T[valid_positions(pack)]).to(model.device)
            top = linear_topk(
                hidden_ND,
                weight_vD,
                max(spec.top_k, 1),
                group=model.groups.tp,
                vocab_size=self._vocab_size,
                temperature=self.temperature,
                ids_TJ=target_N[:, None],
            )
            assert top.picked_logprob_TJ is not None
            signal = Signal(
                logprob_N=top.picked_logprob_TJ[:, 0],
                topk_ids_NK=top.ids_TK if spec.top_k else None,
                topk_logprob_NK=top.logprob_TK if spec.top_k else None,
                entropy_N=top.entropy_T if spec.entropy else None,
                hidden_NE=hidden_ND if spec.hidden_states else None,
            )
            check_finite(signal)
            return signal

        collected = run_packs(model, packs, last_stage)
        return collected if collected else [None] * len(packs)


def check_finite(signal: Signal) -> None:
    """The teacher's door: a bad number is stopped here, before it can hide behind a mask.

    Raises:
        EngineError: a log-prob or entropy is not finite, or a log-prob is positive beyond rounding.
    """
    fields = {
        "log-prob": signal.logprob_N,
        "top-k log-prob": signal.topk_logprob_NK,
        "entropy": signal.entropy_N,
        "hidden state": signal.hidden_NE,
    }
    for name, values in fields.items():
        if values is not None and not bool(torch.isfinite(values).all()):
            raise EngineError(
                f"the teacher gave a {name} that is not finite. Its weights or dtype are broken: try dtype=fp32, "
                "or check the checkpoint with `tropd check`."
            )


def _dealt_to(packs: Sequence[Sequence[Pack]], teacher: Groups) -> list[tuple[int, int]]:
    """(student replica, number) of the packs this teacher replica scores.

    When the layouts agree every pack is scored where it is trained on and nothing travels.
    """
    every = [(r, i) for i in range(len(packs[0])) for r in range(len(packs))]
    return [key for n, key in enumerate(every) if n % teacher.num_replicas == teacher.replica]


def _owner(packs: Sequence[Sequence[Pack]], key: tuple[int, int], teacher: Groups, tensor: int) -> int:
    """World rank that holds the signal of pack ``key`` for a student at ``tensor``."""
    replica, number = key
    position = number * len(packs) + replica
    return teacher.global_rank(
        replica=position % teacher.num_replicas,
        stage=teacher.layout.pipeline - 1,
        tensor=tensor % teacher.layout.tensor,
    )


def _deliver(
    packs: Sequence[Sequence[Pack]],
    held: Mapping[tuple[int, int], Signal | None],
    teacher: Groups,
    student: Groups,
    spec: SignalSpec,
    model: Model,
) -> list[Signal | None]:
    """Sends every signal to the last-stage ranks of the student replica that trains on its pack."""
    me = dist.get_rank()
    received: dict[int, list[Tensor]] = {}
    operations: list[dist.P2POp] = []
    for i in range(len(packs[0])):
        for r in range(len(packs)):
            for tensor in range(student.layout.tensor):
                source = _owner(packs, (r, i), teacher, tensor)
                target = student.global_rank(replica=r, stage=student.layout.pipeline - 1, tensor=tensor)
                if source == target:
                    continue
                if me == source:
                    signal = held[(r, i)]
                    assert signal is not None
                    operations += [dist.P2POp(dist.isend, part, target) for part in _to_wire(signal)]
                elif me == target:
                    received[i] = _empty_wire(packs[r][i].num_valid, spec, model)
                    operations += [dist.P2POp(dist.irecv, part, source) for part in received[i]]
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    if not student.is_last_stage:
        return [None] * len(packs[student.replica])
    return [
        _from_wire(received[i], spec) if i in received else held[(student.replica, i)]
        for i in range(len(packs[student.replica]))
    ]


def _to_wire(signal: Signal) -> list[Tensor]:
    """One fp32 tensor of values and, when there are any, ids as int32 and hidden states as they are."""
    columns = [signal.logprob_N[:, None]]
    if signal.entropy_N is not None:
        columns.append(signal.entropy_N[:, None])
    if signal.topk_logprob_NK is not None:
        columns.append(signal.topk_logprob_NK)
    wire = [torch.cat(columns, dim=1).contiguous()]
    if signal.topk_ids_NK is not None:
        wire.append(signal.topk_ids_NK.to(torch.int32).contiguous())
    if signal.hidden_NE is not None:
        wire.append(signal.hidden_NE.contiguous())
    return wire


def _empty_wire(rows: int, spec: SignalSpec, model: Model) -> list[Tensor]:
    device = model.device
    wire = [torch.empty(rows, 1 + spec.entropy + spec.top_k, device=device)]
    if spec.top_k:
        wire.append(torch.empty(rows, spec.top_k, dtype=torch.int32, device=device))
    if spec.hidden_states:
        wire.append(torch.empty(rows, model.architecture.hidden_size, dtype=model.dtype, device=device))
    return wire


def _from_wire(wire: list[Tensor], spec: SignalSpec) -> Signal:
    values = wire[0]
    return Signal(
        logprob_N=values[:, 0],
        entropy_N=values[:, 1] if spec.entropy else None,
        topk_logprob_NK=values[:, 1 + spec.entropy :] if spec.top_k else None,
        topk_ids_NK=wire[1].long() if spec.top_k else None,
        hidden_NE=wire[-1] if spec.hidden_states else None,
    )
