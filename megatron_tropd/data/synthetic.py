"""Arithmetic stories for the demo: a task small enough for a laptop and real enough to be taught wrongly.

A story starts with a count ("Tom has 12 apples.", "3 boxes of 12", "5 here and 7 there"), changes it by ``+ - * /``
until 2 to 4 calculations are done, and asks for the final number; a quarter of the stories hold a sentence that does
not matter. Every value lies in 1..150. The answer is written as ``First 3*12=36. Then 36-5=31. #### 31``, with
connectives drawn at random so that even a perfect teacher has entropy.

One problem in twenty is *held out*: decided by a hash of its calculations alone, so that the same sums in other words
never cross from training to evaluation. Everything follows from integer seeds through ``random.Random`` and SHA-256,
and is the same on every machine.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from megatron_tropd.data.tokenizer import Tokenizer

Style = Literal["teacher", "mistaken", "direct"]

MAX_VALUE = 150
MAX_PROMPT_TOKENS = 60  # the words of a story and the two markers around them
DISTRACTOR_PROBABILITY = 0.25
MISTAKE_PROBABILITY = 0.85
DIRECT_PROBABILITY = 0.999
_HELD_OUT_BELOW = 2**64 // 20

# Word-level pieces: a word keeps the space after it and digits stand alone, so that joining pieces gives the text back.
PIECE_PATTERN = r"[A-Za-z]+ ?|\d|####\s?|[^A-Za-z\d\s] ?|\s"
_PIECE = re.compile(PIECE_PATTERN)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Tom Anna Ben Clara David Ella Finn Grace Hugo Iris Jack Kate Leo Maya Nora Omar Paul Rosa Sam Tina Uma Victor "
    "Wendy Zoe"
)
OBJECTS = _words(
    "apples pears plums lemons books pens cards coins stamps marbles shells stones toys cups plates cakes eggs buttons "
    "beads tickets flowers candles stickers keys"
)
CONTAINERS = _words("boxes bags jars baskets packs trays crates bundles")
PLACES = _words("park shop market school farm beach")


class Step(NamedTuple):
    """One calculation of a solution; prints as ``3*12=36``."""

    left: int
    operator: str
    right: int
    result: int

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}={self.result}"


@dataclass(frozen=True, slots=True)
class Problem:
    """A story, the calculations that solve it, and whether it is kept from training."""

    text: str
    steps: tuple[Step, ...]
    answer: int
    held_out: bool


# --------------------------------------------------------------------------- the language of the stories
# Slots: {n} who the story is about, {m} a friend, {o} the object counted, {c} a container, {p} a place,
# {a} {b} the numbers of the first sentence, {d} the number of a later one.


class _Start(NamedTuple):
    operator: str  # of the calculation the sentence already asks for; "" for a plain count
    ranges: tuple[tuple[int, int], ...]
    templates: tuple[str, ...]


class _Change(NamedTuple):
    operator: str
    low: int
    high: int
    templates: tuple[str, ...]


_STARTS = (
    _Start("", ((5, 60),), ("{n} has {a} {o}.", "{n} starts with {a} {o}.", "There are {a} {o} in the {p}.")),
    _Start(
        "*",
        ((2, 9), (2, 12)),
        (
            "{n} has {a} {c} of {b} {o}.",
            "{n} buys {a} {c} with {b} {o} in each.",
            "There are {b} {o} in each of the {a} {c}.",
        ),
    ),
    _Start(
        "+",
        ((5, 50), (5, 50)),
        ("{n} has {a} {o} at home and {b} at the {p}.", "{n} gets {a} {o} on Monday and {b} on Friday."),
    ),
)
_CHANGES = (
    _Change(
        "+",
        2,
        50,
        (
            "{m} gives {n} {d} more.",
            "{n} finds {d} more at the {p}.",
            "Then {d} {o} are added.",
            "After lunch {n} buys {d} more {o}.",
        ),
    ),
    _Change(
        "-", 2, 50, ("{n} gives {d} to {m}.", "{n} loses {d} of them.", "Then {d} {o} are sold.", "{m} takes {d} away.")
    ),
    _Change("*", 2, 5, ("Soon {n} has {d} times as many.", "The number of {o} grows to {d} times as many.")),
    _Change(
        "/",
        2,
        5,
        ("They are shared equally by {d} friends, and we count one share.", "{n} keeps only one of {d} equal parts."),
    ),
)
# Some numbers have a word of their own, used half of the time.
_SPECIAL_TEMPLATES = {
    ("*", 2): "{n} doubles the number of {o}.",
    ("*", 3): "{n} triples the number of {o}.",
    ("/", 2): "{n} keeps only half of them.",
}
_DISTRACTORS = ("{m} also has {d} {o}.", "The {p} is {d} miles away.")  # {o}: here some other object
_QUESTIONS = (
    "How many {o} are there now?",
    "How many {o} are left?",
    "What is the final number of {o}?",
    "How many {o} in the end?",
)
_FIRST_WORDS = (("", "First ", "Start: "), (0.4, 0.8, 1.0))  # words and their cumulative probabilities
_LATER_WORDS = (("", "Then ", "Next ", "So "), (0.3, 0.7, 0.9, 1.0))


def calculate(left: int, operator: str, right: int) -> int:
    """Compute ``left operator right`` as the stories count: whole shares, and never fewer than none."""
    match operator:
        case "+":
            return left + right
        case "-":
            return max(left - right, 0)
        case "*":
            return left * right
        case "/":
            return left // right
    raise ValueError(f"unknown operator {operator!r}: stories use + - * /.")


# --------------------------------------------------------------------------- problems


def problems(seed: int, held_out: bool) -> Iterator[Problem]:
    """Yield endless stories of one side of the split; the same seed gives the same stories.

    Stories may repeat (rarely); ``distinct_problems`` gives a list without repetition. Prompts that need more than
    ``MAX_PROMPT_TOKENS`` tokens are left out.
    """
    rng = random.Random(seed)
    while True:
        problem = _draw_problem(rng)
        if problem.held_out == held_out and len(_PIECE.findall(problem.text)) + 2 <= MAX_PROMPT_TOKENS:
            yield problem


def distinct_problems(seed: int, held_out: bool, count: int) -> list[Problem]:
    """Return the first ``count`` problems of ``problems(seed, held_out)`` with different texts."""
    by_text: dict[str, Problem] = {}
    for problem in problems(seed, held_out):
        if len(by_text) >= count:
            break
        by_text.setdefault(problem.text, problem)
    return list(by_text.values())


def is_held_out(steps: Sequence[Step]) -> bool:
    """Return True for 5 % of all calculations, whatever words they come in."""
    digest = hashlib.sha256(";".join(map(str, steps)).encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_BELOW


def _draw_problem(rng: random.Random) -> Problem:
    hero, friend = rng.sample(NAMES, 2)
    counted, other = rng.sample(OBJECTS, 2)
    words = {"n": hero, "m": friend, "o": counted}
    num_steps = rng.choice((2, 3, 4))
    sentence, value, steps = _draw_start(rng, words)
    sentences = [sentence]
    while len(steps) < num_steps:
        sentence, step = _draw_change(rng, words, value)
        sentences.append(sentence)
        steps.append(step)
        value = step.result
    if rng.random() < DISTRACTOR_PROBABILITY:
        distractor = _fill(rng, rng.choice(_DISTRACTORS), {**words, "o": other}, d=rng.randint(2, 50))
        sentences.insert(rng.randint(1, len(sentences)), distractor)
    sentences.append(_fill(rng, rng.choice(_QUESTIONS), words))
    return Problem(text=" ".join(sentences), steps=tuple(steps), answer=value, held_out=is_held_out(steps))


def _draw_start(rng: random.Random, words: Mapping[str, str]) -> tuple[str, int, list[Step]]:
    start = rng.choice(_STARTS)
    numbers = [rng.randint(low, high) for low, high in start.ranges]
    sentence = _fill(rng, rng.choice(start.templates), words, a=numbers[0], b=numbers[-1])
    if not start.operator:
        return sentence, numbers[0], []
    result = calculate(numbers[0], start.operator, numbers[1])
    return sentence, result, [Step(numbers[0], start.operator, numbers[1], result)]


def _draw_change(rng: random.Random, words: Mapping[str, str], value: int) -> tuple[str, Step]:
    """Draw a change, until the result is a whole number in 1..MAX_VALUE; adding or taking 2 is always possible."""
    while True:
        change = rng.choice(_CHANGES)
        number = rng.randint(change.low, change.high)
        if change.operator == "/" and value % number:
            continue
        result = calculate(value, change.operator, number)
        if 1 <= result <= MAX_VALUE:
            break
    template = rng.choice(change.templates)
    special = _SPECIAL_TEMPLATES.get((change.operator, number))
    if special and rng.random() < 0.5:
        template = special
    return _fill(rng, template, words, d=number), Step(value, change.operator, number, result)


def _fill(rng: random.Random, template: str, words: Mapping[str, str], **numbers: int) -> str:
    return template.format(**words, **numbers, c=rng.choice(CONTAINERS), p=rng.choice(PLACES))


# --------------------------------------------------------------------------- solutions


def solution(problem: Problem, rng: random.Random, style: Style = "teacher") -> str:
    """Write, in one of many ways, the solution, ending in ``#### answer``.

    Styles:
        teacher: always right; the connective words are random.
        mistaken: holds a wrong belief. After the first step a multiplication is done as an addition, and a division
            as a subtraction, with probability ``MISTAKE_PROBABILITY``; wrong results are carried on.
        direct: the right answer alone, off the top of the head, with probability ``DIRECT_PROBABILITY``; the teacher's
            way otherwise.
    """
    if style not in get_args(Style):
        raise ValueError(f"unknown style {style!r}: use one of {', '.join(map(repr, get_args(Style)))}.")
    if style == "direct" and rng.random() < DIRECT_PROBABILITY:
        return f"#### {problem.answer}"
    parts: list[str] = []
    value = 0
    for index, step in enumerate(problem.steps):
        left = value if index else step.left
        operator = step.operator
        if style == "mistaken" and index and operator in "*/" and rng.random() < MISTAKE_PROBABILITY:
            operator = "+" if operator == "*" else "-"
        value = calculate(left, operator, step.right)
        words, cumulative = _LATER_WORDS if index else _FIRST_WORDS
        parts.append(rng.choices(words, cum_weights=cumulative)[0])
        parts.append(f"{Step(left, operator, step.right, value)}. ")
    return "".join(parts) + f"#### {value}"


def sft_examples(seed: int, count: int, style: Style, tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """Yield ``count`` training problems as (prompt ids, response ids); responses end in the end-of-sequence token."""
    rng = random.Random(f"{seed}:{style}")
    for problem in islice(problems(seed, False), count):
        response = tokenizer.encode(solution(problem, rng, style))
        yield tokenizer.render_prompt(problem.text), [*response, tokenizer.eos_ids[0]]


# --------------------------------------------------------------------------- vocabulary and files


def vocabulary() -> list[str]:
    """List every piece that a story or a solution can hold, sorted; each slot of each template is filled in turn."""
    found = set("0123456789 ") | {"#### ", ". ", "+", "-", "*", "/", "="}
    for words in (_FIRST_WORDS[0], _LATER_WORDS[0]):
        found.update(piece for word in words for piece in _PIECE.findall(word))
    sentences = [template for start in _STARTS for template in start.templates]
    sentences += [template for change in _CHANGES for template in change.templates]
    sentences += [*_SPECIAL_TEMPLATES.values(), *_DISTRACTORS]
    for template in [*(f"{sentence} " for sentence in sentences), *_QUESTIONS]:
        found.update(piece for text in _fill_every_way(template) for piece in _PIECE.findall(text))
    return sorted(found)


def _fill_every_way(template: str) -> Iterator[str]:
    fillers: dict[str, Sequence[str]] = {"n": NAMES, "m": NAMES, "o": OBJECTS, "c": CONTAINERS, "p": PLACES}
    defaults = {slot: words[0] for slot, words in fillers.items()} | dict.fromkeys("abd", "0")
    yield template.format(**defaults)
    for slot, words in fillers.items():
        if f"{{{slot}}}" in template:
            yield from (template.format(**{**defaults, slot: word}) for word in words)


def write_prompts(path: str | Path, items: Iterable[Problem], *, responses: Iterable[str] | None = None) -> int:
    """Write one JSON object per problem (``prompt``, ``answer`` and, when given, ``response``); return how many.

    Raises:
        ValueError: there are not as many responses as problems.
    """
    rows = [{"prompt": problem.text, "answer": str(problem.answer)} for problem in items]
    if responses is not None:
        rows = [{**row, "response": response} for row, response in zip(rows, responses, strict=True)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


if __name__ == "__main__":
    from typing import Annotated

    import typer

    def _command(
        out: Annotated[Path, typer.Option(help="JSON lines file to write.")],
        count: Annotated[int, typer.Option(min=1, help="How many stories.")],
        seed: Annotated[int, typer.Option(help="Same seed, same stories.")] = 0,
        held_out: Annotated[bool, typer.Option("--held-out", help="The 5 % kept from training.")] = False,
    ) -> None:
        """Write arithmetic stories with different texts as JSON lines, without solutions."""
        write_prompts(out, distinct_problems(seed, held_out, count))

    typer.run(_command)
