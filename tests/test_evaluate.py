"""
Tests of evaluate.py: words and metrics against pycocoevalcap 1.2 (where it is installed) and against constants; the
command against a tiny captioner.
"""
import json
import math
import random
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import evaluate
from evaluate import bleu, cider, cider_references, document_frequencies, rouge_l, tokenize

HERE = Path(__file__).resolve().parent
FLICKR8K = HERE.parent / "shared" / "flickr8k" / "Flickr8k.token.txt"

# What pycocoevalcap 1.2's PTBTokenizer made of these sentences (each between lines "zz": Java looks at the next line).
PTB = [
    ("A man isn't here; he can't go, they don't, she'll, I'm, you've, we'd, it's the dogs' ball.",
     "a man is n't here he ca n't go they do n't she 'll i 'm you 've we 'd it 's the dogs ball"),
    ('He said "hello" to the `girl\' and \'\'she\'\' said ``yes\'\'',
     'he said hello to the girl and she said yes'),
    ("He cannot, gonna wanna gotta gimme lemme d'you more'n 'tis 'twas whatcha dunno",
     "he can not gon na wan na got ta gim me lem me d'you more 'n 't is 't was whatcha dunno"),
    ('Mr. Smith and Dr. Jones vs. the U.S. team at 5 p.m. on St. John Ave. in D.C. etc.',
     'mr. smith and dr. jones vs. the u.s. team at 5 p.m. on st. john ave. in d.c. etc.'),
    ('It costs $5.00, £3, €20, 50 cents, 50¢, US$ 4, C$5 and 10%.',
     'it costs $ 5.00 # 3 $ 20 50 cents 50 cents us$ 4 c$ 5 and 10 %'),
    ('half 1/2 cup, 3/4, ½ and ¾ cup 24/7 w/o and/or he/she',
     'half 1/2 cup 3/4 1/2 and 3/4 cup 24/7 w/o and/or he/she'),
    ('black-and-white t-shirt, well-known x-ray 18-year-old re-do co-op',
     'black-and-white t-shirt well-known x-ray 18-year-old re-do co-op'),
    ("AT&T and R&B, rock & roll, black &amp; white, C++ and A&W's",
     "at&t and r&b rock & roll black & white c++ and a&w 's"),
    ('see http://www.foo.com/bar.html, www.foo.com or a@b.com',
     'see http://www.foo.com/bar.html www.foo.com or a@b.com'),
    ('#1 dog #hashtag @user :) :-( ;) <3 =) <no>',
     '# 1 dog #hashtag @user :-rrb- :--lrb- ;-rrb- < 3 =-rrb- <no>'),
    ('He ran 1,000 m. in 3.5 s at 10:30 on 5/12/2010 (maybe) [yes] {no}',
     'he ran 1,000 m. in 3.5 s at 10:30 on 5/12/2010 -lrb- maybe -rrb- -lsb- yes -rsb- -lcb- no -rcb-'),
    ("A man's '90s car, the 80's and the 1980s rock 'n' roll, o'clock, O'Neil, ma'am",
     "a man 's '90s car the 80 's and the 1980s rock 'n' roll o'clock o'neil ma'am"),
    ('don’t it’s “quoted” ‘single’ l’eau – dash—dash…',
     "do n't it 's quoted single l’eau dash dash"),
    ('a * b / c \\ d | e ~ f + g = h _ i ^ j ** __',
     'a * b / c \\ d | e ~ f + g = h _ i ^ j ** __'),
    ('The dog ran.The cat sat. what?!? no!!! wow? !! ... .. --',
     'the dog ran.the cat sat what ?!? no !!! wow !!'),
    ('No. 5 dog, no. the',
     'no. 5 dog no the'),
    ('jeans,blue shirt;red hat:green',
     'jeans blue shirt red hat green'),
    ('500ml 5kg 3rd 21st 2x4 4x4 7-11 50-50 1-on-1 5.5-inch 5.5ft',
     '500ml 5kg 3rd 21st 2x4 4x4 7-11 50-50 1-on-1 5.5-inch 5.5 ft'),
    ('-5 +5 -5.3 .5 5. 1.2.3 555-1234 5+8 dog-5',
     '-5 +5 -5.3 .5 5 1.2.3 555-1234 5 +8 dog-5'),
    ('two-  hyphen -two well--known a--b',
     'two hyphen two well known a b'),
    ('J. K. Rowling J.K. Rowling Ph.D. i.e. e.g. approx. Inc. Calif. La. la. Wash. wash.',
     'j. k. rowling j.k. rowling ph.d. i.e. e.g. approx inc. calif. la. la wash. wash'),
    ("ain't y'all y'know c'mon ol' 'em 'cause cap'n shan't wouldn't've",
     "ai n't y' all y' know c'mon ol' 'em 'cause cap'n sha n't would n't 've"),
    ('Café naïve 日本語 ñandú',
     'café naïve 日本語 ñandú'),
]


@pytest.mark.parametrize("text, words", PTB)
def test_tokenize_as_stanford(text, words):
    assert tokenize(text) == words.split()


def test_tokenize_edges():
    assert tokenize("") == tokenize(" \n\t ") == tokenize(". , !") == []
    assert tokenize("a dog 😀 runs") == ["a", "dog", "runs"]
    assert tokenize("A\tdog\nruns") == ["a", "dog", "runs"]
    assert len(tokenize("a-b " * 2000)) == 2000


def test_tokenize_whole_corpus_as_java():
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    if not shutil.which("java"):
        pytest.skip("there is no java")
    if not FLICKR8K.exists():
        pytest.skip(f"{FLICKR8K} is not here")
    texts = [line.split("\t", 1)[1] for line in FLICKR8K.read_text(encoding="utf-8").splitlines()]
    java = ptb.PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts)})
    wrong = [(text, java[i][0]) for i, text in enumerate(texts) if tokenize(text) != java[i][0].split()]
    assert not wrong


# ---- metrics by hand

def test_cider_by_hand():
    refs = cider_references([[["red", "dog"]], [["blue", "cat"]]])
    # 1- and 2-grams agree, there are no 3- and 4-grams
    assert cider([["red", "dog"], ["blue", "cat"]], refs)[1] == pytest.approx([5, 5])
    # one of two equally rare words, one pair of words fewer
    assert cider([["red"], []], refs)[1] == pytest.approx([10 / 4 / math.sqrt(2) * math.exp(-1 / 72), 0])
    # a word said twice counts once, but lengthens the caption's vector
    score, scores = cider([["red", "red"], ["blue", "cat"]], refs)
    assert scores == pytest.approx([10 / 4 / (2 * math.sqrt(2)), 5]) and score == pytest.approx(sum(scores) / 2)


def test_cider_with_frequencies_of_other_references():
    train = [[["a", "dog"]], [["a", "cat"]], [["a", "cow"]], [["a", "dog"]]]
    refs = cider_references([[["a", "dog"]]], document_frequencies(train))
    # "a" is everywhere and weighs nothing; "dog" and "a dog" weigh log(4 / 2)
    assert cider([["dog"]], refs)[0] == pytest.approx(10 / 4 * math.exp(-1 / 72))
    assert cider([["a"]], refs)[0] == 0


def test_bleu_by_hand():
    refs = [["the cat is on the mat".split(), "there is a cat on the mat".split()]]
    scores, each = bleu(["the the the the the the the".split()], refs)  # Papineni et al. 2002, example 2
    assert scores[0] == pytest.approx(2 / 7) and scores[1] == pytest.approx(0, abs=1e-6) and each[0] == [scores[0]]
    # of references equally near the shorter counts; a caption shorter than its reference pays
    assert bleu([["a", "b", "c"]], [[["a", "b"], ["a", "b", "c", "d"]]])[0][0] == pytest.approx(1)
    assert bleu([["a", "b"]], [[["a", "b", "c", "d"]]])[0][:2] == pytest.approx([math.exp(-1)] * 2)


def test_rouge_by_hand():
    score, scores = rouge_l(["police kill the gunman".split(), ["a", "b"], ["x"], []],
                            [["police killed the gunman".split()], [["a", "b", "c", "d"]], [["y"]], [["y"]]])
    assert scores == pytest.approx([0.75, 2.44 * 0.5 / (0.5 + 1.44), 0, 0]) and score == pytest.approx(sum(scores) / 4)


@pytest.mark.parametrize("metric", [lambda c, r: cider(c, cider_references(r)), bleu, rouge_l])
def test_unequal_numbers_are_refused(metric):
    with pytest.raises(ValueError):
        metric([["a"]], [[["a"]], [["b"]]])


def test_a_picture_without_references_is_refused():
    with pytest.raises(ValueError):
        cider_references([[["a"]], []])


# ---- metrics against pycocoevalcap

def random_captions(pictures=60):
    rng, vocabulary = random.Random(0), "a a a man dog in on the red red runs sits".split()
    write = lambda longest: rng.choices(vocabulary, k=rng.randint(0, longest))
    captions = [write(14) for _ in range(pictures)]
    return captions, [[write(16) for _ in range(rng.randint(1, 6))] for _ in range(pictures)]


@pytest.mark.parametrize("name", ["cider", "bleu", "rouge"])
def test_as_pycocoevalcap(name):
    module = pytest.importorskip(f"pycocoevalcap.{name}.{name}", reason="pycocoevalcap is not installed")
    captions, references = random_captions()
    join = lambda texts: [" ".join(words) for words in texts]
    oracle = getattr(module, name.capitalize())()
    refs, found = dict(enumerate(map(join, references))), {i: join([words]) for i, words in enumerate(captions)}
    score, scores = oracle.compute_score(refs, found, **dict(verbose=0) if name == "bleu" else {})
    mine = {"cider": lambda: cider(captions, cider_references(references)), "bleu": lambda: bleu(captions, references),
            "rouge": lambda: rouge_l(captions, references)}[name]()
    np.testing.assert_allclose(mine[0], score, atol=1e-6)
    np.testing.assert_allclose(mine[1], scores, atol=1e-6)


# ---- what the scores are compared with

def test_baselines_know_people_chance_and_a_constant():
    # three captions a picture, alike, of words that no other picture has
    references = [[[f"{letter}{i}" for letter in "abcde"]] * 3 for i in range(20)]
    rows = evaluate.baselines(references, cider_references(references))
    assert rows["human"]["cider"] == pytest.approx(10) and rows["human"]["distinct"] == 1
    assert rows["chance"]["cider"] == 0 and rows["chance"]["rouge_l"] == 0  # a caption of its own picture would score
    assert rows["constant"]["cider"] == pytest.approx(10 / 20) and rows["constant"]["distinct"] == pytest.approx(1 / 20)
    assert rows == evaluate.baselines(references, cider_references(references))


def test_people_are_scored_against_the_others_only():
    # two captions a picture that share no word; the third picture has one, which has no others
    references = [[["a", "dog"], ["it", "barks"]], [["a", "cow"], ["it", "moos"]], [["a", "cat"]]]
    human = evaluate.baselines(references, cider_references(references))["human"]
    assert human["cider"] == human["rouge_l"] == 0 and human["mean_words"] == 2


def test_baselines_of_too_few_captions():
    rows = evaluate.baselines([[["a", "dog"]]], cider_references([[["a", "dog"]]]))
    assert rows["human"] is None and rows["chance"] is None and rows["constant"]["bleu1"] == pytest.approx(1)


# ---- the command

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder: data/, a split of six pictures; photos/ and captions.jsonl, the same as files; out/, a captioner."""
    import torch
    from PIL import Image
    from model import Captioner, ModelOptions
    from prepare_flickr import write_dataset
    from sample import VERSION
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    names, images = [f"{i}.png" for i in range(6)], rng.integers(0, 256, (6, 32, 32, 3), np.uint8)
    captions = [[f"a {colour} dog runs .", f"Dog number {i}, it's {colour}"] for i, colour in
                enumerate("red blue green black white pink".split())]
    meta = write_dataset(str(folder / "data"), {split: (names, captions, images) for split in ("train", "val")}, 32,
                         vocab_size=300)
    (folder / "photos").mkdir()
    with open(folder / "captions.jsonl", "w") as file:
        for name, image, texts in zip(names, images, captions):
            Image.fromarray(image).save(folder / "photos" / name)
            print(json.dumps({"image": name, "captions": texts}), file=file)
    torch.manual_seed(0)
    options = ModelOptions(image_size=32, patch_size=8, n_layer_encoder=1, n_layer_decoder=1, n_head=2, n_embd=32)
    (folder / "out").mkdir()
    torch.save(dict(model=Captioner(options, meta["vocab_size"]).state_dict(), options=asdict(options), version=VERSION,
                    tokenizer=dict(ranks=(folder / "data/tokenizer.tiktoken").read_bytes(), pattern=meta["pattern"])),
               folder / "out" / "best.pt")
    return folder


@pytest.fixture
def command(folder, monkeypatch, capsys):
    """Calls main() in the folder with these arguments and returns what it printed."""
    def call(*args):
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--out_dir", "out", "--device", "cpu", *args])
        evaluate.main()
        return capsys.readouterr()
    return call


def test_scores_of_a_known_captioner(command, folder, monkeypatch):
    """A captioner that says each picture's first caption, as every number of the JSON object must tell."""
    said = iter([json.loads(line)["captions"][0] for line in (folder / "captions.jsonl").read_text().splitlines()])
    monkeypatch.setattr(evaluate, "generate", lambda captioner, images, **options: [next(said) for _ in images])
    printed = command("--data_dir", "data", "--json", "--batch_size", "4", "--save", "save.jsonl",
                      "--sheet", "sheet.png")
    result = json.loads(printed.out)
    assert list(result) == ["images", "cider", "bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "distinct", "mean_words",
                            "loss", "loss_shuffled", "bits_per_char", "human", "chance", "constant"]
    assert result["images"] == 6 and result["mean_words"] == 4 and result["distinct"] == 1
    assert [result["bleu1"], result["bleu4"], result["rouge_l"]] == pytest.approx([1, 1, 1])
    assert result["cider"] > result["chance"]["cider"]
    assert "CIDEr on 6 pictures" in printed.err
    saved = [json.loads(line) for line in (folder / "save.jsonl").read_text().splitlines()]
    assert saved[1] == {"image": "1.png", "caption": "a blue dog runs .",
                        "references": ["a blue dog runs .", "Dog number 1, it's blue"]}
    assert (folder / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_loss_is_that_of_each_caption_alone(command, folder):
    import torch
    from sample import load
    captioner = load(folder / "out", "cpu")
    records = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    nats = tokens = characters = 0
    images = evaluate.read_split(str(folder / "data"), "val")["images"]
    for image, record in zip(images, records):
        for text in record["captions"]:
            words = captioner.tokenizer.encode_ordinary(text)
            eot, n = captioner.model.eot_token, len(words) + 1
            places = torch.arange(n)
            hidden = captioner.model.hidden(captioner.model.encode(torch.tensor(image[None])), dict(
                tokens=torch.tensor([eot, *words]), position=places, slot=places, segment=torch.ones(1, n, dtype=torch.long)))
            logp = (hidden @ captioner.model.wte.weight.T).log_softmax(-1)
            nats -= logp[range(n), [*words, eot]].sum().item()
            tokens, characters = tokens + n, characters + len(text)
    result = json.loads(command("--data_dir", "data", "--json", "--max_tokens", "5").out)
    assert result["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result["bits_per_char"] == pytest.approx(nats / math.log(2) / characters, rel=1e-5)


def test_a_captioner_that_ignores_its_pictures_is_shown_as_such(command, folder):
    """One that learned the six pictures by heart, and the same without its encoder's output."""
    import torch
    from model import pack
    from sample import load
    captioner, records = load(folder / "out", "cpu"), evaluate.read_records(str(folder / "data"), "val")
    batch = pack([[captioner.tokenizer.encode_ordinary(text) for text in r["captions"]] for r in records], captioner.model.eot_token, 64)
    images = torch.from_numpy(np.array(evaluate.read_split(str(folder / "data"), "val")["images"]))
    optimizer = torch.optim.AdamW(captioner.model.parameters(), lr=1e-2)
    for _ in range(300):
        (captioner.model(images, batch)[0] / len(batch["targets"])).backward()
        optimizer.step(), optimizer.zero_grad()
    checkpoint = torch.load(folder / "out/best.pt", weights_only=True) | {"model": captioner.model.state_dict()}
    torch.save(checkpoint, folder / "learned.pt")
    for key in ("encoder.norm.weight", "encoder.norm.bias"):
        checkpoint["model"][key] = torch.zeros_like(checkpoint["model"][key])
    torch.save(checkpoint, folder / "ignores.pt")
    looks = command("--data_dir", "data", "--json", "--out_dir", "learned.pt", "--batch_size", "4")
    result = json.loads(looks.out)
    assert result["loss_shuffled"] > result["loss"] + 0.1 and result["distinct"] > 0.5 and "hardly looks" not in looks.err
    with torch.no_grad():  # each picture's captions with the next one's picture
        expected = captioner.model(images.roll(-1, 0), batch)[1].item() / len(batch["targets"])
    assert result["loss_shuffled"] == pytest.approx(expected, rel=1e-5)
    ignores = command("--data_dir", "data", "--json", "--out_dir", "ignores.pt", "--batch_size", "4")
    result = json.loads(ignores.out)
    assert result["loss_shuffled"] == pytest.approx(result["loss"], rel=1e-5) and "hardly looks at its pictures" in ignores.err
    assert result["distinct"] == pytest.approx(1 / 6)


def test_files_score_as_the_prepared_split(command):
    options = "--json", "--max_tokens", "5", "--beam", "2"
    files = command("--images", "photos", "--captions", "captions.jsonl", *options).out
    assert json.loads(files) == json.loads(command("--data_dir", "data", *options).out)


def test_table(command):
    printed = command("--data_dir", "data", "--limit", "3", "--max_tokens", "5").out.splitlines()
    assert printed[0].split()[:3] == ["3", "pictures", "CIDEr"]
    assert [line[:26].strip() for line in printed[1:5]] == ["the model", "people*", "another picture's caption",
                                                            "one caption for all"]
    assert all(len(line[26:].split()) == 8 for line in printed[1:5])


@pytest.mark.parametrize("args, said", [
    (["--spilt", "val"], "did you mean --split?"),
    (["--beam", "0"], "beam must be from 1 to 10000, not 0"),
    (["--length_penalty", "nan"], "length_penalty must be from 0 to 100, not nan"),
    (["--images", "photos"], "give both --images and --captions"),
    (["--data_dir", "nowhere"], "nowhere: no prepared data"),
    (["--data_dir", "data", "--split", "dev"], "no split 'dev'"),
    (["--sheet", "sheet.txt"], "--sheet sheet.txt: name a picture file"),
    (["--save", "nowhere/x.jsonl"], "there is no folder nowhere"),
    (["--images", "photos", "--captions", "captions.jsonl", "--split", "val"], "has no captions of split 'val'"),
    (["--images", "out", "--captions", "captions.jsonl"], "0.png of captions.jsonl is not in out")])
def test_mistakes_are_one_line(folder, args, said):
    done = subprocess.run([sys.executable, HERE / "evaluate.py", *args], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1 and not done.stdout
