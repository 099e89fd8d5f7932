"""Writes the demo's stories and its tokenizer: ``python examples/demo/make_data.py``.

``data/train.jsonl`` (prompt, answer) and ``data/heldout.jsonl`` (stories whose calculations never occur in training).
The teacher's responses, which guide the student's first steps, are added by whoever has the teacher at hand.
"""

from __future__ import annotations

import json
from pathlib import Path

from megatron_tropd.data.synthetic import (
    PIECE_PATTERN,
    Problem,
    distinct_problems,
    sft_examples,
    vocabulary,
    write_prompts,
)

__all__ = ["heldout_problems", "save_tokenizer", "sft_examples", "train_problems", "write_data", "write_prompts"]

HERE = Path(__file__).resolve().parent
TRAIN_COUNT, TRAIN_SEED = 2048, 1
HELDOUT_COUNT, HELDOUT_SEED = 512, 2

PAD, EOS, USER, ASSISTANT = "<pad>", "<eos>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, EOS, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}<eos>"
    "{% else %}{{ raise_exception('roles are user and assistant, not ' + message['role']) }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_problems() -> list[Problem]:
    """The stories of ``data/train.jsonl``, in its order."""
    return distinct_problems(TRAIN_SEED, False, TRAIN_COUNT)


def heldout_problems() -> list[Problem]:
    """The stories of ``data/heldout.jsonl``, in its order."""
    return distinct_problems(HELDOUT_SEED, True, HELDOUT_COUNT)


def write_data(directory: Path) -> None:
    """Writes both files of stories into ``directory``; files that were there, responses included, are replaced."""
    write_prompts(directory / "train.jsonl", train_problems())
    write_prompts(directory / "heldout.jsonl", heldout_problems())


def save_tokenizer(directory: str | Path) -> None:
    """Writes a word-level Hugging Face tokenizer that knows exactly the words of the stories.

    There is no token for unknown words on purpose: encoding one is an error, not silent damage.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    words = [*SPECIAL_TOKENS, *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECE_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # pieces hold their own spaces
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "additional_special_tokens": [USER, ASSISTANT],
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_data(HERE / "data")
