"""Off-policy guidance: which requests a step makes, with teacher prefixes that shrink over training (TrOPD)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_tropd.errors import DataError
from megatron_tropd.types import Prompt, RolloutRequest

_EMPTY = np.empty(0, dtype=np.int64)


def make_requests(
    prompts: Sequence[Prompt], *, samples: int, guided: int, fraction: float, max_new_tokens: int
) -> list[RolloutRequest]:
    """Build ``samples`` on-policy requests and ``guided`` guided ones per prompt, numbered prompt by prompt.

    A guided request starts with the first ``floor(fraction * L)`` tokens of the prompt's teacher response of length L
    (methods.md, "Off-policy guidance"), capped by the response budget; the student continues within what is left of
    the budget. When the whole response is taken there is nothing to continue, unless it was cut off.

    Raises:
        DataError: guidance is requested and a prompt has no teacher response.
    """
    requests = []
    per_prompt = samples + guided
    for number, prompt in enumerate(prompts):
        for sample in range(per_prompt):
            prefix, budget = _EMPTY, max_new_tokens
            if sample >= samples:
                prefix, budget = _prefix(prompt, fraction, max_new_tokens)
            requests.append(
                RolloutRequest(
                    sequence_id=number * per_prompt + sample,
                    prompt_index=prompt.index,
                    prompt_ids=prompt.token_ids,
                    prefix_ids=prefix,
                    max_new_tokens=budget,
                )
            )
    return requests


def _prefix(prompt: Prompt, fraction: float, budget: int) -> tuple[np.ndarray, int]:
    response = prompt.response_ids
    if response is None:
        raise DataError(
            f"prompt {prompt.index} has no teacher response, but guidance continues one. Write responses with "
            "`tropd generate`, or set rollout.guided_per_prompt=0."
        )
    length = min(int(np.floor(fraction * len(response))), budget)
    ended = length == len(response) and prompt.response_finished
    return response[:length], 0 if ended else budget - length
