"""The nouns that travel between rooms. Everything here is frozen and has (nearly) no behavior.

Dimension legend, used as name suffixes everywhere in the package:

    T  tokens of one packed stream      V  full vocabulary     v  this rank's vocabulary shard
    K  candidates per token (support)   D  hidden size         E  hidden size of the teacher
    S  sequences in a pack              L  tokens of one sequence

Alignment: position ``t`` of a pack holds the input token ``token_T[t]``; everything that is *about a
prediction* (target, region, log-probs, uniforms, losses) is stored at the position that makes the prediction,
so ``target_T[t]`` is the next token of the same sequence and ``region_T[t]`` is the region of that target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

Int64Array = npt.NDArray[np.int64]
Float32Array = npt.NDArray[np.float32]
UInt8Array = npt.NDArray[np.uint8]


class Region(IntEnum):
    """Who wrote a token of a sequence. Only the predictions of PREFIX and CONTINUATION tokens carry loss.

    A sequence begins with PROMPT and has no PROMPT later on. After it PREFIX, CONTINUATION and OBSERVATION may follow
    one another in any order and any number of times: a teacher may write on after the student, a tool after either.
    """

    PROMPT = 0  # what the answer answers
    PREFIX = 1  # written by the teacher
    CONTINUATION = 2  # written by the student
    PAD = 3  # no token: padding of a pack, and what a last token would predict
    OBSERVATION = 4  # context written by neither model: tool output, user turns


LOSS_REGIONS = (Region.PREFIX, Region.CONTINUATION)


def regions_of(*stretches: tuple[Region, int]) -> UInt8Array:
    """Return the ``[L]`` regions of a sequence from its stretches, in order, each ``(region, tokens)``."""
    return np.repeat(*np.array(stretches, dtype=np.int64).reshape(-1, 2).T).astype(np.uint8)


def single_turn(*, prompt: int, prefix: int = 0, continuation: int = 0) -> UInt8Array:
    """Return the ``[L]`` regions of a sequence of so many tokens of each kind, in that order."""
    return regions_of((Region.PROMPT, prompt), (Region.PREFIX, prefix), (Region.CONTINUATION, continuation))


# --------------------------------------------------------------------------- prompts and rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One row of the training or evaluation data, already tokenized."""

    index: int  # row number in the source, stable across runs
    token_ids: Int64Array  # [L] the rendered prompt, ready for the model to continue
    text: str
    answer: str | None = None  # reference answer, for grading
    response_ids: Int64Array | None = None  # [L] one teacher response, for guidance
    response_finished: bool = True  # False: it was cut off, has no end token and may be continued
    source: str = ""  # name of the data source, empty where there is only one
    teacher: str = ""  # name of the teacher that scores it, empty where there is only one
    teacher_ids: Int64Array | None = None  # [L] the teacher's own prompt, tokenized; None: it reads the student's


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """The settings by which a sampler turns logits into tokens. ``temperature=0`` is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    stop_token_ids: tuple[int, ...] = ()
    min_new_tokens: int = 0
    model_logprob: bool = True  # whether Rollout.model_logprob is wanted where it costs a pass of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutRequest:
    """One sequence to be sampled: a prompt and, when guided, a teacher-written prefix to continue."""

    sequence_id: int  # unique within the step; keys the sequence's random numbers
    prompt_index: int
    prompt_ids: Int64Array  # [L]
    prefix_ids: Int64Array  # [L], empty when the sequence is fully on-policy
    max_new_tokens: int  # continuation budget; 0 is legal (the prefix is the whole response)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One finished sequence: every token with its region, and the sampler's log-probs of those the student wrote.

    C counts CONTINUATION tokens, in their order, wherever they stand.
    """

    sequence_id: int
    prompt_index: int
    token_ids: Int64Array  # [L]
    region_L: UInt8Array  # Region of every token; which orders are legal: Region
    sampling_logprob: Float32Array  # [C] log-prob under the distribution sampled from (T, top-p, top-k)
    model_logprob: Float32Array  # [C] log-prob under the model itself (temperature 1), nats; nan: not requested
    finished: bool  # True when a stop token ended it, False when the budget did
    weight_version: int = 0  # training step whose weights wrote the continuation
    token_versions: Int64Array | None = None  # [C] the same token by token; None: weight_version for all
    teacher: str = ""  # name of the teacher that scores it, as of its prompt
    teacher_prompt_ids: Int64Array | None = None  # [L] what the teacher reads in place of the PROMPT tokens; None: them

    def count(self, *regions: Region) -> int:
        """Count the tokens in any of ``regions``."""
        return sum(int(np.count_nonzero(self.region_L == region)) for region in regions)

    @property
    def prompt_length(self) -> int:
        """Count the tokens of the prompt: the response begins there."""
        return self.count(Region.PROMPT)

    @property
    def response_length(self) -> int:
        """Count the tokens that a model wrote and that carry loss, PREFIX and CONTINUATION."""
        return self.count(*LOSS_REGIONS)


# --------------------------------------------------------------------------- packs and scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """A fixed-budget stream of whole sequences: the unit of work for teacher and student alike.

    Padding to ``multiple_of`` forms one last block of ``cu_seqlens`` (region PAD, sequence id -1), so that every
    token belongs to exactly one block and attention kernels need no special case.
    """

    token_T: Int64Array
    target_T: Int64Array  # next token of the same sequence; 0 where there is none
    position_T: Int64Array  # 0.. within each sequence
    region_T: UInt8Array  # Region of the target
    sequence_T: Int64Array  # sequence_id, -1 for padding
    cu_seqlens: npt.NDArray[np.int32]  # [S+1] (+1 more when padded), starts at 0, ends at T
    sequence_ids: Int64Array  # [S] in stream order
    num_valid: int  # predictions in PREFIX or CONTINUATION
    teacher: str = ""  # name of the one teacher that scores all of its sequences
    row_T: Int64Array | None = None  # which row computes each token, -1 for padding; None: every token is its own.
    #                                  Tokens with equal histories are one row, numbered in order of first appearance
    num_rows: int = 0  # rows of ``row_T``, rounded up to ``multiple_of``: the last ones may be padding
    teacher_pack: Pack | None = None  # the same sequences behind the teacher's own prompts, with the same valid
    #                                   predictions in the same order; None: the teacher reads this one

    @property
    def scored(self) -> Pack:
        """Return the pack that the teacher reads."""
        return self if self.teacher_pack is None else self.teacher_pack


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherOutputs:
    """The teacher's scores of a pack's valid predictions (N = ``pack.num_valid`` rows, stream order).

    ``teacher/schema.py`` has a row for every attribute: which request it answers, how it travels and is recorded.
    """

    logprob_N: Tensor  # log p(target), nats, fp32
    topk_ids_NK: Tensor | None = None  # int64, most likely first
    topk_logprob_NK: Tensor | None = None  # fp32, nats
    query_ids_NJ: Tensor | None = None  # int64, ids the student named (its own most likely ones)
    query_logprob_NJ: Tensor | None = None  # fp32, nats
    logtail_N: Tensor | None = None  # log mass on all but top k, query ids and target, nats; -inf: none
    entropy_N: Tensor | None = None  # full-vocabulary entropy, nats
    entropy_bound_N: Tensor | None = None  # upper bound of the entropy, nats, of teachers that report their top k alone
    base_logprob_N: Tensor | None = None  # log-prob of the target under a base model, nats
    end_logprob_NX: Tensor | None = None  # of each id that ends a response (``Needs.end_ids``), nats
    base_end_logprob_NX: Tensor | None = None  # the same under the base model
    hidden_NE: Tensor | None = None  # final hidden states, only for full-vocabulary divergences


# --------------------------------------------------------------------------- what a method sees


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentView:
    """The student's side of the tokens it is being trained on. T counts *valid* predictions only."""

    logprob_T: Tensor  # log q(y), nats, carries gradient
    old_logprob_T: Tensor  # the same at the weights of the rollout, no gradient (= logprob_T.detach() when on-policy)
    support_logprob_TK: Tensor | None = None  # log q on teacher.support_ids_TK, carries gradient
    support_logtail_T: Tensor | None = None  # log of q's mass outside the support, carries gradient; -inf: none is
    entropy_T: Tensor | None = None  # H(q), nats, no gradient needed
    old_entropy_T: Tensor | None = None  # H(q) at the weights of the rollout, no gradient
    divergence: Callable[[str, float], Tensor] | None = None  # (kind, beta) -> loss_T, full vocabulary
    advantage_T: Tensor | None = None  # of the answer that a token is in, over what its reward is measured against


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherView:
    """The teacher's side of the same tokens. Finite everywhere (but for an empty tail), no gradient."""

    logprob_T: Tensor  # log p(y), nats
    support_ids_TK: Tensor | None = None
    support_logprob_TK: Tensor | None = None  # log p on the support, nats; may be very negative, never -inf or nan
    support_mask_TK: Tensor | None = None  # bool, True = counts; None: all do. False marks the duplicate columns of a
    #                                        union (an id listed twice keeps one True); log-probs there are ignored
    support_logtail_T: Tensor | None = None  # log of p's mass outside the support, nats; -inf: none is
    support_has_target_T: Tensor | None = None  # bool, True where y is in the support; given where the tail is
    entropy_T: Tensor | None = None
    entropy_bound_T: Tensor | None = None  # upper bound of it, where it is not known
    base_logprob_T: Tensor | None = None  # log-prob of y under the base model (ExOPD)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenView:
    """Facts about the tokens that belong to neither model."""

    region_T: Tensor  # Region of each prediction (PREFIX or CONTINUATION here)
    uniform_T: Tensor  # U[0,1), pre-drawn per (seed, step, sequence id, position): the gate's only randomness
    sequence_T: Tensor  # which sequence a token is in
    position_T: Tensor  # index of the predicting token within its sequence
    target_T: Tensor  # the token y itself
    rollout_logprob_T: Tensor  # the sampler's own log q(y): old_logprob and what the two engines differ by at
    #                            temperature 1; = old_logprob on PREFIX tokens
    entropy_threshold: float = 0.0  # global batch quantile of old_entropy_T, when Needs.entropy_top requests it
    progress: float = 0.0  # step / total steps, in [0, 1)
    reward_T: Tensor | None = None  # of the answer that a token is in; nan where it has none
    advantage_T: Tensor | None = None  # the same over what it is measured against; 0 where it has none


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """A method's answer: one loss per token, before masks, weights and sums."""

    loss_T: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)  # per-token values; "prefix_*" are averaged over PREFIX,
    #                                                             all others over CONTINUATION tokens
    stat_weights: Mapping[str, Tensor] = field(default_factory=dict)  # of the stats whose mean is not over all of these
    #                                                                    tokens alike, [T], at least 0
    weight_T: Tensor | None = None  # detached multiplier; the sum is then divided by sum(weight), not by the count


SupportKind = Literal["teacher", "student", "union", "teacher_and_sampled"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """The inputs that a method requires. ``setup/build.py`` provides exactly this and nothing more."""

    top_k: int = 0  # support size; 0: no support
    support: SupportKind = "teacher"
    tail_mass: bool = False  # both models' mass outside the support
    student_entropy: bool = False
    teacher_entropy: bool = False
    old_logprob: bool = False  # a student scoring pass even when purely on-policy
    entropy_top: float = 0.0  # fraction f: provide entropy_threshold so that a share f of the batch lies above it
    hidden_states: bool = False  # teacher hidden states for StudentView.divergence
    base_model: bool = False
    reward: bool = False  # of whole answers
    end_ids: tuple[int, ...] = ()  # ids that end a response and count as one token; empty: every id is its own


# --------------------------------------------------------------------------- models


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from: a Hugging Face directory, or a checkpoint of Megatron."""

    weights: Path
    like: Path | None = None  # a Hugging Face directory with the config and tokenizer of a checkpoint without its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only transformer, as far as this package needs to know one. Filled from an HF ``config.json``."""

    family: str  # key of the name table in convert/
    num_layers: int
    hidden_size: int
    ffn_size: int  # of one expert, in a mixture of experts
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int  # true size, no padding
    max_positions: int  # no more than sliding_window: within it, attention is plainly causal
    rope_theta: float
    norm_eps: float
    tied_embeddings: bool
    qk_norm: bool = False
    qkv_bias: bool = False
    rope_scaling: Mapping[str, float | str] | None = None  # "type" and what that type of RoPE is made of
    sliding_window: int | None = None  # tokens a layer looks back, where that is fewer than all positions
    num_experts: int = 0  # per layer; 0 is a dense model
    experts_per_token: int = 0
    normalize_experts: bool = True  # the chosen experts' weights add up to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """Low-rank adapters (LoRA) beside the frozen matrices of a model: ``y = W x + alpha / rank * B (A x)``."""

    rank: int
    alpha: float
    dropout: float  # of x, on its way to A alone
    targets: tuple[str, ...]  # last parts of the Hugging Face names of the adapted matrices, in the model's order

    @property
    def scale(self) -> float:
        """Return what the product of both matrices is multiplied by."""
        return self.alpha / self.rank
