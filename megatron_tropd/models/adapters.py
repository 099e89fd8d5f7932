"""Which matrices of a model may have low-rank adapters, and by what names Hugging Face and `peft` know them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_tropd.models.family import Entry
from megatron_tropd.models.name_table import layer_entries
from megatron_tropd.models.rules import Shape
from megatron_tropd.types import AdapterSpec, Architecture

_WEIGHT = ".weight"
# rules of a linear's weight: cut by its columns, that is by what goes in, or by its rows, what comes out
_BY_INPUT, _BY_OUTPUT = ("columns",), ("qkv", "stacked_rows")
_PEFT = "base_model.model."


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedPart:
    """One matrix of Hugging Face within a linear of Megatron, ``[out, in]``, and whether it has an adapter."""

    module: str  # such as model.layers.3.self_attn.q_proj
    shape: Shape
    adapted: bool

    @property
    def target(self) -> str:
        """Return the last part of its name."""
        return self.module.rpartition(".")[2]

    def key(self, matrix: str) -> str:
        """Return the name that `peft` saves a matrix of the adapter under; ``matrix``: lora_A or lora_B."""
        return f"{_PEFT}{self.module}.{matrix}{_WEIGHT}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedLinear:
    """A linear of Megatron with an adapter for at least one of the matrices that it is made of."""

    weight: str  # Megatron's name of its weight, layers counted over the model
    layer: int
    by_input: bool  # tensor ranks hold columns of it, else rows
    per_head_group: bool  # rows are interleaved per group of heads
    parts: tuple[AdaptedPart, ...]

    @property
    def adapted(self) -> tuple[AdaptedPart, ...]:
        """Return the parts that have an adapter."""
        return tuple(part for part in self.parts if part.adapted)


def _matrices(architecture: Architecture, layer: int) -> Iterator[Entry]:
    """List the table's rows of linears outside of experts."""
    for entry in layer_entries(architecture, layer):
        if entry.megatron.endswith(_WEIGHT) and entry.expert is None and entry.rule in _BY_INPUT + _BY_OUTPUT:
            yield entry


def _targets(entries: Iterable[Entry]) -> tuple[str, ...]:
    names = (name.removesuffix(_WEIGHT).rpartition(".")[2] for entry in entries for name in entry.hf)
    return tuple(dict.fromkeys(names))


def possible_targets(architecture: Architecture) -> tuple[str, ...]:
    """List the names of a layer's matrices that may have adapters, in the model's order."""
    return _targets(_matrices(architecture, 0))


def expert_targets(architecture: Architecture) -> tuple[str, ...]:
    """List the names of the matrices of an expert; empty in a dense model."""
    return _targets(entry for entry in layer_entries(architecture, 0) if entry.expert == 0)


def adapted_linears(architecture: Architecture, spec: AdapterSpec, layers: Iterable[int]) -> list[AdaptedLinear]:
    """List the linears of these layers that have adapters."""
    found = []
    for layer in layers:
        for entry in _matrices(architecture, layer):
            modules = [name.removesuffix(_WEIGHT) for name in entry.hf]
            parts = tuple(
                AdaptedPart(module=module, shape=shape, adapted=module.rpartition(".")[2] in spec.targets)
                for module, shape in zip(modules, entry.shapes, strict=True)
            )
            linear = AdaptedLinear(
                weight=entry.megatron,
                layer=layer,
                by_input=entry.rule in _BY_INPUT,
                per_head_group=entry.rule == "qkv",
                parts=parts,
            )
            found += [linear] if linear.adapted else []
    return found


def adapter_shapes(architecture: Architecture, spec: AdapterSpec) -> dict[str, Shape]:
    """Return the shape of every tensor of an adapter by `peft`'s name, in the model's order."""
    shapes: dict[str, Shape] = {}
    for linear in adapted_linears(architecture, spec, range(architecture.num_layers)):
        for part in linear.adapted:
            shapes[part.key("lora_A")] = (spec.rank, part.shape[1])
            shapes[part.key("lora_B")] = (part.shape[0], spec.rank)
    return shapes
