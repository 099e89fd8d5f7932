"""Separate a model's thinking from its answer: what stands before the last ``</think>`` is never graded."""

from __future__ import annotations

# opening and closing marks of the reasoning of public models: Qwen3 and DeepSeek-R1; prompts that ask for tags;
# Seed-OSS; Magistral; Kimi; Cohere; Sky-T1 and OpenThinker
THINKING_MARKS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)


def final_part(response: str) -> str | None:
    """Return what follows the thinking, all of it where there is none; None when the text ends within its thinking.

    A closing mark without an opening one counts: many chat templates open the thinking in the prompt.
    """
    end = max((response.rfind(close) + len(close) for _, close in THINKING_MARKS if close in response), default=0)
    answer = response[end:]
    return None if any(opening in answer for opening, _ in THINKING_MARKS) else answer


def opened_thinking(prompt_end: str) -> str:
    """Return the mark with which a prompt opens the thinking of its response; empty where it does not."""
    end = prompt_end.rstrip()
    return next((opening for opening, _ in THINKING_MARKS if end.endswith(opening)), "")
