"""Connection of the configured servers to a pool that can do what will be requested."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from megatron_tropd.config.sections import ServersConfig
from megatron_tropd.errors import ConfigError, ServingError
from megatron_tropd.vllm_bridge.pool import Pool


def open_pool(config: ServersConfig, *, section: str, needs: Mapping[str, Any]) -> Pool:
    """Connect to the servers of a section of the configuration (its name is for messages).

    Args:
        needs: what a server's ``info`` must say: equal values, at least as large ones for whole numbers (where
            ``vocab_size`` must be equal).

    Raises:
        ServingError: a server does not answer, or is not one that ``tropd serve`` has started.
        ConfigError: a server serves another model, or was started for something else.
    """
    pool = Pool(config, key=os.environ.get(config.key_variable, ""))
    try:
        for url, info in pool.infos().items():
            _check(url, info, needs, section)
    except ServingError as error:
        pool.close()
        raise ServingError(f"{section}: {error} Start servers with `tropd serve`, and list their addresses.") from error
    except ConfigError:
        pool.close()
        raise
    return pool


def _check(url: str, info: Mapping[str, Any], needs: Mapping[str, Any], section: str) -> None:
    for name, wanted in needs.items():
        found = info.get(name)
        grows = isinstance(wanted, int) and not isinstance(wanted, bool) and name != "vocab_size"
        if not (found == wanted or (grows and isinstance(found, int) and found >= wanted)):
            raise ConfigError(
                f"{section}: {url} has {name}={found}, this run needs {wanted}{' or more' if grows else ''}. "
                "Start the server with `tropd serve` and this run's configuration."
            )
