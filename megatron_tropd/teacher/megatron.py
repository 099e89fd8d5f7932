"""A frozen Megatron teacher in the student's processes, with its own architecture and its own layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.errors import EngineError
from megatron_tropd.losses.vocab_parallel import linear_logprobs, linear_topk
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.delivery import Key, Wire, Workers, carry
from megatron_tropd.teacher.protocol import AskedIds, SignalSpec
from megatron_tropd.types import Pack, Signal


class MegatronTeacher:
    """Implements ``teacher.protocol.Teacher``.

    All packs of the batch are dealt to the teacher's replicas. Ids that are asked for travel to the ranks that score
    their pack, and signals to the ranks that compute the loss on it: the two layouts need nothing in common.
    """

    def __init__(
        self,
        model: Model,
        student: Groups,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        role: str = "teacher",
    ) -> None:
        """``model`` is not changed, nor its gradients.

        ``student``: the layout signals are delivered to. ``vocab_size``: ids all models know (default: all of this
        one's). ``role``: what the model is called in messages.
        """
        self.model = model
        self.temperature = temperature
        self._vocab_size = vocab_size or model.architecture.vocab_size
        self._role = role
        self._own = Workers(model.groups, dealt=True)
        self._student = Workers(student, dealt=False)

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: SignalSpec, asked: AskedIds | None = None
    ) -> list[Signal | None]:
        student = self._student.groups
        wires = self._score_dealt(packs, spec, self._delivered(packs, spec, asked))
        found = carry(
            packs, wires, source=self._own, target=self._student, blank=lambda rows: _blank(rows, spec, self.model)
        )
        mine = self._student.mine(packs)
        if not student.is_last_stage:
            return [None] * len(mine)
        answered = asked if asked is not None and spec.asked else [None] * len(mine)
        return [
            replace(_from_wire(found[key], spec), asked_ids_NJ=ids) for key, ids in zip(mine, answered, strict=True)
        ]

    def _delivered(
        self, packs: Sequence[Sequence[Pack]], spec: SignalSpec, asked: AskedIds | None
    ) -> Mapping[Key, Tensor]:
        """The ids asked for in the packs that this rank's last stage scores."""
        if not spec.asked:
            return {}
        groups = self._student.groups
        held: dict[Key, Wire] = {}
        for i, ids_NJ in enumerate(asked or ()):
            if ids_NJ is not None:
                held[(groups.replica, i)] = [ids_NJ.to(torch.int32)]
        if groups.is_last_stage and len(held) < len(packs[groups.replica]):
            raise EngineError(f"the teacher is to grade {spec.asked} ids of the student's, but was not told which.")

        def blank(rows: int) -> Wire:
            return [torch.empty(rows, spec.asked, dtype=torch.int32, device=self.model.device)]

        found = carry(packs, held, source=self._student, target=self._own, blank=blank)
        return {key: wire[0].long() for key, wire in found.items()}

    def _score_dealt(
        self, packs: Sequence[Sequence[Pack]], spec: SignalSpec, asked: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        """Signals of the packs dealt to this replica, ready to travel; nothing off the last stage."""
        groups, keys = self.model.groups, self._own.mine(packs)
        dealt = [packs[replica][number] for replica, number in keys]
        # replicas that share experts run the same number of passes: one without a pack repeats another's, for nothing
        missing = -(-sum(map(len, packs)) // groups.num_replicas) - len(dealt)
        dealt += [packs[0][0]] * missing if groups.layout.expert > 1 else []
        if not dealt:
            return {}

        def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> Wire:
            if number >= len(keys):
                return []
            signal = self._grade(dealt[number], hidden_ND, weight_vD, spec, asked.get(keys[number]))
            check_finite(signal, role=self._role)
            return _to_wire(signal, spec)

        collected = run_packs(self.model, dealt, last_stage)
        return dict(zip(keys, collected, strict=False))

    def _grade(
        self, pack: Pack, hidden_ND: Tensor, weight_vD: Tensor, spec: SignalSpec, asked_NJ: Tensor | None
    ) -> Signal:
        groups, device = self.model.groups, self.model.device
        ids = torch.from_numpy(pack.target_T[own_valid_positions(pack, groups)]).to(device)[:, None]
        if asked_NJ is not None:
            ids = torch.cat([ids, asked_NJ], dim=1)
        if not spec.top_k:
            out = linear_logprobs(
                hidden_ND,
                weight_vD,
                ids,
                group=groups.tp,
                vocab_size=self._vocab_size,
                temperature=self.temperature,
                tail=spec.has_tail,
            )
            return _signal(spec, out.logprob_TK, out.entropy_T, out.logtail_T, hidden_ND)
        top = linear_topk(
            hidden_ND,
            weight_vD,
            spec.top_k,
            group=groups.tp,
            vocab_size=self._vocab_size,
            temperature=self.temperature,
            ids_TJ=ids,
            tail=spec.has_tail,
        )
        assert top.picked_logprob_TJ is not None
        signal = _signal(spec, top.picked_logprob_TJ, top.entropy_T, top.logtail_T, hidden_ND)
        return replace(signal, topk_ids_NK=top.ids_TK, topk_logprob_NK=top.logprob_TK)


def _signal(
    spec: SignalSpec, picked_NJ: Tensor, entropy_N: Tensor, logtail_N: Tensor | None, hidden_NE: Tensor
) -> Signal:
    """``picked_NJ``: log-probs of the target and then of the ids asked for."""
    return Signal(
        logprob_N=picked_NJ[:, 0],
        asked_logprob_NJ=picked_NJ[:, 1:] if spec.asked else None,
        topk_logtail_N=logtail_N,
        entropy_N=entropy_N if spec.entropy else None,
        hidden_NE=hidden_NE if spec.hidden_states else None,
    )


def check_finite(signal: Signal, *, role: str = "teacher") -> None:
    """The teacher's door: a bad number is stopped here, before it can hide behind a mask.

    Raises:
        EngineError: a log-prob or entropy is not finite, or a log-prob is positive beyond rounding.
    """
    fields = {
        "log-prob": signal.logprob_N,
        "top-k log-prob": signal.topk_logprob_NK,
        "log-prob of an id asked for": signal.asked_logprob_NJ,
        "entropy": signal.entropy_N,
        "hidden state": signal.hidden_NE,
        # an empty tail is -inf
        "log tail": None if signal.topk_logtail_N is None else signal.topk_logtail_N.clamp(min=-1.0),
    }
    for name, values in fields.items():
        if values is not None and not bool(torch.isfinite(values).all()):
            raise EngineError(
                f"the {role} gave a {name} that is not finite. Its weights or dtype are broken: try dtype=fp32, "
                "or check the checkpoint with `tropd check`."
            )


def _columns(spec: SignalSpec) -> dict[str, int]:
    """Fields of a Signal that travel as columns of one fp32 tensor, and how many each has."""
    widths = {
        "logprob_N": 1,
        "entropy_N": int(spec.entropy),
        "topk_logtail_N": int(spec.has_tail),
        "topk_logprob_NK": spec.top_k,
        "asked_logprob_NJ": spec.asked,
    }
    return {name: width for name, width in widths.items() if width}


def _to_wire(signal: Signal, spec: SignalSpec) -> Wire:
    """One fp32 tensor of values and, when there are any, ids as int32 and hidden states as they are."""
    values = [getattr(signal, name) for name in _columns(spec)]
    wire = [torch.cat([value if value.dim() == 2 else value[:, None] for value in values], dim=1)]
    if signal.topk_ids_NK is not None:
        wire.append(signal.topk_ids_NK.to(torch.int32))
    if signal.hidden_NE is not None:
        wire.append(signal.hidden_NE)
    return wire


def _blank(rows: int, spec: SignalSpec, model: Model) -> Wire:
    device = model.device
    wire = [torch.empty(rows, sum(_columns(spec).values()), device=device)]
    if spec.top_k:
        wire.append(torch.empty(rows, spec.top_k, dtype=torch.int32, device=device))
    if spec.hidden_states:
        wire.append(torch.empty(rows, model.architecture.hidden_size, dtype=model.dtype, device=device))
    return wire


def _from_wire(wire: Wire, spec: SignalSpec) -> Signal:
    columns = _columns(spec)
    values = dict(zip(columns, wire[0].split(list(columns.values()), dim=1), strict=True))
    return Signal(
        **{name: value if name.endswith(("K", "J")) else value[:, 0] for name, value in values.items()},
        topk_ids_NK=wire[1].long() if spec.top_k else None,
        hidden_NE=wire[-1] if spec.hidden_states else None,
    )
