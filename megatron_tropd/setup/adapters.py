"""The student's adapters as a configuration requests them, and where its frozen base stands in for another model."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout, LoraConfig, StudentConfig
from megatron_tropd.convert.peft import PeftAdapter
from megatron_tropd.convert.source import as_source
from megatron_tropd.engine.adapters import add_adapters, load_adapters
from megatron_tropd.engine.model import Model
from megatron_tropd.errors import CheckpointError, ConfigError
from megatron_tropd.models.adapters import expert_targets, possible_targets
from megatron_tropd.types import AdapterSpec, Architecture, ModelSource

_RANK = 16  # where neither the configuration nor an adapter says
_log = logging.getLogger(__name__)


def adapter_spec(section: StudentConfig, student: Architecture) -> AdapterSpec | None:
    """Return the adapters that the student gets; None where all of its weights are trained.

    Raises:
        ConfigError: a target is no matrix that can have one, or a key contradicts the adapter at ``path``.
        CheckpointError: the adapter at ``path`` cannot be used.
    """
    lora = section.lora
    if lora is None:
        return None
    if lora.path is not None:
        return _spec_of_path(lora, student)
    rank = lora.rank or _RANK
    return AdapterSpec(rank=rank, alpha=lora.alpha or 2.0 * rank, dropout=lora.dropout, targets=_targets(lora, student))


def check_adapters(config: RunConfig, student: Architecture) -> None:
    """Raise what :func:`adapter_spec` does; say where an adapter's numbers will be rounded."""
    spec, lora = adapter_spec(config.student, student), config.student.lora
    if spec is None or lora is None or lora.path is None:
        return
    wide = sorted({str(dtype).removeprefix("torch.") for dtype in _opened(lora, student).dtypes if dtype.itemsize > 2})
    if config.dtype == "bf16" and wide:
        _log.warning(
            "student.lora.path = '%s' holds matrices in %s: they are rounded to bfloat16, which dtype = bf16 trains "
            "in. Set dtype=fp32 to keep them to the bit.",
            lora.path,
            ", ".join(wide),
        )


def _targets(lora: LoraConfig, student: Architecture) -> tuple[str, ...]:
    possible, experts = possible_targets(student), expert_targets(student)
    for target in lora.targets or ():
        if target in possible:
            continue
        if target in experts:
            raise ConfigError(
                f"student.lora.targets holds {target!r}, a matrix of experts, which cannot have adapters: transformers "
                "holds all experts of a layer as one tensor, for which `peft` has adapters of another kind "
                f"(target_parameters). Choose among {', '.join(possible)}."
            )
        raise ConfigError(
            f"student.lora.targets holds {target!r}, which is no matrix of a layer of {student.family}: embeddings, "
            f"the output layer and routers stay frozen. Choose among {', '.join(possible)}."
        )
    return tuple(target for target in possible if lora.targets is None or target in lora.targets)


def _spec_of_path(lora: LoraConfig, student: Architecture) -> AdapterSpec:
    found = _opened(lora, student).spec
    wanted = {"rank": lora.rank, "alpha": lora.alpha, "targets": lora.targets and set(lora.targets)}
    there = {"rank": found.rank, "alpha": found.alpha, "targets": set(found.targets)}
    for name, value in wanted.items():
        if value is not None and value != there[name]:
            shown = getattr(found, name)
            raise ConfigError(
                f"student.lora.{name} = {getattr(lora, name)!r}, but the adapter at student.lora.path = '{lora.path}' "
                f"has {shown!r}. Leave {name} out, or start from none."
            )
    return AdapterSpec(rank=found.rank, alpha=found.alpha, dropout=lora.dropout, targets=found.targets)


def _opened(lora: LoraConfig, student: Architecture) -> PeftAdapter:
    assert lora.path is not None
    try:
        return PeftAdapter(lora.path, student)
    except CheckpointError as error:
        raise CheckpointError(f"student.lora.path = '{lora.path}': {error}") from error


def with_adapters(config: RunConfig, model: Model) -> Model:
    """Return the student with its adapters, to be used in its place; the same where it has none."""
    lora, spec = config.student.lora, adapter_spec(config.student, model.architecture)
    if lora is None or spec is None:
        return model
    model = add_adapters(model, spec, seed=config.seed)
    if lora.path is not None:
        load_adapters(model, _opened(lora, model.architecture))
    return model


def adapter_identity(config: RunConfig, student: Architecture) -> dict[str, Any]:
    """Return what a checkpoint of this run's adapters must share with it, by key; empty where it has none."""
    lora, spec = config.student.lora, adapter_spec(config.student, student)
    if lora is None or spec is None:
        return {}
    facts = asdict(spec)
    return {
        "student.lora": {name: facts[name] for name in ("rank", "targets")},
        "student.lora.alpha": spec.alpha,
        "student.lora.dropout": spec.dropout,
        **({} if lora.path is None else {"student.lora.weights": _opened(lora, student).fingerprint()}),
    }


def base_serves(config: RunConfig, source: ModelSource | Path, layout: Layout) -> bool:
    """Say whether the student's frozen base is this very model under this layout, and need not be there twice."""
    if config.student.lora is None or layout != config.student.parallel:
        return False
    return _places(as_source(source)) == _places(config.student.source)


def _places(source: ModelSource) -> tuple[Path, Path | None]:
    return source.weights.resolve(), None if source.like is None else source.like.resolve()
