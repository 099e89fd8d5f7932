"""How much longer a tokenizer's rules can make a text is bounded before anything is encoded, and never too low."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers
from tokenizers.normalizers import Normalizer

from megatron_tropd.data.tokenizer_growth import _growth, check_growth
from megatron_tropd.errors import ModelFileError

TEXTS = st.text(st.sampled_from("aeb \ufdfa\u0130\u00e9\u6f22\n"), min_size=1, max_size=30)
WORDS = st.sampled_from(["a", "ab", " ", "e", "aa", "\ufdfa", "", "xyz" * 5])
RULES = st.one_of(
    st.builds(normalizers.Replace, WORDS.filter(bool), WORDS),
    st.builds(
        lambda e, word: normalizers.Replace(Regex(e), word), st.sampled_from(["a", "a*", " {2,}", "", "[ae]"]), WORDS
    ),
    st.builds(normalizers.Prepend, WORDS.filter(bool)),
    st.sampled_from([normalizers.NFKD(), normalizers.NFC(), normalizers.NFKC(), normalizers.NFD()]),
    st.sampled_from([normalizers.Lowercase(), normalizers.StripAccents(), normalizers.BertNormalizer()]),
    st.sampled_from([normalizers.Strip(), normalizers.Nmt(), normalizers.ByteLevel()]),
)


def as_json(normalizer: Normalizer) -> dict[str, object]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    return json.loads(tokenizer.to_str())["normalizer"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(RULES, min_size=1, max_size=3), TEXTS)
def test_no_text_grows_more_than_its_bound(rules, text):
    normalizer = normalizers.Sequence(rules)
    try:
        long = len(normalizer.normalize_str(text).encode())
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # the library gives up on some expressions that find nothing
            raise
        return
    # a rule that inserts where nothing is does so once more than there are characters
    assert long <= _growth(as_json(normalizer)) * (len(text.encode()) + 1)


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]),  # Llama 2
        normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase(), normalizers.Replace(Regex(" {2,}"), " ")]),
        normalizers.NFC(),
        normalizers.BertNormalizer(),
    ],
)
def test_the_rules_of_models_are_far_from_the_limit(normalizer):
    assert _growth(as_json(normalizer)) < 100


def test_rules_that_grow_are_refused_by_name_and_read_once(tmp_path):
    rules = [{"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}] * 14
    (tmp_path / "tokenizer.json").write_text(json.dumps({"decoder": {"type": "Sequence", "decoders": rules}}))
    with pytest.raises(
        ModelFileError, match=r"the decoder of .*tokenizer.json may make a text 1.64e\+04 times as long"
    ):
        check_growth(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"decoder": {"type": "Sequence", "decoders": rules[:13]}}))
    check_growth(tmp_path)
    check_growth(Path("nowhere"))
