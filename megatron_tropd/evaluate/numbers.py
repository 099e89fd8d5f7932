"""Read numbers as people write them, exactly: no number here passes through a float."""

from __future__ import annotations

import re
from decimal import Decimal

_LONGEST_LINE = 300  # characters behind a marker that are looked at
_MOST_MARKERS = 100
_SPACE = "[ \u00a0\u2009\u202f]"
_DIGITS = rf"(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d{{1,3}}(?:{_SPACE}\d{{3}})+(?!\d)|\d+)"
_MONEY = "[\u20ac\u00a3\u00a5\u20b9]"
NUMBER = rf"[-+]?{_MONEY}?[-+]?{_SPACE}?(?:{_DIGITS}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,5}}(?!\d))?"
# letters may follow a number directly when they are a unit: 12abc is no number, nor is 42k 42
_UNIT = (
    "(?:[kmcdn]?m[23\u00b2\u00b3]?|[kKmM]?g|[kmMG]?W|kWh|[mc]?[lL]|[kMGT]?i?B|[kM]?Hz|[mk]?V|[kM]?J|[kM]?Pa|km/h|m/s|mph"
    "|lbs?|oz|ft|in|mi|yd|sq|h|hrs?|min|s|secs?|ms|days?|years?|USD|EUR|GBP|usd|eur|cents?|dollars?|degrees?|th|st|nd|rd)"
)
_NEXT = rf"(?={_UNIT}(?![A-Za-z0-9^])|(?![\w/^*]|[.,:]\d)(?!\s*[-+*/^=\u00d7\u00f7]\s*[\d.(]|\s+\d))"
_PLAIN = re.compile(NUMBER)
# "1.2 million" is not 1.2; a dozen is a unit, too
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(rf"{_SPACE}?({'|'.join(_SCALES)})s?\b", re.IGNORECASE)
# "42 or 43" settles on nothing
_ALTERNATIVE = re.compile(rf"[ ,;(]{{0,3}}(?:or|and|/|&)[ (~$]{{0,3}}({NUMBER})", re.IGNORECASE)
_BEGINS = re.compile(rf"({NUMBER}){_NEXT}")
_MARKER = re.compile("#{4,}")
_WORDS = re.compile(
    r"(?:so|thus|therefore|hence)?,? ?(?:the |my )?(?:final |correct )?(?:answer|result|total|solution|value)"
    r"(?: is| equals)? ?[:=]? ?"
    r"|(?:about|approximately|roughly) ",
    re.IGNORECASE,
)
_DECORATION = (
    (re.compile(r"<<[^<>]*>>"), ""),  # the calculator's annotations of GSM8K
    (re.compile(r"\\(?:boxed|fbox|text|textbf|mathrm|mathbf|displaystyle)\b|\\[()\[\]!]|\\?\$|[`_{}]"), ""),
    (re.compile(r"\\[,; ]|\\quad"), " "),
    (re.compile(r"\\?%"), " "),
    # emphasis, but not the power in 2**5 nor the product in 6 * 7
    (re.compile(r"(?<![\d)*\s])\*+|\*+(?![\d(*\s])|(?<=\S)\*+(?=\s)|(?<=\s)\*+(?=\S)"), ""),
    (re.compile("[\u2212\u2013\u2012]"), "-"),
)


def final_answer(text: str) -> Decimal | None:
    """Return the number behind the last ``####`` (GSM8K's convention), or None when there is none.

    Signs, currencies, thousands separators and decimals are understood, and what people put around a number: emphasis,
    boxes, parentheses, "The answer is", ``x =``, a unit (``#### -$1,234.50`` is -1234.50). Text may follow the number
    (``#### 42 apples``), ``million`` multiplies it; an expression, a fraction, and one of two different numbers
    (``#### 42 or 43``) are no number. Later headings without a number are passed over.
    """
    end = len(text)
    for marker in reversed(list(_MARKER.finditer(text))[-_MOST_MARKERS:]):
        line = text[marker.end() : min(end, marker.end() + _LONGEST_LINE)].lstrip().split("\n", 1)[0]
        number = number_that_begins(line)
        if number is not None or not _is_passed_over(text[max(0, marker.start() - 80) : marker.start()], line):
            return number
        end = marker.start()
    return None


def plain_number(text: str) -> Decimal | None:
    """Return the number that a text is, whatever is put around it; None when it is something else."""
    line = _undecorated(text)
    return _to_decimal(line) if _PLAIN.fullmatch(line) else None


def number_that_begins(line: str) -> Decimal | None:
    """Return the number that a line states: what it begins with, or what stands behind its last ``=``."""
    line = _undecorated(line)
    for part in (line.rpartition("=")[2], line.partition("=")[0]) if "=" in line else (line,):
        match = _BEGINS.match(part.lstrip(" =\u2248~:([\"'"))
        if match:
            return _settled(match)
    return None


def _settled(match: re.Match[str]) -> Decimal | None:
    """Return the number of a match, scaled by the word behind it; None where another number stands beside it."""
    number, rest = _to_decimal(match.group(1)), match.string[match.end() :]
    other = _ALTERNATIVE.match(rest)
    if other and _to_decimal(other.group(1)) != number:
        return None
    scale = _SCALE.match(rest)
    return number * _SCALES[scale.group(1).lower()] if scale else number


def _is_passed_over(before: str, line: str) -> bool:
    """Say whether a marker without a number is a heading of Markdown, or closes one (``#### 42 ####``)."""
    begins_line = not before.rpartition("\n")[2].strip(" *_>-")
    return line.strip(" *_")[:1].isalpha() if line.strip() and begins_line else not line.strip() and not begins_line


def _undecorated(line: str) -> str:
    if len(line) > _LONGEST_LINE:
        return ""
    for pattern, replacement in _DECORATION:
        line = pattern.sub(replacement, line)
    line = re.sub(" +", " ", line.strip())
    words = _WORDS.match(line)
    line = line[words.end() :] if words else line
    return line.strip(" \t\r\n") if "(" in line[1:] else line.strip(" \t\r\n()[]")


def _to_decimal(number: str) -> Decimal:
    return Decimal(re.sub(rf"{_SPACE}|{_MONEY}|,", "", number))
