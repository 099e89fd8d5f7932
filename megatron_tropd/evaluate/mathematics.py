"""Compare mathematics: the last boxed expression of a response with a reference, exactly.

Numbers written plainly are compared as fractions. Everything else is read by the library math-verify, whose verdict
"equal" is checked again at high precision, because it rounds: to it 1/2^99 and 1/2^98 are the same.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any

from megatron_tropd.errors import DataError

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns whoever sets no limit of its own: see _parsed

_LONGEST_NUMBER = 400  # characters; longer ones are left to the library
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b\u207f", "0123456789-n"
)
_SUPERSCRIPT = re.compile("[\u2070\u00b9\u00b2\u00b3\u2074-\u2079\u207b\u207f]+")
_FRACTIONS = {
    "\u00bd": (1, 2), "\u2153": (1, 3), "\u2154": (2, 3), "\u00bc": (1, 4), "\u00be": (3, 4), "\u2155": (1, 5),
    "\u2156": (2, 5), "\u2157": (3, 5), "\u2158": (4, 5), "\u2159": (1, 6), "\u215a": (5, 6), "\u215b": (1, 8),
    "\u215c": (3, 8), "\u215d": (5, 8), "\u215e": (7, 8),
}  # fmt: skip
_SIGNS = {
    "\u2212": "-", "\u00d7": r"\times ", "\u00b7": r"\cdot ", "\u00f7": r"\div ", "\u03c0": r"\pi ",
    "\u221e": r"\infty ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ", "\u222a": r"\cup ",
    "\u2229": r"\cap ", "\u221a": r"\sqrt ", "\u00b1": r"\pm ", "\u00b0": "", "\u202f": " ", "\u2009": " ",
    "\u00a0": " ", "\u00a3": "", "\u00a5": "", "\u20ac": "", "\u20b9": "",
}  # fmt: skip
_TIDY = (
    (re.compile(r"\^\s?\{?\s?\\circ\s?\}?|\\degree\b"), ""),
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr)\b"), ""),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"(?<=\d)(?:\\[,;: ]| )(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?:,\d{3})*(?![\d,]))"), ","),
    (re.compile(r"\\\$"), ""),
)
_DELIMITERS = (
    *((r"\[", r"\]"), (r"\(", r"\)"), ("$$", "$$"), ("$", "$")),
    *((rf"\begin{{{name}}}", rf"\end{{{name}}}") for name in ("equation", "equation*", "displaymath", "math")),
)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathit|mbox|boxed|fbox)\s?\{([^{}]*)\}")
_BOX_PIECES = re.compile(r"\\(?:boxed|fbox)\s?\{|\\(?:boxed|fbox)\s([^\s{}\\$,.]+)|\\.|[{}]", re.DOTALL)
_JOINT = re.compile(
    r"\\text\s?\{\s?(?:and|or)\s?\}|\\(?:quad|qquad|\)|\(|[,; ])|\band\b|\bor\b"
    r"|\b[a-zA-Z](?:_\{?\w\}?)? ?=|[,;&$\s]"  # "x = 1 or x = 2": the name of a variable joins, too
)
_JOINS = re.compile(r"and|or|[,;&]")
_DECIMAL = re.compile(
    r"([-+]?)(\d{1,3}(?:,\d{3})+|\d+)?(\.\d*)?(?:[eE]([-+]?\d{1,4})|\\times10\^\{?([-+]?\d{1,4})\}?)?"
)
_RATIO = re.compile(r"([-+]?)(?:\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}|\\frac(\d)(\d)|(\d+)/(\d+))")


def last_box(text: str) -> str | None:
    """Return what the last balanced ``\\\\boxed{...}`` (or ``\\\\fbox``) holds, None where there is none.

    Boxes that only commas, "and" or "or" stand between are one answer of several parts: ``\\\\{a, b\\\\}``.
    """
    boxes = _boxes(text)
    if not boxes:
        return None
    group = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        between = text[box[1] : group[0][0]]
        if len(between) > 80 or _JOINT.sub("", between) or not _JOINS.search(between):
            break
        group.insert(0, box)
    contents = [content for _, _, content in group]
    return contents[0] if len(contents) == 1 else r"\{" + ", ".join(contents) + r"\}"


def grade_math(response: str, answer: str) -> bool:
    """Say whether the last box of a response, or else its final answer as math-verify finds it, equals the reference.

    Raises:
        DataError: the reference is no mathematics, and the response does not repeat it either.
    """
    reference = tidied(answer.rpartition("####")[2])
    if reference.lower() in ("", "nan"):
        raise DataError(f"reference answer {answer!r} is not an expression math-verify can read: it is missing.")
    boxed = last_box(response)
    given = None if boxed is None else tidied(boxed)
    if given is not None:
        alike = _plainly_equal(reference, given)
        if alike is not None:
            return alike
    gold = _parsed(f"${reference}$")
    if not gold:
        raise DataError(f"reference answer {answer!r} is not an expression math-verify can read.")
    return any(_equal(one, other) for one in gold for other in _parsed(response if given is None else f"${given}$"))


def check_math_reference(answer: str) -> None:
    """Raise DataError when ``answer`` is no mathematics: only a response that repeats it could be right."""
    reference = tidied(answer.rpartition("####")[2])
    if (
        not reference
        or reference.lower() == "nan"
        or (exact_number(reference) is None and not _parsed(f"${reference}$"))
    ):
        raise DataError(f"reference answer {answer!r} is not an expression math-verify can read.")


def tidied(text: str) -> str:
    """Write an expression plainly: without delimiters, currencies, degrees and spacing, with LaTeX for Unicode."""
    text = _SUPERSCRIPT.sub(lambda found: "^{" + found.group().translate(_SUPERSCRIPTS) + "}", text.strip())
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    for sign, (numerator, denominator) in _FRACTIONS.items():
        text = text.replace(sign, rf"\frac{{{numerator}}}{{{denominator}}}")
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return _bare(text)


def _bare(text: str) -> str:
    before = None
    while text != before:
        before, text = text, text.strip().rstrip(".,;").strip()
        for opening, closing in _DELIMITERS:
            inner = text[len(opening) : -len(closing)]
            if len(text) >= len(opening + closing) and text.startswith(opening) and text.endswith(closing):
                text = inner.strip() if opening not in inner else text
        text = text.replace("$", "").strip() if text.count("$") == 1 else text
        whole = _boxes(text)
        if len(whole) == 1 and whole[0][:2] == (0, len(text)):
            text = whole[0][2]
    return text


# --------------------------------------------------------------------------- boxes


def _boxes(text: str) -> list[tuple[int, int, str]]:
    """List ``(start, end, content)`` of every outermost balanced box, in one pass over the text."""
    found: list[tuple[int, int, str]] = []
    open_at: list[tuple[int, int] | None] = []  # None for a brace that is no box's
    for piece in _BOX_PIECES.finditer(text):
        token = piece.group()
        if piece.group(1) is not None:
            found.append((piece.start(), piece.end(), piece.group(1)))
        elif token.endswith("{") and not token.startswith("\\{"):
            open_at.append((piece.start(), piece.end()) if token.startswith("\\") else None)
        elif token == "}" and open_at:
            opened = open_at.pop()
            if opened is not None:
                while found and found[-1][0] > opened[0]:
                    found.pop()  # a box within this one
                found.append((opened[0], piece.end(), text[opened[1] : piece.start()]))
    return found


# --------------------------------------------------------------------------- equality


def _plainly_equal(reference: str, given: str) -> bool | None:
    """Compare texts and plain numbers; None where that decides nothing."""
    if _as_text(reference) == _as_text(given):
        return True
    numbers = exact_number(reference), exact_number(given)
    if numbers[0] is None or numbers[1] is None:
        return None
    (first, first_percent), (second, second_percent) = numbers[0], numbers[1]
    if first_percent != second_percent:  # 9% answers "how many percent" and "what share"
        share = first / 100 if first_percent else first, second / 100 if second_percent else second
        return first == second or share[0] == share[1]
    return first == second


def _as_text(text: str) -> str:
    before = None
    while text != before:
        before, text = text, _WRAPPED.sub(r"\1", text)
    return re.sub(r"\\?[\s~]|\\[,;:]", "", text)


def exact_number(text: str) -> tuple[Fraction, bool] | None:
    """Read a plain number (``1,234.5``, ``1e-5``, ``3/4``, ``\\\\frac{3}{4}``) and whether it is in percent."""
    text = re.sub(r"\s|(?<=\d)\.$", "", text)
    bare = re.sub(r"\\?%$", "", text)
    if not bare or len(bare) > _LONGEST_NUMBER:
        return None
    percent = bare != text
    ratio = _RATIO.fullmatch(bare)
    if ratio:
        sign, *parts = ratio.groups()
        numerator, denominator = (int(part) for part in parts if part is not None)
        return (Fraction(numerator, denominator) * (-1 if sign == "-" else 1), percent) if denominator else None
    match = _DECIMAL.fullmatch(bare)
    if not match or not (match.group(2) or (match.group(3) or ".") != "."):
        return None
    sign, whole, decimals, *powers = match.groups()
    value = Fraction(f"{sign}{(whole or '0').replace(',', '')}{(decimals or '').rstrip('.')}")
    return value * Fraction(10) ** int(next((power for power in powers if power), "0")), percent


def _parsed(text: str) -> list[Any]:
    # no limit of the library's own: it goes by the clock, so that a busy machine makes right answers wrong in silence;
    # the pool that grades ends what takes too long, and says so
    from math_verify import parse  # type: ignore[import-untyped,unused-ignore]

    return list(parse(text, parsing_timeout=None))


def _equal(gold: Any, given: Any) -> bool:
    from math_verify import verify

    numbers = _as_number(gold), _as_number(given)
    if numbers[0] is not None and numbers[1] is not None and not _has_percent(gold, given):
        return not _numbers_differ(*numbers)
    return bool(verify(gold, given, timeout_seconds=None)) and not _differ(gold, given)


def _differ(one: Any, other: Any) -> bool:
    """Say whether two expressions differ: False also where that cannot be decided."""
    import sympy  # type: ignore[import-untyped,unused-ignore]

    one, other = _value(one), _value(other)
    numbers = _as_number(one), _as_number(other)
    if numbers[0] is not None and numbers[1] is not None:
        return not _has_percent(one, other) and _numbers_differ(*numbers)
    if isinstance(one, sympy.FiniteSet) and isinstance(other, sympy.FiniteSet):
        return any(all(_differ(left, right) for right in other.args) for left in one.args)
    if isinstance(one, sympy.MatrixBase) and isinstance(other, sympy.MatrixBase):
        return any(_differ(*pair) for pair in zip(one.flat(), other.flat(), strict=False))
    if isinstance(one, sympy.Expr) and isinstance(other, sympy.Expr):
        return _values_differ(one, other)
    if isinstance(one, sympy.Basic) and type(one) is type(other) and len(one.args) == len(other.args):
        return any(_differ(*pair) for pair in zip(one.args, other.args, strict=True))
    return False


def _value(expression: Any) -> Any:
    """Return 5 for ``x = 5``."""
    import sympy

    is_value = isinstance(expression, sympy.Eq) and isinstance(expression.lhs, sympy.Symbol)
    return expression.rhs if is_value else expression


def _as_number(expression: Any) -> Any:
    """Return an expression without variables, its decimals as the fractions they are; None for anything else."""
    import sympy

    if not isinstance(expression, sympy.Expr) or not expression.is_number or expression.is_finite is False:
        return None
    return expression.replace(lambda part: part.is_Float, lambda part: sympy.Rational(str(part)))


def _has_percent(*expressions: Any) -> bool:
    """Say whether math-verify read a percent sign: it keeps it as a product with 1/100."""
    import sympy

    return any(isinstance(e, sympy.Mul) and sympy.Rational(1, 100) in e.args for e in expressions)


def _numbers_differ(one: Any, other: Any) -> bool:
    one, other = one.doit(), other.doit()
    if one.is_Rational and other.is_Rational:
        return bool(one != other)
    first, second = one.evalf(60), other.evalf(60)
    scale = max(abs(first), abs(second))
    return bool(scale.is_comparable and abs(first - second) > scale * 10**-45)


def _values_differ(one: Any, other: Any) -> bool:
    """Compare two functions of the same variables at a few points."""
    import sympy

    symbols = sorted(one.free_symbols | other.free_symbols, key=str)
    if len(symbols) != len(one.free_symbols):
        return False
    for start in (3, 11, 23):
        point = {symbol: sympy.Rational(start + 2 * i, 7 + i) for i, symbol in enumerate(symbols)}
        numbers = _as_number(one.subs(point)), _as_number(other.subs(point))
        if numbers[0] is not None and numbers[1] is not None and _numbers_differ(*numbers):
            return True
    return False
