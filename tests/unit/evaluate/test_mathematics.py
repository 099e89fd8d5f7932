"""The last box is compared with the reference: what is written differently is equal, different numbers never are."""

from __future__ import annotations

from fractions import Fraction

import pytest

from megatron_tropd.errors import DataError
from megatron_tropd.evaluate.mathematics import check_math_reference, exact_number, last_box
from megatron_tropd.evaluate.rules import grade

EQUAL = [
    (r"\$36", r"\$36"), (r"\$18.90", "18.90"), (r"\$32,\!348", "32348"), (r"\[5\]", "5"), ("$36", "36"),
    (r"\(5\)", "5"), ("$$5$$", "5"), ("10,000", r"10\,000"), ("10 000", "10000"), ("1,000,000", "1000000"),
    ("90", "90°"), ("12", r"12^\circ"), ("5", "5."), ("x²", "x^2"), ("½", r"\frac12"), ("1e-5", "0.00001"),
    ("1.5e3", r"1.5\times 10^{3}"), ("-3", "\u22123"), ("3/4", "0.75"), ("3/4", r"\dfrac{3}{4}"), ("x=5", "5"),
    (r"3\frac{1}{2}", "3.5"), ("2^{10}", "1024"), ("5", r"5\text{ cm}"), ("5", "x=5"), ("9", r"9\%"), ("0.09", r"9\%"),
    (r"\text{Tuesday}", "Tuesday"), ("Evelyn", r"\text{Evelyn}"), ("x+1", "1+x"), (r"2\sqrt{3}", r"\sqrt{12}"),
    ("£36", "36"), ("36", "€36"), (r"\begin{equation}5\end{equation}", "5"),
    (r"\{1,2\}", r"\{2,1\}"), (r"\sin^2 x+\cos^2 x", "1"), (r"\frac{1}{2^{99}}", "2^{-99}"), (r"\boxed{7}", "7"),
]  # fmt: skip
DIFFERENT = [
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"), (r"\frac{1}{2004!}", r"\frac{1}{2006!}"), (r"\frac{1}{2^{99}}", "0"),
    (r"\frac{1}{3}", "0.333333"), (r"\sqrt{2}", "1.41421356"), (r"\frac{\pi}{4}", "0.785398163"), ("0", "10^{-30}"),
    ("0.1", "0.10000000000000001"), ("1.0000001", "1"), ("10^{50}", "10^{50}+1"), ("100!", "100!+1"),
    (r"\sqrt{2}+10^{-20}", r"\sqrt{2}"), (r"(\frac{1}{2^{99}},1)", r"(\frac{1}{2^{98}},1)"), ("(1,2)", "(1,3)"),
    (r"\{\frac{1}{2^{99}}\}", r"\{\frac{1}{2^{98}}\}"), (r"x+\frac{1}{2^{99}}", r"x+\frac{1}{2^{98}}"),
    ("[1,2]", "[1,2)"), (r"x \le 3", "x<3"), ("1/0", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "boxed"), EQUAL)
def test_what_is_written_differently_is_equal(reference, boxed):
    assert grade("math", f"So it is \\boxed{{{boxed}}}.", reference)


@pytest.mark.parametrize(("reference", "boxed"), DIFFERENT)
def test_different_numbers_are_never_equal(reference, boxed):
    assert not grade("math", f"So it is \\boxed{{{boxed}}}.", reference)


@pytest.mark.parametrize(
    ("response", "box"),
    [
        (r"\boxed{41} ... recheck. \boxed{42}", "42"),
        ("\\boxed{41}\n\n$\\boxed{42}$", "42"),
        (r"\boxed{41} hm \boxed{4", "41"),
        (r"\boxed{41, no \boxed{42}", "42"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{3} and so on", "3"),
        (r"\boxed 7.", "7"),
        (r"\boxed{1} and \boxed{2}", r"\{1, 2\}"),
        (r"$\boxed{1}$, $\boxed{2}$ or \boxed{3}", r"\{1, 2, 3\}"),
        (r"\boxed{1}, but rather \boxed{2}", "2"),
        (r"x = \boxed{1} or x = \boxed{2}", r"\{1, 2\}"),
        (r"$x_1=\boxed{1}$, $x_{2}=\boxed{2}$", r"\{1, 2\}"),
        (r"\boxed{1}, so total = \boxed{2}", "2"),
        ("no box, only {braces}", None),
        (r"\boxed{", None),
    ],
)
def test_the_last_balanced_box_is_the_answer(response, box):
    assert last_box(response) == box


def test_an_answer_that_hedges_is_wrong_and_one_of_several_parts_is_right():
    assert not grade("math", r"\boxed{41} or \boxed{42}", "42")
    assert grade("math", r"\boxed{1} and \boxed{2}", "1,2")
    assert not grade("math", r"\boxed{41} ... recheck. \boxed{42}", "41")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1,234.5", (Fraction(2469, 2), False)), ("-.5", (Fraction(-1, 2), False)), ("7.", (Fraction(7), False)),
        (r"\frac{-3}{4}", (Fraction(-3, 4), False)), (r"-\frac34", (Fraction(-3, 4), False)),
        ("1e16", (Fraction(10**16), False)),
        (r"5\%", (Fraction(5), True)), ("1,23", None), ("x", None), ("", None),
        (".", None), ("3/0", None), ("9" * 401, None),
    ],
)  # fmt: skip
def test_plain_numbers_are_read_exactly(text, number):
    assert exact_number(text) == number


def test_references_that_are_no_mathematics_are_found():
    for fine in ("5", r"\frac{1}{2}", "48\n#### 72", r"\$36"):
        check_math_reference(fine)
    for bad in ("", " ", "$$", "#### "):
        with pytest.raises(DataError, match="is not an expression math-verify can read"):
            check_math_reference(bad)
