"""Tests of nanocaption/metrics.py: against pycocoevalcap 1.2, if installed, and by hand."""
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from nanocaption.metrics import (baselines, bleu, cider, cider_references, document_frequencies,
                                 rouge_l, tokenize)

CAPTIONS = Path(__file__).parent / "data" / "captions.txt"

# Sentences and what pycocoevalcap 1.2's PTBTokenizer makes of them. Each was tokenized between
# lines "zz", because its Java program looks at the next line.
PTB = [
    (
        "A man isn't here; he can't go, they don't, she'll, I'm, "
        "you've, we'd, it's the dogs' ball.",
        "a man is n't here he ca n't go they do n't she 'll i 'm you 've we 'd it 's the dogs ball",
    ),
    (
        'He said "hello" to the `girl\' and \'\'she\'\' said ``yes\'\'',
        "he said hello to the girl and she said yes",
    ),
    (
        "He cannot, gonna wanna gotta gimme lemme d'you more'n 'tis 'twas whatcha dunno",
        "he can not gon na wan na got ta gim me lem me d'you more 'n 't is 't was whatcha dunno",
    ),
    (
        "Mr. Smith and Dr. Jones vs. the U.S. team at 5 p.m. on St. John Ave. in D.C. etc.",
        "mr. smith and dr. jones vs. the u.s. team at 5 p.m. on st. john ave. in d.c. etc.",
    ),
    (
        "It costs $5.00, £3, €20, 50 cents, 50¢, US$ 4, C$5 and 10%.",
        "it costs $ 5.00 # 3 $ 20 50 cents 50 cents us$ 4 c$ 5 and 10 %",
    ),
    (
        "half 1/2 cup, 3/4, ½ and ¾ cup 24/7 w/o and/or he/she",
        "half 1/2 cup 3/4 1/2 and 3/4 cup 24/7 w/o and/or he/she",
    ),
    (
        "black-and-white t-shirt, well-known x-ray 18-year-old re-do co-op",
        "black-and-white t-shirt well-known x-ray 18-year-old re-do co-op",
    ),
    (
        "AT&T and R&B, rock & roll, black &amp; white, C++ and A&W's",
        "at&t and r&b rock & roll black & white c++ and a&w 's",
    ),
    (
        "see http://www.foo.com/bar.html, www.foo.com or a@b.com",
        "see http://www.foo.com/bar.html www.foo.com or a@b.com",
    ),
    (
        "#1 dog #hashtag @user :) :-( ;) <3 =) <no>",
        "# 1 dog #hashtag @user :-rrb- :--lrb- ;-rrb- < 3 =-rrb- <no>",
    ),
    (
        "He ran 1,000 m. in 3.5 s at 10:30 on 5/12/2010 (maybe) [yes] {no}",
        "he ran 1,000 m. in 3.5 s at 10:30 on 5/12/2010 -lrb- maybe "
        "-rrb- -lsb- yes -rsb- -lcb- no -rcb-",
    ),
    (
        "A man's '90s car, the 80's and the 1980s rock 'n' roll, o'clock, O'Neil, ma'am",
        "a man 's '90s car the 80 's and the 1980s rock 'n' roll o'clock o'neil ma'am",
    ),
    (
        "don’t it’s “quoted” ‘single’ l’eau – dash—dash…",
        "do n't it 's quoted single l’eau dash dash",
    ),
    (
        'a * b / c \\ d | e ~ f + g = h _ i ^ j ** __',
        'a * b / c \\ d | e ~ f + g = h _ i ^ j ** __',
    ),
    (
        "The dog ran.The cat sat. what?!? no!!! wow? !! ... .. --",
        "the dog ran.the cat sat what ?!? no !!! wow !!",
    ),
    (
        "No. 5 dog, no. the",
        "no. 5 dog no the",
    ),
    (
        "jeans,blue shirt;red hat:green",
        "jeans blue shirt red hat green",
    ),
    (
        "500ml 5kg 3rd 21st 2x4 4x4 7-11 50-50 1-on-1 5.5-inch 5.5ft",
        "500ml 5kg 3rd 21st 2x4 4x4 7-11 50-50 1-on-1 5.5-inch 5.5 ft",
    ),
    (
        "-5 +5 -5.3 .5 5. 1.2.3 555-1234 5+8 dog-5",
        "-5 +5 -5.3 .5 5 1.2.3 555-1234 5 +8 dog-5",
    ),
    (
        "two-  hyphen -two well--known a--b",
        "two hyphen two well known a b",
    ),
    (
        "J. K. Rowling J.K. Rowling Ph.D. i.e. e.g. approx. Inc. Calif. La. la. Wash. wash.",
        "j. k. rowling j.k. rowling ph.d. i.e. e.g. approx inc. calif. la. la wash. wash",
    ),
    (
        "ain't y'all y'know c'mon ol' 'em 'cause cap'n shan't wouldn't've",
        "ai n't y' all y' know c'mon ol' 'em 'cause cap'n sha n't would n't 've",
    ),
    (
        "Café naïve 日本語 ñandú",
        "café naïve 日本語 ñandú",
    ),
]


# other scripts, likewise: with combining marks (NFD too), emoji, and what Java does not know
SCRIPTS = [
    (
        "एक कुत्ता घास पर धीरे-धीरे दौड़ रहा है।",
        "एक कुत्ता घास पर धीरे धीरे दौड़ रहा है ।",
    ),
    (
        "একটি কুকুর ঘাসের উপর দৌড়াচ্ছে।",
        "একটি কুকুর ঘাসের উপর দৌড়াচ্ছে ।",
    ),
    (
        "ஒரு நாய் புல்வெளியில் ஓடுகிறது.",
        "ஒரு நாய் புல்வெளியில் ஓடுகிறது",
    ),
    (
        "ఒక కుక్క గడ్డిలో పరుగెత్తుతోంది.",
        "ఒక కుక్క గడ్డిలో పరుగెత్తుతోంది",
    ),
    (
        "ಒಂದು ನಾಯಿ ಹುಲ್ಲಿನಲ್ಲಿ ಓಡುತ್ತಿದೆ.",
        "ಒ ದ ನ ಯ ಹ ಲ ಲ ನಲ ಲ ಓಡ ತ ತ ದ",
    ),
    (
        "ਇੱਕ ਕੁੱਤਾ ਘਾਹ ਤੇ",
        "ਇ ਕ ਕੁ ਤਾ ਘਾਹ ਤੇ",
    ),
    (
        "એક કૂતરો ઘાસ પર દોડે છે.",
        "એક કૂતરો ઘાસ પર દોડે છે",
    ),
    (
        "สุนัขกำลังวิ่ง บนหญ้า",
        "สุนัขกำลังวิ่ง บนหญ้า",
    ),
    (
        "ໝາ ກໍາລັງ ແລ່ນ",
        "ໝາ ກໍາລັງ ແລ່ນ",
    ),
    (
        "כֶּלֶב רָץ עַל הַדֶּשֶׁא, בן־שלוש.",
        "כֶּלֶב רָץ עַל הַדֶּשֶׁא בן ־ שלוש",
    ),
    (
        "كَلْبٌ يَجْرِي عَلَى الْعُشْبِ، وطفل؟",
        "كَلْبٌ يَجْرِي عَلَى الْعُشْبِ ، وطفل ؟",
    ),
    (
        "ܟܠܒܐ ܪܗܛ",
        "ܟܠܒܐ ܪܗܛ",
    ),
    (
        "Cafe\u0301, a cre\u0300me bru\u0302le\u0301e; nai\u0308ve-looking",
        "cafe\u0301 a cre\u0300me bru\u0302le\u0301e nai\u0308ve looking",
    ),
    (
        "Ca\u0323\u0302u be\u0301 cu\u031bo\u031b\u0300i, “đe\u0323p qua\u0301!”",
        "ca\u0323\u0302u be\u0301 cu\u031bo\u031b\u0300i đe\u0323p qua\u0301",
    ),
    (
        "Cậu bé cười, “đẹp quá!”",
        "cậu bé cười đẹp quá",
    ),
    (
        "Е\u0308ж и и\u0306од по-моему",
        "е\u0308ж и и\u0306од по-моему",
    ),
    (
        "Ε\u0301νας σκυ\u0301λος τρε\u0301χει",
        "ε\u0301νας σκυ\u0301λος τρε\u0301χει",
    ),
    (
        "A dog ❤\ufe0f its ball 😀, a 👩\u200d👩\u200d👧 family 1\ufe0f\u20e3 👍🏽!",
        "a dog ❤ its ball a family 1",
    ),
    (
        "a😀b z\u200bw © 25°C 5 m² été/hiver और/या",
        "a b z w © 25 ° c 5 m ² été / hiver और / या",
    ),
    (
        "犬が走る。 一只狗，草地！ 강아지가",
        "犬が走る 。 一只狗 ， 草地 ！ 강아지가",
    ),
]


@pytest.mark.parametrize("text, words", PTB + SCRIPTS)
def test_tokenize_as_stanford(text, words):
    assert tokenize(text) == words.split()


def test_tokenize_keeps_marks_with_their_letters():
    assert tokenize("एक कुत्ता") == ["एक", "कुत्ता"]
    assert tokenize("cafe\u0301") == ["cafe\u0301"]
    assert tokenize("❤\ufe0f") == ["❤"]


def test_tokenize_edges():
    assert tokenize("") == []
    assert tokenize(" \n\t ") == []
    assert tokenize(". , !") == []
    assert tokenize("a dog 😀 runs") == ["a", "dog", "runs"]
    assert tokenize("A\tdog\nruns") == ["a", "dog", "runs"]
    assert len(tokenize("a-b " * 2000)) == 2000


def test_tokenize_real_captions_as_java():
    """300 captions from Flickr8k and Flickr30k with rare punctuation."""
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    if not shutil.which("java"):
        pytest.skip("Java is missing")
    texts = CAPTIONS.read_text(encoding="utf-8").splitlines()
    assert len(texts) == 300
    java = ptb.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    for i, text in enumerate(texts):
        assert tokenize(text) == java[i][0].split(), text


# -----------------------------------------------------------------------------
# metrics by hand

def test_cider_by_hand():
    references = cider_references([[["red", "dog"]], [["blue", "cat"]]])
    # 1- and 2-grams agree; there are no 3- and 4-grams
    _, scores = cider([["red", "dog"], ["blue", "cat"]], references)
    assert scores == pytest.approx([5, 5])
    # one of two equally rare words; one bigram fewer
    _, scores = cider([["red"], []], references)
    assert scores == pytest.approx([10 / 4 / math.sqrt(2) * math.exp(-1 / 72), 0])
    # a repeated word counts once, but lengthens the caption's vector
    score, scores = cider([["red", "red"], ["blue", "cat"]], references)
    assert scores == pytest.approx([10 / 4 / (2 * math.sqrt(2)), 5])
    assert score == pytest.approx(sum(scores) / 2)


def test_cider_with_frequencies_of_other_references():
    train = [[["a", "dog"]], [["a", "cat"]], [["a", "cow"]], [["a", "dog"]]]
    references = cider_references([[["a", "dog"]]], document_frequencies(train))
    # "a" is everywhere and has no weight; "dog" and "a dog" have log(4 / 2)
    assert cider([["dog"]], references)[0] == pytest.approx(10 / 4 * math.exp(-1 / 72))
    assert cider([["a"]], references)[0] == 0


def test_bleu_by_hand():
    # Papineni et al. 2002, example 2
    references = [["the cat is on the mat".split(), "there is a cat on the mat".split()]]
    scores, each = bleu(["the the the the the the the".split()], references)
    assert scores[0] == pytest.approx(2 / 7)
    assert scores[1] == pytest.approx(0, abs=1e-6)
    assert each[0] == [scores[0]]
    # of two references equally close in length, the shorter counts
    scores, _ = bleu([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]])
    assert scores[0] == pytest.approx(1)
    # a caption shorter than its reference is penalized
    scores, _ = bleu([["a", "b"]], [[["a", "b", "c", "d"]]])
    assert scores[:2] == pytest.approx([math.exp(-1)] * 2)


def test_rouge_by_hand():
    captions = ["police kill the gunman".split(), ["a", "b"], ["x"], []]
    references = [
        ["police killed the gunman".split()],
        [["a", "b", "c", "d"]],
        [["y"]],
        [["y"]],
    ]
    score, scores = rouge_l(captions, references)
    assert scores == pytest.approx([0.75, 2.44 * 0.5 / (0.5 + 1.44), 0, 0])
    assert score == pytest.approx(sum(scores) / 4)


def cider_of(captions, references):
    """CIDEr with the arguments of bleu and rouge_l."""
    return cider(captions, cider_references(references))


METRICS = {"cider": cider_of, "bleu": bleu, "rouge": rouge_l}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_unequal_numbers_are_refused(metric):
    with pytest.raises(ValueError):
        metric([["a"]], [[["a"]], [["b"]]])


def test_an_image_without_references_is_refused():
    with pytest.raises(ValueError):
        cider_references([[["a"]], []])


# -----------------------------------------------------------------------------
# metrics against pycocoevalcap

def random_captions(n_images=60):
    """Captions and references, some of them empty."""
    rng = random.Random(0)
    vocabulary = "a a a man dog in on the red red runs sits".split()

    def write(longest):
        return rng.choices(vocabulary, k=rng.randint(0, longest))

    captions = [write(14) for _ in range(n_images)]
    references = [[write(16) for _ in range(rng.randint(1, 6))] for _ in range(n_images)]
    return captions, references


@pytest.mark.parametrize("name", METRICS)
def test_as_pycocoevalcap(name):
    module = pytest.importorskip(f"pycocoevalcap.{name}.{name}")
    oracle = getattr(module, name.capitalize())()
    options = {"verbose": 0} if name == "bleu" else {}
    captions, references = random_captions()
    their_captions = {}
    their_references = {}
    for i, (words, image_references) in enumerate(zip(captions, references)):
        their_captions[i] = [" ".join(words)]
        their_references[i] = [" ".join(reference) for reference in image_references]
    their_score, their_scores = oracle.compute_score(their_references, their_captions, **options)
    score, scores = METRICS[name](captions, references)
    np.testing.assert_allclose(score, their_score, atol=1e-6)
    np.testing.assert_allclose(scores, their_scores, atol=1e-6)


# -----------------------------------------------------------------------------
# baselines

def test_baselines_of_humans_chance_and_a_constant():
    # three equal captions an image, of words that no other image has
    references = [[[f"{letter}{i}" for letter in "abcde"]] * 3 for i in range(20)]
    rows = baselines(references, cider_references(references))
    assert rows["human"]["cider"] == pytest.approx(10)
    assert rows["human"]["distinct"] == 1
    # a caption of the image itself would score
    assert rows["chance"]["cider"] == 0
    assert rows["chance"]["rouge_l"] == 0
    assert rows["constant"]["cider"] == pytest.approx(10 / 20)
    assert rows["constant"]["distinct"] == pytest.approx(1 / 20)
    assert rows == baselines(references, cider_references(references))


def test_humans_are_scored_against_the_others_only():
    # two captions an image, without a common word; the third image has one and is left out
    references = [
        [["a", "dog"], ["it", "barks"]],
        [["a", "cow"], ["it", "moos"]],
        [["a", "cat"]],
    ]
    human = baselines(references, cider_references(references))["human"]
    assert human["cider"] == 0
    assert human["rouge_l"] == 0
    assert human["mean_words"] == 2


def test_baselines_of_too_few_captions():
    references = [[["a", "dog"]]]
    rows = baselines(references, cider_references(references))
    assert rows["human"] is None
    assert rows["chance"] is None
    assert rows["constant"]["bleu1"] == pytest.approx(1)
