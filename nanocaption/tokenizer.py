"""The tokenizer: byte-level BPE, learned from captions or taken from elsewhere, run by tiktoken."""
import base64
import heapq
import json
import os
import pickle
import re
import unicodedata
from collections import Counter, defaultdict

import tiktoken

from nanocaption import download
from nanocaption.cli import UserError

# how text is split into words before BPE, in tiktoken's syntax
GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
)
# Falcon's: punctuation is split from the space before it, and digits are grouped in threes
FALCON_PATTERN = (
    r"[!-/:-@\[-`{-~\p{P}]++|\p{Nd}{3}|\p{Nd}{1,2}|\p{N}++| ?\p{L}++"
    r"| ?[^\s\p{L}\p{N}\p{P}!-/:-@\[-`{-~]++|\s++$|\s+(?!\S)|\s"
)
DECODER_PATTERNS = {"gpt2": GPT2_PATTERN, "falcon": FALCON_PATTERN}  # by decoder_family
# keyed by the types of the pre-tokenizers in tokenizer.json
HUB_PATTERNS = {
    "ByteLevel": GPT2_PATTERN,
    "Punctuation ByteLevel Digits Split": FALCON_PATTERN,
}
BYTES = [bytes([byte]) for byte in range(256)]


# ------------------------------------------------------------------------------------------------
# learning


def train_bpe(texts, vocab_size):
    """
    Byte-level BPE (arXiv 1508.07909) of words split by GPT-2's pattern.

    Returns list[bytes], the tokens by rank, starting with the 256 single bytes. There are at most
    vocab_size - 1, because EOT is added to them; fewer if no further pair occurs twice.

    Unlike in the paper, a candidate is a byte string, whichever two neighbors form it. After each
    new token, tiktoken's rule is applied again to the words that contain it, so that encoding gives
    exactly the tokens of training.
    """
    texts = list(texts)
    split = word_pattern(texts)
    counted = Counter()
    for text in texts:
        counted.update(split.findall(text))
    counts = list(counted.values())
    words = []
    for word in counted:
        words.append([BYTES[byte] for byte in word.encode()])

    ranks = {token: rank for rank, token in enumerate(BYTES)}
    total = Counter()  # candidate -> how often it occurs
    where = defaultdict(set)  # candidate -> the words it occurs in
    for n, parts in enumerate(words):
        for left, right in zip(parts, parts[1:]):
            total[left + right] += counts[n]
            where[left + right].add(n)
    heap = [(-count, token) for token, count in total.items()]
    heapq.heapify(heap)

    while heap and len(ranks) < vocab_size - 1:
        count, token = heapq.heappop(heap)
        # if its count has changed, the heap has a newer entry
        if token in ranks or -count != total[token] or -count < 2:
            continue
        ranks[token] = len(ranks)
        changed = set()
        for n in where.pop(token):
            old = words[n]
            new = apply_merges(old, ranks)
            if new == old:
                continue
            words[n] = new
            for left, right in zip(old, old[1:]):
                total[left + right] -= counts[n]
                changed.add(left + right)
            for left, right in zip(new, new[1:]):
                total[left + right] += counts[n]
                where[left + right].add(n)
                changed.add(left + right)
        for candidate in changed - ranks.keys():
            heapq.heappush(heap, (-total[candidate], candidate))
    return list(ranks)


def word_pattern(texts):
    """
    GPT2_PATTERN for Python's re, which has no \\p{L}; its \\w is letters, numbers and underscore.
    Numbers other than \\d are listed, but only those in the texts: large classes are slow.
    """
    characters = sorted(set().union(*texts))
    numbers = "".join(c for c in characters if unicodedata.category(c) in ("No", "Nl"))
    space = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    return re.compile(
        rf"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_{numbers}]+| ?[\d{numbers}]+| ?(?:[^{space}\w]|_)+"
        rf"|[{space}]+(?![^{space}])|[{space}]"
    )


def apply_merges(parts, ranks, made=None):
    """
    Merges list[bytes] by tiktoken's rule: always the two neighbors whose token has the lowest rank,
    the leftmost first. made: a set to which the token of each merge is added.
    """
    parts = list(parts)
    while True:
        lowest = len(ranks)
        for i in range(len(parts) - 1):
            rank = ranks.get(parts[i] + parts[i + 1], lowest)
            if rank < lowest:
                lowest = rank
                at = i
        if lowest == len(ranks):
            return parts
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if made is not None:
            made.add(parts[at])


def keep_used(ranks, pattern, texts):
    """
    The tokens to keep in a vocabulary reduced to these texts: those that the texts use, those that
    are merged on the way to them, and the single bytes. The texts are encoded as before (except for
    the ids), and any other text can still be encoded.

    ranks: list[bytes] by rank. Returns the ranks to keep, list[int] in ascending order.
    """
    encoding = make_tokenizer(ranks, pattern)
    order = {token: rank for rank, token in enumerate(ranks)}
    used = set()
    for text in texts:
        used.update(encoding.encode_ordinary(text))
    kept = set(BYTES)
    for rank in used:
        token = ranks[rank]
        kept.add(token)
        apply_merges([BYTES[byte] for byte in token], order, kept)
    return sorted(order[token] for token in kept)


# ------------------------------------------------------------------------------------------------
# reading and writing


def make_tokenizer(ranks, pattern=GPT2_PATTERN):
    """list[bytes] by rank -> tiktoken.Encoding. Its EOT, <|endoftext|>, has id len(ranks)."""
    return tiktoken.Encoding(
        "nanocaption",
        pat_str=pattern,
        mergeable_ranks={token: rank for rank, token in enumerate(ranks)},
        special_tokens={"<|endoftext|>": len(ranks)},
    )


def ranks_to_text(ranks):
    """list[bytes] by rank -> tiktoken's file format, as bytes: a line "base64 rank" for each."""
    lines = []
    for rank, token in enumerate(ranks):
        lines.append(b"%s %d\n" % (base64.b64encode(token), rank))
    return b"".join(lines)


def text_to_ranks(text):
    """The inverse of ranks_to_text. Raises UserError if a rank or a single byte is missing."""
    ranks = []
    try:
        for line in text.splitlines():
            if not line:
                continue
            token, rank = line.split()
            if int(rank) != len(ranks):
                raise ValueError
            ranks.append(base64.b64decode(token, validate=True))
        if not set(BYTES).issubset(ranks):
            raise ValueError
    except ValueError:
        raise UserError(
            "not in tiktoken's file format; expected lines of base64 and rank, counted from 0"
        ) from None
    return ranks


def read_tokenizer(source):
    """
    Reads an existing tokenizer. source: "gpt2", a prepared folder, a checkpoint or its folder, a
    model on the hub, or a folder with a tokenizer.json, or vocab.json and merges.txt.

    Returns (list[bytes] by rank, pattern, ids). ids: the ids of the tokens and of EOT in a
    pretrained decoder, or None. Returns None for "bpe", which has yet to be learned.
    """
    if source == "bpe":
        return None
    if source == "gpt2":
        return read_gpt2_tokenizer()
    if os.path.exists(f"{source}/tokenizer.tiktoken"):
        # imported here because dataset.py imports this file
        from nanocaption.dataset import Dataset
        dataset = Dataset(source)
        return dataset.ranks, dataset.meta["pattern"], dataset.token_ids
    folder = source
    is_model_name = re.fullmatch(r".+/.+|(distil)?gpt2[\w-]*", source)
    if is_model_name and download.is_hub_name(source):
        folder = f"{download.WEIGHTS}/{source}"
        os.makedirs(folder, exist_ok=True)
        if not download.fetch_hub_file(source, f"{folder}/tokenizer.json"):
            for name in ("vocab.json", "merges.txt"):
                download.fetch_hub_file(source, f"{folder}/{name}")
    if os.path.exists(f"{folder}/tokenizer.json"):
        return read_hub_tokenizer(f"{folder}/tokenizer.json")
    if os.path.exists(f"{folder}/vocab.json") and os.path.exists(f"{folder}/merges.txt"):
        return read_hub_tokenizer(f"{folder}/vocab.json")
    for path in (f"{source}/best.pt", f"{source}/last.pt", source):
        if os.path.isfile(path):
            return read_checkpoint_tokenizer(path)
    raise UserError(
        f"--tokenizer {source}: expected bpe, gpt2, a prepared folder, a checkpoint or its folder, "
        "OWNER/NAME on the hub or a folder with a tokenizer.json, or vocab.json and merges.txt"
    )


def read_gpt2_tokenizer():
    """GPT-2's tokenizer, which tiktoken downloads, as read_tokenizer returns it."""
    try:
        gpt2 = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise OSError(f"--tokenizer gpt2: tiktoken could not download it ({error})") from None
    ranks = [gpt2.decode_single_token_bytes(rank) for rank in range(gpt2.eot_token)]
    return ranks, GPT2_PATTERN, list(range(gpt2.n_vocab))


def read_checkpoint_tokenizer(path):
    """A checkpoint's tokenizer, as read_tokenizer returns it."""
    import torch  # only needed here
    download.check_no_pointer(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tokenizer = checkpoint["tokenizer"]
        ranks = text_to_ranks(tokenizer["ranks"])
        return ranks, tokenizer["pattern"], tokenizer.get("ids")
    except (
        KeyError, TypeError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError
    ) as error:
        raise UserError(
            f"--tokenizer {path}: not a checkpoint with a tokenizer ({error})"
        ) from None


def read_hub_tokenizer(path):
    """
    Reads the tokenizer.json of a byte-level BPE such as GPT-2's or Falcon's, or the older pair of
    vocab.json and merges.txt. Returns (list[bytes] by rank, pattern, the tokens' ids in the file,
    that of <|endoftext|> last). Raises UserError for other kinds of tokenizers.
    """
    download.check_no_pointer(path)
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        if os.path.basename(path) == "vocab.json":
            data = join_vocab_and_merges(data, os.path.dirname(path))
        split = data["pre_tokenizer"]
        kind = " ".join(part["type"] for part in split.get("pretokenizers", [split]))
        if kind not in HUB_PATTERNS:
            raise ValueError(f"words are split by {kind}")
        special = {token["content"]: token["id"] for token in data["added_tokens"]}
        vocab = data["model"]["vocab"]
        merged = []
        for merge in data["model"]["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merged.append(vocab[left + right])
        if merged != sorted(merged):
            raise ValueError("the merges are not in the order of their ids")
        byte_of = printable_bytes()
        ids = {}
        for token, id in vocab.items():
            if token not in special:
                ids[bytes(byte_of[c] for c in token)] = id
        if not ids.keys() >= set(BYTES):
            raise ValueError("a single byte has no token")
        ranks = sorted(ids, key=ids.get)
        eot = special["<|endoftext|>"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: not a byte-level BPE like GPT-2's or Falcon's "
            f"({type(error).__name__}: {error})"
        ) from None
    return ranks, HUB_PATTERNS[kind], [ids[token] for token in ranks] + [eot]


def join_vocab_and_merges(vocab, folder):
    """vocab.json's dict, and merges.txt in its folder -> what GPT-2's tokenizer.json holds."""
    with open(f"{folder}/merges.txt", encoding="utf-8") as file:
        merges = [line.rstrip("\n") for line in file if not line.startswith("#version")]
    if any(token.endswith("</w>") for token in vocab):
        raise ValueError("its words end in </w>, as CLIP's do")
    eot = {"content": "<|endoftext|>", "id": vocab["<|endoftext|>"]}
    return {
        "pre_tokenizer": {"type": "ByteLevel"},
        "added_tokens": [eot],
        "model": {"vocab": vocab, "merges": [merge for merge in merges if merge]},
    }


def printable_bytes():
    """
    {character: byte} as used in tokenizer.json: printable bytes stand for themselves, the others
    are written as characters 256, 257, ...
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    byte_of = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for n, byte in enumerate(others):
        byte_of[chr(256 + n)] = byte
    return byte_of
