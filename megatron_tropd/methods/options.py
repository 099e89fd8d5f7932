"""Options of a method: a section like those of the configuration, validated and explained in the same way.

class TropdOptions(MethodOptions):
    k: SupportSize = 64
    beta: Real = key(0.001, "weight of the prefix term", ge=0)
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

from pydantic import Field, ValidationError

from megatron_tropd.config.sections import Real, Section, Whole, WrittenAt, key
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import terms
from megatron_tropd.losses.gates import RatioSource
from megatron_tropd.losses.multipliers import Mismatch
from megatron_tropd.losses.reduce import Normalization
from megatron_tropd.losses.support import ReverseTail, Tail
from megatron_tropd.types import SupportKind

Multiplier = Literal["none", "drift_gate", "prefix_drift", "surprise"]
SpecialTokens = Literal["keep", "mask", "mask_first"]
EndTokens = Literal["class", "exact", "refuse"]
Reference = Literal["k3", "pg"]


class MethodOptions(Section):
    """Everything that any method can be combined with: options of every preset."""

    normalization: Normalization = key("token", "what the loss is a mean over")
    ratio: RatioSource = key("old", "student log-prob in the gate's ratio")
    temperature: Real = key(1.0, "divides student and teacher logits alike", gt=0)
    special_tokens: SpecialTokens = key("keep", "whether special tokens lose their loss")
    end_tokens: EndTokens | None = key(
        None,
        "ends of responses as one token, each by itself, or an error where student and teacher name different ones; "
        "null: class where they do, exact where they do not",
    )
    multiplier: Multiplier = key("none", "weight of each token")
    drift_tau: Real = key(1.0, "drift_gate: exp(-tau * |mean drift|), drift in nats", ge=0)
    drift_block: Whole = key(64, "drift_gate: tokens per block", ge=1)
    prefix_drift_gain: Real = key(0.5, "prefix_drift: weight of a first token beyond that of a last one, 1", ge=0)
    surprise_gain: Real = key(1.0, "surprise: weight of a token of probability 0 beyond that of a sure one, 1", ge=0)
    reward_weight: Real = key(0.0, "weight of the policy gradient of the answer's reward, beside all else", ge=0)
    reward_clip: Real | None = key(
        None, "PPO clip range of that and of reference_pg, for rollouts used more than once", gt=0, lt=1
    )
    reference_weight: Real = key(0.0, "weight of a KL to a reference, the base model, beside all else", ge=0)
    reference: Reference = key("k3", "that KL: GRPO's estimator, or the policy gradient of the reverse KL")
    mismatch: Mismatch = key("none", "correction for the sampler's log-probs")
    mismatch_cap: Real = key(2.0, "mismatch: truncate at cap, mask outside [1/cap, cap]", gt=1)


# --------------------------------------------------------------------------- options that several methods have

SupportSize = Annotated[Whole, Field(ge=1, description="tokens of the support")]
Support = Annotated[SupportKind, Field(description="whose top k tokens a top-k term looks at")]
TailKind = Annotated[Tail, Field(description="what a top-k term does with the mass outside its support")]
ReverseTailKind = Annotated[
    ReverseTail, Field(description="the same of a reverse KL; sampled: what y says of that mass")
]
PpoClip = Annotated[
    Real | None,
    Field(gt=0, lt=1, description="PPO clip range of the policy gradient, for rollouts used more than once"),
]
RewardShape = Annotated[
    terms.RewardShape,
    Field(description="reward of k1_pg: the log ratio r, its sign, or sign(r) log(1 + |r|)"),
]
K3Bound = Annotated[
    Real | None,
    Field(gt=0, description="k3: nats of log p/q beyond which a token's weight p/q - 1 grows no further; null: never"),
]

# --------------------------------------------------------------------------- reading

_NOWHERE = WrittenAt()
_Options = TypeVar("_Options", bound=MethodOptions)


def own_options(options: type[MethodOptions]) -> tuple[str, ...]:
    """Return the names of the options that a method has besides those of every method."""
    return tuple(name for name in options.model_fields if name not in MethodOptions.model_fields)


def parse_options(
    options: type[_Options], values: Mapping[str, object], *, method: str, written: WrittenAt = _NOWHERE
) -> _Options:
    """Build the options of a method from plain values, which were ``written`` there.

    Raises:
        ConfigError: an option is unknown or breaks its rule; the message names the nearest one and all valid ones.
    """
    try:
        return options.model_validate(dict(values))
    except ValidationError as error:
        # it reads YAML too, which whoever uses the methods alone need not have
        from megatron_tropd.config.messages import explain

        name, valid = f"method '{method}'", f"Valid keys of method '{method}': "
        message = explain(
            error,
            options,
            source=f"{written.source}: {name}" if written.source else name,
            text=written.text,
            overrides=written.overrides,
            whole=name,
            below=("method",),
        )
        if any(item["type"] == "extra_forbidden" for item in error.errors()) and valid not in message:
            message += f" {valid}{', '.join(options.model_fields)}."
        raise ConfigError(message) from None


def suggestion(name: str, valid: Sequence[str]) -> str:
    """Return `` Did you mean 'x'?`` with the nearest valid name, or the empty string."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
