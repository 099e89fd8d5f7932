"""Find the tokens that end a response, to the student and every model beside it, and whether they count as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_tropd.data.tokenizer import TEMPLATE, Tokenizer
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods.options import EndTokens
from megatron_tropd.report.terminal import say

STUDENT = "student"


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseEnds:
    """The tokens that end a response in a run, and where that is said."""

    ids: tuple[int, ...]  # that count as one token, and at each of which sampling stops; empty: each is its own
    lines: tuple[str, ...]  # for whoever started the run


def response_ends(
    tokenizers: Mapping[str, Tokenizer], wanted: EndTokens | None, *, vocab_size: int | None = None
) -> ResponseEnds:
    """Decide whether the ends of responses are one class.

    Two models that name the same end tokens in their files agree, whatever their chat templates write: a base model
    often comes with the template of its instruct model, and ends its responses as it was pre-trained.

    Args:
        tokenizers: by role, the student's first.
        wanted: ``method.end_tokens``; None: ``class`` where the models disagree, ``exact`` where they agree.
        vocab_size: ids that all models know; ends beyond are left out of the class.

    Raises:
        ConfigError: the models disagree and ``refuse`` is wanted.
    """
    differ = len({_declared(t) for t in tokenizers.values()}) > 1 or len({_all(t) for t in tokenizers.values()}) > 1
    union = tuple(dict.fromkeys(i for t in tokenizers.values() for i in t.eos_ids))
    ids = tuple(i for i in union if vocab_size is None or i < vocab_size)
    lines = tuple(_lines(tokenizers))
    if differ and wanted == "refuse":
        raise ConfigError(
            "method.end_tokens=refuse, and the models end their responses with different tokens: "
            + "; ".join(line.strip() for line in lines)
            + ". Set method.end_tokens=class to count them as one token, exact to keep them separate, or give both "
            "models the same end tokens in generation_config.json."
        )
    mode = wanted if wanted in ("class", "exact") else ("class" if differ else "exact")
    if mode == "class" and len(ids) > 1:
        shown = _shown(tokenizers[STUDENT], ids)
        unknown = [i for i in union if i not in ids]
        lines += (f"they count as one token, and sampling stops at each (method.end_tokens=class): {shown}",)
        lines += (f"not among them, since some model has no such id: {unknown}",) if unknown else ()
        return ResponseEnds(ids=ids, lines=lines)
    if differ:
        lines += (
            "WARNING: they differ, and each counts by itself (method.end_tokens=exact): to the teacher the student's "
            "own end is a token that it would never write. Set method.end_tokens=class to count them as one.",
        )
    return ResponseEnds(ids=(), lines=lines)


def tell_ends(ends: ResponseEnds, *, enabled: bool = True) -> None:
    """Print what ends a response, and what is made of it; ``enabled``: on the rank that speaks."""
    for line in ends.lines if enabled else ():
        say(line)


def stopping_at(tokenizer: Any, ids: tuple[int, ...]) -> Any:
    """Return the tokenizer with all of ``ids`` among its end tokens, its own first."""
    more = tuple(i for i in ids if i not in tokenizer.eos_ids)
    return replace(tokenizer, eos_ids=(*tokenizer.eos_ids, *more)) if more else tokenizer


def _declared(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the end tokens that the files name, the chat template aside."""
    return frozenset(i for source, ids in tokenizer.end_sources.items() if source != TEMPLATE for i in ids)


def _all(tokenizer: Tokenizer) -> frozenset[int]:
    return frozenset(tokenizer.eos_ids)


def _lines(tokenizers: Mapping[str, Tokenizer]) -> Iterator[str]:
    for role, tokenizer in tokenizers.items():
        sources: dict[tuple[int, ...], list[str]] = {}
        for source, ids in tokenizer.end_sources.items():
            sources.setdefault(ids, []).append(source)
        named = "; ".join(f"{_shown(tokenizer, ids)} ({', '.join(where)})" for ids, where in sources.items())
        yield f"responses end, to the {role}, with {named}"


def _shown(tokenizer: Tokenizer, ids: tuple[int, ...]) -> str:
    return ", ".join(f"{i} {tokenizer.token_text(i)!r}" for i in ids)
