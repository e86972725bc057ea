"""Reads caption files in the formats of Flickr8k, Flickr30k, COCO and others."""
import contextlib
import csv
import json
import os
import re
from collections import Counter, defaultdict

from nanocaption.cli import UserError
from nanocaption.dataset import SPLITS
from nanocaption.images import stem, strip_extension

SYNONYMS = {"restval": "train", "dev": "val", "valid": "val", "validation": "val"}  # of splits
# Flickr8k.token.txt: NAME.jpg#n<TAB>caption
TOKEN_LINE = re.compile(r"([^\t]*\S)#\d+\t(.*)")
# Kaggle's Flickr30k, results.csv: NAME.jpg| n| caption, without quoting. One line of the original
# lacks its second bar.
BAR_HEADER = "image_name|comment_number|comment"
BAR_LINE = re.compile(r"\s*([^|]*[^|\s])\s*\|\s*\d+(?:\s*\||\s)(.*)")
# names of CSV columns
IMAGE_COLUMNS = ("image", "image_name", "filename", "file_name")
CAPTION_COLUMNS = ("caption", "comment", "raw")


def read_captions(path, skipped=None):
    """
    Reads a caption file. Its format is recognized by its content: NAME.jpg#n<TAB>caption lines
    (.token), CSV with a header (Kaggle's captions.txt and results.csv, nlphuji's), JSON
    (Karpathy's, COCO's captions_*.json, {name: [captions]}) or JSON lines
    {"image", "captions"[, "split"]}.

    Returns [(image file name, caption, split or None)] in the file's order; an empty caption is "".
    Malformed lines are described in the list `skipped`; without that list they raise UserError.
    """
    captions = []
    for where, raw, name, texts, split in read_rows(path):
        if isinstance(texts, str):
            texts = [texts]
        if not is_well_formed(name, texts):
            message = f"{path}, {where}: not an image name with captions: {str(raw)[:80]}"
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


def is_well_formed(name, texts):
    """Whether a row has an image name and a list of captions."""
    if not isinstance(name, str) or not name.strip() or not isinstance(texts, list):
        return False
    return all(isinstance(text, str) for text in texts)


# ------------------------------------------------------------------------------------------------
# formats: each reader yields (where, the line or record itself, image name, captions, split), with
# None for what is missing or malformed


def read_rows(path):
    """The rows of a caption file, by the reader of its format."""
    text = read_text(path)
    # not splitlines(), which would also split at U+2028
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    filled = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            filled.append((f"line {number}", line))
    if not filled:
        raise UserError(f"{path}: empty, expected captions")
    first = filled[0][1].lstrip()
    if first[0] in "{[":
        return json_rows(path, text, filled)
    if any(TOKEN_LINE.match(line) for _, line in filled[:20]):
        return line_rows(TOKEN_LINE, filled)
    if first.lower().replace(" ", "") == BAR_HEADER:
        return line_rows(BAR_LINE, filled[1:])
    return csv_rows(path, lines)


def read_text(path):
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        with open(path, "rb") as file:
            return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8; convert it with iconv -f LATIN1 -t UTF-8"
        ) from None
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror.lower()}, expected a caption file") from None


def line_rows(pattern, filled):
    """One caption a line; the groups of pattern are the image name and the caption."""
    for where, line in filled:
        match = pattern.fullmatch(line)
        name, caption = match.groups() if match else (None, None)
        yield where, line, name, caption, None


def csv_rows(path, lines):
    """CSV (RFC 4180) with columns for the image, the caption (`raw`: a JSON list) and the split."""
    header = None
    number = 0
    while number < len(lines):
        line = lines[number]
        where = f"line {number + 1}"
        row, count = parse_csv(lines[number:number + 20])
        number += count
        if row == []:
            continue
        if header is None:
            header = [column.strip().lower() for column in row or []]
            image_column = find_column(IMAGE_COLUMNS, header)
            caption_column = find_column(CAPTION_COLUMNS, header)
            if image_column is None or caption_column is None:
                raise UserError(
                    f"{path}: unknown format, it begins with {line[:80]!r}; expected "
                    "NAME.jpg#n<TAB>caption, a CSV header such as image,caption, or JSON (lines) "
                    "with image and captions"
                )
        elif row is None or len(row) != len(header):
            yield where, line, None, None, None
        else:
            record = dict(zip(header, row))
            captions = record[caption_column]
            if caption_column == "raw":
                with contextlib.suppress(ValueError, RecursionError):
                    captions = json.loads(captions)
            split = record.get("split", "").strip() or None
            yield where, line, record[image_column], captions, split


def parse_csv(lines):
    """
    The first row of some lines, and the number of lines it takes up; (None, 1) if there is none.

    A quoted field may contain line ends, but a stray quote would swallow the lines after it. So
    the row is the smallest number of lines that form one.
    """
    for count in range(1, len(lines) + 1):
        with contextlib.suppress(csv.Error):
            row = next(csv.reader(["\n".join(lines[:count])], strict=True), [])
            return row, count
    return None, 1


def find_column(names, header):
    """The first of the names that is in the header, or None."""
    for name in names:
        if name in header:
            return name
    return None


def json_rows(path, text, filled):
    """JSON in any of the known layouts, or JSON lines."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not any(re.fullmatch(r'\s*\{.*"image".*\}\s*', line) for _, line in filled):
            raise UserError(f"{path}: neither JSON nor JSON lines ({error})") from None
        data = parse_json_lines(filled)
    try:
        records = to_records(path, data)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: unknown JSON layout ({type(error).__name__}: {error}); expected Karpathy's, "
            "COCO's captions_*.json, {name: [captions]} or lines with image and captions"
        ) from None
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        yield where, record, record.get("image"), record.get("captions"), record.get("split")


def parse_json_lines(filled):
    """The values of JSON lines. What is not JSON stays text, and thereby malformed."""
    values = []
    for _, line in filled:
        value = line
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(line)
        values.append(value)
    return values


def to_records(path, data):
    """Parsed JSON -> a list of dicts with image, captions and, in some layouts, split."""
    if isinstance(data, dict) and "image" in data:
        data = [data]
    records = []
    if isinstance(data, list):
        if data and isinstance(data[0], dict) and "image_id" in data[0]:
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
    """HanCai98's Flickr30k lists the image's path among its captions."""
    file_name = os.path.basename(name)
    return [text for text in captions if os.path.basename(text) != file_name]


# ------------------------------------------------------------------------------------------------
# names


def match_names(names, paths):
    """
    Finds names, written with or without folder and extension, among paths. Returns {name: path} of
    those that are found. Raises UserError for a name that fits two paths.
    """
    by_stem = defaultdict(list)
    for path in paths:
        by_stem[stem(path)].append(path)
    rivals = Counter(stem(name) for name in names)
    found = {}
    for name in names:
        candidates = by_stem[stem(name)]
        hits = [path for path in candidates if ends_with(path, name)]
        # a different folder or extension is fine if no other name has this stem
        if not hits and rivals[stem(name)] == 1:
            file_name = os.path.basename(name)
            hits = [path for path in candidates if os.path.basename(path) == file_name]
            hits = hits or candidates
        if len(hits) > 1:
            raise UserError(
                f"{name} may be {hits[0]} or {hits[1]}; "
                "write the folder (and the extension) in the captions"
            )
        if hits:
            found[name] = hits[0]
    return found


def ends_with(path, name):
    """Whether path, with or without its extension, is name or ends with /name."""
    name = f"/{name}"
    return f"/{path}".endswith(name) or f"/{strip_extension(path)}".endswith(name)
