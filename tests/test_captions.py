"""Tests of nanocaption/captions.py: all formats, malformed lines, unusable files."""
import gzip
import io
import json
import re
import zipfile
from pathlib import Path

import pytest

from nanocaption.captions import match_names, read_captions
from nanocaption.cli import UserError

FORMATS = Path(__file__).parent / "data" / "formats"

# captions that break careless readers: quotes, commas, bars, the end-of-text marker, accents,
# hashes, white space
CAPTIONS = {
    "1.jpg": [
        "A dog , a cat and a bird .",
        'A sign that says " active . "',
        '"',
        "A man | a plan | a canal",
    ],
    "2_x.jpg": [
        "<|endoftext|> is not the end",
        "Crème brûlée naïve – 犬 🐕",
        "two\u2028lines, one caption",
        "A 5\" board",
    ],
    "3.jpg": ["it's #1 : a {brace} [bracket]", "  spaces   inside  ", "don't , won't", "", "a"],
}
SPLIT = {"1.jpg": "train", "2_x.jpg": "restval", "3.jpg": "val"}


def quote(field):
    """A CSV field as RFC 4180 wants it."""
    if any(character in field for character in '",\n'):
        return '"' + field.replace('"', '""') + '"'
    return field


def csv_line(*fields):
    return ",".join(quote(field) for field in fields)


def write_formats():
    """CAPTIONS in every format: {name: text}."""
    rows = []
    for name, texts in CAPTIONS.items():
        for n, text in enumerate(texts):
            rows.append((name, n, text))
    token = [f"{name}#{n}\t{text}" for name, n, text in rows]
    kaggle = ["image,caption"]
    kaggle += [csv_line(name, text) for name, _, text in rows]
    bars = ["image_name| comment_number| comment"]
    bars += [f"{name}| {n}| {text}" for name, n, text in rows]
    commas = ["image_name,comment_number,comment"]
    commas += [csv_line(name, str(n), text) for name, n, text in rows]

    nlphuji = ["raw,sentids,split,filename,img_id"]
    karpathy = []
    coco_images = []
    hancai = {}
    lines = []
    records = []
    for n, (name, texts) in enumerate(CAPTIONS.items()):
        nlphuji.append(csv_line(json.dumps(texts), "[0, 1]", SPLIT[name], name, "0"))
        sentences = [{"raw": text, "tokens": []} for text in texts]
        karpathy.append({"filename": name, "filepath": "deep", "split": SPLIT[name],
                         "sentences": sentences})
        coco_images.append({"id": 100 + n, "file_name": name})
        hancai[name] = [*texts, f"flickr30k-images/{name}"]
        record = {"image": name.removesuffix(".jpg"), "captions": texts}
        lines.append(json.dumps(record, ensure_ascii=False))
        records.append({"image": f"./{name}", "captions": texts})
    karpathy.append({"filename": "none.jpg", "split": "test", "sentences": []})
    # LAVIS, Hugging Face
    blip = [{"caption": text, "image": f"val2014/{name}", "image_id": f"coco_{name}"}
            for name, _, text in rows]
    blip_lists = [{"image": name, "caption": texts} for name, texts in CAPTIONS.items()]
    metadata = [json.dumps({"file_name": name, "text": text}) for name, _, text in rows]
    metadata_csv = ["file_name,text"] + [csv_line(name, text) for name, _, text in rows]
    ids = {image["file_name"]: image["id"] for image in coco_images}
    notes = [{"id": 7, "image_id": ids[name], "caption": text} for name, _, text in rows]
    return {
        "token": "\n".join(token) + "\n",
        "token with CRLF and a BOM": "\ufeff" + "\r\n".join(token) + "\r\n",
        "Kaggle captions.txt": "\n".join(kaggle),
        "Kaggle results.csv": "\n".join(bars),
        "Kaggle with commas": "\r\n".join(commas),
        "nlphuji": "\n".join(nlphuji),
        "Karpathy": json.dumps({"dataset": "x", "images": karpathy}),
        "COCO": json.dumps({"info": {}, "images": coco_images, "annotations": notes}, indent=1),
        "HanCai98": json.dumps(hancai),
        "JSON lines": "\n".join(lines),
        "JSON list": json.dumps(records),
        "BLIP, a caption each": json.dumps(blip),
        "BLIP, lists": json.dumps(blip_lists),
        "imagefolder's metadata.jsonl": "\n".join(metadata),
        "imagefolder's metadata.csv": "\n".join(metadata_csv),
    }


@pytest.mark.parametrize("name", ["nlphuji", "Karpathy"])
def test_splits_in_the_file(tmp_path, name):
    (tmp_path / "file").write_text(write_formats()[name])
    splits = {}
    for image, _, split in read_captions(tmp_path / "file"):
        splits[Path(image).name] = split
    assert splits == {"1.jpg": "train", "2_x.jpg": "train", "3.jpg": "val"}


@pytest.mark.parametrize("file, count, last", [
    # with the original's 2258277193_586949ec62.jpg.1
    ("flickr8k.token.txt", 15, (
        "2258277193_586949ec62.jpg.1", "two woman and one man standing near train tracks .", None)),
    ("flickr8k_crlf.token.txt", 3, (
        "1000268201_693b08cb0e.jpg", "A little girl climbing into a wooden playhouse .", None)),
    ("kaggle_flickr8k.csv", 8, (
        "1401961581_76921a75c5.jpg", "A girl sits in a harness ready to lift up into the air and "
        'behind her is a sign that says " active . "', None)),
    # its last line lacks a bar
    ("kaggle_flickr30k.csv", 6, ("2199200615.jpg", "A dog runs across the grass .", None)),
    ("flickr30k.token", 5, ("1000092795.jpg", "Two friends enjoy time spent together .", None)),
    ("nlphuji_flickr30k.csv", 5, (
        "1000092795.jpg", "Two friends enjoy time spent together.", "train")),
    ("karpathy_flickr8k.json", 10, (
        "2699342860_5288e203ea.jpg",
        "The little boy in the red shirt stops to smile for the camera .", "train")),
    ("karpathy_ucm.json", 15, ("3.tif", "Here is a piece of farmland .", "train")),
    ("hancai_flickr30k.json", 10, (
        "7162685234.jpg", "Two little boys play with sand on the beach .", None)),
])
def test_genuine_files(file, count, last):
    captions = read_captions(FORMATS / file)
    assert len(captions) == count
    name, text, split = captions[-1]
    assert (name, " ".join(text.split()), split) == last
    for name, text, _ in captions:
        assert name.endswith((".jpg", ".tif", ".jpg.1"))
        assert text and not text.endswith(".jpg")


@pytest.mark.parametrize("name, text, n_skipped, where", [
    ("a.token", "1.jpg#0\tA dog\nno tab here\n\n1.jpg#1\tA cat\n", 1, "line 2"),
    ("b.csv",
     'image,caption\n1.jpg,A dog\n1.jpg,one, too many\n1.jpg,"never closed\n1.jpg,"A, cat"\n',
     2, "line 3"),
    ("c.csv",
     "image_name| comment_number| comment\n1.jpg| 0| A dog\njust text\n1.jpg| 1| A, cat\n",
     1, "line 3"),
    ("d.jsonl",
     '{"image": "1.jpg", "captions": ["A dog"]}\n{"image": "1.jpg", "capt\n{"image": "2.jpg"}\n'
     '{"image": "2.jpg", "captions": [3]}\n{"image": "1.jpg", "captions": ["A cat"]}\n[]\n',
     4, "record 2"),
])
def test_malformed_lines_are_listed(tmp_path, name, text, n_skipped, where):
    path = tmp_path / name
    path.write_text(text)
    skipped = []
    names, texts, _ = zip(*read_captions(path, skipped))
    assert names == ("1.jpg", "1.jpg")
    assert [text.strip().replace(",", "") for text in texts] == ["A dog", "A cat"]
    assert len(skipped) == n_skipped, skipped
    assert skipped[0].startswith(f"{path}, {where}: ")
    with pytest.raises(UserError, match=where):
        read_captions(path)


def test_a_quoted_caption_may_contain_line_ends(tmp_path):
    (tmp_path / "c.csv").write_text('image,caption\n1.jpg,"two\nlines"\n2.jpg,one\n')
    expected = [("1.jpg", "two\nlines", None), ("2.jpg", "one", None)]
    assert read_captions(tmp_path / "c.csv") == expected


def captions_or_error(path):
    """What read_captions returns, or the text of its error."""
    try:
        return read_captions(path)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("header", ["image,caption", "image,captions", "filename,raw",
                                    "file_name,text", "image_name,comment"])
@pytest.mark.parametrize("cell, texts", [
    ("['A dog runs .', 'A cat sits .']", ["A dog runs .", "A cat sits ."]),
    ('["A dog runs .", "A cat \\u00e9 \\ud83d\\ude00 ."]', ["A dog runs .", "A cat é 😀 ."]),
    # as Python writes apostrophes, NumPy lists, and an older Python texts
    ("""["A man's dog .", 'a "b" , [c]', ]""", ["A man's dog .", 'a "b" , [c]']),
    ("['A dog runs .'\n 'A cat sits .']", ["A dog runs .", "A cat sits ."]),
    ("[u'A dog .', u'caf\\xe9']", ["A dog .", "café"]),
    ("('A dog .', 'A cat .')", ["A dog .", "A cat ."]),
    ("[]", []),
    # no lists
    ('["A" is on the sign]', ['["A" is on the sign]']),
    ("[laughing] children", ["[laughing] children"]),
    ("'A dog .', 'A cat .'", ["'A dog .', 'A cat .'"]),
])
def test_a_list_in_a_cell_is_several_captions(tmp_path, header, cell, texts):
    text = f"{header}\n{csv_line('1.jpg', cell)}\n2.jpg,A bird .\n"
    (tmp_path / "c.csv").write_text(text, encoding="utf-8")
    expected = [("1.jpg", text, None) for text in texts] + [("2.jpg", "A bird .", None)]
    assert captions_or_error(tmp_path / "c.csv") == expected


@pytest.mark.parametrize("cell", ["['A man's dog .', 'A cat .']", "['A dog .', nan]", '["a", null]',
                                  "['a' ... 'z']"])
def test_a_damaged_list_is_no_caption(tmp_path, cell):
    (tmp_path / "c.csv").write_text(f"image,caption\n{csv_line('1.jpg', cell)}\n2.jpg,A bird .\n")
    skipped = []
    assert read_captions(tmp_path / "c.csv", skipped) == [("2.jpg", "A bird .", None)]
    assert len(skipped) == 1
    assert "line 2: no caption text" in skipped[0]


BLIP = [
    {"image": "a/1.jpg", "caption": "A dog .", "image_id": 7},
    {"image": "a/2.jpg", "caption": ["A cat .", "A bird ."], "image_id": "coco_8"},
]
METADATA = [
    {"file_name": "a/1.jpg", "text": "A dog ."},
    {"file_name": "a/2.jpg", "text": ["A cat .", "A bird ."]},
]


@pytest.mark.parametrize("text", [
    json.dumps(BLIP),
    "\n".join(json.dumps(record) for record in BLIP),
    json.dumps([{k: v for k, v in record.items() if k != "image_id"} for record in BLIP]),
    json.dumps(METADATA),
    "\n".join(json.dumps(record) for record in METADATA),
    "file_name,text\na/1.jpg,A dog .\na/2.jpg,A cat .\na/2.jpg,A bird .\n",
    # what Excel's Unicode text is after its conversion, and its CSV in much of Europe
    "image\tcaption\na/1.jpg\tA dog .\na/2.jpg\tA cat .\na/2.jpg\tA bird .\n",
    "image;caption\r\na/1.jpg;A dog .\r\na/2.jpg;A cat .\r\na/2.jpg;A bird .\r\n",
])
def test_records_of_blip_hugging_face_and_excel(tmp_path, text):
    (tmp_path / "file").write_text(text, encoding="utf-8")
    found = captions_or_error(tmp_path / "file")
    assert found == [("a/1.jpg", "A dog .", None), ("a/2.jpg", "A cat .", None),
                     ("a/2.jpg", "A bird .", None)]


@pytest.mark.parametrize("record, missing", [
    ({"image": "1.jpg", "conversations": []}, r"no caption text \(captions, caption, "),
    ({"url": "http://x/1.jpg", "caption": "A dog ."}, r"no image name \(image, image_name, "),
    ({"image": 7, "question": "Why?"}, r"no image name .* and no caption text"),
])
def test_what_a_record_lacks_is_named(tmp_path, record, missing):
    (tmp_path / "file").write_text(json.dumps([record]))
    with pytest.raises(UserError, match=f"record 1: {missing}"):
        read_captions(tmp_path / "file")


ENGLISH = "image,caption\n1.jpg,A man’s “dog” – on a café’s terrace …\n"
FRENCH = "image,caption\n1.jpg,Un garçon à côté d’une école — il est gêné .\n"


@pytest.mark.parametrize("text, encoding, named", [
    (ENGLISH, "cp1252", "line 2: not UTF-8 but WINDOWS-1252; .* iconv -f WINDOWS-1252 "),
    (FRENCH, "cp1252", "iconv -f WINDOWS-1252 "),
    ("image,caption\n1.jpg,Zwei Hündinnen\n", "latin-1", "iconv -f WINDOWS-1252 "),
    (ENGLISH, "mac_roman", "iconv -f MACINTOSH "),
    (FRENCH, "mac_roman", "iconv -f MACINTOSH "),
    ("image,caption\n1.jpg,Собака бежит по траве .\n", "cp1251", "iconv -f ENCODING "),
    ("image,caption\n1.jpg,Dwa psy żółte biegną w śniegu\n", "cp1250", "iconv -f ENCODING "),
    ("image,caption\n1.jpg,一只狗在草地上奔跑\n", "gb18030", "iconv -f ENCODING "),
    ("image,caption\n1.jpg,犬が草の上を走っている\n", "shift_jis", "iconv -f ENCODING "),
    (ENGLISH, "utf-16", "UTF-16.* iconv -f UTF-16 "),
    (ENGLISH, "utf-16-le", "iconv -f UTF-16LE "),
    (ENGLISH, "utf-16-be", "iconv -f UTF-16BE "),
    (ENGLISH, "utf-32", "iconv -f UTF-32 "),
])
def test_the_right_encoding_is_named(tmp_path, text, encoding, named):
    (tmp_path / "file").write_bytes(text.encode(encoding))
    with pytest.raises(UserError) as raised:
        read_captions(tmp_path / "file")
    assert re.search(named, str(raised.value)), raised.value


def test_one_damaged_byte_is_no_other_encoding(tmp_path):
    (tmp_path / "file").write_bytes(ENGLISH.encode().replace(b"A man", b"A \xff man"))
    with pytest.raises(UserError) as raised:
        read_captions(tmp_path / "file")
    assert "line 2: a damaged character in UTF-8 text" in str(raised.value)


def zipped(name):
    """The bytes of a zip with one file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, ENGLISH)
    return file.getvalue()


@pytest.mark.parametrize("data, what", [
    (zipped("xl/workbook.xml"), "is an Excel workbook; save it as CSV UTF-8"),
    (bytes.fromhex("d0cf11e0a1b11ae1") + bytes(99), "is an Excel workbook"),
    (zipped("captions.csv"), "is a zip archive; unpack it"),
    (gzip.compress(ENGLISH.encode(), mtime=0), "is compressed with gzip; unpack it"),
    (b"PAR1\x15\x04\x15\xe0PAR1", "is a Parquet file; convert it with pandas"),
    (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not a text file"),
])
def test_files_that_are_no_text_are_named(tmp_path, data, what):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError) as raised:
        read_captions(tmp_path / "file")
    assert f"{tmp_path / 'file'} {what}" in str(raised.value)


@pytest.mark.parametrize("data, message", [
    (b"", "empty"),
    ("1.jpg#0\tcaf\xe9\n".encode("latin-1"), "line 1: not UTF-8"),
    (b"what is this\n", "unknown format"),
    (b'{"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]}',
     "unknown JSON layout"),
    (b'[{"image_id": 1, "caption": "x"}]', "COCO results"),
    (b'{"images": [', "neither JSON nor"),
    (b'{"image": "1.jpg", "captions": ["x"], "split": "trian"}',
     "split is 'trian', expected train"),
    (b'{"image": "1.jpg", "captions": ["\\ud83d"]}\n{"image": "1.jpg"}',
     "record 2: no caption text"),
    (b'[{"image": "1.jpg", "label": 3}]',
     r"record 1: no caption text \(captions, caption, comment, raw, text\)"),
    (b'[{"path": "1.jpg", "caption": "x"}]',
     r"record 1: no image name \(image, image_name, filename, file_name\)"),
])
def test_unusable_caption_files(tmp_path, data, message):
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path / "file")


def test_names_match_paths_with_or_without_folder_and_extension():
    paths = ["a/1.jpg", "b/1.jpg", "a/2.png", "3.jpg"]
    names = ["a/1", "b/1.jpg", "2.jpg", "elsewhere/3", "4"]
    assert match_names(names, paths) == {
        "a/1": "a/1.jpg", "b/1.jpg": "b/1.jpg", "2.jpg": "a/2.png", "elsewhere/3": "3.jpg",
    }
    with pytest.raises(UserError, match="1 may be a/1.jpg or b/1.jpg"):
        match_names(["1"], paths)


def match(names, paths):
    """match_names' result, or the text of its error."""
    try:
        return match_names(names, paths)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("paths, expected", [
    # an exact path wins
    (["a/0.jpg", "a/a/0.jpg"], {"a/0.jpg": "a/0.jpg", "a/a/0.jpg": "a/a/0.jpg"}),
    (["a/0.jpg", "a/a/0.jpg"], {"a/0": "a/0.jpg", "a/a/0": "a/a/0.jpg"}),
    (["0.jpg", "thumbs/0.jpg"], {"0.jpg": "0.jpg"}),
    (["0.jpg", "thumbs/0.jpg"], {"0": "0.jpg"}),
    # the most last parts in common
    (["cats/0.jpg", "dogs/0.jpg"], {"cls/cats/0.jpg": "cats/0.jpg", "cls/dogs/0": "dogs/0.jpg"}),
    (["cats/0.jpg", "dogs/0.jpg"], {"/home/x/cls/dogs/0.jpg": "dogs/0.jpg"}),
    (["x/cats/0.jpg", "x/dogs/0.jpg"], {"y/cats/0.jpg": "x/cats/0.jpg"}),
    (["x/cats/0.png", "x/dogs/0.jpg"], {"cats/0.jpg": "x/cats/0.png"}),
    # the extension decides
    (["0.jpg", "0.png"], {"0.png": "0.png"}),
    # of NFC and NFD: both are found, and an exact name wins
    (["cafe\u0301.jpg"], {"caf\u00e9.jpg": "cafe\u0301.jpg"}),
    (["caf\u00e9.jpg"], {"a/cafe\u0301": "caf\u00e9.jpg"}),
    (["caf\u00e9.jpg", "cafe\u0301.jpg"],
     {"caf\u00e9.jpg": "caf\u00e9.jpg", "cafe\u0301.jpg": "cafe\u0301.jpg"}),
])
def test_which_path_a_name_means(paths, expected):
    assert match(list(expected), paths) == expected


@pytest.mark.parametrize("names, paths", [
    # another name has a better claim
    (["a/0.jpg", "b/0.jpg"], ["a/0.jpg"]),
    (["x/cats/0.jpg", "y/cats/0.jpg"], ["cats/0.jpg"]),
    (["0.jpg", "0.gif"], ["0.png"]),
])
def test_a_file_is_not_taken_for_another(names, paths):
    expected = {name: name for name in names if name in paths}
    assert match(names, paths) == expected


def test_a_name_that_fits_two_paths_is_an_error():
    assert "0.jpg may be a/0.jpg or b/0.jpg" in match(["0.jpg"], ["a/0.jpg", "b/0.jpg"])
    assert "0 may be 0.jpg or 0.png" in match(["0"], ["0.jpg", "0.png"])
