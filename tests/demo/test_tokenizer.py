"""The small tokenizer knows public texts only and loses nothing."""

from __future__ import annotations

import pytest

from rlhf_audit_nb.demo import public_texts, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(vocab_size=1024)


@pytest.mark.parametrize("text", ["How long can I keep cooked rice?", "naïve 漢字 🙂\n\ttabs", ""])
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_it_stays_within_its_size_and_has_the_three_special_tokens(tokenizer):
    assert 259 <= len(tokenizer) <= 1024
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", "<pad>")


def test_it_is_the_same_each_time_and_learns_from_the_public_texts(tokenizer):
    assert train_tokenizer(vocab_size=1024).get_vocab() == tokenizer.get_vocab()
    assert train_tokenizer(["zzzz"], vocab_size=1024).get_vocab() != tokenizer.get_vocab()
    words = public_texts()[0]
    assert len(tokenizer(words)["input_ids"]) < len(words.encode()) / 2
