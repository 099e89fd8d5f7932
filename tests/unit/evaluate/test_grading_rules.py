from __future__ import annotations

import itertools
import math
import threading
from decimal import Decimal

import numpy as np
import pytest
from scipy import stats

from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.evaluate.choices import chosen_letter
from megatron_tropd.evaluate.intervals import accuracy_interval, pass_at_k, pass_at_k_interval
from megatron_tropd.evaluate.numbers import final_answer
from megatron_tropd.evaluate.rules import extracted, grade

FINAL_ANSWERS = {
    "First 3*12=36. Then 36-5=31. #### 31": "31",
    "#### 42": "42",
    "####42\n": "42",
    "#### -7": "-7",
    "#### \u22127": "-7",
    "#### 1,234,567": "1234567",
    "#### $1,234.50": "1234.5",
    "#### -$5": "-5",
    "#### $-5": "-5",
    "#### 0.25": "0.25",
    "#### .5": "0.5",
    "#### +3": "3",
    "#### 42.": "42",
    "#### 42, I think": "42",
    "#### 42 apples": "42",
    "#### 10%": "10",
    "#### 1 no, #### 2": "2",
    "#### 5 and then #### none": None,
    "the answer is 42": None,
    "####": None,
    "#### ": None,
    "#### 1/2": None,
    "#### 42/7": None,
    "#### 1,23": None,
    "#### 3.14.15": None,
    "#### 5e3": "5000",
    "#### 1e-05": "0.00001",
    "#### **42**": "42",
    "**#### 42**": "42",
    "#### __42__": "42",
    r"#### \boxed{42}": "42",
    r"#### \boxed{\text{42}}": "42",
    r"#### $\$42$": "42",
    r"#### \$42": "42",
    r"#### \(42\)": "42",
    "#### (42)": "42",
    "#### 42kg": "42",
    "#### 42 km/h": "42",
    "#### 42%": "42",
    "#### Answer: 42": "42",
    "#### The answer is 42": "42",
    "#### The final answer is: **42**.": "42",
    "#### x = 42": "42",
    "#### 6 * 7 = 42": "42",
    "#### 42 = 6 * 7": "42",
    "#### `42`": "42",
    "#### <<6*7=42>>42": "42",
    "#### 1 234": "1234",
    "#### 1\u202f234,567": None,
    "#### 1\u202f234.5": "1234.5",
    "#### \u20ac42": "42",
    "#### 42\u20ac": "42",
    "#### \uff14\uff12": "42",
    r"#### 32,\!348": "32348",
    "#### 32{,}348": "32348",
    "####\n42": "42",
    "#### 42 ####": "42",
    "#### 42\n\n#### Check\nfine": "42",
    "#### 42\n\n#### Step 2: check\nfine": "42",
    "#### about 42": "42",
    "#### 42<|im_end|>": "42",
    "#### 12:30": None,
    "#### 42k": None,
    "#### 2**5": None,
    "#### 3 + 4": None,
    "#### 10-12": None,
    r"#### \frac{1}{2}": None,
    "#### 1.234,56": None,
    "#### 12abc": None,
    "": None,
}


@pytest.mark.parametrize("text", FINAL_ANSWERS)
def test_final_answer_reads_the_number_behind_the_last_marker(text):
    expected = FINAL_ANSWERS[text]
    assert final_answer(text) == (None if expected is None else Decimal(expected))


def test_final_numbers_compare_as_numbers():
    assert grade("final_number", "so #### 1,000.0", "1000")
    assert grade("final_number", "#### 72", "Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72")
    assert not grade("final_number", "#### 71", "72")
    assert not grade("final_number", "72", "72")  # the marker is part of the task
    assert grade("final_number", "#### 0", "0") and not grade("final_number", "I do not know", "0")
    assert not grade("final_number", "#### 0.3", "0.30000000000000001")  # exact, not rounded to doubles
    with pytest.raises(DataError, match="'seven' is not a number"):
        grade("final_number", "#### 7", "seven")
    for missing in ("", "nan", "None"):
        with pytest.raises(DataError, match=f"{missing!r} is not a number"):
            grade("final_number", "#### 7", missing)
    assert grade("final_number", "#### 0.00001", "1e-05") and grade("final_number", "#### 36", r"\$36")


def test_exact_and_regex_kinds():
    assert grade("exact", " yes\n", "yes") and not grade("exact", "Yes", "yes")
    assert not grade("exact", "yes or no", "yes") and not grade("exact", "", "yes")
    assert grade("regex", "it is 42!", r"\b42\b") and not grade("regex", "it is 142!", r"\b42\b")
    for reference in ("(", "", "nan", "NaN "):  # the last ones are what a missing value looks like as text
        with pytest.raises(DataError, match="not a regular expression"):
            grade("regex", "finance", reference)
    with pytest.raises(DataError, match="is empty"):
        grade("exact", "", " ")


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        (r"Thus $x=\frac{1}{2}$, so \boxed{\frac{1}{2}}", "0.5", True),
        (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", True),
        (r"\boxed{(1,2)}", "(1,2)", True),
        (r"\boxed{\sqrt{8}}", r"$2\sqrt{2}$", True),
        (r"\boxed{43}", "42", False),
        ("I do not know", "42", False),
        ("The answer is 72", "48+24\n#### 72", True),
        ("The answer is 24", "24\n#### 72", False),
    ],
)
def test_math_kind_sees_equal_mathematics(response, answer, right):
    assert grade("math", response, answer) is right


def test_math_kind_works_off_the_main_thread():
    results: list[bool] = []
    thread = threading.Thread(target=lambda: results.append(grade("math", r"\boxed{\frac{1}{2}}", "0.5")))
    thread.start()
    thread.join()
    assert results == [True]


def test_references_and_kinds_that_cannot_be_used_are_refused():
    with pytest.raises(DataError, match="math-verify can read"):
        grade("math", "42", "")
    with pytest.raises(ConfigError, match="choice, code, exact, final_number, math, regex"):
        grade("f1", "a", "b")


CHOICES = {
    r"I think \boxed{B}": "B",
    r"\boxed{\text{(C)}}": "C",
    "The answer is (D).": "D",
    "Answer: **A**": "A",
    "The correct option is C, not B": "C",
    "answer is A. Wait, the answer is B": "B",
    "#### E": "E",
    "B": "B",
    "(B)": "B",
    "B) because it is odd": "B",
    "Both are odd.\nC\n": "C",
    r"\boxed{B. 42}": "B",
    r"\boxed{b}": "B",
    r"\boxed{\textbf{(D) } 42}": "D",
    "**Answer: C**": "C",
    "**Answer:** C": "C",
    "Answer: (C) 42": "C",
    "B is the correct answer": "B",
    "So B is correct.": "B",
    "A is correct": "A",
    "**(B)** is the best choice": "B",
    "I choose B": "B",
    "I'd go with option D.": "D",
    "The best choice would be: B": "B",
    "The correct answer is option B": "B",
    "I think it's **B**.": "B",
    "The answer is not A. It is B": "B",
    "It is A lot, or it is I who err.": None,
    "It is A or B.": None,
    "The answer is A because it is odd": "A",
    "The answer is A, and not B": "A",
    "\u7b54\u6848\uff1aB": "B",
    "\u7b54\u6848\u662f B\u3002": "B",
    "The answer is B. Option C is for cats.": "B",
    "A is not correct. B is correct.": "B",
    "The answer is therefore B.": "B",
    "The answer is 'B'": "B",
    "<answer>B</answer>": "B",
    "It must be B.": "B",
    "The answer is A's sister": None,
    "The answer is A lot": None,
    "The answer is I think 4": None,
    "A is not correct.": None,
    "A good question. I do not know.": None,
    "the answer is a number": None,
    "Answer: Because": None,
    "": None,
}


@pytest.mark.parametrize("text", CHOICES)
def test_the_letter_a_response_settles_on(text):
    assert chosen_letter(text) == CHOICES[text]
    if CHOICES[text]:
        assert grade("choice", text, CHOICES[text]) and not grade("choice", text, "J")


def test_choices_are_letters():
    assert grade("choice", "B", "(B)")
    for answer in ("", "3", "Berlin", "Z"):
        with pytest.raises(DataError, match="is not a choice: give one letter"):
            grade("choice", "B", answer)


def test_extraction_gives_the_last_match_and_nothing_where_there_is_none():
    assert extracted("x=1, x=2", r"x=(\d)") == "2"
    assert extracted("x=1, x=2", r"x=\d") == "x=2"
    either = r"Answer: (\d+)|\[(\d+)\]"  # the group that took part in the match, not an empty first one
    assert extracted("Answer: 1, no [2]", either) == "2" and extracted("[2] or Answer: 1", either) == "1"
    assert extracted("all of it", ".*") == "all of it"  # and not the nothing behind it
    assert extracted("nothing", r"x=(\d)") == "" and extracted("as it is", None) == "as it is"
    with pytest.raises(ConfigError, match="not a regular expression"):
        extracted("x", "(")


# --------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("right", "total"), [(0, 7), (1, 7), (7, 7), (300, 512), (511, 512), (1, 1)])
def test_one_sample_per_problem_gives_wilsons_interval(right, total):
    scores = np.arange(total) < right
    expected = stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    for shape in (scores, scores[:, None]):
        accuracy = accuracy_interval(shape)
        assert accuracy == pytest.approx((right / total, expected.low, expected.high), abs=1e-12)


def test_many_problems_give_the_normal_interval_over_problem_means():
    rng = np.random.default_rng(0)
    scores = rng.random((20_001, 4)) < rng.beta(2, 1, size=(20_001, 1))
    means = scores.mean(axis=1)
    expected = stats.norm.interval(0.95, loc=means.mean(), scale=stats.sem(means))
    accuracy = accuracy_interval(scores)
    assert (accuracy.low, accuracy.high) == pytest.approx(expected, abs=5e-5)
    alone = stats.binomtest(int(scores.sum()), scores.size).proportion_ci(method="wilson")
    assert accuracy.high - accuracy.low > 1.2 * (alone.high - alone.low)  # samples of one problem are alike


@pytest.mark.parametrize("hardness", [(2, 1), (9, 1), (0.3, 0.3)])
def test_the_interval_covers_the_truth_about_95_times_in_100(hardness):
    rng = np.random.default_rng(1)
    truth = hardness[0] / sum(hardness)
    hits = 0
    for _ in range(1000):
        chance = rng.beta(*hardness, size=(60, 1))
        accuracy = accuracy_interval(rng.random((60, 3)) < chance)
        hits += accuracy.low <= truth <= accuracy.high
    assert 0.93 <= hits / 1000 <= 0.97  # three standard errors around 0.95


def test_several_samples_count_as_many_as_their_problem_means_vary():
    accuracy = accuracy_interval([[1, 1], [1, 0], [0, 0], [1, 1]])
    # by hand: means 1, 1/2, 0, 1; variance of their mean 0.6875 / 3 / 4; worth 0.625 * 0.375 / that = 4.09 samples
    count = 0.625 * 0.375 / (0.6875 / 3 / 4)
    # Wilson's bounds solve (0.625 - p)^2 = z^2 p (1 - p) / count
    z2 = stats.norm.ppf(0.975) ** 2 / count
    bounds = np.sort(np.roots([1 + z2, -2 * 0.625 - z2, 0.625**2]))
    assert (accuracy.mean, accuracy.low, accuracy.high) == pytest.approx((0.625, *bounds), abs=1e-12)


def test_the_interval_stays_inside_and_open_when_all_or_nothing_is_right():
    everything, nothing = accuracy_interval(np.ones((9, 4))), accuracy_interval(np.zeros((9, 4)))
    expected = stats.binomtest(9, 9).proportion_ci(method="wilson")  # nine problems, however many samples
    assert everything == pytest.approx((1.0, expected.low, 1.0))
    assert nothing == pytest.approx((0.0, 0.0, 1 - expected.low))
    alike = accuracy_interval(np.tile([1, 0], (50, 1)))  # no spread between problems: at most 100 samples' worth
    assert (alike.low, alike.high) == pytest.approx(tuple(stats.binomtest(50, 100).proportion_ci(method="wilson")))
    with pytest.raises(DataError, match=r"got shape \(0,\)"):
        accuracy_interval([])


@pytest.mark.parametrize("n", [1, 5, 16, 200])
def test_pass_at_k_is_the_hypergeometric_chance_of_at_least_one(n):
    for c, k in itertools.product({0, 1, n // 2, n}, {1, (n + 1) // 2, n}):
        assert pass_at_k(n, c, k) == pytest.approx(stats.hypergeom(n, c, k).sf(0), abs=1e-12)


def test_pass_at_k_counts_subsets():
    chosen = list(itertools.combinations([1, 1, 0, 0, 0], 2))
    assert pass_at_k(5, 2, 2) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4) and math.isclose(pass_at_k(5, 4, 2), 1.0)
    with pytest.raises(ConfigError, match="pass@6 needs"):
        pass_at_k(5, 2, 6)
    with pytest.raises(DataError, match="6 right samples of 5"):
        pass_at_k(5, 6, 2)


def test_pass_at_k_of_many_problems_agrees_with_the_bootstrap():
    rng = np.random.default_rng(2)
    right = rng.random((400, 8)) < rng.beta(0.7, 1.2, size=(400, 1))
    for k in (1, 3, 8):
        estimates = np.array([1 - math.comb(8 - c, k) / math.comb(8, k) for c in right.sum(axis=1)])
        expected = stats.bootstrap((estimates,), np.mean, method="BCa", rng=rng).confidence_interval
        interval = pass_at_k_interval(right, k)
        assert interval.mean == pytest.approx(estimates.mean())
        assert (interval.low, interval.high) == pytest.approx(tuple(expected), abs=0.006)


def test_pass_at_k_covers_the_truth_about_95_times_in_100():
    rng, hits, samples, k = np.random.default_rng(3), 0, 4, 2
    # of Beta(2, 1) chances the share of problems that k samples miss is E[(1-p)^2] = 1 - 2 * 2/3 + 2/4
    truth = 1 - (1 - 2 * 2 / 3 + 1 / 2)
    for _ in range(600):
        chance = rng.beta(2, 1, size=(60, 1))
        interval = pass_at_k_interval(rng.random((60, samples)) < chance, k)
        hits += interval.low <= truth <= interval.high
    assert 0.92 <= hits / 600 <= 0.98


def test_pass_at_k_intervals_stay_open_when_all_or_nothing_is_solved():
    expected = stats.binomtest(9, 9).proportion_ci(method="wilson")
    assert pass_at_k_interval(np.ones((9, 4)), 2) == pytest.approx((1.0, expected.low, 1.0))
    assert pass_at_k_interval(np.zeros((9, 4)), 2) == pytest.approx((0.0, 0.0, 1 - expected.low))
    with pytest.raises(DataError, match="pass@k needs"):
        pass_at_k_interval([1, 0], 1)
