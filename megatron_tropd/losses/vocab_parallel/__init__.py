"""Vocabulary-parallel losses of hidden states and output weights, without all of the logits: the public names."""

from megatron_tropd.losses.vocab_parallel.divergence import linear_divergence
from megatron_tropd.losses.vocab_parallel.logprobs import LogProbs, linear_logprobs
from megatron_tropd.losses.vocab_parallel.projection import project
from megatron_tropd.losses.vocab_parallel.topk import TopK, linear_topk

__all__ = ["LogProbs", "TopK", "linear_divergence", "linear_logprobs", "linear_topk", "project"]
