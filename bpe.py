"""The tokenizer: byte-level BPE, learned from captions here or taken over from a language model, and run by tiktoken."""
import base64
import heapq
import json
import re
import unicodedata
from collections import Counter, defaultdict

import tiktoken

from common import UserError

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"  # as in tiktoken


def train_bpe(texts, vocab_size):
    """Byte-level BPE (Sennrich et al. 2015, arXiv 1508.07909) over words split by GPT-2's pattern.

    Returns list[bytes], the tokens by rank: the 256 bytes first, at most vocab_size - 1 in all (EOT comes on top);
    fewer where no pair is left that occurs twice. A word is always split the way tiktoken splits it: a candidate is
    the bytes that two neighbours make together, whichever two they are, and after each merge the words it touches are
    merged again by rank, so that encoding gives the training's own tokens.
    """
    # GPT2_PATTERN for re, which has no \p{L}: \w is letters, numbers (\d and others) and the underscore. The others are
    # only those that occur, for re is slow at large classes.
    texts = list(texts)
    other = "".join(c for c in sorted(set().union(*texts)) if unicodedata.category(c) in ("No", "Nl"))
    space = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
    split = re.compile(rf"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_{other}]+| ?[\d{other}]+| ?(?:[^{space}\w]|_)+"
                       rf"|[{space}]+(?![^{space}])|[{space}]")
    counted = Counter(word for text in texts for word in split.findall(text))
    counts = list(counted.values())
    pieces = [[bytes([byte]) for byte in word.encode()] for word in counted]
    ranks = {bytes([byte]): byte for byte in range(256)}
    total, where = Counter(), defaultdict(set)  # candidate -> how often in the texts, in which words
    for n, parts in enumerate(pieces):
        for left, right in zip(parts, parts[1:]):
            total[left + right] += counts[n]
            where[left + right].add(n)
    heap = [(-count, token) for token, count in total.items()]
    heapq.heapify(heap)
    while heap and len(ranks) < vocab_size - 1:
        count, token = heapq.heappop(heap)
        if token in ranks or -count != total[token] or -count < 2:  # known, out of date (a newer entry is there), rare
            continue
        ranks[token] = len(ranks)
        changed = set()
        for n in where.pop(token):
            old = pieces[n]
            new = pieces[n] = apply_merges(old, ranks)
            if new != old:
                for parts, sign in ((old, -counts[n]), (new, counts[n])):
                    for left, right in zip(parts, parts[1:]):
                        total[left + right] += sign
                        where[left + right].add(n)
                        changed.add(left + right)
        for token in changed - ranks.keys():
            heapq.heappush(heap, (-total[token], token))
    return list(ranks)


def apply_merges(parts, ranks, made=None):
    """
    tiktoken's rule: the two neighbours whose token has the lowest rank are merged, leftmost first, and so on. made: a set that
    gets every token on the way.
    """
    parts = list(parts)
    while True:
        rank, at = min(((ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))),
                       default=(len(ranks), 0))
        if rank == len(ranks):
            return parts
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if made is not None:
            made.add(parts[at])


def make_tokenizer(ranks, pattern=GPT2_PATTERN):
    """list[bytes] by rank -> tiktoken.Encoding; <|endoftext|> (eot_token) is len(ranks)."""
    return tiktoken.Encoding("nanocaption", pat_str=pattern, special_tokens={"<|endoftext|>": len(ranks)},
                             mergeable_ranks={token: n for n, token in enumerate(ranks)})


def ranks_to_text(ranks):
    """list[bytes] by rank -> tiktoken's file format, as bytes: a line `base64 rank` each."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), n) for n, token in enumerate(ranks))


def text_to_ranks(text):
    """The inverse of ranks_to_text; UserError where ranks don't count up from 0 or a byte has no token."""
    try:
        lines = [line.split() for line in text.splitlines() if line]
        ranks = [base64.b64decode(token, validate=True) for token, _ in lines]
        if [int(n) for _, n in lines] != list(range(len(lines))) or {bytes([b]) for b in range(256)} - set(ranks):
            raise ValueError
    except ValueError:
        raise UserError("not tiktoken's file format: expected a line `base64 rank` for each rank from 0") from None
    return ranks


def keep_used(ranks, pattern, texts):
    """
    list[bytes] by rank -> the ranks, int in order, of the tokens that the texts use, of all tokens on the way to them and of the
    single bytes: with these alone the texts are encoded as before but for the numbers, and any other text still encodes.
    """
    encoding, order = make_tokenizer(ranks, pattern), {token: n for n, token in enumerate(ranks)}
    used = {ranks[n] for n in set().union(*(encoding.encode_ordinary(text) for text in texts))}
    kept = {bytes([byte]) for byte in range(256)} | used
    for token in used:
        apply_merges([bytes([byte]) for byte in token], order, kept)
    return sorted(order[token] for token in kept)


# punctuation apart from the space before it, digits by threes
FALCON_PATTERN = (r"[!-/:-@\[-`{-~\p{P}]++|\p{Nd}{3}|\p{Nd}{1,2}|\p{N}++| ?\p{L}++"
                  r"| ?[^\s\p{L}\p{N}\p{P}!-/:-@\[-`{-~]++|\s++$|\s+(?!\S)|\s")
PATTERNS = {"ByteLevel": GPT2_PATTERN, "Punctuation ByteLevel Digits Split": FALCON_PATTERN}  # by tokenizer.json's pre_tokenizer
DECODER_PATTERNS = {"gpt2": GPT2_PATTERN, "falcon": FALCON_PATTERN}  # by decoder_family


def read_hub_tokenizer(path):
    """
    tokenizer.json of a byte-level BPE (GPT-2's, Falcon's) -> (list[bytes] by rank, pattern, their ids there with that of
    <|endoftext|> last). UserError for a tokenizer of another kind.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # which stand for themselves; the others for 256, 257, ...
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
    try:
        with open(path, encoding="utf-8") as file:
            data = json.load(file)
        split = data["pre_tokenizer"]
        kinds = " ".join(part["type"] for part in split.get("pretokenizers", [split]))
        vocab, special = data["model"]["vocab"], {token["content"]: token["id"] for token in data["added_tokens"]}
        ids = {bytes(letters[c] for c in token): n for token, n in vocab.items() if token not in special}
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in data["model"]["merges"]]
        made = [vocab[left + right] for left, right in merges]
        if kinds not in PATTERNS or made != sorted(made) or {bytes([b]) for b in range(256)} - ids.keys():
            raise ValueError(f"split by {kinds}")
        ranks = sorted(ids, key=ids.get)
        return ranks, PATTERNS[kinds], [*map(ids.get, ranks), special["<|endoftext|>"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a byte-level BPE as GPT-2's or Falcon's ({type(error).__name__}: {error})") from None
