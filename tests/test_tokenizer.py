"""Tests of nanocaption/tokenizer.py: BPE against its definition, on any Unicode."""
import random
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
from tiktoken_ext import openai_public

from nanocaption.captions import read_captions
from nanocaption.cli import UserError
from nanocaption.tokenizer import GPT2_PATTERN, make_tokenizer, ranks_to_text, read_tokenizer
from nanocaption.tokenizer import text_to_ranks, train_bpe
from test_captions import CAPTIONS, FORMATS


def split_words(texts):
    """The words of all texts, as GPT-2's pattern splits them."""
    words = []
    for text in texts:
        words += regex.findall(GPT2_PATTERN, text)
    return words


def reference_bpe(texts, vocab_size):
    """
    The definition, slowly: after each new token, tiktoken itself encodes every word, and all pairs
    are counted again.
    """
    words = Counter(split_words(texts))
    ranks = [bytes([byte]) for byte in range(256)]
    while len(ranks) < vocab_size - 1:
        encoding = make_tokenizer(ranks)
        pairs = Counter()
        for word, count in words.items():
            parts = encoding.decode_tokens_bytes(encoding.encode_ordinary(word))
            for left, right in zip(parts, parts[1:]):
                pairs[left + right] += count
        candidates = [(-count, token) for token, count in pairs.items() if token not in ranks]
        if not candidates:
            break
        count, token = min(candidates)
        if -count < 2:
            break
        ranks.append(token)
    return ranks


def test_bpe_is_its_definition():
    rng = random.Random(0)
    words = ["dog", "dogs", "doggo", "banana", "bandana", "running", "ran", "it's", "they're",
             "2012", "!!", "crème"]
    captions = [" ".join(rng.choices(words, k=6)) for _ in range(40)]
    assert train_bpe(captions, 340) == reference_bpe(captions, 340)


@pytest.mark.parametrize("seed", range(8))
def test_bpe_is_its_definition_for_overlapping_pairs(seed):
    # few letters, so that tokens can be made in many ways
    rng = random.Random(seed)
    texts = ["".join(rng.choices("aab ", k=rng.randint(1, 30))) for _ in range(30)]
    assert train_bpe(texts, 300) == reference_bpe(texts, 300)


def test_bpe_splits_words_as_the_pattern_on_any_unicode():
    rng = random.Random(0)
    # the characters that both Python's and regex's version of Unicode know
    known = []
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        if unicodedata.category(c) not in ("Cn", "Cs") and regex.fullmatch(r"\P{Cn}", c):
            known.append(c)
    likely = " \t\n'\u00a0\u2028_-.9aé²½Ⅷ一\x1c\x85"
    texts = []
    for _ in range(60):
        texts.append("".join(rng.choice(known if rng.random() < 0.3 else likely)
                             for _ in range(25)))
    # each text twice, so that whole words are learned
    ranks = train_bpe(texts * 2, 65536)
    encoding = make_tokenizer(ranks)
    words = split_words(texts)
    for word in words:
        assert len(encoding.encode_ordinary(word)) == 1, repr(word)
    words = {word.encode() for word in words}
    for token in ranks[256:]:
        assert any(token in word for word in words)


def test_bpe_of_genuine_captions_encodes_any_text():
    texts = []
    for file in FORMATS.iterdir():
        if file.suffix != ".md":
            texts += [text for _, text, _ in read_captions(file)]
    ranks = train_bpe(texts, 500)
    encoding = make_tokenizer(ranks)
    assert len(ranks) == len(set(ranks)) == 499
    assert text_to_ranks(ranks_to_text(ranks)) == ranks
    for text in texts + CAPTIONS["2_x.jpg"]:
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert encoding.eot_token not in encoding.encode_ordinary("<|endoftext|>")
    n_tokens = np.mean([len(encoding.encode_ordinary(text)) for text in texts])
    n_bytes = np.mean([len(text.encode()) for text in texts])
    assert n_tokens < n_bytes / 2.5


@pytest.mark.parametrize("change", ["a line lost", "a byte lost", "no base64", "a column lost"])
def test_a_damaged_tokenizer_file(change):
    lines = ranks_to_text(train_bpe(["a dog a dog"], 300)).splitlines()
    if change == "a line lost":
        del lines[70]
    elif change == "a byte lost":
        lines = lines[:255]
    elif change == "no base64":
        lines[3] = b"??? 3"
    else:
        lines[3] = b"3"
    with pytest.raises(UserError, match="tiktoken's file format"):
        text_to_ranks(b"\n".join(lines))


def test_gpt2(monkeypatch):
    """What tiktoken has as GPT-2's tokenizer is taken over, and our pattern is GPT-2's."""
    assert GPT2_PATTERN == openai_public.r50k_pat_str
    ranks = train_bpe(["a dog runs , a dog sits"] * 2, 280)
    small = make_tokenizer(ranks)

    def get_encoding(name):
        assert name == "gpt2"
        return small

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    assert read_tokenizer("gpt2") == (ranks, GPT2_PATTERN, list(range(len(ranks) + 1)))

    def no_network(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(OSError, match="--tokenizer gpt2: tiktoken could not download it"):
        read_tokenizer("gpt2")
