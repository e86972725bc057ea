"""
Photographs and captions into the binaries that train.py memory-maps: Flickr30k, Flickr8k, COCO or your own.

    python prepare_flickr.py                                     # downloads Flickr30k (4.4 GB) into data/flickr30k
    python prepare_flickr.py --images photos/ --captions captions.jsonl --out_dir data/mine

For each split out_dir gets SPLIT_images.bin, SPLIT_tokens.bin, SPLIT_captions.bin and SPLIT_index.bin (what they hold:
read_split) and SPLIT.jsonl, beside tokenizer.tiktoken and, written last, meta.json (load_meta). Other scripts read
pictures and captions with load_image and read_captions from here, so that they are the same everywhere.
"""
# before what is slow to import: from here on Ctrl-C is answered in one line
from common import PICTURE_BYTES, Parser, UserError, atomic_write, check_ranges, download, exclusive, fetch, progress, run

import array
import contextlib
import csv
import hashlib
import io
import itertools
import json
import logging
import lzma
import multiprocessing
import os
import pickle
import re
import signal
import struct
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import tiktoken
from PIL import Image, ImageOps

from bpe import GPT2_PATTERN, keep_used, make_tokenizer, ranks_to_text, read_hub_tokenizer, text_to_ranks, train_bpe
import common

Image.init()
FORMATS = [name for name in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF") if name in Image.OPEN]  # no EPS: it runs code
PIXELS = 64_000_000  # of a picture that is decoded whole
SPLITS = "train", "val", "test"
SYNONYMS = {"restval": "train", "dev": "val", "valid": "val", "validation": "val"}
EXTENSION = re.compile(r"\.(jpe?g|png|gif|bmp|webp|tiff?|ppm|pgm|jp2|avif)$", re.IGNORECASE)
logging.getLogger("PIL").addHandler(logging.NullHandler())  # else it prints what load_image says in its own line
FLICKR30K_URL = "https://huggingface.co/datasets/nlphuji/flickr30k/resolve/main"
FLICKR30K = {"train": 29000, "val": 1014, "test": 1000}  # pictures of Karpathy's split

# ---------------------------------------------------------------------------------------------------------------------
# pictures


def load_image(source, size):
    """A picture as the model sees it: upright, RGB, transparency on white, squashed (never cropped) to a square.

    source: a path, an http(s) address, the file's bytes or an open binary file. Returns np.uint8 (size, size, 3).
    Raises UserError, in one line that names the source, for what is not a readable picture.
    """
    name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "picture")
    if isinstance(source, str) and re.match("https?://", source):
        source = fetch(source)
    try:
        if isinstance(source, (str, os.PathLike)) and not os.path.isfile(source) and os.path.exists(source):
            raise ValueError("a folder or a device, not a file")  # a pipe would keep us waiting
        with (warnings.catch_warnings(action="ignore"),
              Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image):
            if image.width * image.height > PIXELS and (image.format != "JPEG" or "progression" in image.info):
                raise ValueError(f"{image.width} × {image.height} pixels are too many: make it smaller")
            image.draft(None, (size, size))  # a large JPEG decodes faster at 1/2, 1/4 or 1/8, the smallest that is no smaller than size
            image.load()
            # A damaged EXIF block can raise anything and is no reason to lose the picture.
            with contextlib.suppress(Exception):
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16-bit grey: convert() would clip it, not scale it
                image = image.convert("I").resize((size, size), Image.Resampling.BICUBIC)
                image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB").resize((size, size), Image.Resampling.BICUBIC)
            if image.mode == "RGBA":
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            return np.array(image)
    # PIL's decoders raise OSError, SyntaxError, struct.error, IndexError ... at a damaged file, and an error of their
    # own at a picture of too many pixels (a decompression bomb).
    except Exception as error:
        reason = getattr(error, "strerror", None) or " ".join(re.sub("<_io.*>", "", str(error)).split()) or type(error).__name__
        raise UserError(f"{name}: not a readable picture: {reason}") from None


def list_images(source):
    """The files in a folder, .zip or .tar(.gz): a dict from path inside the source to what read_entry takes.

    A folder's entries are paths, a zip's ZipInfos, a tar's (offset, length); a compressed tar's are None, for it can
    only be read from its beginning. macOS's __MACOSX/ and ._* are left out.
    """
    entries = {}
    def unreadable(error):
        raise UserError(f"{source}: {error.filename} can't be read: {error.strerror}")

    if os.path.isdir(source):
        for folder, _, files in os.walk(source, onerror=unreadable):
            for file in files:
                path = os.path.join(folder, file)
                entries[os.path.relpath(path, source).replace(os.sep, "/")] = path
    elif not os.path.exists(source):
        raise UserError(f"{source}: no such file or folder")
    elif zipfile.is_zipfile(source):
        try:
            with zipfile.ZipFile(source) as archive:
                for info in archive.infolist():
                    if not info.is_dir():
                        entries.setdefault(info.filename, info)
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
            raise UserError(f"{source}: a damaged zip: {error}") from None
        if any(info.flag_bits & 1 for info in entries.values()):
            raise UserError(f"{source}: the zip is encrypted: unpack it and give the folder")
    else:
        try:
            with tarfile.open(source) as archive:
                plain = isinstance(archive.fileobj, io.BufferedReader)
                for member in archive:
                    if member.isfile():
                        entries.setdefault(member.name, (member.offset_data, member.size) if plain else None)
                    archive.members = []  # else tarfile keeps every header
        except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OSError) as error:
            raise UserError(f"{source}: not a folder, a zip or a whole tar: {error}") from None
    entries = {path.removeprefix("./"): entry for path, entry in entries.items()}
    return {path: entry for path, entry in sorted(entries.items()) if not re.search(r"(^|/)(__MACOSX/|\._)", path)}


def read_entry(source, entry):
    """What load_image takes, for an entry of list_images(source). UserError for a damaged or giant one."""
    if isinstance(entry, str):
        return entry
    size = entry[1] if isinstance(entry, tuple) else len(entry) if isinstance(entry, bytes) else entry.file_size
    if size > PICTURE_BYTES:
        raise UserError(f"more than {PICTURE_BYTES >> 20} MB, no picture's file is so large")
    if isinstance(entry, bytes):
        return entry
    with open(source, "rb") as archive:
        if isinstance(entry, tuple):
            archive.seek(entry[0])
            return archive.read(size)
        try:
            archive.seek(entry.header_offset + 26)  # past the local header's name and extra field: no directory is read
            archive.seek(sum(struct.unpack("<HH", archive.read(4))), 1)
            with zipfile.ZipExtFile(archive, "r", entry) as file:
                return file.read(size)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError, NotImplementedError) as error:
            raise UserError(f"{entry.filename}: damaged in {source}: {error}") from None


def decode(task):
    """In a worker: (source, entry, size, file, row) -> the picture goes into its row of the file; the text of what is wrong, or None."""
    source, entry, size, path, row = task
    try:
        image = load_image(read_entry(source, entry), size)
    except UserError as error:
        return str(error)
    with open(path, "r+b") as file:
        file.seek(row * image.nbytes)
        file.write(image)


def begin_worker():
    """Ctrl-C is the parent's to answer; a worker would print a traceback. But none outlives a parent that was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def decode_all(source, entries, pictures, out_dir, size, workers):
    """Fills SPLIT_images.bin. pictures: {split: [path inside the source, ...]}, a row each.

    Returns {path: error}. A picture that can't be read leaves no row.
    """
    place = {path: (split, row) for split, paths in pictures.items() for row, path in enumerate(paths)}

    def tasks():
        if None not in entries.values():
            yield from ((path, entries[path]) for path in place)
            return
        left = set(place)
        with tarfile.open(source, "r|*") as archive:  # compressed: one pass, in the archive's order
            for member in archive:
                path = member.name.removeprefix("./")
                if member.isfile() and path in left:
                    left.remove(path)
                    yield path, archive.extractfile(member).read(PICTURE_BYTES + 1)
                archive.members = []

    stream, errors, done, began, row_bytes = tasks(), {}, 0, time.monotonic(), size * size * 3
    with contextlib.ExitStack() as stack:
        files = {split: stack.enter_context(open(f"{out_dir}/{split}_images.bin", "w+b")) for split in pictures}
        pool = stack.enter_context(ProcessPoolExecutor(workers, initializer=begin_worker))
        while batch := list(itertools.islice(stream, 32 if None in entries.values() else 256)):  # what a compressed tar holds is in memory
            jobs = [(source, entry, size, files[place[path][0]].name, place[path][1]) for path, entry in batch]
            try:
                errors.update((path, error) for (path, _), error in zip(batch, pool.map(decode, jobs, chunksize=4)) if error)
            except BrokenProcessPool:
                raise OSError("a worker process was killed (out of memory?): try --workers 1") from None
            done += len(batch)
            progress("pictures", done, len(place), began)
        for split, paths in pictures.items():  # close the gaps that unreadable pictures left
            good = [row for row, path in enumerate(paths) if path not in errors]
            for new, old in enumerate(good):
                if new != old:
                    files[split].seek(old * row_bytes)
                    image = files[split].read(row_bytes)
                    files[split].seek(new * row_bytes)
                    files[split].write(image)
            files[split].truncate(len(good) * row_bytes)
    return errors


# ---------------------------------------------------------------------------------------------------------------------
# captions: each reader yields (where, the line or record itself, picture's name, captions, split), None for what lacks

TOKEN_LINE = re.compile(r"([^\t]*\S)#\d+\t(.*)")
# Kaggle's Flickr30k results.csv, `name| n| caption`, nothing quoted; one row of the original lacks its second bar.
BAR_LINE = re.compile(r"\s*([^|]*[^|\s])\s*\|\s*\d+(?:\s*\||\s)(.*)")


def read_captions(path, skipped=None):
    """Captions from any of the files that Flickr8k, Flickr30k and COCO are found as, told apart by their content.

    NAME.jpg#n<TAB>caption lines (.token), CSV with a header (Kaggle's captions.txt and results.csv, nlphuji's), JSON
    (Karpathy's, COCO's captions_*.json, {name: [captions]}) and JSON lines {"image", "captions"[, "split"]}.
    Returns [(image file name, caption text, split or None)] in the file's order, empty captions as "". A line that
    can't be understood is appended, as a text that names it, to the list `skipped`; without one it is a UserError.
    """
    try:
        with open(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (convert it: iconv -f LATIN1 -t UTF-8)") from None
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror.lower()}, expected a file of captions") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # splitlines() would also split at U+2028
    filled = [(f"line {number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not filled:
        raise UserError(f"{path}: empty, expected captions")
    first = filled[0][1].lstrip()
    if first[0] in "{[":
        rows = json_rows(path, text, filled)
    elif any(TOKEN_LINE.match(line) for _, line in filled[:20]):
        rows = line_rows(TOKEN_LINE, filled)
    elif first.lower().replace(" ", "") == "image_name|comment_number|comment":
        rows = line_rows(BAR_LINE, filled[1:])
    else:
        rows = csv_rows(path, lines)
    records = []
    for where, raw, name, captions, split in rows:
        captions = [captions] if isinstance(captions, str) else captions
        if not (isinstance(name, str) and name.strip() and isinstance(captions, list)
                and all(isinstance(caption, str) for caption in captions)):
            malformed = f"{path}, {where}: no picture's name with captions: {str(raw)[:80]}"
            if skipped is None:
                raise UserError(malformed)
            skipped.append(malformed)
        elif not isinstance(split, str | None) or SYNONYMS.get(split, split) not in (None, *SPLITS):
            raise UserError(f"{path}, {where}: split {split!r}, expected train, val or test")
        else:
            name = name.strip().replace("\\", "/").removeprefix("./")
            # JSON may escape half a surrogate pair, which no file could hold.
            records += [(name, caption.encode("utf-8", "replace").decode(), SYNONYMS.get(split, split))
                        for caption in captions]
    return records


def line_rows(pattern, filled):
    """A line a caption: pattern's groups are the picture's name and the caption."""
    for where, line in filled:
        found = pattern.fullmatch(line)
        yield where, line, *(found.groups() if found else (None, None)), None


def csv_rows(path, lines):
    """Comma-separated (RFC 4180), with columns for the picture, the caption (`raw`: a JSON list of them), the split."""
    header, number = None, 0
    while number < len(lines):
        # A quoted field may hold line ends, and a stray quote may swallow the lines after it: take the fewest lines
        # that are one row; where up to twenty are not, only this line is malformed.
        for end in range(number + 1, min(number + 20, len(lines)) + 1):
            try:
                row = next(csv.reader(["\n".join(lines[number:end])], strict=True), [])
                break
            except csv.Error:
                row = None
        where, line, number = f"line {number + 1}", lines[number], number + 1 if row is None else end
        if row == []:
            continue
        if header is None:
            header = [column.strip().lower() for column in row or []]
            images = [column for column in ("image", "image_name", "filename", "file_name") if column in header]
            texts = [column for column in ("caption", "comment", "raw") if column in header]
            if not images or not texts:
                raise UserError(f"{path}: unknown format, its first line is {line[:80]!r}: expected NAME.jpg#n<TAB>"
                                "caption, a CSV header such as image,caption, or JSON (lines) with image and captions")
        elif row is None or len(row) != len(header):
            yield where, line, None, None, None
        else:
            row = dict(zip(header, row))
            captions = row[texts[0]]
            if texts[0] == "raw":
                with contextlib.suppress(ValueError, RecursionError):
                    captions = json.loads(captions)
            yield where, line, row[images[0]], captions, row.get("split", "").strip() or None


def json_rows(path, text, filled):
    """JSON in any of the known layouts, or JSON lines."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not any(re.fullmatch(r'\s*\{.*"image".*\}\s*', line) for _, line in filled):
            raise UserError(f"{path}: neither JSON nor JSON lines: {error}") from None
        data = []
        for _, line in filled:
            with contextlib.suppress(ValueError, RecursionError):
                line = json.loads(line)
            data.append(line)  # what isn't JSON stays text, and so malformed
    try:
        if isinstance(data, dict) and "image" in data:
            data = [data]
        if isinstance(data, list):
            if data and isinstance(data[0], dict) and "image_id" in data[0]:
                raise UserError(f"{path}: COCO results name no files: give the annotations (captions_*.json)")
            records = [record if isinstance(record, dict) else {"line": record} for record in data]
        elif "annotations" in data:
            files = {image["id"]: image["file_name"] for image in data["images"]}
            records = [{"image": files.get(note["image_id"]), "captions": note["caption"]}
                       for note in data["annotations"]]
        elif isinstance(data.get("images"), list):
            records = [{"image": os.path.join(image.get("filepath", ""), image["filename"]),
                        "captions": [sentence["raw"] for sentence in image["sentences"]],
                        "split": image.get("split")} for image in data["images"]]
        else:  # {name: [captions]}; HanCai98's Flickr30k lists the picture's own path among its captions
            records = [{"image": name, "captions": captions if isinstance(captions, str) else
                        [text for text in captions if os.path.basename(text) != os.path.basename(name)]}
                       for name, captions in data.items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: JSON of no known layout ({type(error).__name__}: {error}): expected Karpathy's, "
                        "COCO's captions_*.json, {name: [captions]} or lines with image and captions") from None
    for number, record in enumerate(records, 1):
        yield f"record {number}", record, record.get("image"), record.get("captions"), record.get("split")


# ---------------------------------------------------------------------------------------------------------------------
# a prepared folder


def load_meta(data_dir):
    """meta.json's dict: version, image_size, vocab_size (with EOT), pattern, tokenizer, mean and std (3 each, of train
    pixels in 0..1, from at most 256 pictures), splits {name: {images, captions, tokens, longest}}, fingerprint, source. UserError without it."""
    try:
        with open(f"{data_dir}/meta.json", encoding="utf-8") as file:
            meta = json.load(file)
            version = meta["version"]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{data_dir}: no prepared data (no meta.json): make it with prepare_flickr.py") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{data_dir}/meta.json is damaged: prepare it again with --force") from None
    if version != 1:
        raise UserError(f"{data_dir}/meta.json has version {version}, expected 1: prepare it again with --force")
    return meta


def load_tokenizer(data_dir):
    """The prepared folder's tiktoken.Encoding."""
    meta = load_meta(data_dir)
    try:
        with open(f"{data_dir}/tokenizer.tiktoken", "rb") as file:
            return make_tokenizer(text_to_ranks(file.read()), meta["pattern"])
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"{data_dir}/tokenizer.tiktoken: {error}: prepare it again with --force") from None


def load_ids(data_dir):
    """The numbers that the prepared folder's tokens have in a pretrained decoder, list[int]; None where they are the same."""
    path = f"{data_dir}/token_ids.bin"
    return np.fromfile(path, np.int64).tolist() if os.path.exists(path) else None


def read_tokenizer(source):
    """`gpt2`, a prepared folder, a checkpoint (or its folder), a name on the hub or a folder with its tokenizer.json -> (ranks, pattern, ids: the
    tokens' numbers in a pretrained decoder with EOT's, or None); None for `bpe`: yet to learn."""
    if source == "bpe":
        return None
    if source == "gpt2":
        try:
            gpt2 = tiktoken.get_encoding("gpt2")
        except OSError as error:  # requests' errors are
            raise OSError(f"--tokenizer gpt2: tiktoken could not download it: {error}") from None
        return [gpt2.decode_single_token_bytes(n) for n in range(gpt2.eot_token)], GPT2_PATTERN, list(range(gpt2.n_vocab))
    if os.path.exists(f"{source}/tokenizer.tiktoken"):
        with open(f"{source}/tokenizer.tiktoken", "rb") as file:
            return text_to_ranks(file.read()), load_meta(source)["pattern"], load_ids(source)
    folder = source
    if common.on_hub(source) and re.fullmatch(r".+/.+|(distil)?gpt2[\w-]*", source):
        folder = f"{common.WEIGHTS}/{source}"
        os.makedirs(folder, exist_ok=True)
        download(f"{common.HUB}/{source}/resolve/main/tokenizer.json", f"{folder}/tokenizer.json", os.environ.get("HF_TOKEN"))
    if os.path.exists(f"{folder}/tokenizer.json"):
        return read_hub_tokenizer(f"{folder}/tokenizer.json")
    path = next((p for p in (f"{source}/best.pt", f"{source}/last.pt", source) if os.path.isfile(p)), None)
    if path is None:
        raise UserError(f"--tokenizer {source}: not bpe, gpt2, a prepared folder, a checkpoint, a folder with one or OWNER/NAME on the hub")
    import torch  # only here: preparing needs no torch
    try:
        tokenizer = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["tokenizer"]
        return text_to_ranks(tokenizer["ranks"]), tokenizer["pattern"], tokenizer.get("ids")
    except (KeyError, TypeError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"--tokenizer {path}: not a checkpoint that holds a tokenizer: {error}") from None


def read_split(data_dir, split):
    """A split's binaries, as a dict: images, a memmap uint8 (N, S, S, 3); tokens, a memmap uint16 (T,), every caption
    followed by EOT; captions int64 (C + 1,), where each begins in tokens; index int64 (N + 1,), where each picture's
    captions begin. Call it again to reopen the maps: pages that were read stay resident as long as a map lives."""
    meta = load_meta(data_dir)
    if split not in meta["splits"]:
        raise UserError(f"{data_dir} has no split {split!r}: it has {', '.join(meta['splits'])}")
    size, n = meta["image_size"], meta["splits"][split]
    try:
        return {
            "images": np.memmap(f"{data_dir}/{split}_images.bin", np.uint8, "r", shape=(n["images"], size, size, 3)),
            "tokens": np.memmap(f"{data_dir}/{split}_tokens.bin", np.uint16, "r", shape=(n["tokens"],)),
            "captions": np.fromfile(f"{data_dir}/{split}_captions.bin", np.int64),
            "index": np.fromfile(f"{data_dir}/{split}_index.bin", np.int64)}
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{data_dir}: {split} is damaged ({error}): prepare it again with --force") from None


def read_records(data_dir, split):
    """[{"image": file name, "captions": [text, ...]}] from SPLIT.jsonl, in the order of the binaries."""
    if split not in (splits := load_meta(data_dir)["splits"]):
        raise UserError(f"{data_dir} has no split {split!r}: it has {', '.join(splits)}")
    with open(f"{data_dir}/{split}.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def written_files(out_dir):
    """The paths that preparing writes: meta.json first, without which none of the others counts."""
    files = [f"{split}{end}" for split in SPLITS for end in
             ("_images.bin", "_tokens.bin", "_captions.bin", "_index.bin", ".jsonl")]
    return [f"{out_dir}/{file}" for file in ("meta.json", *files, "tokenizer.tiktoken", "token_ids.bin", "skipped.txt")]


def clear(out_dir):
    """Makes the folder, and removes what an earlier run left there: meta.json first, so that no half looks whole."""
    os.makedirs(out_dir, exist_ok=True)
    for path in written_files(out_dir):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def write_dataset(out_dir, splits, image_size, tokenizer="bpe", vocab_size=8192, source=None):
    """Writes a whole prepared folder from pictures in memory; returns meta.json's dict.

    splits: {"train": (names, captions, images), ...} with names list[str], captions list[list[str]] and images an
    iterable of np.uint8 (image_size, image_size, 3), in the same order.
    """
    known = read_tokenizer(tokenizer)
    clear(out_dir)
    for split, (names, captions, images) in splits.items():
        count = 0
        with open(f"{out_dir}/{split}_images.bin", "wb") as file:
            for count, image in enumerate(images, 1):
                if image.dtype != np.uint8 or image.shape != (image_size, image_size, 3):
                    raise ValueError(f"{split}: expected uint8 ({image_size}, {image_size}, 3), "
                                     f"got {image.dtype} {image.shape}")
                file.write(np.ascontiguousarray(image))
        if not len(names) == len(captions) == count:
            raise ValueError(f"{split}: {len(names)} names, {len(captions)} lists of captions, {count} images")
    texts = {split: (names, captions) for split, (names, captions, _) in splits.items()}
    return write_texts(out_dir, texts, image_size, tokenizer, known, vocab_size, source)


def write_texts(out_dir, splits, image_size, tokenizer, known, vocab_size, source, only_used=False):
    """Everything but SPLIT_images.bin, meta.json last. splits: {split: (names, captions)}; known: read_tokenizer's
    answer; only_used: of its tokens, keep those that the captions of train need."""
    if not splits.get("train", ((), ()))[0]:
        raise UserError("the train split is empty: no pictures with captions")
    splits = {split: (names, [[" ".join(text.split()) for text in texts] for texts in captions])
              for split, (names, captions) in splits.items()}
    texts = [text for texts in splits["train"][1] for text in texts]
    ranks, pattern, ids = known or (train_bpe(texts, vocab_size), GPT2_PATTERN, None)
    if only_used:
        kept = keep_used(ranks, pattern, texts)
        ranks, ids = [ranks[n] for n in kept], ids and [ids[n] for n in [*kept, -1]]
    encoding = make_tokenizer(ranks, pattern)
    if encoding.n_vocab > 65536:
        raise UserError(f"the tokenizer has {encoding.n_vocab:,} tokens; SPLIT_tokens.bin (uint16) holds 65,536")
    with atomic_write(f"{out_dir}/tokenizer.tiktoken") as file:
        file.write(ranks_to_text(ranks))
    fingerprint = hashlib.sha256(b"%d\n" % image_size + ranks_to_text(ranks))
    meta = {"version": 1, "image_size": image_size, "vocab_size": encoding.n_vocab, "pattern": pattern,
            "tokenizer": tokenizer, "splits": {}}
    if ids and ids != list(range(len(ids))):
        with atomic_write(f"{out_dir}/token_ids.bin") as file:
            file.write(np.array(ids, np.int64))
    for split, (names, captions) in splits.items():
        tokens, starts, index = array.array("H"), [0], [0]
        for texts in captions:
            for text in texts:
                tokens.extend(encoding.encode_ordinary(text))
                tokens.append(encoding.eot_token)
                starts.append(len(tokens))
            index.append(len(starts) - 1)
        jsonl = "".join(json.dumps({"image": name, "captions": texts}, ensure_ascii=False) + "\n"
                        for name, texts in zip(names, captions)).encode("utf-8", "backslashreplace")
        fingerprint.update(split.encode() + jsonl)
        for end, data in (("_tokens.bin", np.array(tokens, np.uint16)), ("_captions.bin", np.array(starts, np.int64)),
                          ("_index.bin", np.array(index, np.int64)), (".jsonl", jsonl)):
            with atomic_write(f"{out_dir}/{split}{end}") as file:
                file.write(data)
        meta["splits"][split] = {"images": len(names), "captions": len(starts) - 1, "tokens": len(tokens),
                                 "longest": int(np.diff(starts).max(initial=0))}
    n = len(splits["train"][0])
    images = np.memmap(f"{out_dir}/train_images.bin", np.uint8, "r", shape=(n, image_size ** 2, 3))
    some = min(256, max(1, 2 ** 24 // image_size ** 2))  # pictures that tell mean and deviation well enough
    images = images[::-(-n // some)] / 255
    meta |= {"mean": images.mean((0, 1)).tolist(), "std": images.std((0, 1)).tolist(), "source": source or {}}
    fingerprint.update(json.dumps([meta["mean"], meta["std"]]).encode())  # so that other pixels are other data
    meta["fingerprint"] = fingerprint.hexdigest()
    with atomic_write(f"{out_dir}/meta.json") as file:
        file.write(json.dumps(meta, indent=1).encode())
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# from files to a prepared folder


def stem(path):
    """The file name without its folder and without a picture's extension."""
    return EXTENSION.sub("", path.rsplit("/", 1)[-1])


def match(names, paths):
    """Finds names, written with or without folder and extension, among paths: a dict from name to path.

    A name that fits nothing is not in it; one that fits two paths is a UserError.
    """
    by_stem = defaultdict(list)
    for path in paths:
        by_stem[stem(path)].append(path)
    rivals, found = Counter(stem(name) for name in names), {}
    for name in names:
        candidates = by_stem.get(stem(name), [])
        hits = [path for path in candidates if f"/{path}".endswith(f"/{name}")
                or f"/{EXTENSION.sub('', path)}".endswith(f"/{name}")]
        # Another folder or extension than the captions say is fine only where nothing else has that name.
        if not hits and rivals[stem(name)] == 1:
            hits = [path for path in candidates if os.path.basename(path) == os.path.basename(name)] or candidates
        if len(hits) > 1:
            raise UserError(f"{name} may be {hits[0]} or {hits[1]}: write the folder (and extension) in the captions")
        if hits:
            found[name] = hits[0]
    return found


def read_all_captions(files, skipped):
    """[FILE or train=FILE, ...] -> {name: [captions]}, {name: split or None}; what is left out goes onto skipped."""
    captions, splits = {}, {}
    for file in files:
        given, _, path = file.partition("=") if re.match(r"(train|val|test)=", file) else ("", "", file)
        malformed = []
        for name, text, split in read_captions(path, malformed):
            split = given or split
            if splits.setdefault(name, split) != split:
                raise UserError(f"{path}: {name} is in two splits, {splits[name]} and {split}")
            captions.setdefault(name, []).append(text)
        skipped += [("caption", line) for line in malformed]
    return captions, splits


def read_split_files(files, names):
    """Lists of ids, in the order train, val, test -> ({name: split}, [ids that no caption names])."""
    splits, unknown, lists = {}, [], {}
    for split, path in zip(SPLITS, files):
        try:
            with open(path, encoding="utf-8-sig") as file:
                ids = dict.fromkeys(line.strip() for line in file if line.strip())
        except (FileNotFoundError, UnicodeDecodeError) as error:
            raise UserError(f"--split_files {path}: {error}") from None
        found = match(ids, names)
        unknown += [f"{path}: {id}" for id in ids if id not in found]
        for name in found.values():
            if splits.setdefault(name, split) != split:
                raise UserError(f"{name} is in two lists, {lists[splits[name]]} and {path}")
        lists[split] = path
    return splits, unknown


def hashed_split(name):
    """90 / 5 / 5 by a hash of the file name: adding pictures moves no other."""
    share = int(hashlib.sha256(stem(name).encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2 ** 32
    return "train" if share < 0.90 else "val" if share < 0.95 else "test"


def signature(path):
    """What changes when a file (size, time) or a folder (files, their size, newest time) does."""
    if os.path.isdir(path):
        stats = [os.lstat(os.path.join(folder, file)) for folder, _, files in os.walk(path) for file in files]
        return [len(stats), sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0)]
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder") from None
    return [stat.st_size, stat.st_mtime_ns]


def up_to_date(out_dir, source):
    """Whether out_dir holds just what these arguments would make; UserError where it was made from others."""
    if not os.path.exists(f"{out_dir}/meta.json"):
        return False
    old = load_meta(out_dir)["source"]
    for key in source:
        if key != "inputs" and old.get(key) != source[key]:
            raise UserError(f"{out_dir} was prepared with --{key} {old.get(key)}, now it is {source[key]}: "
                            "give another --out_dir, or --force to replace it")
    for path in source["inputs"]:
        if old["inputs"].get(path) != source["inputs"][path]:
            raise UserError(f"{path} has changed since {out_dir} was prepared: --force prepares it again")
    return True


def check_skipped(out_dir, skipped, kind, total, allow_missing):
    """Writes skipped.txt, a line `kind<TAB>what` each; more than 1 % of the pictures or captions is a UserError."""
    if skipped:
        with atomic_write(f"{out_dir}/skipped.txt") as file:
            file.write("".join(f"{kind}\t{what}\n" for kind, what in skipped).encode("utf-8", "replace"))
    bad = [what for k, what in skipped if k == kind]
    if len(bad) > 0.01 * total and not allow_missing:
        raise UserError(f"{len(bad):,} of {total:,} {kind}s can't be used (more than 1 %), the first: {bad[0]};"
                        f" all are in {out_dir}/skipped.txt; --allow_missing goes on without them")


def prepare(args):
    """From pictures and captions to a prepared folder; prints what it made."""
    began, skipped, unknown = time.monotonic(), [], []
    keys = "images", "captions", "split_files", "image_size", "vocab_size", "tokenizer", "keep_used"
    source = {key: getattr(args, key) for key in keys}
    files = [args.images, *(re.sub("^(train|val|test)=", "", file) for file in args.captions)]
    files += (args.split_files or []) + ([args.tokenizer] if os.path.exists(args.tokenizer) else [])
    # What was downloaded stays as it is, and the archive may be deleted.
    source["inputs"] = {} if args.url else {file: signature(file) for file in files}
    if not args.force and up_to_date(args.out_dir, source):
        print(f"{args.out_dir} is prepared already, from the same: nothing to do (--force does it again)")
        return
    if own := {os.path.realpath(path) for path in written_files(args.out_dir)} & {os.path.realpath(file) for file in files}:
        raise UserError(f"{own.pop()} is read, but preparing would overwrite it: give another --out_dir")
    os.makedirs(args.out_dir, exist_ok=True)
    lock = exclusive(args.out_dir)  # noqa: F841: held until this function ends
    if args.url:
        os.makedirs(os.path.dirname(args.images), exist_ok=True)
        token = os.environ.get("HF_TOKEN") if args.url.startswith(f"{common.HUB}/") else None
        for path in (*args.captions, args.images):
            download(f"{args.url.rstrip('/')}/{os.path.basename(path)}", path, token)
    known = read_tokenizer(args.tokenizer)

    # captions, by the names that their files use
    captions, splits = read_all_captions(args.captions, skipped)
    n_captions = sum(map(len, captions.values())) + len(skipped)
    if args.url and Counter(splits.values()) != FLICKR30K:
        raise UserError(f"{args.captions[0]}: expected Karpathy's split, {FLICKR30K}, found "
                        f"{dict(Counter(splits.values()))}: delete the file to download it anew")
    if args.split_files:
        splits, unknown = read_split_files(args.split_files, captions)
        skipped += [("picture", f"{id}: in the list, but has no captions") for id in unknown]
    elif any(splits.values()) and None in splits.values():
        name = next(name for name in splits if splits[name] is None)
        raise UserError(f"{name} has no split where others have one: give --split_files, or --captions train=FILE")

    # pictures: their places in the source, in the captions' order
    entries = list_images(args.images)
    found, texts, split_of = match(captions, entries), defaultdict(list), {}
    for name, split in splits.items():
        path = found.get(name)
        for text in captions[name]:
            if not text.strip():
                skipped.append(("caption", f"{name}: empty"))
            elif path is None:
                skipped.append(("caption", f"{name}: no such picture in {args.images}: {text}"))
            else:
                texts[path].append(text)
                split = split or hashed_split(path)
                if split_of.setdefault(path, split) != split:
                    raise UserError(f"{path} is in two splits, {split_of[path]} and {split}, under two names")
    pictures = {split: [path for path in texts if split_of[path] == split] for split in SPLITS}
    pictures = {split: paths for split, paths in pictures.items() if paths}
    if "train" not in pictures:
        raise UserError(f"nothing to train on: of {len(captions):,} names in the captions (such as "
                        f"{next(iter(captions), '')}) {len(texts):,} are among the {len(entries):,} files in "
                        f"{args.images} (such as {next(iter(entries), '')}), and none of those in train")
    check_skipped(args.out_dir, skipped, "caption", n_captions, args.allow_missing)
    clear(args.out_dir)
    errors = decode_all(args.images, entries, pictures, args.out_dir, args.image_size, args.workers)
    skipped += [("picture", f"{path}: {error}") for path, error in errors.items()]
    check_skipped(args.out_dir, skipped, "picture", len(texts) + len(unknown), args.allow_missing)

    # Names without folders, so that the same pictures packed differently are the same data, unless two would be one.
    bases = Counter(map(os.path.basename, texts))
    names = {path: os.path.basename(path) if bases[os.path.basename(path)] == 1 else path for path in texts}
    pictures = {split: [path for path in paths if path not in errors] for split, paths in pictures.items()}
    meta = write_texts(args.out_dir, {split: ([names[path] for path in paths], [texts[path] for path in paths])
                                      for split, paths in pictures.items() if paths},
                       args.image_size, args.tokenizer, known, args.vocab_size, source, args.keep_used)
    for split, n in meta["splits"].items():
        print(f"{split}: {n['images']:,} pictures, {n['captions']:,} captions, {n['tokens']:,} tokens, "
              f"at most {n['longest']} a caption")
    if "val" not in meta["splits"]:
        print("no split val, which training needs: give --split_files TRAIN VAL")
    lost = Counter(kind for kind, _ in skipped)
    unused = sum(1 for path in entries if EXTENSION.search(path) and path not in texts)
    print(f"{args.out_dir}: vocabulary {meta['vocab_size']:,}, {time.monotonic() - began:.0f} seconds; skipped "
          f"{lost['picture']:,} pictures and {lost['caption']:,} captions"
          + f" ({args.out_dir}/skipped.txt)" * bool(skipped)
          + f"; {len(captions) - len(splits):,} pictures with captions are in no list" * bool(args.split_files)
          + f"; {unused:,} pictures of {args.images} are without captions or in no list" * bool(unused))
    if args.delete_archive:
        os.remove(args.images)


def main():
    """The command: see the top of this file."""
    parser = Parser(description="Pictures and captions into the binaries that train.py reads.")
    add = parser.add_argument
    add("--images", help="folder, .zip or .tar(.gz) of pictures; without it Flickr30k is downloaded into data/flickr30k (4.4 GB)")
    add("--captions", nargs="+", metavar="FILE", help="caption files in any known format; train=FILE says its split")
    add("--split_files", nargs="+", metavar="LIST", help="lists of ids, TRAIN [VAL [TEST]]; else the captions' own "
        "splits, else 90/5/5 by a hash of the name")
    add("--out_dir", help="where to write (default: data/ and the name of --images)")
    add("--image_size", type=int, default=160, help="pixels a side (default: %(default)s)")
    add("--vocab_size", type=int, default=8192, help="at most so many tokens, EOT included (default: %(default)s)")
    add("--tokenizer", default="bpe", help="bpe (learned from train; default), gpt2, a prepared folder, a checkpoint, a "
        "language model's name on the hub (OWNER/NAME) or a folder with its tokenizer.json")
    add("--keep_used", action="store_true", help="of a tokenizer that is taken over, keep only the tokens that train's captions use")
    add("--workers", type=int, default=os.cpu_count(), help="processes that decode pictures (default: all cores)")
    add("--force", action="store_true", help="replace what is in out_dir: it is deleted before the new data are made")
    add("--allow_missing", action="store_true", help="go on where more than 1 %% of pictures or captions can't be used")
    add("--url", metavar="BASE", help=f"where to download Flickr30k from (default: {FLICKR30K_URL})")
    add("--delete_archive", action="store_true", help="delete the downloaded archive once all is prepared")
    args = parser.parse_args()
    check_ranges(args, image_size=(8, 4096), vocab_size=(257, 65536), workers=(1, 1024))
    if len(args.split_files or []) > 3:
        raise UserError(f"--split_files: expected TRAIN [VAL [TEST]], found {len(args.split_files)} files")
    if bool(args.images) != bool(args.captions):
        raise UserError("expected both --images and --captions, or neither to download Flickr30k")
    if args.images:
        if args.url or args.delete_archive:
            raise UserError("--url and --delete_archive are for the download of Flickr30k, without --images")
        args.out_dir = args.out_dir or f"data/{os.path.basename(os.path.abspath(args.images)).split('.')[0]}"
        if os.path.commonpath([within := os.path.realpath(args.images), os.path.realpath(args.out_dir)]) == within:
            raise UserError(f"--out_dir {args.out_dir} lies within --images {args.images}: give another")
    else:
        args.url, args.out_dir, place = args.url or FLICKR30K_URL, args.out_dir or "data/flickr30k", "data/flickr30k"
        if not re.match("https?://", args.url):
            raise UserError(f"--url {args.url}: expected http:// or https://")
        args.images, args.captions = f"{place}/flickr30k-images.zip", [f"{place}/flickr_annotations_30k.csv"]
    prepare(args)


if __name__ == "__main__":
    run(main)
