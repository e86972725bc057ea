"""
Scores a captioner against what people wrote: CIDEr-D, BLEU-1..4 and ROUGE-L, equal to pycocoevalcap's but without Java.

    python evaluate.py --out_dir out/nano --data_dir data/flickr8k --split val
    python evaluate.py --out_dir out/nano --images photos/ --captions captions.jsonl --sheet sheet.png

The metrics take lists of words, from tokenize:

    from evaluate import cider, cider_references, tokenize
    refs = cider_references([[tokenize(text) for text in texts] for texts in references])   # once
    score, scores = cider([tokenize(text) for text in captions], refs)                      # as often as wanted
"""
# before what is slow to import: from here on Ctrl-C is answered in one line
from common import PUBLISHED, Parser, UserError, atomic_write, check_ranges, progress, run

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter

import numpy as np

from prepare_flickr import EXTENSION, list_images, load_image, match, read_captions, read_entry, read_records, read_split

# ---------------------------------------------------------------------------------------------------------------------
# words

# Abbreviations keep their full stop: always, only where they begin with a capital, only before a number.
ABBREVIATIONS = """jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri mr mrs ms messrs
    mme mlle dr drs prof profs sr jr st ste ave blvd rd mt ft ct sq bldg vs etc inc ltd co cos corp bros dept
    est gov govs gen col sgt capt lt lieut cmdr maj pvt pfc cpl spc brig supt insp rep reps sen sens rev hon
    pres esq atty attys adm asst assn assoc univ natl intl ext tel elec mfg plc pty pte bhd cie ph.d al ala ariz
    calif colo conn dak fla ga ind kan kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo rt
    alex wm jos cf ph"""
CAPITAL = "Miss Ark Del Ill La Mass Ore Pa Tex Wash"
NUMBERED = "no nos pp fig figs op art ca"

A, L, W = "['’]", r"[^\W\d_]", r"[^\W_]"  # an apostrophe, a letter, a letter or digit
THING = rf"(?:(?:[dlo]{A}{L}|\d+(?:[.,:]\d+)+(?=-{L})){W}*|{W}+)"
END = rf"(?!{W}|-{W}|{A}{L})"
any_of = lambda words: "|".join(map(re.escape, words.split()))
# The first alternative that fits is taken, so the order matters.
TOKEN = re.compile(rf"""
    https?://[^\s"<>|(){{}}]*[^\s"<>|(){{}}.,;:?!'-]                             # addresses
  | \w[\w.+-]*@[\w-]+(?:\.[\w-]+)* | [@#]{L}+
  | (?:{W}[\w-]*\.)+(?:com|net|org|edu)\b(?:/[^\s"<>|(){{}}]*[\w/])?
  | </?[a-z][^<>\s]*>                                                            # tags
  | [<>]?[:;=][-o*']?[()dpo](?!{W})                                              # smileys
  | (?:{L}\.)+(?!{L})(?:-{THING})*                                               # U.S. p.m. J.
  | (?:{any_of(ABBREVIATIONS)}|(?-i:{any_of(CAPITAL)}))\.(?!{L}) | (?:{any_of(NUMBERED)})\.(?=\s?\d|[,;])
  | can(?=not{END}) | (?:gon|wan)(?=na{END}) | got(?=ta{END}) | (?:gim|lem)(?=me{END})   # can not, gon na
  | {A}t(?=(?:is|was)(?!{W})) | {A}n{A} | {A}(?:s|m|d|ll|re|ve|em|till?|cause|n(?!\.)|\d0s|\d\d(?=[\s.,;!?]|$))(?!{W})
  | ma{A}am | c{A}mon | cap{A}n | ol{A}(?!{W}) | [eo]{A}er | ne{A}er | li{A}l | [jy]{A}(?={L})
  | {W}+(?:-{W}+)*?(?=n{A}t) | n{A}t{L}*                                         # is n't
  | (?-i:[A-Z]+(?:[&+][A-Z]+)+) | c\+\+ | [cf]\#                                 # AT&T
  | (?:us|[ac])\$ | [-+]?\d*+(?:[.,:]\d++)++(?!-{L})                             # US$, 1,000.50
  | {L}{W}*(?:[.!?]{L}{W}*)+(?:-{THING})*                                        # a missing space: ran.the
  | {THING}(?:[-_]{THING})*(?:/{W}+(?:[-_]{THING})*){{,2}}                       # t-shirt, black/white, 1/2
  | [-+]\d+ | \.\.+ | --+ | [!?]{{2,}} | \*+ | _+ | \#+ | `` | '' | \S
    """, re.VERBOSE | re.IGNORECASE)
REWRITE = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'", "“": '"', "”": '"', "‘": "`",
           "–": "--", "—": "--", "‒": "--", "…": "...", "¢": " cents ", "£": "#", "€": "$", "\u00ad": "",
           "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 "}
REWRITE_PATTERN = re.compile("|".join(REWRITE))
BRACKETS = str.maketrans({"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"})
PUNCTUATION = {"'", "''", '"', "’", "`", "``", ".", "..", "?", "!", ",", ":", ";", "-"}  # besides runs of . and -


def tokenize(text):
    """
    text: str -> its words, list of str, lower case, without punctuation. They are those of pycocoevalcap 1.2's
    PTBTokenizer (Stanford's, -lowerCase), so "isn't" is "is", "n't", and brackets remain, as "-lrb-": pycocoevalcap
    means to drop them but looks for "-LRB-". The rules were found by comparing outputs; rare ones (telephone numbers,
    ftp://) are missing.
    """
    text = REWRITE_PATTERN.sub(lambda found: REWRITE[found[0]], text)
    words = []
    for word in TOKEN.findall(text):
        word = word.lower()
        if word in PUNCTUATION or word.startswith(("--", "...")) or word > "\U00010000":  # emoji are dropped as well
            continue
        if word[0] in "n’" and word.startswith(("’", "n’t")):
            word = word.replace("’", "'")
        words.append(word if word.isalnum() else word.translate(BRACKETS))
    return words


# ---------------------------------------------------------------------------------------------------------------------
# metrics: lists of words in, (score of all captions, list of each caption's score) out; 1 is not the most in CIDEr


def ngrams(words):
    """How often each sequence of 1 to 4 words occurs: a Counter over tuples of str."""
    return Counter(tuple(words[i:i + n]) for n in range(1, 5) for i in range(len(words) - n + 1))


def document_frequencies(references):
    """
    references: for each picture a list of captions, each a list of words. Returns (Counter: in how many pictures'
    captions each n-gram occurs, number of pictures), which cider_references takes, so that rare is what is rare in,
    say, train.
    """
    counts = Counter()
    for captions in references:
        counts.update({ngram for words in captions for ngram in ngrams(words)})
    return counts, len(references)


def tf_idf(words, frequencies):
    """-> ({n-gram: weight}, norms of the four n-gram lengths' weights, number of pairs of words) for CIDEr."""
    documents, n_documents = frequencies
    weights, squares, log_n = {}, [0.0] * 4, math.log(n_documents)
    for ngram, count in ngrams(words).items():
        weights[ngram] = weight = count * (log_n - math.log(max(documents.get(ngram, 0), 1)))
        squares[len(ngram) - 1] += weight * weight
    return weights, [math.sqrt(s) for s in squares], max(len(words) - 1, 0)


def cider_references(references, frequencies=None):
    """
    references: for each picture a list of captions (one or more), each a list of words; frequencies: of the n-grams,
    from document_frequencies (None: counted in these references). Returns what cider takes. ValueError for no captions.
    """
    if not references or not all(references):
        raise ValueError("every picture needs a reference caption")
    frequencies = frequencies or document_frequencies(references)
    return frequencies, [[tf_idf(words, frequencies) for words in captions] for captions in references]


def cider(captions, references):
    """
    CIDEr-D (arXiv 1411.5726; n-grams up to 4, sigma 6): captions: a list of words for each picture; references from
    cider_references. ValueError if they are not equally many. A score is at most 10.
    """
    frequencies, references = references
    scores = []
    for words, refs in zip(captions, references, strict=True):
        weights, norms, pairs = tf_idf(words, frequencies)
        total = 0.0
        for ref_weights, ref_norms, ref_pairs in refs:
            products = [0.0] * 4
            for ngram, weight in weights.items():
                if ngram in ref_weights:
                    products[len(ngram) - 1] += min(weight, ref_weights[ngram]) * ref_weights[ngram]
            cosines = sum(p / (a * b) for p, a, b in zip(products, norms, ref_norms) if a * b)
            total += cosines * math.exp(-(pairs - ref_pairs) ** 2 / (2 * 6 ** 2))
        scores.append(10 * total / 4 / len(refs))
    return sum(scores) / len(scores), scores


def bleu(captions, references):
    """
    BLEU-1 to BLEU-4 (Papineni et al. 2002, ACL P02-1040) with the closest reference's length. captions: a list of words
    for each picture; references: for each a list of lists of words. Returns (the corpus' four scores, for each of the
    four a list with each caption's), as pycocoevalcap does. ValueError if they are not equally many.
    """
    def score(length, ref_length, correct, possible):
        scores, product = [], 1.0
        for n in range(4):
            product *= (correct[n] + 1e-15) / (possible[n] + 1e-9)
            scores.append(product ** (1 / (n + 1)))
        ratio = (length + 1e-15) / (ref_length + 1e-9)
        return [s * math.exp(min(0, 1 - 1 / ratio)) for s in scores]

    rows = []  # of length, the closest reference's, correct n-grams of four lengths, possible ones
    for words, refs in zip(captions, references, strict=True):
        closest = min((abs(len(ref) - len(words)), len(ref)) for ref in refs)[1]
        most = Counter()
        for ref in refs:
            most |= ngrams(ref)
        correct = [0] * 4
        for ngram, count in ngrams(words).items():
            correct[len(ngram) - 1] += min(count, most[ngram])
        rows.append([len(words), closest, *correct, *(max(len(words) - n, 0) for n in range(4))])
    as_score = lambda row: score(row[0], row[1], row[2:6], row[6:])
    return as_score([sum(column) for column in zip(*rows)]), [list(s) for s in zip(*map(as_score, rows))]


def rouge_l(captions, references):
    """
    ROUGE-L (Lin 2004, ACL W04-1013; beta 1.2, best precision and best recall over the references). captions: a list of
    words for each picture; references: for each a list of lists of words. ValueError if they are not equally many.
    """
    def common(a, b):  # the length of their longest common subsequence
        row = [0] * (len(b) + 1)
        for word in a:
            diagonal = 0
            for j, other in enumerate(b, 1):
                diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
        return row[-1]

    scores = []
    for words, refs in zip(captions, references, strict=True):
        # in pycocoevalcap no words are one empty word
        words, refs = words or [""], [ref or [""] for ref in refs]
        lengths = [common(words, ref) for ref in refs]
        precision, recall = max(lengths) / len(words), max(n / len(ref) for n, ref in zip(lengths, refs))
        scores.append((1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision) if recall else 0.0)
    return sum(scores) / len(scores), scores


def meteor_spice(captions, references):
    """METEOR and SPICE by pycocoevalcap's Java programs: captions and references as for bleu -> {"meteor", "spice"}."""
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.spice.spice import Spice
    refs = {i: [" ".join(words) for words in texts] for i, texts in enumerate(references)}
    found, scores = {i: [" ".join(words)] for i, words in enumerate(captions)}, {}
    for name, metric in ("meteor", Meteor), ("spice", Spice):
        try:
            scores[name] = float(metric().compute_score(refs, found)[0])
        except (OSError, ValueError, subprocess.CalledProcessError) as error:  # SPICE wants a download and an old Java
            scores[name] = None
            print(f"evaluate.py: no {name}: its Java program failed: {str(error)[:200]}", file=sys.stderr)
    return scores


def score_all(words, references, refs=None):
    """Captions and references as for bleu, refs from cider_references -> a row of the table, as a dict."""
    bleus = bleu(words, references)[0]
    return {"cider": cider(words, refs or cider_references(references))[0],
            **{f"bleu{n}": score for n, score in enumerate(bleus, 1)}, "rouge_l": rouge_l(words, references)[0],
            "distinct": len(set(map(tuple, words))) / len(words), "mean_words": sum(map(len, words)) / len(words)}


def baselines(references, refs, seed=0):
    """
    What the numbers mean: rows for a person (each caption against the picture's others), for a caption of another
    picture, and for one caption for all pictures (the best by CIDEr of 50 of the references). None where there are too
    few.
    """
    rng = np.random.default_rng(seed)
    rounds = []
    for i in range(max(map(len, references))):
        several = [captions for captions in references if i < len(captions) > 1]
        if several:
            rounds.append(score_all([c[i] for c in several], [c[:i] + c[i + 1:] for c in several]))
    human = {key: sum(row[key] for row in rounds) / len(rounds) for key in rounds[0]} if rounds else None
    chance = None
    if len(references) > 1:  # each takes its predecessor's on a random round trip of all pictures
        order, others = rng.permutation(len(references)), [None] * len(references)
        for picture, other in zip(order, np.roll(order, 1)):
            others[picture] = references[other][rng.integers(len(references[other]))]
        chance = score_all(others, references, refs)
    captions = [words for texts in references for words in texts]
    candidates = [captions[i] for i in rng.choice(len(captions), min(50, len(captions)), replace=False)]
    best = max(candidates, key=lambda words: cider([words] * len(references), refs)[0])
    return {"human": human, "chance": chance, "constant": score_all([best] * len(references), references, refs)}


# ---------------------------------------------------------------------------------------------------------------------
# the captioner


def encode(captioner, images):
    """images: uint8 (N, S, S, 3) -> what the decoder sees of them, (N, patches, C)"""
    import torch
    with torch.no_grad():
        return captioner.model.encode(torch.from_numpy(images).to(captioner.model.mean.device))


def generate(captioner, memory, **options):
    """memory: N encoded pictures -> N captions, str"""
    return [captioner.tokenizer.decode(words).strip() for [(words, _)] in captioner.model.beam_search(memory, **options)]


def summed_loss(captioner, memory, texts):
    """
    memory: N + 1 encoded pictures, texts: for each of the first N a list of str -> (5,): summed cross-entropy in nats, the
    same with each picture replaced by the next, tokens with EOT, characters, captions cut to the longest that the model
    takes, of all the texts.
    """
    from model import pack
    model = captioner.model
    texts = [[" ".join(text.split()) for text in captions] for captions in texts]
    tokens = [[captioner.tokenizer.encode_ordinary(text) for text in captions] for captions in texts]
    batch = {k: v.to(memory.device) for k, v in pack(tokens, model.eot_token, model.longest).items()}
    return np.array([*(model.cross_entropy(m, batch).item() for m in (memory[:-1], memory[1:])), len(batch["targets"]),
                     sum(len(text) for captions in texts for text in captions),
                     sum(len(words) >= model.longest for captions in tokens for words in captions)])


# ---------------------------------------------------------------------------------------------------------------------
# the command


def find_pictures(args):
    """
    What the arguments name -> (file names, captions: a list of str for each, get): get(range, size) gives those
    pictures, uint8 (n, S, S, 3), of side `size` where they are read from files.
    """
    if not args.images:
        records = read_records(args.data_dir, args.split)[:args.limit]
        # opened for each batch, so that pages once read don't stay with the process
        get = lambda rows, size: np.array(read_split(args.data_dir, args.split)["images"][rows.start:rows.stop])
        return [r["image"] for r in records], [r["captions"] for r in records], get
    captions, splits, empty, entries = {}, set(), 0, list_images(args.images)
    if None in entries.values():
        raise UserError(f"--images {args.images} is compressed and can't be read in any order: unpack it first")
    for name, text, split in read_captions(args.captions):
        splits.add(split)
        if args.split is None or split == args.split:
            captions.setdefault(name, []).append(text)
            empty += not text.strip()
    if not captions:
        raise UserError(f"{args.captions} has no captions of split {args.split!r} (it has: "
                        f"{', '.join(map(str, splits))})")
    found = match(captions, entries)
    for name in captions:
        if name not in found:
            raise UserError(f"{name} of {args.captions} is not in {args.images}")
        captions[name] = [text for text in captions[name] if text.strip()]
        if not captions[name]:
            raise UserError(f"{name} of {args.captions} has only empty captions")
    if empty:
        print(f"evaluate.py: {empty} empty captions of {args.captions} were left out", file=sys.stderr)
    names = list(captions)[:args.limit]

    def get(rows, size):
        pictures = []
        for name in names[rows.start:rows.stop]:
            source = read_entry(args.images, entries[found[name]])
            if isinstance(source, bytes):
                source = io.BytesIO(source)
                source.name = name  # which an error tells
            pictures.append(load_image(source, size))
        return np.stack(pictures)
    return names, [captions[name] for name in names], get


def print_table(result):
    """Prints score_all's dict for people."""
    columns = {"CIDEr": "cider", "BLEU-1": "bleu1", "BLEU-2": "bleu2", "BLEU-3": "bleu3", "BLEU-4": "bleu4",
               "ROUGE-L": "rouge_l", "distinct": "distinct", "words": "mean_words"}
    rows = {"the model": result, "people*": result["human"], "another picture's caption": result["chance"],
            "one caption for all": result["constant"]}
    print(f"{result['images']:,} pictures".ljust(26) + "".join(f"{column:>9}" for column in columns))
    for title, row in rows.items():
        cells = [f"{row[key]:9.{1 if key == 'mean_words' else 3}f}" for key in columns.values()] if row else []
        print(f"{title:26}" + ("".join(cells) or "  (too few captions)"))
    print(f"loss {result['loss']:.4f} nats a token, {result['bits_per_char']:.4f} bits a character, on people's captions; "
          f"{result['loss_shuffled']:.4f} with each picture replaced by another")
    print("* each of a picture's captions against its others: one reference fewer than the rows beside it have")
    for name in "meteor", "spice":
        if name in result:
            print(f"{name.upper()} {'not available' if result[name] is None else format(result[name], '.3f')}")


def draw(path, names, texts, references, scores, pictures):
    """The ten best, middle and worst captions by CIDEr as one picture. pictures: i -> uint8 (S, S, 3)."""
    from sample import draw_sheet
    order, n = sorted(range(len(names)), key=lambda i: -scores[i]), min(10, len(names))
    middle = (len(order) - n) // 2
    parts = {"best": order[:n], "median": order[middle:middle + n], "worst": order[-n:]}
    captions = [f"{part} {k}, CIDEr {scores[i]:.2f}\n{texts[i]}\na person: {references[i][0]}"
                for part, chosen in parts.items() for k, i in enumerate(chosen, 1)]
    draw_sheet(path, np.stack([pictures(i) for chosen in parts.values() for i in chosen]), captions, columns=10)


def main():
    """The command: see the top of this file."""
    parser = Parser(description="Scores a captioner against what people wrote.")
    add = parser.add_argument
    add("--out_dir", default=PUBLISHED, help="a checkpoint or the folder that holds it (default: out/flickr8k beside this file)")
    add("--data_dir", default="data/flickr8k", help="a prepared folder (default: %(default)s)")
    add("--split", help="of data_dir (default: val) or, where it names splits, of --captions (default: all)")
    add("--images", help="instead of data_dir: a folder, .zip or .tar of pictures")
    add("--captions", help="and their captions, in any format that prepare_flickr.py reads")
    add("--limit", type=int, help="at most so many pictures")
    add("--beam", type=int, default=3, help="beams of the search, 1: greedy (default: %(default)s)")
    add("--max_tokens", type=int, help="no caption longer than this (default: what the model was trained on)")
    add("--length_penalty", type=float, default=0.5, help="beams compare by log-probability / length ** this")
    add("--batch_size", type=int, default=64, help="pictures at a time (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--save", metavar="JSONL", help="write a line a picture: image, caption, references")
    add("--sheet", metavar="PNG", help="draw the ten best, median and worst captions by CIDEr")
    add("--meteor_spice", action="store_true", help="METEOR and SPICE too: needs Java and pycocoevalcap")
    args = parser.parse_args()
    check_ranges(args, limit=(1, 1e12), beam=(1, 1e4), max_tokens=(1, 1e9), length_penalty=(0, 100), batch_size=(1, 1e6))
    if bool(args.images) != bool(args.captions):
        raise UserError("give both --images and --captions, or neither for a split of --data_dir")
    if not args.images:
        args.split = args.split or "val"
    if args.save and not os.path.isdir(folder := os.path.dirname(args.save) or "."):
        raise UserError(f"--save {args.save}: there is no folder {folder}: make it first")
    if args.sheet and not EXTENSION.search(args.sheet):
        raise UserError(f"--sheet {args.sheet}: name a picture file, such as sheet.png")
    if args.meteor_spice:
        try:
            import pycocoevalcap.spice.spice  # noqa: F401
        except ImportError as error:
            raise UserError(f"--meteor_spice needs pycocoevalcap ({error}): pip install pycocoevalcap") from None
        if not shutil.which("java"):
            raise UserError("--meteor_spice needs Java, and there is no java on the PATH: install one")

    names, references, get = find_pictures(args)
    from sample import load
    captioner = load(args.out_dir, args.device)
    texts, sums, began = [], np.zeros(5), time.monotonic()
    for start in range(0, len(names), args.batch_size):
        rows = range(start, min(start + args.batch_size, len(names)))
        after = range(rows.stop % len(names), rows.stop % len(names) + 1)
        memory = encode(captioner, np.concatenate([get(r, captioner.image_size) for r in (rows, after)]))
        texts += generate(captioner, memory[:-1], beam=args.beam, max_tokens=args.max_tokens, length_penalty=args.length_penalty)
        sums += summed_loss(captioner, memory, [references[i] for i in rows])
        progress("pictures", len(texts), len(names), began)
    nats, nats_shuffled, tokens, characters, cut = sums.tolist()
    if cut:
        print(f"evaluate.py: {cut:.0f} captions of people were cut to {captioner.model.longest} tokens for the loss, "
              "which makes bits_per_char too low", file=sys.stderr)
    if len(names) < 100:
        print(f"evaluate.py: CIDEr on {len(names)} pictures says little: it weighs words by how rare they are, "
              "which takes 100 or more", file=sys.stderr)

    if len(names) > 1 and nats_shuffled - nats < 0.01 * tokens:
        print(f"evaluate.py: this captioner hardly looks at its pictures: with other pictures it finds people's captions as "
              f"likely ({nats_shuffled / tokens:.4f} nats a token) as with their own ({nats / tokens:.4f})", file=sys.stderr)

    words = [tokenize(text) for text in texts]
    reference_words = [[tokenize(text) for text in captions] for captions in references]
    refs = cider_references(reference_words)
    result = {"images": len(names), **score_all(words, reference_words, refs), "loss": nats / tokens,
              "loss_shuffled": nats_shuffled / tokens,
              "bits_per_char": nats / math.log(2) / characters, **baselines(reference_words, refs)}
    if args.meteor_spice:
        result |= meteor_spice(words, reference_words)
    if args.save:
        with atomic_write(args.save) as file:
            for image, caption, captions in zip(names, texts, references):
                line = json.dumps({"image": image, "caption": caption, "references": captions}, ensure_ascii=False)
                file.write(f"{line}\n".encode("utf-8", "backslashreplace"))
    if args.sheet:
        draw(args.sheet, names, texts, references, cider(words, refs)[1],
             lambda i: get(range(i, i + 1), captioner.image_size)[0])
    if args.json:
        print(json.dumps(result))
    else:
        print_table(result)


if __name__ == "__main__":
    run(main)
