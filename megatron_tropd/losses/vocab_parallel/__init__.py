"""Vocabulary-parallel losses of hidden states and output weights, without all of the logits: the public names."""

from megatron_tropd.losses.vocab_parallel.divergence import linear_divergence
from megatron_tropd.losses.vocab_parallel.logprobs import LogProbs, linear_logprobs
from megatron_tropd.losses.vocab_parallel.output_layer import (
    enter_vocabulary,
    hand_on_hidden_states,
    output_weight,
    unwrapped,
)
from megatron_tropd.losses.vocab_parallel.projection import project
from megatron_tropd.losses.vocab_parallel.topk import TopK, linear_topk

__all__ = [
    "LogProbs",
    "TopK",
    "enter_vocabulary",
    "hand_on_hidden_states",
    "linear_divergence",
    "linear_logprobs",
    "linear_topk",
    "output_weight",
    "project",
    "unwrapped",
]
