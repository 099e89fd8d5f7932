"""Tokenizers: one protocol, two kinds of files (Hugging Face directories and raw sentencepiece models).

Nothing here reaches the network or runs code that comes with a model. ``transformers`` is imported only when a
Hugging Face directory is loaded, because the import alone costs seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Protocol

from megatron_tropd.data.chat import ChatTemplate, Message, Tools
from megatron_tropd.data.tokenizer_growth import check_growth
from megatron_tropd.errors import TokenizerError
from megatron_tropd.storage.kinds import adapter_base, foreign_kind
from megatron_tropd.storage.model_files import check_model_files

TOKENIZER, GENERATION, CONFIG = "tokenizer", "generation_config.json", "config.json"  # where end tokens are named
TEMPLATE = "chat template"
_REPLACEMENT = "\ufffd"  # what an unfinished UTF-8 character decodes to


class Tokenizer(Protocol):
    """The protocol of a tokenizer."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Return the tokens that end a response: the tokenizer's own, those of ``generation_config.json``, what the
        chat template ends a turn with, and those of ``config.json``."""

    @property
    def end_sources(self) -> Mapping[str, tuple[int, ...]]:
        """Map the model's files to the end tokens that each names; ``TEMPLATE`` is the chat template."""

    @property
    def turn_end(self) -> int:
        """Return the one of ``eos_ids`` that the chat template ends a turn with; the first where there is none."""

    @property
    def bos_id(self) -> int | None:
        """Return the token that begins a text, where the tokenizer has one."""

    @property
    def chat(self) -> ChatTemplate | None:
        """Return the chat template that prompts are rendered with; None: they are plain text."""

    @property
    def pad_id(self) -> int:
        """Return the id that fills up batches, never trained on; without a padding token, the first of ``eos_ids``."""

    @property
    def vocab(self) -> Mapping[str, int]:
        """Map each token (as stored, not as decoded) to its id, added and special tokens included."""

    @property
    def vocab_size(self) -> int:
        """Return the largest id + 1. A model's embedding may be larger (padding), never smaller."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of ``text`` and nothing else: no beginning- or end-of-sequence token is added."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids`` without special tokens."""

    def response_text(self, ids: Iterable[int]) -> str:
        """Return the text of a sampled response up to its end, with special tokens (``<think>``, ``[TOOL_CALLS]``)."""

    def token_text(self, i: int) -> str:
        """Return a token as it is written in a text."""

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """Return one readable piece per id, special tokens included; joined, the pieces are the decoded text.

        A character spread over several tokens shows at the last of them.
        """

    def render_prompt(self, prompt: str | Sequence[Message], *, tools: Tools | None = None) -> list[int]:
        """Return the ids a model should continue: of ``prompt`` in the chat template, or alone where there is none."""

    def fingerprint(self) -> str:
        """Hash (SHA-256, hex) the vocabulary and the rules that merge it: equal for tokenizers that encode alike."""

    def identity(self) -> str:
        """Hash (SHA-256, hex) all that decides which ids a row of data becomes: equal ones give the same ids."""


def load_tokenizer(
    path: str | Path, *, chat_template: bool = True, template_options: Mapping[str, Any] | None = None
) -> Tokenizer:
    """Load a Hugging Face directory, or a sentencepiece ``.model`` file.

    Args:
        path: local path; nothing is downloaded.
        chat_template: False feeds prompts as plain text even when the tokenizer has a chat template.
        template_options: variables for the chat template, e.g. ``{"enable_thinking": False}``.

    Raises:
        TokenizerError: the path does not exist, holds no usable tokenizer, or names no end-of-sequence token.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".model":
        return _load_sentencepiece(path)
    if path.is_dir():
        return _load_hugging_face(path, chat_template=chat_template, template_options=template_options or {})
    found = "is a file of another kind" if path.exists() else "does not exist"
    raise TokenizerError(
        f"tokenizer {path} {found}: give a local Hugging Face directory (with tokenizer.json) or a sentencepiece "
        f".model file. Models are not downloaded here; fetch them first, e.g. `hf download NAME --local-dir DIR`."
    )


def check_same_vocabulary(
    student: Tokenizer, teacher: Tokenizer, *, ignore_ids: Collection[int] = (), role: str = "teacher"
) -> int:
    """Make sure that an id means the same token to both models, and return the number of ids they share.

    One vocabulary may be longer: ids from the returned number on exist on one side only and have probability 0 on the
    other. ``ignore_ids`` are not compared (special tokens that were renamed and are masked from the loss). ``role``:
    what the second model is called in the message.

    Raises:
        TokenizerError: some shared id stands for different tokens; the first differences are shown.
    """
    shared = min(student.vocab_size, teacher.vocab_size)
    skip = frozenset(ignore_ids)
    student_token, teacher_token = _by_id(student), _by_id(teacher)
    different = [i for i in range(shared) if i not in skip and student_token.get(i) != teacher_token.get(i)]
    if different:
        lines = [f"  id {i}: student {student_token.get(i)!r}, {role} {teacher_token.get(i)!r}" for i in different[:5]]
        more = f"\n  and {len(different) - 5} more" if len(different) > 5 else ""
        raise TokenizerError(
            f"student and {role} disagree about {len(different)} of {shared} shared token ids, so the {role}'s "
            "probabilities would be read off the wrong tokens. Choose two models of one tokenizer family.\n"
            + "\n".join(lines)
            + more
        )
    return shared


def _by_id(tokenizer: Tokenizer) -> dict[int, str]:
    return {i: token for token, i in tokenizer.vocab.items()}


def _digest(parts: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part, ensure_ascii=True, sort_keys=True).encode())
        digest.update(b"\n")
    return digest.hexdigest()


# --------------------------------------------------------------------------- Hugging Face


@dataclass(frozen=True, eq=False)
class HuggingFaceTokenizer:
    """A fast tokenizer of a Hugging Face directory. Made by ``load_tokenizer``."""

    path: Path
    eos_ids: tuple[int, ...]
    end_sources: Mapping[str, tuple[int, ...]]
    turn_end: int
    bos_id: int | None
    pad_id: int
    vocab: Mapping[str, int] = field(repr=False)
    chat: ChatTemplate | None
    _tokenizer: Any = field(repr=False)

    @property
    def vocab_size(self) -> int:
        return max(self.vocab.values()) + 1

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """Return the template that came with the tokenizer, or several by name, used or not."""
        template: str | dict[str, str] | None = self._tokenizer.chat_template
        return template

    def encode(self, text: str) -> list[int]:
        return self._encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def response_text(self, ids: Iterable[int]) -> str:
        kept = _before_end(ids, self.eos_ids)
        return str(self._tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False))

    def token_text(self, i: int) -> str:
        added = self._tokenizer.added_tokens_decoder.get(i)
        return str(added.content) if added is not None else self.tokens([i])[0]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        # The Rust decoder itself: a report decodes every token twice, and the wrapper is four times slower.
        decode = self._tokenizer.backend_tokenizer.decode
        return list(_readable_pieces(list(ids), lambda part: decode(part, skip_special_tokens=False)))

    def render_prompt(self, prompt: str | Sequence[Message], *, tools: Tools | None = None) -> list[int]:
        if self.chat is not None:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            return self.encode(self.chat.render(messages, tools=tools))
        if not isinstance(prompt, str):
            raise TokenizerError(
                f"tokenizer {self.path} has no chat template (or it is switched off), so it cannot render a list of "
                f"{len(prompt)} messages: give prompts as plain text, or a tokenizer with a chat template."
            )
        ids = self._encode(prompt, add_special_tokens=True)
        return ids[:-1] if ids and ids[-1] in self.eos_ids else ids  # a prompt is to be continued, not ended

    def fingerprint(self) -> str:
        model = json.loads(self._tokenizer.backend_tokenizer.to_str())["model"]
        return _digest([sorted(self.vocab.items(), key=lambda item: item[1]), model.get("merges", [])])

    def identity(self) -> str:
        marks = {name: str(token) for name, token in self._tokenizer.special_tokens_map.items()}
        template = None if self.chat is None else self.chat.fingerprint()
        rules = self._tokenizer.backend_tokenizer.to_str()
        return _digest([str(self.path), rules, template, marks, self.eos_ids, self.turn_end, self.bos_id, self.pad_id])

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return _encoded(self.path, self._tokenizer, text, add_special_tokens=add_special_tokens)


def _load_hugging_face(path: Path, *, chat_template: bool, template_options: Mapping[str, Any]) -> HuggingFaceTokenizer:
    tokenizer = _open_fast_tokenizer(path)
    vocab: dict[str, int] = dict(tokenizer.get_vocab())
    if not vocab:
        raise TokenizerError(f"tokenizer {path} has an empty vocabulary: its files are damaged, fetch them again.")
    pad_id, bos_id = tokenizer.pad_token_id, tokenizer.bos_token_id
    sources = _end_sources(path, tokenizer, set(vocab.values()))
    eos_ids = _joined(sources)
    chat, turn_end = None, None
    if chat_template and tokenizer.chat_template:
        chat = ChatTemplate(path, dict(template_options), tokenizer)
        turn_end = _turn_end(path, tokenizer, chat.turn_tail, eos_ids)
    if turn_end is not None:
        sources = {**sources, TEMPLATE: (turn_end,)}
    return HuggingFaceTokenizer(
        path=path,
        eos_ids=_joined(sources),
        end_sources=sources,
        turn_end=eos_ids[0] if turn_end is None else turn_end,
        bos_id=None if bos_id is None else int(bos_id),
        pad_id=eos_ids[0] if pad_id is None else int(pad_id),
        vocab=vocab,
        chat=chat,
        _tokenizer=tokenizer,
    )


def _encoded(path: Path, tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    try:
        return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
    except BaseException as error:  # the Rust library raises plain Exception, or panics
        _raise_if_ours(error)
        _refuse_halves(text)
        raise TokenizerError(
            f"tokenizer {path} cannot encode {text[:200]!r}: {error}. "
            "Its vocabulary may be closed (words it does not know have no token)."
        ) from error


def _turn_end(path: Path, tokenizer: Any, tail: str, eos_ids: Collection[int]) -> int | None:
    """Return the first end token, or else mark, that a template writes behind an answer; None where there is none."""
    added = tokenizer.added_tokens_decoder
    ids = [i for i in _encoded(path, tokenizer, tail, add_special_tokens=False) if i in added]
    if tokenizer.bos_token_id not in eos_ids:
        ids = [i for i in ids if i != tokenizer.bos_token_id]
    special = [i for i in ids if added[i].special or i in eos_ids]
    return next(iter(special or ids), None)


def _open_fast_tokenizer(path: Path) -> Any:
    check_model_files(path)
    check_growth(path)
    names = {entry.name for entry in path.iterdir()}
    for file in sorted(path.glob("*token*")) + sorted(path.glob("*.json")):
        if file.is_file() and (kind := foreign_kind(file)):
            raise TokenizerError(f"{file} is {kind}")
    if adapter := adapter_base(path):
        raise TokenizerError(f"{path} is {adapter}")
    if not names & {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"}:
        raise TokenizerError(
            f"{path} holds no tokenizer: expected tokenizer.json (or tokenizer.model, vocab.json, vocab.txt) among "
            f"{sorted(names)[:10]}. Copy the tokenizer files of the model there."
        )
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except BaseException as error:  # any of a dozen kinds, from JSON errors to missing packages and panics
        _raise_if_ours(error)
        raise TokenizerError(
            f"tokenizer {path} cannot be loaded: {error}. It must load without running code from the model directory."
        ) from error
    if not tokenizer.is_fast:
        raise TokenizerError(
            f"tokenizer {path} is a slow one ({type(tokenizer).__name__}): save it with a tokenizer.json, "
            "or give its sentencepiece .model file instead."
        )
    return tokenizer


def _read_object(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}. Fetch it again, or remove it.") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{file} holds {type(config).__name__}, expected a JSON object.")
    return config


def _end_sources(path: Path, tokenizer: Any, known: set[int]) -> dict[str, tuple[int, ...]]:
    """List the tokenizer's own end token first (it ends a chat turn), then those of the two config files.

    A library writes a default id into ``config.json``, whatever the vocabulary has there: only marks count of those.
    """
    config = _read_object(path / "config.json")
    nested = config.get("text_config")
    found = {
        TOKENIZER: _as_ids(tokenizer.eos_token_id),
        GENERATION: _as_ids(_read_object(path / GENERATION).get("eos_token_id")),
        CONFIG: _as_ids(config.get("eos_token_id", nested.get("eos_token_id") if isinstance(nested, dict) else None)),
    }
    unknown = [i for source in (TOKENIZER, GENERATION) for i in found[source] if i not in known]
    if unknown:
        raise TokenizerError(
            f"end-of-sequence ids {unknown} of {path} (tokenizer_config.json, generation_config.json) "
            "are not in its vocabulary: the files belong to different models."
        )
    marks = {*tokenizer.added_tokens_decoder, *found[TOKENIZER], *found[GENERATION]}
    found[CONFIG] = tuple(i for i in found[CONFIG] if i in marks)
    if not any(found.values()):
        raise TokenizerError(
            f"tokenizer {path} names no end-of-sequence token, so responses would never end: set eos_token in "
            "tokenizer_config.json or eos_token_id in generation_config.json."
        )
    return {source: ids for source, ids in found.items() if ids}


def _as_ids(listed: Any) -> tuple[Any, ...]:
    ids = listed if isinstance(listed, list) else [listed]
    return tuple(i if isinstance(i, int) else str(i) for i in ids if i is not None)


def _joined(sources: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """List every id once, those of ``config.json`` last."""
    order = sorted(sources, key=lambda source: source == CONFIG)
    return tuple(dict.fromkeys(i for source in order for i in sources[source]))


def _raise_if_ours(error: BaseException) -> None:
    """Raise what ends this process (Ctrl-C and the like); a panic of the Rust library, which is none, returns."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _refuse_halves(text: str) -> None:
    """Raise TokenizerError for a text that holds half a character, which no tokenizer can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        part = text[max(0, error.start - 40) : error.end + 40]
        raise TokenizerError(
            f"the text ...{part!r}... holds half a character (a lone surrogate), which is no text. Write it anew as "
            "UTF-8, or leave the row out."
        ) from None


def _before_end(ids: Iterable[int], ends: Collection[int]) -> list[int]:
    return list(takewhile(lambda i: i not in ends, ids))


def _readable_pieces(ids: list[int], decode: Any) -> Iterator[str]:
    """Split ``decode(ids)`` into one piece per id.

    Each piece is what a token adds to the text of the few tokens before it, because a decoder may drop the leading
    space of whatever it is given first, and a character may take several tokens.
    """
    start, done = 0, 0  # ids[start:done] is context that was shown already
    for end in range(1, len(ids) + 1):
        before, now = decode(ids[start:done]), decode(ids[start:end])
        if now.endswith(_REPLACEMENT) and end < len(ids):
            yield ""
            continue
        yield now[len(before) :]
        start, done = done, end


# --------------------------------------------------------------------------- sentencepiece


@dataclass(frozen=True, eq=False)
class SentencePieceTokenizer:
    """A raw sentencepiece ``.model`` file: no chat template; prompts start with the beginning-of-sequence token."""

    path: Path
    eos_ids: tuple[int, ...]
    end_sources: Mapping[str, tuple[int, ...]]
    pad_id: int
    vocab: Mapping[str, int] = field(repr=False)
    _processor: Any = field(repr=False)
    chat: None = None

    @property
    def turn_end(self) -> int:
        return self.eos_ids[0]

    @property
    def bos_id(self) -> int | None:
        bos = int(self._processor.bos_id())
        return bos if bos >= 0 else None

    @property
    def vocab_size(self) -> int:
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        try:
            return list(self._processor.encode(text))
        except (UnicodeEncodeError, RuntimeError):
            _refuse_halves(text)
            raise

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._processor.decode(list(ids)))

    def response_text(self, ids: Iterable[int]) -> str:
        return self.decode(_before_end(ids, self.eos_ids))

    def token_text(self, i: int) -> str:
        return self.tokens([i])[0]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        ids = list(ids)
        pieces = _readable_pieces(ids, self._processor.decode)
        # control pieces (beginning, end) decode to nothing, but a report should show them
        return [
            self._processor.id_to_piece(i) if self._processor.is_control(i) else piece
            for i, piece in zip(ids, pieces, strict=True)
        ]

    def render_prompt(self, prompt: str | Sequence[Message], *, tools: Tools | None = None) -> list[int]:
        if not isinstance(prompt, str):
            raise TokenizerError(
                f"tokenizer {self.path} is a raw sentencepiece model without a chat template, so it cannot render a "
                f"list of {len(prompt)} messages: give prompts as plain text."
            )
        return ([] if self.bos_id is None else [self.bos_id]) + self.encode(prompt)

    def fingerprint(self) -> str:
        scores = [self._processor.get_score(i) for i in range(self.vocab_size)]  # they decide what is merged
        return _digest([sorted(self.vocab.items(), key=lambda item: item[1]), scores])

    def identity(self) -> str:
        model = hashlib.sha256(self._processor.serialized_model_proto()).hexdigest()
        return _digest([str(self.path), model, self.eos_ids, self.turn_end, self.bos_id, self.pad_id])


def _load_sentencepiece(path: Path) -> SentencePieceTokenizer:
    from sentencepiece import SentencePieceProcessor

    try:
        processor = SentencePieceProcessor(model_file=str(path))
        size = int(processor.vocab_size())
    except (OSError, RuntimeError) as error:
        raise TokenizerError(f"{path} is not a sentencepiece model: {error}. Fetch it again.") from error
    eos, pad = int(processor.eos_id()), int(processor.pad_id())
    if eos < 0:
        raise TokenizerError(f"sentencepiece model {path} has no end-of-sequence piece: train it with eos_id >= 0.")
    return SentencePieceTokenizer(
        path=path,
        eos_ids=(eos,),
        end_sources={TOKENIZER: (eos,)},
        pad_id=pad if pad >= 0 else eos,
        vocab={processor.id_to_piece(i): i for i in range(size)},
        _processor=processor,
    )
