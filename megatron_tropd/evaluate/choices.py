"""Find the letter that a response to a multiple-choice question settles on."""

from __future__ import annotations

import re

_LETTER = r"[*_\"'(\[{$]{0,4}([A-J])\b(?!\w|['\u2019]\w)"
# "The answer is A lot": A and I are words where a small one follows that begins no reason
_NOT_A_WORD = r"(?!(?<=[AI]) (?!(?:because|since|as|for|and|or|but|which|with|where|when|while|so|is|was|,)\b)[a-z])"
_BOX = re.compile(
    r"\\(?:boxed|fbox)\{ ?(?:\\(?:text|mathrm|mathbf|textbf|mathsf)\{ ?)?[(\[*]{0,3}([A-Ja-j])(?:[)\]*.:} ]|\\)"
)
_MARKED = re.compile(rf"#### ?{_LETTER}")
_STATED = tuple(
    re.compile(pattern)
    for pattern in (
        r"(?i:\banswer|\bchoice|\boption|\bletter)[*_]{0,2} ?"
        r"(?:(?i:is|would be|must be|should be)(?: [a-z]{1,9}ly| therefore| thus| hence| then| indeed)? ?[:=\uff1a]?"
        r"|[:=\uff1a])"
        rf"[*_ ]{{0,3}}(?i:the )?(?i:option |choice |letter )?{_LETTER}{_NOT_A_WORD}",
        rf"{_LETTER}[*_\"')\]$]{{0,4}} is (?i:the )?(?i:most |single |only |best )?"
        r"(?i:correct|right|best|true|answer|appropriate|accurate)\b",
        rf"\b(?i:choose|pick|select|chose|picked|selected|go with|going with)(?i: option| choice| answer)? ?"
        rf"{_LETTER}{_NOT_A_WORD}",
        rf"<answer> ?{_LETTER}{_NOT_A_WORD}",
        rf"\b(?i:must be) {_LETTER}{_NOT_A_WORD}",
        rf"(?:\u7b54\u6848|\u9009\u9879|\u9009\u62e9|\u9009)(?:\u662f|\u4e3a|\u5e94\u4e3a)? ?[:\uff1a]? ?{_LETTER}",
    )
)
# "A or B" settles on nothing; "A, and B is wrong" does
_ANOTHER = re.compile(
    r"[*_\"')\]$}]{0,4},? ?(?:or|and|/|&) ?[*_\"'(\[{$]{0,4}(?:option |choice )?[*_\"'(\[{$]{0,4}"
    r"([A-Ja-j])\b(?!['\u2019]?\w)(?!(?<=[AIai]) [a-z])(?!\W{0,4}(?:is|are|was|would|cannot|can)\b)"
)
_FONT = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathsf|bf) ?\{([^{}]{0,40})\}")
_SMALL = re.compile(r"(?m:^\W{0,3}\(([a-j])\)\W{0,3}$)|(?i:\banswer|\bchoice|\boption)(?: is)?:? \(([a-j])\)")
_NAMED = (
    re.compile(rf"(?i:\banswer|\bchoice|\boption)[*_]{{0,2}} ?{_LETTER}{_NOT_A_WORD}"),
    # "It is B." at the end of a clause
    re.compile(
        rf"\b(?i:it is|it['\u2019]s|it has to be|it should be) {_LETTER}(?=[*_\"')\]}}$]{{0,4}}(?:[.,;:!\n]|$))"
    ),
)
_BEGINS = re.compile(r"^\W{0,3}([A-J])(?:[.):]|\W{0,3}$)")
_LINE = re.compile(r"(?m:^\W{0,3}([A-J])\W{0,3}$)")


def chosen_letter(response: str) -> str | None:
    """Return the letter, A to J, that a response settles on; None where it settles on none.

    Believed in this order, the last one of a kind: ``\\\\boxed{B}``, also ``\\\\boxed{B. 42}``; ``#### B``; a statement
    ("the answer is (B)", "B is correct", "I choose B"); one that is named ("option B", "it is B."); a response that
    begins with the letter ("B) because ..."); a line that holds nothing else. Outside a box only capital letters count,
    or small ones in parentheses: "a" is mostly a word. One that another is named beside ("A or B") settles on none.
    """
    # runs of white space become one character: every pattern then looks at a bounded stretch of text
    text = re.sub(r"\s+", lambda run: "\n" if "\n" in run.group() else " ", response.strip())
    text = _FONT.sub(r"\1", text)
    for patterns in ((_BOX,), (_MARKED,), _STATED, _NAMED, (_BEGINS,), (_LINE,), (_SMALL,)):
        stated = [match for pattern in patterns for match in _last(pattern, text)]
        if stated:
            return _settled(max(stated, key=lambda match: match.end()))
    return None


def _settled(match: re.Match[str]) -> str | None:
    """Return the letter of a match; None where another one stands beside it."""
    group = match.lastindex or 1
    letter, other = match.group(group).upper(), _ANOTHER.match(match.string, match.end(group))
    return None if other and other.group(1).upper() != letter else letter


def _last(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    last = None
    for last in pattern.finditer(text):  # noqa: B007
        pass
    return [last] if last else []
