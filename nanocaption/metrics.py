"""
Caption metrics without Java: CIDEr-D, BLEU-1..4 and ROUGE-L, matching pycocoevalcap's.

    references = cider_references([[tokenize(text) for text in texts] for texts in references])
    score, scores = cider([tokenize(text) for text in captions], references)
"""
import math
import re
from collections import Counter

import numpy as np

N_CANDIDATES = 50  # references that are tried as the one caption for all images
N_TRIED = 100  # images that they are tried on

# -----------------------------------------------------------------------------
# words

# abbreviations, which keep their period: these always, CAPITAL only if capitalized, NUMBERED only
# before a number, comma or semicolon
ABBREVIATIONS = """
    jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri mr mrs ms
    messrs mme mlle dr drs prof profs sr jr st ste ave blvd rd mt ft ct sq bldg vs etc inc ltd
    co cos corp bros dept est gov govs gen col sgt capt lt lieut cmdr maj pvt pfc cpl spc brig
    supt insp rep reps sen sens rev hon pres esq atty attys adm asst assn assoc univ natl intl
    ext tel elec mfg plc pty pte bhd cie ph.d al ala ariz calif colo conn dak fla ga ind kan
    kans ky md mich minn mo mont neb nev okla penn tenn va vt wis wisc wyo rt alex wm jos cf ph
"""
CAPITAL = "Miss Ark Del Ill La Mass Ore Pa Tex Wash"
NUMBERED = "no nos pp fig figs op art ca"

# punctuation and symbols that are words of their own
SYMBOLS = (
    r"!-/:-@\[-`{-~\xa1-\xa9\xac\xae-\xb4\xb6-\xb9\xbc-\xbf\xd7\xf7\u037e\u0387\u0589\u05be\u05c0"
    r"\u05c3\u05c6\u05f3-\u0603\u0606-\u060c\u0614\u061b\u061e-\u061f\u066a\u066d\u06d4"
    r"\u0700-\u070d\u07f6-\u07f8\u0964-\u0965\u0e3f\u0e4f\u1fbd\u2016-\u2017\u2019\u201a"
    r"\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a0"
    r"\u20a4\u20ac\u2100-\u2101\u2103-\u2106\u2108-\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125"
    r"\u2127\u2129\u212e\u213a-\u213b\u2140-\u2144\u214a-\u214d\u214f\u2153-\u215e\u2190-\u2bff"
    r"\u3001-\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65\uffe0-\uffe1"
    r"\uffe5-\uffe6"
)
# marks that belong to the word around them, such as accents and vowel signs
MARKS = (
    r"\u02c2-\u0379\u0384-\u0385\u03f6\u0483-\u0487\u055a-\u055f\u058a\u0591-\u05bd\u05bf"
    r"\u05c1-\u05c2\u05c4-\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06fe\u070f-\u07f3"
    r"\u0900-\u0903\u093c-\u094e\u0951-\u0955\u0962-\u0963\u0981-\u09e3\u0a01-\u0a4f\u0a81-\u0acf"
    r"\u0b82-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d48\u0e31-\u0e3a\u0e47-\u0e4e\u0eb1-\u0ecd"
    r"\u1885-\u1886\u2010-\u2011"
)
# what Stanford's tokenizer does not know, such as emoji; it ends a word and is dropped
UNKNOWN = re.compile(rf"[^\w\s{SYMBOLS}{MARKS}]|[\U00010000-\U0010ffff]")

A = "['’]"                 # an apostrophe
L = rf"[^\s\d{SYMBOLS}]"   # a letter or mark
W = rf"[^\s{SYMBOLS}]"     # a letter, mark or digit
P = rf"[^\W{SYMBOLS}]"     # a letter or digit
# THING (Stanford's name): a part of a hyphenated word. END: the word does not go on
THING = rf"(?:(?:[dlo]{A}{L}|\d+(?:[.,:]\d+)+(?=-{L})){P}*|{P}+)"
END = rf"(?!{W}|-{W}|{A}{L})"


def any_of(words):
    """A regular expression for any of these words."""
    return "|".join(re.escape(word) for word in words.split())


# the first alternative that matches wins, so the order matters
TOKEN = re.compile(rf"""
    https?://[^\s"<>|(){{}}]*[^\s"<>|(){{}}.,;:?!'-]                             # addresses
  | \w[\w.+-]*@[\w-]+(?:\.[\w-]+)* | [@#]{L}+
  | (?:{W}[\w-]*\.)+(?:com|net|org|edu)\b(?:/[^\s"<>|(){{}}]*[\w/])?
  | </?[a-z][^<>\s]*>                                                            # tags
  | [<>]?[:;=][-o*']?[()dpo](?!{W})                                              # emoticons
  | (?:{L}\.)+(?!{L})(?:-{THING})*                                               # U.S. p.m. J.
  | (?:{any_of(ABBREVIATIONS)}|(?-i:{any_of(CAPITAL)}))\.(?!{L})
  | (?:{any_of(NUMBERED)})\.(?=\s?\d|[,;])
  | can(?=not{END}) | (?:gon|wan)(?=na{END})                                     # can not, gon na
  | got(?=ta{END}) | (?:gim|lem)(?=me{END})
  | {A}t(?=(?:is|was)(?!{W})) | {A}n{A}
  | {A}(?:s|m|d|ll|re|ve|em|till?|cause|n(?!\.)|\d0s|\d\d(?=[\s.,;!?]|$))(?!{W})
  | ma{A}am | c{A}mon | cap{A}n | ol{A}(?!{W}) | [eo]{A}er | ne{A}er | li{A}l | [jy]{A}(?={L})
  | {W}+(?:-{W}+)*?(?=n{A}t) | n{A}t{L}*                                         # is n't
  | (?-i:[A-Z]+(?:[&+][A-Z]+)+) | c\+\+ | [cf]\#                                 # AT&T
  | (?:us|[ac])\$ | [-+]?\d*+(?:[.,:]\d++)++(?!-{L})                             # US$, 1,000.50
  | {L}{W}*(?:[.!?]{L}{W}*)+(?:-{THING})*                                        # ran.the
  | {THING}(?:{W}+|(?:[-_]{THING})*(?:(?<=[a-z\d])/[a-z\d]+(?:[-_]{THING})*){{,2}})  # t-shirt, 1/2
  | {W}+ | [-+]\d+ | \.\.+ | --+ | [!?]{{2,}} | \*+ | _+ | \#+ | `` | '' | \S
    """, re.VERBOSE | re.IGNORECASE)
REWRITE = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'",
    "“": '"', "”": '"', "‘": "`", "–": "--", "—": "--", "‒": "--", "…": " ... ",
    "¢": " cents ", "£": " # ", "€": "$", "\u00ad": "",
    "½": " 1/2 ", "¼": " 1/4 ", "¾": " 3/4 ", "⅓": " 1/3 ", "⅔": " 2/3 ",
}
REWRITE_PATTERN = re.compile("|".join(REWRITE))
BRACKETS = str.maketrans({
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
})
# dropped, as are runs of . and -
PUNCTUATION = {"'", "''", '"', "’", "`", "``", ".", "..", "?", "!", ",", ":", ";", "-"}


def tokenize(text):
    """
    A text -> its words, lowercase and without punctuation, as pycocoevalcap 1.2's PTBTokenizer
    splits it (Stanford's, with -lowerCase): "isn't" is "is", "n't". Brackets remain, as "-lrb-":
    pycocoevalcap means to drop them but looks for "-LRB-". Words with combining marks stay whole,
    except in scripts that Stanford's splits too (Kannada, Malayalam, Khmer, ...). The rules were
    found by comparing outputs; rare ones (telephone numbers, ftp://) are missing.
    """
    text = REWRITE_PATTERN.sub(rewrite, text)
    if not text.isascii():
        text = UNKNOWN.sub(" ", text)
    words = []
    for word in TOKEN.findall(text):
        word = word.lower()
        if word in PUNCTUATION or word.startswith(("--", "...")):
            continue
        if word.startswith(("’", "n’t")):
            word = word.replace("’", "'")
        words.append(word if word.isalnum() else word.translate(BRACKETS))
    return words


def rewrite(match):
    """What Stanford's tokenizer writes for a symbol."""
    return REWRITE[match[0]]


# -----------------------------------------------------------------------------
# metrics: each takes lists of words and returns the score of all captions and a list of each
# caption's score


def ngrams(words):
    """Counts of all n-grams of 1 to 4 words: a Counter over tuples of str."""
    counts = Counter()
    for n in range(1, 5):
        for i in range(len(words) - n + 1):
            counts[tuple(words[i:i + n])] += 1
    return counts


def document_frequencies(references):
    """
    references: for each image a list of captions, each a list of words. Returns a Counter (of how
    many images' captions contain each n-gram) and the number of images. Pass this pair to
    cider_references to let other captions, such as train's, decide which n-grams are rare.
    """
    counts = Counter()
    for captions in references:
        found = set()
        for words in captions:
            found.update(ngrams(words))
        counts.update(found)
    return counts, len(references)


def tf_idf(words, frequencies):
    """A caption's {n-gram: weight}, their norm for each n, and its length, counted in bigrams."""
    documents, n_documents = frequencies
    weights = {}
    squares = [0.0] * 4
    for ngram, count in ngrams(words).items():
        idf = math.log(n_documents) - math.log(max(documents.get(ngram, 0), 1))
        weight = count * idf
        weights[ngram] = weight
        squares[len(ngram) - 1] += weight * weight
    return weights, [math.sqrt(s) for s in squares], max(len(words) - 1, 0)


def cider_references(references, frequencies=None):
    """
    Prepares references, for each image one or more lists of words, for cider. frequencies: from
    document_frequencies, by default of these references. Raises ValueError if an image has none.
    """
    if not references or not all(references):
        raise ValueError("every image needs a reference caption")
    if frequencies is None:
        frequencies = document_frequencies(references)
    prepared = []
    for captions in references:
        prepared.append([tf_idf(words, frequencies) for words in captions])
    return frequencies, prepared


def cider(captions, references):
    """
    CIDEr-D (arXiv 1411.5726; n-grams up to 4, sigma 6), at most 10. captions: a list of words for
    each image; references: from cider_references. Raises ValueError if their numbers differ.
    """
    frequencies, references = references
    scores = []
    for words, image_references in zip(captions, references, strict=True):
        scores.append(mean_similarity(tf_idf(words, frequencies), image_references))
    return sum(scores) / len(scores), scores


def mean_similarity(caption, references):
    """CIDEr-D of one caption; it and its image's references are from tf_idf."""
    total = sum(similarity(caption, reference) for reference in references)
    return 10 * total / 4 / len(references)


def similarity(caption, reference):
    """CIDEr-D's similarity of two captions from tf_idf: cosines times a penalty for length."""
    weights, norms, length = caption
    reference_weights, reference_norms, reference_length = reference
    products = [0.0] * 4
    for ngram, weight in weights.items():
        if ngram in reference_weights:
            other = reference_weights[ngram]
            products[len(ngram) - 1] += min(weight, other) * other
    total = 0.0
    for product, a, b in zip(products, norms, reference_norms):
        if a * b:
            total += product / (a * b)
    return total * math.exp(-(length - reference_length) ** 2 / (2 * 6 ** 2))


def bleu(captions, references):
    """
    BLEU-1 to BLEU-4 (Papineni et al. 2002, ACL P02-1040) with the closest reference's length, as
    pycocoevalcap computes them. captions: a list of words for each image; references: for each a
    list of lists of words. Raises ValueError if their numbers differ. Returns the corpus's four
    scores, and four lists with each caption's.
    """
    counts = []
    for words, image_references in zip(captions, references, strict=True):
        counts.append(bleu_counts(words, image_references))
    total = [sum(column) for column in zip(*counts)]
    each = [bleu_score(count) for count in counts]
    return bleu_score(total), [list(scores) for scores in zip(*each)]


def bleu_counts(words, references):
    """Length, closest reference length, 4 counts of matched n-grams, 4 counts of all n-grams."""
    distance = [(abs(len(reference) - len(words)), len(reference)) for reference in references]
    _, closest = min(distance)
    most = Counter()
    for reference in references:
        most |= ngrams(reference)
    matched = [0] * 4
    for ngram, count in ngrams(words).items():
        matched[len(ngram) - 1] += min(count, most[ngram])
    possible = [max(len(words) - n, 0) for n in range(4)]
    return [len(words), closest, *matched, *possible]


def bleu_score(counts):
    """BLEU-1 to BLEU-4 from bleu_counts, of one caption or summed over a corpus."""
    length, reference_length = counts[:2]
    ratio = (length + 1e-15) / (reference_length + 1e-9)
    brevity = math.exp(min(0, 1 - 1 / ratio))
    scores = []
    product = 1.0
    for n in range(4):
        product *= (counts[2 + n] + 1e-15) / (counts[6 + n] + 1e-9)
        scores.append(product ** (1 / (n + 1)) * brevity)
    return scores


def rouge_l(captions, references):
    """
    ROUGE-L (Lin 2004, ACL W04-1013; beta 1.2, best precision and best recall over the references).
    captions: a list of words for each image; references: for each a list of lists of words. Raises
    ValueError if their numbers differ.
    """
    scores = []
    for words, image_references in zip(captions, references, strict=True):
        # pycocoevalcap treats an empty caption as one empty word
        words = words or [""]
        precision = 0.0
        recall = 0.0
        for reference in image_references:
            reference = reference or [""]
            common = common_length(words, reference)
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(reference))
        score = 0.0
        if recall:
            score = (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)
        scores.append(score)
    return sum(scores) / len(scores), scores


def common_length(a, b):
    """The length of the longest common subsequence of two lists."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, 1):
            above = row[j]
            row[j] = diagonal + 1 if word == other else max(above, row[j - 1])
            diagonal = above
    return row[-1]


def score_all(words, references, prepared=None):
    """
    All scores of the captions, as a dict; distinct is the fraction of different captions. words,
    references: as for bleu; prepared: from cider_references, or None to prepare them here.
    """
    if prepared is None:
        prepared = cider_references(references)
    scores = {"cider": cider(words, prepared)[0]}
    for n, score in enumerate(bleu(words, references)[0], 1):
        scores[f"bleu{n}"] = score
    scores["rouge_l"] = rouge_l(words, references)[0]
    scores["distinct"] = len(set(map(tuple, words))) / len(words)
    scores["mean_words"] = sum(map(len, words)) / len(words)
    return scores


def baselines(references, prepared, seed=0):
    """
    Scores to compare a model with: those of humans (each reference against the image's others), of
    another image's caption, and of one caption for all images (the best by CIDEr of 50 references,
    see constant_caption). Returns {"human", "chance", "constant"}: score_all's dicts, or None for
    too few captions.
    """
    chance, constant = blind_captions(references, prepared, seed)
    return {
        "human": human_scores(references),
        "chance": score_all(chance, references, prepared) if chance else None,
        "constant": score_all(constant, references, prepared),
    }


def cider_baselines(references, prepared, seed=0):
    """
    CIDEr of the same three in a tenth of the time: {"human", "chance", "constant"}, floats or None.
    That of humans is about 0.01 higher than from baselines, because n-grams are counted in all
    references, including the one that is scored.
    """
    chance, constant = blind_captions(references, prepared, seed)
    human = []
    for captions in prepared[1]:
        if len(captions) > 1:
            scores = [mean_similarity(caption, captions[:i] + captions[i + 1:])
                      for i, caption in enumerate(captions)]
            human.append(sum(scores) / len(scores))
    return {
        "human": sum(human) / len(human) if human else None,
        "chance": cider(chance, prepared)[0] if chance else None,
        "constant": cider(constant, prepared)[0],
    }


def human_scores(references):
    """Scores of each image's i-th reference against its others, averaged over i."""
    rounds = []
    for i in range(max(map(len, references))):
        several = [captions for captions in references if i < len(captions) > 1]
        if several:
            words = [captions[i] for captions in several]
            others = [captions[:i] + captions[i + 1:] for captions in several]
            rounds.append(score_all(words, others))
    if not rounds:
        return None
    return {key: sum(scores[key] for scores in rounds) / len(rounds) for key in rounds[0]}


def blind_captions(references, prepared, seed):
    """
    Two lists of captions made without seeing the images: for each image a random reference of
    another one (None if there is only one image), and the same caption for all.
    """
    rng = np.random.default_rng(seed)
    chance = other_captions(references, rng) if len(references) > 1 else None
    return chance, [constant_caption(references, prepared, rng)] * len(references)


def other_captions(references, rng):
    """For each image a random reference of another one: of its neighbor in a random cycle."""
    n = len(references)
    order = rng.permutation(n)
    words = [None] * n
    for image, other in zip(order, np.roll(order, 1)):
        words[image] = references[other][rng.integers(len(references[other]))]
    return words


def constant_caption(references, prepared, rng):
    """The best by CIDEr of N_CANDIDATES references, each tried on the first N_TRIED images."""
    frequencies, prepared = prepared
    captions = [words for image_references in references for words in image_references]
    chosen = rng.choice(len(captions), min(N_CANDIDATES, len(captions)), replace=False)
    best_score = -1.0
    for i in chosen:
        caption = tf_idf(captions[i], frequencies)
        score = sum(mean_similarity(caption, others) for others in prepared[:N_TRIED])
        if score > best_score:
            best_score = score
            best = captions[i]
    return best
