"""A small tokenizer, trained here and now on public texts. Floor 1.

Byte-level, so that any text can be written with it; trained on what ships with the package, never on votes: a
vocabulary learnt from private texts would be a function of them outside the privacy guarantee.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_audit_nb.demo.phrases import public_texts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedTokenizerFast

__all__ = ["train_tokenizer"]


def train_tokenizer(texts: Iterable[str] | None = None, *, vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ``<s>``, ``</s>`` and ``<pad>``.

    Args:
        texts: what to learn the merges from; public texts only. ``None`` takes those that ship with the package.
        vocab_size: upper bound on the vocabulary (at least the 256 bytes and three special tokens remain).
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(public_texts() if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials)
