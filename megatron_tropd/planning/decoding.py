"""Time that the embedded sampler takes per token on a GPU: reading memory, or Python that asks for it.

It is plain PyTorch, an operation at a time, without graphs. Counted, on a CPU, of ``engine.decode``; the time of a call
is what PyTorch takes to send one to a GPU, and was not measured here.
"""

from __future__ import annotations

from megatron_tropd.types import Architecture

_CALLS_OF_A_LAYER, _CALLS_OF_A_TOKEN = 114, 68
_CALLS_OF_AN_EXPERT = 10  # they are computed one after the other
_CALL_S = 5e-6
LARGE = 1e9  # parameters, from which on vLLM is the better sampler


def host_seconds(a: Architecture) -> float:
    """Return the seconds that Python takes for one more token of a whole batch, however few sequences are in it."""
    of_a_layer = _CALLS_OF_A_LAYER + _CALLS_OF_AN_EXPERT * a.num_experts
    return (_CALLS_OF_A_TOKEN + of_a_layer * a.num_layers) * _CALL_S


def advice(a: Architecture, parameters: float, *, new_tokens: int) -> str:
    """Say what sampling in the trainer's own model costs on a GPU, and what to do about it from a billion parameters
    on.
    """
    token = host_seconds(a)
    said = f"about {token * 1e3:,.0f} ms of Python per token of a batch, {token * new_tokens:,.0f} s for its longest"
    if parameters < LARGE:
        return said
    return f"{said}: meant for small models. Use vLLM on a GPU (rollout.engine=vllm or vllm_server)"
