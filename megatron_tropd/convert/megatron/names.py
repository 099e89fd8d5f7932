"""The keys of a Megatron checkpoint, under whatever names and axes, in the names of the families' tables.

Transformer Engine's layers hold a norm within the matrix that follows it, plain ones beside it. Layers are stacked
along a first axis or numbered in the key, and so are experts; the halves of a gated first matrix stand below each
other, or under keys of their own. None of it depends on the layout that wrote the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from megatron_tropd.convert.megatron.stored import StoredTensor
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.rules import Shape

_WRAPPER = re.compile(r"^(?:(?:model\d*|module)\.)+")
_LAYER = re.compile(r"^decoder\.layers\.(?:(\d+)\.)?(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.(?:experts|local_experts)\.(?:(\d+)\.)?(linear_fc[12]\.weight)$")
_HALF = re.compile(r"^(.*linear_fc1\.weight)_([wv])$")
# Transformer Engine's name -> the plain one
_WITHIN = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
TE_NAMES = {plain: te for te, plain in _WITHIN.items()}
# what stands beside the model under one key or many
_OPTIMIZER = re.compile(r"(^|\.)optimizer\d*\.|^chained_\d+\.optimizer\.|^optimizer")
_RNG = re.compile(r"(^|\.|/)rng_state|rerun_state_machine|^torch_rng$|^scheduler$|opt_param_scheduler")
_EXTRA = re.compile(r"\._extra_state(/|$)")
_AVERAGE = re.compile(r"^moving_average\.")  # of a student that is its own teacher


@dataclass(frozen=True, slots=True)
class StoredPlace:
    """Where the values of one Megatron parameter stand: a key, and places on the key's leading axes."""

    key: str
    place: Shape


class Names:
    """The parameters that a checkpoint has, by the names of ``models.name_table``."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = tensors
        self._key_of: dict[str, str] = {}  # a plain name, with {i} and {e} for the axes of layers and experts
        self.strange: list[str] = []  # tensors of the model that no table has a place for
        self.beside = {"moving average": 0, "optimizer": 0, "generator": 0}  # tensors of other parts of a run
        for key in tensors:
            self._sort(key)

    def _sort(self, key: str) -> None:
        if _AVERAGE.search(key):
            self.beside["moving average"] += 1
        elif _OPTIMIZER.search(key):
            self.beside["optimizer"] += 1
        elif _RNG.search(key):
            self.beside["generator"] += 1
        elif not _EXTRA.search(key):
            name = plain_name(key)
            if name in self._key_of:
                raise CheckpointError(
                    f"{key} and {self._key_of[name]} are both {name}: the checkpoint is not one model."
                )
            self._key_of[name] = key

    def find(self, name: str, *, layer: int | None, expert: int | None, half: str = "") -> StoredPlace | None:
        """Find a parameter of the table; None where the checkpoint has none.

        Args:
            name: with ``{i}`` and ``{e}`` in the place of numbers.
            half: "_w" or "_v": what of a first matrix stands under a key of its own.
        """
        for layers_stacked in (True, False) if layer is not None else (False,):
            for experts_stacked in (True, False) if expert is not None else (False,):
                wanted = name if layers_stacked else name.replace("{i}", str(layer))
                wanted = wanted if experts_stacked else wanted.replace("{e}", str(expert))
                if (key := self._key_of.get(wanted + half)) is not None:
                    axes = [number for number, used in ((layer, layers_stacked), (expert, experts_stacked)) if used]
                    return StoredPlace(key, tuple(number for number in axes if number is not None))
        return None

    def shape(self, place: StoredPlace) -> Shape:
        """Return the shape of the parameter without the leading axes."""
        return self._tensors[place.key].shape[len(place.place) :]

    def homeless(self, used: Iterable[str]) -> list[str]:
        """List the model's keys that are not among those used."""
        return sorted(set(self._key_of.values()) - set(used))

    def sizes(self) -> dict[str, int]:
        """Return the numbers of layers and experts that the keys and their axes show."""
        found: dict[str, int] = {}
        for name, key in self._key_of.items():
            match = _LAYER.match(_WRAPPER.sub("", key))
            if match is None:
                continue
            shape = self._tensors[key].shape
            stacked = "{i}" in name
            layers = shape[0] if stacked and shape else int(match[1] or 0) + 1
            found["layers"] = max(found.get("layers", 0), layers)
            if (expert := _EXPERT.match(_without_half(match[2]))) is not None:
                axis = int(stacked)
                experts = shape[axis] if "{e}" in name and len(shape) > axis else int(expert[1] or 0) + 1
                found["experts"] = max(found.get("experts", 0), experts)
        return found


def _without_half(name: str) -> str:
    half = _HALF.match(name)
    return name if half is None else half[1]


def plain_name(key: str) -> str:
    """Translate a key: axes of layers and experts become ``{i}`` and ``{e}``, numbers in the key stay."""
    key = _WRAPPER.sub("", key)
    layer = _LAYER.match(key)
    if layer is None:
        return key
    number, rest = layer[1] or "{i}", layer[2]
    rest, half = _without_half(rest), rest[len(_without_half(rest)) :]
    expert = _EXPERT.match(rest)
    if expert is not None:
        rest = f"mlp.experts.local_experts.{expert[1] or '{e}'}.{expert[2]}"
    return f"decoder.layers.{number}.{_WITHIN.get(rest, rest)}{half}"


def objects_by_kind(others: Iterable[str]) -> dict[str, list[str]]:
    """Sort the keys of what is no tensor."""
    found: dict[str, list[str]] = {}
    for key in others:
        if key.startswith("common_state/"):
            continue  # read, as common.pt is
        kinds = {"moving average": _AVERAGE, "_extra_state": _EXTRA, "optimizer": _OPTIMIZER, "generator": _RNG}
        kind = next((name for name, pattern in kinds.items() if pattern.search(key)), "unknown")
        found.setdefault(kind, []).append(key)
    return found
