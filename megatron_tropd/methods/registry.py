"""The one table of methods, and building one by name. A new method: its file, its row here, its test, its YAML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from megatron_tropd.config.sections import MethodConfig, WrittenAt
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import terms
from megatron_tropd.losses.terms import Term
from megatron_tropd.methods import (
    aopd,
    drift_gate,
    entropy_opd,
    eopd,
    exopd,
    fkl,
    gkd,
    grpo,
    local_support,
    opd,
    opsd,
    prompt_distillation,
    reopold,
    resopd,
    rkl,
    sdft,
    sft,
    tropd,
    tropd_aopd,
    tropd_clip,
    tropd_mask,
    tropd_resopd,
    tropd_rkl,
    tropd_soft,
)
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, parse_options, suggestion

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "opd": opd.PRESET,
        "tropd": tropd.PRESET,
        "tropd_mask": tropd_mask.PRESET,
        "tropd_clip": tropd_clip.PRESET,
        "tropd_rkl": tropd_rkl.PRESET,
        "tropd_resopd": tropd_resopd.PRESET,
        "tropd_soft": tropd_soft.PRESET,
        "tropd_aopd": tropd_aopd.PRESET,
        "eopd": eopd.PRESET,
        "entropy_opd": entropy_opd.PRESET,
        "reopold": reopold.PRESET,
        "aopd": aopd.PRESET,
        "local_support": local_support.PRESET,
        "gkd": gkd.PRESET,
        "fkl": fkl.PRESET,
        "rkl": rkl.PRESET,
        "resopd": resopd.PRESET,
        "opsd": opsd.PRESET,
        "sdft": sdft.PRESET,
        "prompt_distillation": prompt_distillation.PRESET,
        "drift_gate": drift_gate.PRESET,
        "exopd": exopd.PRESET,
        "grpo": grpo.PRESET,
        "sft": sft.PRESET,
    }
)


def build_method(name: str, **options: object) -> Method:
    """Build the method ``name`` with the given options; everything else at the preset's defaults.

    Raises:
        ConfigError: no such method or option, or a value that breaks its rule; the message says what is valid.
    """
    return _built(name, options, WrittenAt())


def method_of(section: MethodConfig) -> Method:
    """Build the method of a configuration; errors as of ``build_method``, with file and line."""
    return _built(section.name, section.options, section.written)


def _built(name: str, options: Mapping[str, object], written: WrittenAt) -> Method:
    if name not in PRESETS:
        # it reads YAML too, which whoever uses the methods alone need not have
        from megatron_tropd.config.messages import where

        place = where(("method", "name"), written.text, written.overrides)
        place = f"{written.source}: {place}" if written.source else place
        near = suggestion(name, list(PRESETS))
        raise ConfigError(f"{place}unknown method '{name}'.{near} Methods: {', '.join(PRESETS)}.")
    preset = PRESETS[name]
    chosen = parse_options(preset.options, {**preset.defaults, **options}, method=name, written=written)
    reward = terms.reward_pg(clip=chosen.reward_clip) if chosen.reward_weight else terms.NONE
    return replace(preset.build(chosen), name=name, settings=chosen, reward=reward, reference=_reference(chosen))


def _reference(options: MethodOptions) -> Term:
    """Build the term by which any method may hold the student near the base model."""
    if not options.reference_weight:
        return terms.NONE
    return terms.reference_pg(clip=options.reward_clip) if options.reference == "pg" else terms.reference_k3()
