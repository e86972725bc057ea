"""Reads caption files in the formats of Flickr8k, Flickr30k, COCO and others."""
import ast
import contextlib
import csv
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict

from nanocaption.cli import UserError
from nanocaption.dataset import SPLITS
from nanocaption.images import has_image_extension, same_bytes, strip_extension

SYNONYMS = {"restval": "train", "dev": "val", "valid": "val", "validation": "val"}  # of splits
# Flickr8k.token.txt: NAME.jpg#n<TAB>caption
TOKEN_LINE = re.compile(r"([^\t]*\S)#\d+\t(.*)")
# Kaggle's Flickr30k, results.csv: NAME.jpg| n| caption, without quoting. One line of the original
# lacks its second bar.
BAR_HEADER = "image_name|comment_number|comment"
BAR_LINE = re.compile(r"\s*([^|]*[^|\s])\s*\|\s*\d+(?:\s*\||\s)(.*)")
# names of CSV columns and JSON keys
IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
CAPTION_COLUMNS = ("captions", "caption", "comment", "raw", "text")
# a list of captions written as in Python, JSON or NumPy, and what looks like a damaged one
ITEM = r"""u?(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
LIST = re.compile(rf"\s*[\[(]\s*(?:{ITEM}(?:[\s,]+{ITEM})*[\s,]*)?[\])]\s*", re.DOTALL)
LIKE_A_LIST = re.compile(r"""\s*[\[(]\s*u?["'].*(?:["']|None|null|nan)\s*[\])]\s*""", re.DOTALL)
# how files that are not UTF-8 text begin, and what they are
NOT_TEXT = {
    rb"PK\x03\x04.*xl/workbook|\xd0\xcf\x11\xe0": "an Excel workbook; save it as CSV UTF-8",
    rb"PK\x03\x04": "a zip archive; unpack it",
    rb"\x1f\x8b": "compressed with gzip; unpack it",
    rb"BZh\d|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf": "compressed; unpack it",
    rb"PAR1": "a Parquet file; convert it with "
              "pandas.read_parquet(FILE).to_json(NEW, orient='records', lines=True)",
    rb"\xff\xfe\0\0|\0\0\xfe\xff": "UTF-32; convert it with iconv -f UTF-32 -t UTF-8",
    rb"\xff\xfe|\xfe\xff": "UTF-16, which Excel calls Unicode text; convert it with "
                          "iconv -f UTF-16 -t UTF-8",
    rb"[^\0]\0": "UTF-16; convert it with iconv -f UTF-16LE -t UTF-8",
    rb"\0[^\0]": "UTF-16; convert it with iconv -f UTF-16BE -t UTF-8",
}
# the non-ASCII characters of captions in Western European languages
WESTERN = set("àáâãäåæçèéêëíîïñóôõöøùúûüœßÀÁÄÅÇÈÉÊÑÖØÜ‘’“”«»–—…•·°ºª²³½¼¾×©®™€£¡¿´")


def read_captions(path, skipped=None):
    """
    Reads a caption file. Its format is recognized by its content: NAME.jpg#n<TAB>caption lines
    (.token), CSV with a header (Kaggle's captions.txt and results.csv, nlphuji's), JSON
    (Karpathy's, COCO's captions_*.json, {name: [captions]}, lists of records) or JSON lines with a
    record each, such as {"image", "captions"[, "split"]} (ours), {"image", "caption"} (BLIP's) or
    {"file_name", "text"} (Hugging Face's metadata.jsonl). A text may be a list of captions, written
    as in Python or JSON.

    Returns [(image file name, caption, split or None)] in the file's order; an empty caption is "".
    Malformed lines are described in the list `skipped`; without that list they raise UserError.
    """
    captions = []
    for where, raw, name, texts, split in read_rows(path):
        if isinstance(texts, str):
            texts = split_list(texts)
        missing = find_missing(name, texts)
        if missing:
            # a line that is malformed as a whole
            if isinstance(raw, str) and name is None and texts is None:
                missing = "not an image name with captions"
            message = f"{path}, {where}: {missing}: {str(raw)[:80]}"
            if skipped is None:
                raise UserError(message)
            skipped.append(message)
            continue
        if isinstance(split, str):
            split = SYNONYMS.get(split, split)
        if split is not None and split not in SPLITS:
            raise UserError(f"{path}, {where}: split is {split!r}, expected train, val or test")
        name = name.strip().replace("\\", "/").removeprefix("./")
        for text in texts:
            # JSON may escape half of a surrogate pair, which no file can hold
            text = text.encode("utf-8", "replace").decode()
            captions.append((name, text, split))
    return captions


def split_list(text):
    """A text -> [text], or its items if it is a list, or None if it looks like a damaged list."""
    if not LIST.fullmatch(text):
        return None if LIKE_A_LIST.fullmatch(text) else [text]
    with contextlib.suppress(ValueError):
        return json.loads(text)
    try:
        return [ast.literal_eval(item) for item in re.findall(ITEM, text, re.DOTALL)]
    except (SyntaxError, ValueError):
        return None


def find_missing(name, texts):
    """What a row lacks, an image name or a list of captions or both; "" if it has both."""
    missing = []
    if not isinstance(name, str) or not name.strip():
        missing.append(f"no image name ({', '.join(IMAGE_COLUMNS)})")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        missing.append(f"no caption text ({', '.join(CAPTION_COLUMNS)})")
    return " and ".join(missing)


# ------------------------------------------------------------------------------------------------
# formats: each reader yields (where, the line or record itself, image name, captions, split), with
# None for what is missing or malformed. For a new format, write a reader that read_rows calls; for
# a new JSON layout, extend to_records.


def read_rows(path):
    """The rows of a caption file, by the reader of its format."""
    text = read_text(path)
    # not splitlines(), which would also split at U+2028
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    nonblank = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            nonblank.append((f"line {number}", line))
    if not nonblank:
        raise UserError(f"{path}: empty, expected captions")
    first = nonblank[0][1].lstrip()
    if first[0] in "{[":
        return json_rows(path, text, nonblank)
    if any(TOKEN_LINE.match(line) for _, line in nonblank[:20]):
        return line_rows(TOKEN_LINE, nonblank)
    if first.lower().replace(" ", "") == BAR_HEADER:
        return line_rows(BAR_LINE, nonblank[1:])
    return csv_rows(path, lines)


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror.lower()}, expected a text file") from None
    for beginning, kind in NOT_TEXT.items():
        if re.match(beginning, data, re.DOTALL):
            raise UserError(f"{path} is {kind}")
    if b"\0" in data:
        raise UserError(f"{path} is not a text file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: {explain_bytes(data)}") from None


def explain_bytes(data):
    """What is wrong with a text that is not UTF-8, and what to do about it."""
    text = data.decode("utf-8", "replace")
    n_bad = text.count("\ufffd")
    if len(re.sub(r"[\0-\x7f\ufffd]+", "", text)) > n_bad:
        return "a damaged character in UTF-8 text; correct or remove it"
    # in Western languages, non-ASCII characters are rarely adjacent
    high = re.findall(rb"[\x80-\xff]+", data)
    n_high = sum(map(len, high))
    for encoding in ("WINDOWS-1252", "MACINTOSH"):
        characters = b"".join(high).decode(encoding, "replace")
        if sum(c in WESTERN for c in characters) > 0.9 * n_high and n_high < 2 * len(high):
            return f"not UTF-8 but {encoding}; convert it with iconv -f {encoding} -t UTF-8"
    return ("not UTF-8; convert it with iconv -f ENCODING -t UTF-8, where ENCODING is what it was "
            "saved in, such as GB18030, SHIFT_JIS or WINDOWS-1251")


def line_rows(pattern, nonblank):
    """One caption per line; the groups of pattern are the image name and the caption."""
    for where, line in nonblank:
        match = pattern.fullmatch(line)
        name, caption = match.groups() if match else (None, None)
        yield where, line, name, caption, None


def csv_rows(path, lines):
    """
    CSV (RFC 4180) with columns for the image, the caption and perhaps the split. They are separated
    by commas, semicolons or tabs, all of which Excel writes.
    """
    header = None
    delimiter = ","
    number = 0
    while number < len(lines):
        line = lines[number]
        where = f"line {number + 1}"
        if header is None:
            delimiter = max(",;\t", key=line.count)
        row, count = parse_csv(lines[number:number + 20], delimiter)
        number += count
        if row == []:
            continue
        if header is None:
            header = [column.strip().lower() for column in row or []]
            image_column = find_column(IMAGE_COLUMNS, header)
            caption_column = find_column(CAPTION_COLUMNS, header)
            if image_column is None or caption_column is None:
                raise UserError(
                    f"{path}: unknown format (it begins with {line[:80]!r}); expected "
                    "NAME.jpg#n<TAB>caption, a CSV header such as image,caption, or JSON or JSON "
                    "lines with image and captions"
                )
        elif row is None or len(row) != len(header):
            yield where, line, None, None, None
        else:
            record = dict(zip(header, row))
            split = record.get("split", "").strip() or None
            yield where, line, record[image_column], record[caption_column], split


def parse_csv(lines, delimiter):
    """
    The first row of some lines, and the number of lines it takes up; (None, 1) if there is none.

    A quoted field may contain line breaks, but a stray quote would swallow the lines after it. So
    the row is the smallest number of lines that form one.
    """
    for count in range(1, len(lines) + 1):
        with contextlib.suppress(csv.Error):
            row = next(csv.reader(["\n".join(lines[:count])], delimiter=delimiter, strict=True), [])
            return row, count
    return None, 1


def find_column(names, header):
    """The first of the names that is in the header, or None."""
    for name in names:
        if name in header:
            return name
    return None


def json_rows(path, text, nonblank):
    """JSON in any of the known layouts, or JSON lines."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        data = parse_json_lines(nonblank)
        if not any(isinstance(value, dict) for value in data):
            raise UserError(f"{path}: neither JSON nor JSON lines ({error})") from None
    try:
        records = to_records(path, data)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: unknown JSON layout ({type(error).__name__}: {error}); expected Karpathy's, "
            "COCO's captions_*.json, {name: [captions]} or lines with image and captions"
        ) from None
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        name = record.get(find_column(IMAGE_COLUMNS, record))
        captions = record.get(find_column(CAPTION_COLUMNS, record))
        yield where, record, name, captions, record.get("split")


def parse_json_lines(nonblank):
    """The values of JSON lines. A line that is not JSON stays text, to be reported later."""
    values = []
    for _, line in nonblank:
        value = line
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
        values.append(value)
    return values


def to_records(path, data):
    """Parsed JSON -> a list of dicts with image, captions and, in some layouts, split."""
    if isinstance(data, dict) and isinstance(data.get(find_column(IMAGE_COLUMNS, data)), str):
        data = [data]
    records = []
    if isinstance(data, list):
        first = data[0] if data and isinstance(data[0], dict) else {}
        if "image_id" in first and not find_column(IMAGE_COLUMNS, first):
            raise UserError(
                f"{path}: COCO results have no file names; use the annotations (captions_*.json)"
            )
        for record in data:
            records.append(record if isinstance(record, dict) else {"line": record})
    elif "annotations" in data:
        # COCO
        names = {image["id"]: image["file_name"] for image in data["images"]}
        for note in data["annotations"]:
            name = names.get(note["image_id"])
            records.append({"image": name, "captions": note["caption"]})
    elif isinstance(data.get("images"), list):
        # Karpathy
        for image in data["images"]:
            name = os.path.join(image.get("filepath", ""), image["filename"])
            captions = [sentence["raw"] for sentence in image["sentences"]]
            records.append({"image": name, "captions": captions, "split": image.get("split")})
    else:
        for name, captions in data.items():
            if not isinstance(captions, str):
                captions = without_path(captions, name)
            records.append({"image": name, "captions": captions})
    return records


def without_path(captions, name):
    """The captions without the image's path, which HanCai98's Flickr30k lists among them."""
    file_name = os.path.basename(name)
    return [text for text in captions if os.path.basename(text) != file_name]


# ------------------------------------------------------------------------------------------------
# names


def match_names(names, paths, source=None):
    """
    Finds names, written with or without folder and extension, among paths. Returns {name: path} of
    those that are found.

    source: the folder or archive, if paths is its list_images. A name matches the path equal to it,
    or else the one that shares the most trailing parts with it. The parts before them, and the
    extension, may differ unless another name ends in the same parts. Of identical files, the least
    deeply nested is taken; other ambiguous names raise UserError.
    """
    rivals = Counter()  # tail -> how many names end in it
    for name in {unicodedata.normalize("NFC", name) for name in names}:
        rivals.update(tails(name))
    root = f"{os.path.abspath(source)}/".replace(os.sep, "/") if source else ""
    by_tail = defaultdict(list)
    for path in paths:
        for tail in tails(root + path):
            if tail in rivals:
                by_tail[tail].append(path)

    found = {}
    for name in names:
        if name in paths:
            found[name] = name
            continue
        whole = tails(name)[0]
        tail = next((tail for tail in tails(name) if tail in by_tail), None)
        hits = by_tail.get(tail, [])
        same_file = [path for path in hits if file_name(path) == file_name(name)]
        # the whole name matches
        agrees = tail == whole and (same_file or not has_image_extension(name))
        if not hits or (rivals[tail] > 1 and not agrees):
            continue
        hits = same_file or hits
        # a folder inside the source may be named like the source
        hits = [path for path in hits if tails(path)[0] == whole] or hits
        if len(hits) > 1:
            hits.sort(key=lambda path: path.count("/"))
            if not source or not same_bytes(source, [paths[path] for path in hits]):
                raise UserError(
                    f"{name} may be {hits[0]} or {hits[1]}; "
                    "include the folder (and the extension) in the name"
                )
        found[name] = hits[0]
    return found


def tails(path):
    """A path's last parts, without extension: a/b/1.jpg -> a/b/1, b/1, 1. In NFC, to compare."""
    parts = strip_extension(unicodedata.normalize("NFC", path)).split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def file_name(path):
    """A path's last part, in NFC."""
    return unicodedata.normalize("NFC", os.path.basename(path))
