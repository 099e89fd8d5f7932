"""The protocol between the trainer and a server started by ``tropd serve``: paths, and arrays with their checksum.

Requests are JSON; arrays come back as safetensors, which is neither pickle nor text, with a digest of the body in a
header: what a proxy or a cable has changed is recognized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_tropd.errors import ServingError

PREFIX = "/tropd/"
DIGEST = "x-tropd-digest"


def digest_of(body: bytes) -> str:
    """Return the checksum of a body."""
    return hashlib.blake2b(body, digest_size=16).hexdigest()


def encoded(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Encode the arrays as a body."""
    return save({name: np.ascontiguousarray(array) for name, array in arrays.items()})


def decoded(body: bytes, digest: str | None, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Decode the arrays of a body.

    Raises:
        ServingError: the body is not what was sent, or lacks one of ``names``.
    """
    if digest != digest_of(body):
        raise ServingError(f"an answer of {len(body)} bytes does not match its checksum: it was changed on the way.")
    try:
        arrays: dict[str, np.ndarray] = load(body)
        return {name: arrays[name] for name in names}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ServingError(f"an answer of {len(body)} bytes cannot be read: {error!r}.") from error
