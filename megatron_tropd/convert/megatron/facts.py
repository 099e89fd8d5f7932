"""Compare a Megatron checkpoint's own description of its model with ``config.json``, field by field."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_tropd.convert.megatron.pickles import Inert, read_archive
from megatron_tropd.convert.megatron.stored import Table, read_object
from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

Fields = Mapping[str, Any]
Expected = Callable[[Architecture], Any]

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Plain fields that a checkpoint has of itself, the file that says them, and what of it was left out."""

    fields: Fields
    said_by: str
    common: Fields  # the plain values of common.pt beside them
    left_out: Counter[str]


# what newer versions of megatron-core have in the place of common.pt
_COMMON = "common_state/shard_0_1"


def read_facts(table: Table, beside: tuple[Path, ...]) -> Facts:
    """Read ``common.pt`` of a checkpoint, or its entry that holds the same, and the first YAML file ``beside`` it.

    Raises:
        CheckpointError: one is torn.
    """
    common: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    if (table.directory / "common.pt").is_file():
        found, left_out = read_archive(table.directory / "common.pt")
        common = found if isinstance(found, dict) else {}
    elif _COMMON in table.others:
        found, left_out = read_object(table, _COMMON)
        found = found[0] if isinstance(found, list) and found else found  # its values, as every object's, in a list
        common = found if isinstance(found, dict) else {}
    args = common.get("args")
    own = args.state if isinstance(args, Inert) else args
    plain = {name: value for name, value in common.items() if isinstance(value, _PLAIN)}
    for path in beside:
        if path.is_file():
            fields, tags = _read_yaml(path)
            return Facts(fields=fields, said_by=path.name, common=plain, left_out=left_out + tags)
    fields = _plain_fields(own) if isinstance(own, Mapping) else {}
    return Facts(fields=fields, said_by="args in common.pt", common=plain, left_out=left_out)


def _plain_fields(table: Mapping[Any, Any]) -> dict[str, Any]:
    # lists as well: moe_layer_freq may be one
    return {str(name): value for name, value in table.items() if isinstance(value, (*_PLAIN, list))}


class _PlainYaml(yaml.SafeLoader):
    """SafeLoader that leaves out what carries a tag of Python's."""

    left_out: Counter[str]


def _leave_out(loader: _PlainYaml, suffix: str, node: yaml.Node) -> None:
    loader.left_out[suffix] += 1


_PlainYaml.add_multi_constructor("tag:yaml.org,2002:python/", _leave_out)
_PlainYaml.add_multi_constructor("!", _leave_out)


def _read_yaml(path: Path) -> tuple[dict[str, Any], Counter[str]]:
    """Read the fields of a model from ``run_config.yaml`` or NeMo's ``model.yaml``, wherever in it they stand."""
    try:
        loader = _PlainYaml(path.read_text(encoding="utf-8"))
        loader.left_out = Counter()
        found = loader.get_single_data()
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(f"{path.absolute()} is not valid YAML: {error}. Copy it again.") from error
    found = found if isinstance(found, dict) else {}
    model = found.get("model", found)
    model = model if isinstance(model, dict) else {}
    # a model's configuration may lie within it; its own fields count
    inner = [model.get(name) for name in ("config", "transformer") if isinstance(model.get(name), dict)]
    fields = {name: value for part in [*inner, model] for name, value in _plain_fields(part or {}).items()}
    return fields, loader.left_out


# --------------------------------------------------------------------------- the comparison


def _always(value: Any) -> Expected:
    return lambda architecture: value


def _scaling(kind: str, name: str) -> Expected:
    def expected(architecture: Architecture) -> Any:
        scaling = architecture.rope_scaling
        return scaling[name] if scaling is not None and scaling["type"] == kind else None

    return expected


@dataclass(frozen=True, slots=True)
class _Rule:
    """Names of one fact, what the architecture wants it to be, and whether it counts under the other fields."""

    names: tuple[str, ...]
    expected: Expected
    key: str  # of config.json
    counts: Callable[[Fields, Architecture], bool] = lambda fields, architecture: True


def _grouped(fields: Fields, architecture: Architecture) -> bool:
    # Megatron-LM's num_query_groups is 1 where it does not count
    return bool(fields.get("group_query_attention", True))


def _has_experts(fields: Fields, architecture: Architecture) -> bool:
    return bool(architecture.num_experts)


def _dense(fields: Fields, architecture: Architecture) -> bool:
    return not architecture.num_experts


def _given(name: str) -> Callable[[Fields, Architecture], bool]:
    return lambda fields, architecture: fields.get(name) is not None


def _llama3(fields: Fields, architecture: Architecture) -> bool:
    return (
        bool(fields.get("use_rope_scaling", fields.get("rope_scaling")))
        or _scaling("llama3", "factor")(architecture) is not None
    )


_RULES = (
    _Rule(("num_layers",), lambda a: a.num_layers, "num_hidden_layers"),
    _Rule(("hidden_size",), lambda a: a.hidden_size, "hidden_size"),
    _Rule(("ffn_hidden_size",), lambda a: a.ffn_size, "intermediate_size", _dense),
    _Rule(("moe_ffn_hidden_size",), lambda a: a.ffn_size, "moe_intermediate_size", _has_experts),
    _Rule(("num_attention_heads",), lambda a: a.num_heads, "num_attention_heads"),
    _Rule(("num_query_groups",), lambda a: a.num_kv_heads, "num_key_value_heads", _grouped),
    _Rule(("kv_channels",), lambda a: a.head_dim, "head_dim"),
    _Rule(("rotary_base",), lambda a: a.rope_theta, "rope_theta"),
    _Rule(("norm_epsilon", "layernorm_epsilon"), lambda a: a.norm_eps, "rms_norm_eps"),
    _Rule(("normalization",), _always("RMSNorm"), "architectures"),
    _Rule(("qk_layernorm",), lambda a: a.qk_norm, "architectures"),
    _Rule(("add_qkv_bias",), lambda a: a.qkv_bias, "architectures"),
    _Rule(("add_bias_linear",), _always(False), "architectures"),
    _Rule(("swiglu", "gated_linear_unit"), _always(True), "hidden_act"),
    _Rule(("untie_embeddings_and_output_weights",), lambda a: not a.tied_embeddings, "tie_word_embeddings"),
    _Rule(("share_embeddings_and_output_weights",), lambda a: a.tied_embeddings, "tie_word_embeddings"),
    _Rule(("position_embedding_type",), _always("rope"), "architectures"),
    _Rule(("rotary_percent",), _always(1.0), "partial_rotary_factor"),
    _Rule(("rotary_interleaved",), _always(False), "architectures"),
    _Rule(
        ("rotary_seq_len_interpolation_factor", "seq_len_interpolation_factor"),
        _scaling("linear", "factor"),
        "rope_scaling",
    ),
    _Rule(("use_rope_scaling", "rope_scaling"), lambda a: _scaling("llama3", "factor")(a) is not None, "rope_scaling"),
    _Rule(("rope_scaling_factor",), _scaling("llama3", "factor"), "rope_scaling", _llama3),
    _Rule(("apply_layernorm_1p", "layernorm_zero_centered_gamma"), _always(False), "architectures"),
    _Rule(("num_experts", "num_moe_experts"), lambda a: a.num_experts or None, "num_experts"),
    _Rule(("moe_router_topk",), lambda a: a.experts_per_token, "num_experts_per_tok", _has_experts),
    _Rule(("moe_router_pre_softmax",), lambda a: not a.normalize_experts, "norm_topk_prob", _has_experts),
    _Rule(("moe_router_score_function",), _always("softmax"), "architectures", _has_experts),
    _Rule(("moe_layer_freq",), _always(1), "architectures", _has_experts),
    _Rule(("moe_shared_expert_intermediate_size",), _always(None), "architectures"),
    _Rule(("moe_router_topk_scaling_factor",), _always(None), "architectures"),
    _Rule(("moe_mlp_glu_interleave_size",), _always(None), "architectures", _given("moe_mlp_glu_interleave_size")),
    _Rule(("multi_latent_attention",), _always(False), "architectures"),
    _Rule(("qk_l2_norm",), _always(False), "architectures"),
    _Rule(("attention_output_gate",), _always(False), "architectures"),
    _Rule(("mtp_num_layers",), _always(None), "architectures"),
    _Rule(("hybrid_layer_pattern", "hybrid_override_pattern"), _always(None), "architectures"),
    _Rule(("window_size",), _always(None), "sliding_window"),
)


def compare(facts: Facts, architecture: Architecture, *, checkpoint: Path, config: Path) -> int:
    """Compare every field that both know; return how many they are.

    Raises:
        CheckpointError: lists all that differ, with both values.
    """
    compared, wrong = 0, []
    for name, said, wanted, key in _differences(facts, architecture):
        compared += 1
        if not _same(said, wanted):
            wrong.append(f"  {name} = {said!r}, where config.json wants {wanted!r} ({key})")
    if wrong:
        raise CheckpointError(
            f"{checkpoint.absolute()} is of another model than {config.absolute()}: its {facts.said_by} has\n"
            + "\n".join(wrong)
            + "\nGive the directory of the model that it was trained from as `like`."
        )
    return compared


def _differences(facts: Facts, architecture: Architecture) -> Iterator[tuple[str, Any, Any, str]]:
    for rule in _RULES:
        for name in rule.names:
            if name in facts.fields and rule.counts(facts.fields, architecture):
                yield name, facts.fields[name], rule.expected(architecture), rule.key
    for name in ("vocab_size", "padded_vocab_size"):
        said = facts.fields.get(name)
        if isinstance(said, int) and said < architecture.vocab_size:
            yield name, said, architecture.vocab_size, "vocab_size"


# written for the same thing where an option is off
_OFF = (None, False, 0, 0.0)


def _same(said: Any, wanted: Any) -> bool:
    if said is None and not isinstance(wanted, bool):
        return True  # left to Megatron's default, which the shapes show
    if wanted in _OFF and not isinstance(wanted, float):
        return said in _OFF or (isinstance(wanted, int) and wanted == said)
    if isinstance(wanted, float):
        try:  # YAML 1.1 takes 1e-05 for text
            return abs(float(said) - wanted) <= 1e-6 * abs(wanted)
        except (TypeError, ValueError):
            return False
    if isinstance(said, list):
        return all(_same(one, wanted) for one in said)
    return bool(said == wanted) and isinstance(said, bool) == isinstance(wanted, bool)
