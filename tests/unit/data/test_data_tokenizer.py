from __future__ import annotations

import importlib.util
import io
import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_tropd.data import tokenizer as tokenizer_module
from megatron_tropd.data.prompts import read_prompts
from megatron_tropd.data.synthetic import problems, sft_examples, solution
from megatron_tropd.data.tokenizer import HuggingFaceTokenizer, Tokenizer, check_same_vocabulary, load_tokenizer
from megatron_tropd.errors import TokenizerError

REPOSITORY = Path(__file__).resolve().parents[3]
CORPUS = ["Tom has 12 apples and 3 pears.", "Zoë says: naïve café 🙂 costs 5 €", "How many are left? 12*3=36"] * 20


def save_demo_tokenizer(directory: Path) -> Path:
    spec = importlib.util.spec_from_file_location("make_data", REPOSITORY / "examples" / "demo" / "make_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.save_tokenizer(directory)
    return directory


def save_byte_bpe(directory: Path, *, vocab_size: int = 300, generation: Any = None, **config: Any) -> Path:
    """A small byte-level BPE in the shape of Qwen's: pieces of UTF-8 characters, two end tokens, chat template."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if quiet %}<quiet>{% endif %}{% endif %}"
)


def save_sentencepiece(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        hard_vocab_limit=False,
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(save_demo_tokenizer(tmp_path_factory.mktemp("demo")))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    generation = {"eos_token_id": [2, 0]}
    return load_tokenizer(save_byte_bpe(tmp_path_factory.mktemp("bpe"), generation=generation, chat_template=CHATML))


# --------------------------------------------------------------------------- the demo's


def test_demo_text_comes_back_exactly_and_digits_stand_alone(demo):
    rng = random.Random(0)
    for story in islice(problems(21, False), 500):
        for text in (story.text, solution(story, rng), solution(story, rng, "mistaken")):
            ids = demo.encode(text)
            assert demo.decode(ids) == text
            assert "".join(demo.tokens(ids)) == text
            assert sum(token.isdigit() for token in demo.tokens(ids)) == sum(letter.isdigit() for letter in text)
    assert demo.vocab_size == len(demo.vocab) == 219


def test_demo_prompt_ends_in_the_assistant_marker_and_sft_examples_in_the_end_token(demo):
    prompt, response = next(sft_examples(7, 1, "teacher", demo))
    story = next(problems(7, False))
    assert "".join(demo.tokens(prompt)) == f"<|user|>{story.text}<|assistant|>"
    assert demo.decode(prompt) == story.text
    assert response[-1] == demo.eos_ids[0] == demo.vocab["<eos>"]
    assert demo.decode(response).endswith(f"#### {story.answer}")
    assert (demo.eos_ids, demo.pad_id) == ((1,), 0)


def test_the_demo_directory_loads_with_plain_transformers(demo):
    from transformers import AutoTokenizer

    assert isinstance(demo, HuggingFaceTokenizer)
    loaded = AutoTokenizer.from_pretrained(str(demo.path), local_files_only=True)
    messages = [{"role": "user", "content": "How many apples are left?"}]
    encoded = loaded.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert list(encoded["input_ids"]) == demo.render_prompt("How many apples are left?") == demo.render_prompt(messages)
    assert loaded.eos_token_id == demo.eos_ids[0] and loaded.pad_token_id == demo.pad_id


def test_a_word_without_a_token_is_an_error_not_damage(demo):
    with pytest.raises(TokenizerError, match="cannot encode 'Zebra runs'"):
        demo.encode("Zebra runs")


def test_a_template_that_writes_what_has_no_token_is_an_error_that_quotes_it(tmp_path):
    words = tokenizers.Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "user": 2}, unk_token="<none>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }} {{ m.content }} ~fin~ {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(TokenizerError, match=r"cannot encode '[^']*~fin~"):
        load_tokenizer(tmp_path)


def test_a_template_that_refuses_is_reported_with_its_reason(demo):
    with pytest.raises(TokenizerError, match="roles are user and assistant, not system"):
        demo.render_prompt([{"role": "system", "content": "x"}])


# --------------------------------------------------------------------------- Hugging Face directories


def test_characters_of_several_tokens_show_once_and_pieces_join_to_the_text(bpe):
    text = "Zoë costs 5 € 🦆🦉 日本 ok"
    ids = bpe.encode(text)
    pieces = bpe.tokens(ids)
    assert len(pieces) == len(ids) > len(text)  # some characters took several tokens
    assert "".join(pieces) == text == bpe.decode(ids)
    assert "�" not in "".join(pieces)
    assert "".join(bpe.tokens(bpe.encode("ok 🦆")[:-1])).endswith("�")  # a character cut off is shown as such
    assert bpe.tokens([2, *bpe.encode("ok")])[0] == "<|im_end|>" and bpe.decode([2, *bpe.encode("ok")]) == "ok"


def test_end_tokens_are_the_tokenizers_own_then_those_of_generation_config(bpe, tmp_path):
    assert bpe.eos_ids == (2, 0)
    assert bpe.pad_id == 2  # no padding token: the first end token
    assert load_tokenizer(save_byte_bpe(tmp_path, generation={"eos_token_id": 0})).eos_ids == (2, 0)


def test_end_tokens_come_from_all_files_and_each_says_which(tmp_path):
    directory = save_byte_bpe(tmp_path, generation={"eos_token_id": [2, 0]}, eos_token="<|im_end|>")
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [0, 1, 7, 99999]}))
    tokenizer = load_tokenizer(directory)
    # 7 is an ordinary token and 99999 none at all: a library's default, not an end
    assert tokenizer.eos_ids == (2, 0, 1)
    assert tokenizer.end_sources == {"tokenizer": (2,), "generation_config.json": (2, 0), "config.json": (0, 1)}


def test_the_chat_template_ends_a_base_models_answer_too(tmp_path):
    directory = save_byte_bpe(tmp_path, eos_token="<|endoftext|>", generation={"eos_token_id": 0}, chat_template=CHATML)
    (directory / "config.json").write_text(json.dumps({"text_config": {"eos_token_id": 1}}))
    tokenizer = load_tokenizer(directory)
    assert tokenizer.end_sources["chat template"] == (2,)
    assert tokenizer.eos_ids == (0, 2, 1) and tokenizer.turn_end == 2
    # where prompts are plain text, nothing is rendered that would end a turn
    assert load_tokenizer(directory, chat_template=False).eos_ids == (0, 1)


def test_where_the_template_writes_no_end_it_is_the_tokenizers_own(tmp_path):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    for own, other in ((2, 0), (0, 2)):
        name = {0: "<|endoftext|>", 2: "<|im_end|>"}[own]
        generation = {"eos_token_id": [other, own]}
        directory = save_byte_bpe(tmp_path / str(own), eos_token=name, generation=generation, chat_template=template)
        tokenizer = load_tokenizer(directory)
        assert set(tokenizer.eos_ids) == {0, 2} and tokenizer.turn_end == own
        (tmp_path / "rows.jsonl").write_text('{"prompt": "Tom", "response": "has 3"}\n')
        (prompt,) = read_prompts(tmp_path / "rows.jsonl", tokenizer).prompts
        assert prompt.response_ids[-1] == own and other not in prompt.response_ids


def test_an_end_token_named_in_config_json_alone_is_enough(tmp_path):
    directory = save_byte_bpe(tmp_path, eos_token=None)
    (directory / "config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert load_tokenizer(directory).eos_ids == (0,)


def test_id_0_is_an_id_like_any_other(tmp_path):
    padded = load_tokenizer(save_byte_bpe(tmp_path, pad_token="<|endoftext|>"))
    assert (padded.eos_ids, padded.pad_id) == ((2,), 0)
    ended = load_tokenizer(save_byte_bpe(tmp_path, eos_token="<|endoftext|>", generation={"eos_token_id": 2}))
    assert (ended.eos_ids, ended.pad_id) == ((0, 2), 0)


def test_the_vocabulary_reaches_to_its_largest_id_even_with_gaps(bpe):
    assert bpe.vocab_size == 300
    assert replace(bpe, vocab={"a": 0, "b": 7}).vocab_size == 8


def test_the_chat_template_gets_its_options_and_can_be_switched_off(bpe, tmp_path):
    assert "".join(bpe.tokens(bpe.render_prompt("hi"))) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    save_byte_bpe(tmp_path, chat_template=CHATML)
    quiet = load_tokenizer(tmp_path, template_options={"quiet": True})
    assert "".join(quiet.tokens(quiet.render_prompt("hi"))).endswith("assistant\n<quiet>")
    plain = load_tokenizer(tmp_path, chat_template=False)
    assert plain.render_prompt("hi") == plain.encode("hi")
    with pytest.raises(TokenizerError, match="no chat template"):
        plain.render_prompt([{"role": "user", "content": "hi"}])


def test_plain_prompts_get_the_beginning_token_but_never_the_end_token(tmp_path):
    directory = save_byte_bpe(tmp_path)
    file = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    tokenizer.save(str(file))
    loaded = load_tokenizer(directory)
    assert loaded.render_prompt("hi") == [1, *loaded.encode("hi")]
    assert 1 not in loaded.encode("hi") and 2 not in loaded.encode("hi")
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHATML}))
    chat = load_tokenizer(directory)  # a template writes its own markers: nothing is added around it
    assert "".join(chat.tokens(chat.render_prompt("hi"))).count("<|im_start|>") == 2


def test_fingerprints_differ_exactly_when_the_vocabulary_or_its_merges_do(tmp_path):
    first = load_tokenizer(save_byte_bpe(tmp_path / "a"))
    same = load_tokenizer(save_byte_bpe(tmp_path / "b", chat_template=CHATML))
    longer = load_tokenizer(save_byte_bpe(tmp_path / "c", vocab_size=310))
    assert first.fingerprint() == same.fingerprint() != longer.fingerprint()
    model = json.loads((save_byte_bpe(tmp_path / "d") / "tokenizer.json").read_text())
    model["model"]["merges"].reverse()
    (tmp_path / "d" / "tokenizer.json").write_text(json.dumps(model))
    reordered = load_tokenizer(tmp_path / "d")
    assert reordered.vocab == first.vocab and reordered.fingerprint() != first.fingerprint()


# --------------------------------------------------------------------------- two tokenizers


def test_a_longer_vocabulary_of_the_same_family_shares_the_shorter_ones_ids(tmp_path):
    short = load_tokenizer(save_byte_bpe(tmp_path / "a", vocab_size=290))
    long = load_tokenizer(save_byte_bpe(tmp_path / "b", vocab_size=301))
    assert check_same_vocabulary(short, long) == check_same_vocabulary(long, short) == 290


def test_different_vocabularies_are_refused_with_the_first_differences(bpe, demo, tmp_path):
    with pytest.raises(TokenizerError) as error:
        check_same_vocabulary(demo, bpe)
    assert "of 219 shared" in str(error.value)
    assert "id 0: student '<pad>', teacher '<|endoftext|>'" in str(error.value)
    renamed = json.loads((save_byte_bpe(tmp_path) / "tokenizer.json").read_text().replace("<|im_start|>", "<User>"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(renamed))
    other = load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="disagree about 1 of 300"):
        check_same_vocabulary(bpe, other)
    assert check_same_vocabulary(bpe, other, ignore_ids=[1]) == 300


def test_the_last_shared_id_is_compared_too_and_those_beyond_are_not():
    def known(*names: str) -> Any:
        return SimpleNamespace(vocab={name: i for i, name in enumerate(names)}, vocab_size=len(names))

    assert check_same_vocabulary(known("a", "b", "c"), known("a", "b")) == 2
    with pytest.raises(TokenizerError, match=r"1 of 2 shared token ids(.|\n)*id 1: student 'b', judge 'x'"):
        check_same_vocabulary(known("a", "b", "c"), known("a", "x"), role="judge")


# --------------------------------------------------------------------------- sentencepiece


def test_a_sentencepiece_model_encodes_like_the_library_and_starts_prompts(tmp_path):
    path = save_sentencepiece(tmp_path / "spm.model")
    tokenizer = load_tokenizer(path)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "Tom has 12 naïve 🙃 apples"
    ids = library.encode(text)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == text == "".join(tokenizer.tokens(ids))
    assert tokenizer.render_prompt(text) == [library.bos_id(), *ids]
    assert tokenizer.tokens([library.bos_id(), *ids, library.eos_id()])[-1] == "</s>"
    assert tokenizer.eos_ids == (library.eos_id(),) and tokenizer.pad_id == library.eos_id()
    assert tokenizer.vocab_size == library.get_piece_size() == len(tokenizer.vocab)
    assert tokenizer.fingerprint() == load_tokenizer(path).fingerprint()
    assert check_same_vocabulary(tokenizer, tokenizer) == tokenizer.vocab_size
    with pytest.raises(TokenizerError, match="without a chat template"):
        tokenizer.render_prompt([{"role": "user", "content": text}])


def test_a_sentencepiece_model_may_number_its_pieces_otherwise(tmp_path):
    padded = load_tokenizer(save_sentencepiece(tmp_path / "a.model", pad_id=0, unk_id=1, bos_id=2, eos_id=3))
    assert (padded.pad_id, padded.eos_ids, padded.render_prompt("12")[0]) == (0, (3,), 2)
    begun = load_tokenizer(save_sentencepiece(tmp_path / "b.model", bos_id=0, unk_id=1, eos_id=2))
    assert (begun.pad_id, begun.render_prompt("12")) == (2, [0, *begun.encode("12")])
    bare = load_tokenizer(save_sentencepiece(tmp_path / "c.model", bos_id=-1))
    assert bare.render_prompt("12") == bare.encode("12")


def test_scores_decide_how_a_sentencepiece_model_cuts_and_are_part_of_its_fingerprint(tmp_path):
    first = load_tokenizer(save_sentencepiece(tmp_path / "a.model"))
    library = first._processor
    rescored = SimpleNamespace(get_score=lambda i: library.get_score(i) - (i == 290), vocab_size=library.vocab_size)
    assert replace(first, _processor=rescored).fingerprint() != first.fingerprint()


def test_a_sentencepiece_model_without_an_end_piece_is_refused(tmp_path):
    with pytest.raises(TokenizerError, match="no end-of-sequence piece"):
        load_tokenizer(save_sentencepiece(tmp_path / "spm.model", eos_id=-1))


# --------------------------------------------------------------------------- bad input


def test_unusable_paths_are_refused_with_the_path_and_what_is_missing(tmp_path):
    with pytest.raises(TokenizerError, match=r"Qwen/Qwen3-0.6B does not exist.*hf download"):
        load_tokenizer("Qwen/Qwen3-0.6B")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"holds no tokenizer: expected tokenizer.json.*config.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match="is a file of another kind"):
        load_tokenizer(tmp_path / "config.json")
    (tmp_path / "tokenizer.json").write_text('{"torn')
    with pytest.raises(TokenizerError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(TokenizerError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_end_tokens_must_exist(tmp_path):
    with pytest.raises(TokenizerError, match="names no end-of-sequence token"):
        load_tokenizer(save_byte_bpe(tmp_path, eos_token=None))
    with pytest.raises(TokenizerError, match=r"ids \[9999\].*different models"):
        load_tokenizer(save_byte_bpe(tmp_path, generation={"eos_token_id": [2, 9999]}))
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_brings_its_own_code_is_refused_and_the_code_does_not_run(tmp_path):
    marker = tmp_path / "ran"
    save_byte_bpe(tmp_path, tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.Own", "own.Own"]})
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(TokenizerError, match="without running code"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


@pytest.mark.slow
def test_importing_the_room_does_not_import_transformers():
    code = (
        "import sys, megatron_tropd.data.tokenizer, megatron_tropd.data.prompts; print('transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_half_a_character_is_refused_by_name_whatever_the_tokenizer(tmp_path):
    pieces = load_tokenizer(save_sentencepiece(tmp_path / "spm.model"))
    for tokenizer in (pieces, load_tokenizer(save_byte_bpe(tmp_path / "hf"))):
        with pytest.raises(TokenizerError, match=r"'the \\ud800 of'.* holds half a character \(a lone surrogate\)"):
            tokenizer.encode("the \ud800 of")


def test_a_panic_of_the_library_is_an_error_that_names_the_tokenizer(tmp_path):
    directory = save_byte_bpe(tmp_path / "m")
    tree = json.loads((directory / "tokenizer.json").read_text())
    insert = {"type": "Replace", "pattern": {"Regex": ""}, "content": "xyz"}
    rules = {"type": "Sequence", "normalizers": [insert, {"type": "NFC"}]}
    (directory / "tokenizer.json").write_text(json.dumps(tree | {"normalizer": rules}))
    with pytest.raises(TokenizerError, match=r"tokenizer .*m cannot (encode 'a'|be loaded)"):
        load_tokenizer(directory).encode("a")
    with pytest.raises(KeyboardInterrupt):
        tokenizer_module._raise_if_ours(KeyboardInterrupt())
