"""Bound, without encoding anything, how much longer a tokenizer's rules can make a text.

A normalizer (and a decoder) is a list of rules that came with the model. Each may replace a character by many, and the
next one each of these: forty short rules make terabytes of a word. Here every rule's worst factor is read off the file
and they are multiplied: at worst is not what is seen, so the limit is far above what rules of models multiply to.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_tropd.errors import ModelFileError

_MOST = 10_000.0  # public models: 3 to 40
_UNICODE = 11.0  # one character of 3 bytes is 33 when it is decomposed, and no other is more
# bytes made of one, at worst, by the rules that have no settings for it
_FACTORS = {"NFC": 3.0, "NFD": _UNICODE, "NFKC": _UNICODE, "NFKD": _UNICODE, "Lowercase": 1.5, "ByteLevel": 2.0}
_FACTORS |= {"BertNormalizer": 5.0, "Metaspace": 3.0, "ByteFallback": 3.0}


def check_growth(directory: Path) -> None:
    """Raise ModelFileError when the rules of ``tokenizer.json`` may make a text more than 10,000 times as long."""
    file = directory / "tokenizer.json"
    try:
        found = file.stat()
    except OSError:
        return
    for part, factor in _growths(file, found.st_mtime_ns, found.st_size).items():
        if factor > _MOST:
            raise ModelFileError(
                f"the {part} of {file.absolute()} may make a text {factor:.3g} times as long, and that of no model "
                f"more than {_MOST:,.0f} times: it would fill the memory. Fetch it again, or use another tokenizer."
            )


@lru_cache(maxsize=16)
def _growths(file: Path, changed: int, size: int) -> dict[str, float]:
    """Return the factor of normalizer and decoder. A file of some tens of megabytes is read once."""
    try:
        tree = json.loads(file.read_bytes())
    except RecursionError:
        raise ModelFileError(f"{file.absolute()} holds lists within lists, deeper than can be read.") from None
    except (OSError, ValueError):  # its reader says so
        return {}
    return {part: _growth(tree.get(part)) for part in ("normalizer", "decoder")} if isinstance(tree, dict) else {}


def _growth(rule: Any) -> float:
    if not isinstance(rule, Mapping):
        return 1.0
    kind = rule.get("type")
    if kind == "Sequence":
        product = 1.0
        for part in rule.get("normalizers") or rule.get("decoders") or ():
            product *= min(_growth(part), 1e100)
            product = min(product, 1e300)
        return product
    if kind == "Replace":
        return _replacement(rule.get("pattern"), str(rule.get("content") or ""))
    if kind == "Precompiled":
        return _charsmap(str(rule.get("precompiled_charsmap") or ""))
    if kind == "Prepend":
        return 1.0 + len(str(rule.get("prepend") or "").encode(errors="replace"))
    return _FACTORS.get(str(kind), 1.0)


def _replacement(pattern: Any, content: str) -> float:
    """Return the factor of a replacement of a text, or of whatever a regular expression finds."""
    size = len(content.encode(errors="replace"))
    text = pattern.get("String") if isinstance(pattern, Mapping) else None
    if isinstance(text, str):
        return max(1.0, size / max(len(text.encode(errors="replace")), 1)) if text else 1.0 + size
    expression = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    try:
        finds_nothing = expression is None or re.match(str(expression), "") is not None
    except re.error:  # the tokenizer's own dialect
        finds_nothing = True
    return 1.0 + size if finds_nothing else max(1.0, float(size))


def _charsmap(encoded: str) -> float:
    """Return the longest text of a sentencepiece table: 4 bytes of size, the trie, then texts that end in zeros."""
    try:
        table = base64.b64decode(encoded, validate=True)
        (size,) = struct.unpack_from("<I", table)
    except (binascii.Error, struct.error, ValueError):
        return 1.0
    return float(max((len(text) for text in table[4 + size :].split(b"\0")), default=1) or 1)
