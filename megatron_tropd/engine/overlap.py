"""Communication during compute: sums of gradients while backward runs, new weights while the next forward starts.

Megatron's hooks do the work: on parameters, which reduce a bucket once all of its gradients are there, and on modules,
which wait for the weights they are about to use. The latter are in place only for the forward of an update that
follows another one at once. Whatever else reads weights (publishing, scoring, saving) makes them whole first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer import TransformerConfig


class Overlap:
    """Communication under way between the ranks that share the weights of one model."""

    def __init__(self, wrapped: Sequence[DistributedDataParallel], config: TransformerConfig) -> None:
        """Hook into the schedule. ``config``: the model's, whose schedule starts the communication."""
        self._wrapped = wrapped
        self._config = config
        self._gathers = wrapped[0].use_forward_hook
        self._behind = False  # this rank has the new weights of its own share only
        self._training = False
        for module in wrapped if self._gathers else ():
            module.disable_forward_pre_hook(param_sync=False)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Let the schedule, within the block, run forward and backward of one update."""
        config, behind = self._config, self._behind
        config.no_sync_func = self._of_each("no_sync")
        # later stages, which end first, start together with the first one
        config.grad_sync_func = self._of_each("start_grad_sync")
        # interleaved chunks are waited for one after the other; their schedule begins each ahead of time
        config.param_sync_func = self._of_each("start_param_sync") if behind and self._aligned else None
        self._training = True
        last = []
        for module in self._wrapped if behind else ():
            module.enable_forward_pre_hook()
            last.append(module.module.register_forward_hook(partial(_finish_gathering, module)))
        try:
            yield
        finally:
            for module in self._wrapped if behind else ():
                module.disable_forward_pre_hook(param_sync=False)
            for handle in last:
                handle.remove()
            config.no_sync_func = config.grad_sync_func = config.param_sync_func = None
            self._training = False
        self._behind = False

    def updated(self) -> None:
        """Note an update: with the distributed optimizer each rank now has its own share of the new weights."""
        self._behind = self._gathers

    def finish_gathers(self) -> None:
        """Make the weights whole on every rank. Collective, where they are not."""
        if self._behind and not self._training:
            for module in self._wrapped:
                module.start_param_sync(force_sync=True)
            self._behind = False

    @property
    def _aligned(self) -> bool:
        return bool(self._wrapped[0].ddp_config.align_param_gather)

    def _of_each(self, name: str) -> Callable[..., Any] | list[Callable[..., Any]]:
        """Return one function, or a list of them for several chunks, as the schedules take it."""
        found = [getattr(module, name) for module in self._wrapped]
        return found[0] if len(found) == 1 else found


def _finish_gathering(module: DistributedDataParallel, *_: Any) -> None:
    """Finish gathering after a chunk's forward: the loss uses only the output layer's weight, so no hook waited for
    it.
    """
    for group in (*module.bucket_groups, *module.expert_parallel_bucket_groups):
        group.finish_param_sync(skip_next_bucket_dispatch=True)
