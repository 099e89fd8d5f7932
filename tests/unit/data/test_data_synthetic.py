from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest

from megatron_tropd.data import synthetic
from megatron_tropd.data.synthetic import Problem, Step, problems, solution

REPOSITORY = Path(__file__).resolve().parents[3]


def load_make_data() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_data", REPOSITORY / "examples" / "demo" / "make_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stories() -> list[Problem]:
    return list(islice(problems(11, False), 3000)) + list(islice(problems(12, True), 700))


def count_by_reading(text: str) -> int:
    """Solves a story from its words alone, knowing nothing of the generator."""
    sentences = re.findall(r"[^.?]+[.?]", text)
    counted = re.search(r"(?:many|of) (\w+)[ ?]", sentences[-1]).group(1)
    value: int | None = None
    for sentence in sentences[:-1]:
        numbers = [int(number) for number in re.findall(r"\d+", sentence)]
        if "miles" in sentence or " also has " in sentence:
            continue
        if value is None:
            assert counted in sentence
            several = " at home " in sentence or " Monday " in sentence
            value = numbers[0] if len(numbers) == 1 else sum(numbers) if several else numbers[0] * numbers[1]
        elif "times as many" in sentence:
            value *= numbers[0]
        elif "doubles" in sentence or "triples" in sentence:
            value *= 2 if "doubles" in sentence else 3
        elif "half" in sentence:
            value /= 2
        elif "shared" in sentence or "equal parts" in sentence:
            value /= numbers[0]
        elif re.search(r"more|added", sentence):
            value += numbers[0]
        elif re.search(r"gives|loses|sold|away", sentence):
            value -= numbers[0]
        else:
            raise AssertionError(f"cannot read {sentence!r}")
    assert value is not None and value == int(value)
    return int(value)


def test_the_words_of_a_story_say_what_its_steps_compute(stories):
    for story in stories:
        assert count_by_reading(story.text) == story.answer == story.steps[-1].result, story


def test_steps_are_right_and_chained_and_stay_between_1_and_150(stories):
    for story in stories:
        assert 2 <= len(story.steps) <= 4
        for before, step in zip((None, *story.steps), story.steps, strict=False):
            assert eval(f"{step.left}{step.operator}{step.right}") == step.result  # true division: exact shares only
            assert 1 <= step.result <= 150
            assert before is None or before.result == step.left


def test_a_quarter_of_the_stories_holds_a_sentence_that_does_not_matter(stories):
    share = sum(" also has " in story.text or " miles " in story.text for story in stories) / len(stories)
    assert share == pytest.approx(0.25, abs=0.03)  # a little less: longer prompts are left out more often


def test_the_split_depends_on_the_calculations_alone_and_is_five_percent():
    rng = random.Random(3)
    drawn = [synthetic._draw_problem(rng) for _ in range(20_000)]
    side: dict[str, bool] = {}
    for story in drawn:
        key = ";".join(f"{s.left}{s.operator}{s.right}={s.result}" for s in story.steps)
        assert side.setdefault(key, story.held_out) == story.held_out
    assert len(side) < len(drawn)  # some calculations came in two wordings
    assert sum(side.values()) / len(side) == pytest.approx(0.05, abs=0.005)


def test_training_never_sees_the_calculations_of_a_held_out_problem():
    trained = {story.steps for story in islice(problems(5, False), 5000)}
    held = {story.steps for story in islice(problems(5, True), 500)}
    assert not trained & held
    assert synthetic.is_held_out([Step(3, "*", 12, 36), Step(36, "-", 5, 31)]) == (
        int.from_bytes(hashlib.sha256(b"3*12=36;36-5=31").digest()[:8], "big") / 2**64 < 0.05
    )


def test_stories_are_the_same_in_every_run():
    # recorded once; hash() differs from run to run, so a dependence on it would show here
    digest = hashlib.sha256()
    rng = random.Random(9)
    for story in islice(problems(0, False), 300):
        digest.update(f"{story.text}{solution(story, rng)}{solution(story, rng, 'mistaken')}".encode())
    assert digest.hexdigest() == "574c1fccee3fae4dad7453e8429badb880a7605ead2f82300fda9b2567e22223"


def test_prompts_fit_sixty_tokens_and_use_only_the_vocabulary(stories):
    rng = random.Random(1)
    known, used = set(synthetic.vocabulary()), set()
    for story in stories:
        pieces = re.findall(synthetic.PIECE_PATTERN, story.text)
        assert len(pieces) + 2 <= 60 and "".join(pieces) == story.text
        used.update(pieces)
        for style in ("teacher", "mistaken"):
            used.update(re.findall(synthetic.PIECE_PATTERN, solution(story, rng, style)))
    assert used == known  # no unknown word and no dead token


EXAMPLE = Problem(
    text="", steps=(Step(3, "*", 12, 36), Step(36, "-", 6, 30), Step(30, "/", 5, 6), Step(6, "*", 2, 12)), answer=12,
    held_out=False,
)  # fmt: skip


def test_the_teacher_is_always_right_and_words_vary():
    rng = random.Random(2)
    texts = [solution(EXAMPLE, rng) for _ in range(2000)]
    bare = {re.sub(r"First |Start: |Then |Next |So ", "", text) for text in texts}
    assert bare == {"3*12=36. 36-6=30. 30/5=6. 6*2=12. #### 12"}
    first = [re.match(r"(First |Start: |)3", text).group(1) for text in texts]
    assert first.count("First ") / 2000 == pytest.approx(0.4, abs=0.04)
    assert first.count("Start: ") / 2000 == pytest.approx(0.2, abs=0.04)


def test_the_mistaken_style_confuses_later_products_and_shares_and_carries_the_error():
    rng = random.Random(4)
    texts = [solution(EXAMPLE, rng, "mistaken") for _ in range(4000)]
    bare = [re.sub(r"First |Start: |Then |Next |So ", "", text) for text in texts]
    shares = {text: bare.count(text) / 4000 for text in set(bare)}
    expected = {  # by hand; a belief is wrong with probability 0.85, independently per step; the first step is right
        "3*12=36. 36-6=30. 30-5=25. 25+2=27. #### 27": 0.85 * 0.85,
        "3*12=36. 36-6=30. 30-5=25. 25*2=50. #### 50": 0.85 * 0.15,
        "3*12=36. 36-6=30. 30/5=6. 6+2=8. #### 8": 0.15 * 0.85,
        "3*12=36. 36-6=30. 30/5=6. 6*2=12. #### 12": 0.15 * 0.15,
    }
    assert shares == pytest.approx(expected, abs=0.02)


def test_the_direct_style_gives_the_answer_alone_but_for_one_in_a_thousand():
    rng = random.Random(6)
    texts = [solution(EXAMPLE, rng, "direct") for _ in range(20_000)]
    shown = [text for text in texts if text != "#### 12"]
    bare = {re.sub(r"First |Start: |Then |Next |So ", "", text) for text in shown}
    assert bare == {"3*12=36. 36-6=30. 30/5=6. 6*2=12. #### 12"}
    assert 5 <= len(shown) <= 40  # 20 expected; a chance of 1e-4 to be outside


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="'teacher', 'mistaken', 'direct'"):
        solution(EXAMPLE, random.Random(0), "student")


def test_written_rows_hold_prompt_answer_and_response(tmp_path):
    stories = synthetic.distinct_problems(3, True, 5)
    assert synthetic.write_prompts(tmp_path / "new" / "x.jsonl", stories, responses=list("abcde")) == 5
    rows = [json.loads(line) for line in (tmp_path / "new" / "x.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [story.text for story in stories]
    assert [int(row["answer"]) for row in rows] == [story.answer for story in stories]
    assert "".join(row["response"] for row in rows) == "abcde"
    with pytest.raises(ValueError):
        synthetic.write_prompts(tmp_path / "y.jsonl", stories, responses=["one"])


def test_the_command_line_writes_held_out_stories(tmp_path):
    out = tmp_path / "stories.jsonl"
    command = [sys.executable, "-m", "megatron_tropd.data.synthetic", "--out", str(out), "--count", "7", "--seed", "3"]
    subprocess.run([*command, "--held-out"], cwd=REPOSITORY, check=True, timeout=60)
    texts = [json.loads(line)["prompt"] for line in out.read_text().splitlines()]
    assert texts == [story.text for story in synthetic.distinct_problems(3, True, 7)]


@pytest.mark.parametrize("name", ["train", "heldout"])
def test_the_demo_data_in_the_repository_is_what_make_data_writes(name):
    make_data = load_make_data()
    file = REPOSITORY / "examples" / "demo" / "data" / f"{name}.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    stories = make_data.train_problems() if name == "train" else make_data.heldout_problems()
    assert [(row["prompt"], row["answer"]) for row in rows] == [(story.text, str(story.answer)) for story in stories]
    assert len({row["prompt"] for row in rows}) == len(rows)
    assert {story.held_out for story in stories} == {name == "heldout"}
    assert file.stat().st_size < 1_500_000
