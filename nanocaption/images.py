"""Images: one loader for all scripts, and image files in folders and archives."""
import contextlib
import importlib
import io
import itertools
import logging
import lzma
import multiprocessing
import os
import posixpath
import re
import signal
import stat
import struct
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageOps

from nanocaption import download
from nanocaption.cli import UserError, one_line, show_progress

Image.preinit()  # BMP, GIF, JPEG, PNG, PPM; Image.init() would load every format there is
for plugin in ("Avif", "Jpeg2K", "Tiff", "WebP"):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"PIL.{plugin}ImagePlugin")
# without EPS, which runs code
SAFE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in SAFE_FORMATS if name in Image.OPEN]
EXTENSION = re.compile(
    r"\.(jpe?g|jpe|jfif|mpo|a?png|gif|bmp|webp|tiff?|p[bfgnp]m|jp2|j2[ck]|jp[cfx]|avifs?|hei[cf])$",
    re.IGNORECASE,
)
MAX_PIXELS = 64_000_000  # of an image that must be decoded at full size
Image.MAX_IMAGE_PIXELS = None  # Pillow's limit doesn't know at what size an image is decoded
JPEG_END = b"\xff\xd9"
# otherwise Pillow prints warnings in addition to our messages
logging.getLogger("PIL").addHandler(logging.NullHandler())


def has_image_extension(name):
    """Whether a file name or path ends with .jpg, .png or the like."""
    return EXTENSION.search(name) is not None


def strip_extension(name):
    """A file name or path without its image extension, if it has one."""
    return EXTENSION.sub("", name)


def stem(path):
    """A path's file name without folder and image extension."""
    return strip_extension(path.rsplit("/", 1)[-1])


# ------------------------------------------------------------------------------------------------
# loading


def is_image(path):
    """Whether a file is an image, by its extension or else by its content."""
    if has_image_extension(path):
        return True
    # a named pipe would block forever
    if not os.path.isfile(path):
        return False
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS):
            return True
    except OSError:
        pass
    except Exception:
        # for a damaged image, Pillow can raise anything
        return True
    try:
        with open(path, "rb") as file:
            return is_heic(file.read(64))
    except OSError:
        return False


def is_heic(data):
    """Whether the first bytes of a file are those of HEIC, a format that Pillow lacks."""
    return data[4:8] == b"ftyp" and re.search(b"hei[cfmsx]|hev[cmsx]", data[8:64]) is not None


def load_image(source, size):
    """
    An image as the model sees it: upright, RGB, transparency on white, squashed (never cropped) to
    a square. Returns uint8 (size, size, 3).

    source: a path, an http(s) URL, the bytes of a file, an open binary file, a PIL.Image or an
    array (see from_array). Raises UserError, which names the source, if it is not a readable image.
    Prints a note on stderr if the end of a JPEG is missing.
    """
    is_path = isinstance(source, (str, os.PathLike))
    name = source if is_path else getattr(source, "name", "image")
    if isinstance(source, str) and download.is_url(source):
        source = download.fetch_image(source)
        is_path = False
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        if isinstance(source, np.ndarray):
            source = from_array(source)
        if isinstance(source, Image.Image):
            # a copy, because to_array changes it in place
            return to_array(source.copy(), size)
        if is_path and os.path.exists(source) and not os.path.isfile(source):
            # a named pipe would block forever
            raise ValueError("a folder or a device, not a file")
        opened = open(source, "rb") if is_path else contextlib.nullcontext(source)
        with opened as file, warnings.catch_warnings(action="ignore"):
            try:
                return decode(file, size)
            except Exception:
                file.seek(0)
                image = decode_damaged(file.read(download.IMAGE_BYTES), size, name)
                if image is None:
                    raise
                return image
    except Exception as error:
        # for damaged files, Pillow raises OSError, SyntaxError, struct.error, IndexError, ...
        raise UserError(f"{name}: not a readable image: {error_text(error)}") from None


def decode(file, size):
    """load_image of an open file; raises whatever Pillow does."""
    with Image.open(file, formats=FORMATS) as image:
        return to_array(image, size)


def decode_damaged(data, size, name):
    """load_image of bytes that Pillow refuses; None or an exception if they can't be decoded."""
    if data.startswith(b"\x89PNG"):
        return decode(io.BytesIO(without_metadata(data)), size)
    if data.startswith(b"\xff\xd8"):
        image = decode(io.BytesIO(data + JPEG_END), size)
        # what is missing becomes this gray
        if (image == 128).all(-1).mean() > 0.1:
            raise ValueError("the file is cut off; more than a tenth of the image is missing")
        print(one_line(f"{name}: the file is cut off; using what is there"), file=sys.stderr)
        return image
    if is_heic(data):
        raise ValueError("HEIC, which Pillow can't decode; convert it to JPEG")
    return None


def without_metadata(data):
    """
    A PNG without the chunks that its pixels don't need, which may be damaged or larger than Pillow
    accepts. Transparency and orientation are kept.
    """
    kept = [data[:8]]
    start = 8
    while start + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, start)
        end = start + 12 + length
        chunk = data[start:end]
        is_sound = zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        # an upper-case first letter marks chunks that no decoder may skip
        if kind[:1].isupper() or (kind in (b"tRNS", b"eXIf") and is_sound):
            kept.append(chunk)
        start = end
    return b"".join(kept)


def from_array(array):
    """An array (H, W) or (H, W, C), C 1, 3 or 4, uint8 or float in 0..1 -> a PIL.Image."""
    is_float = array.dtype.kind == "f" and array.size and 0 <= array.min() <= array.max() <= 1
    has_channels = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if not (array.ndim == 2 or has_channels) or not (array.dtype == np.uint8 or is_float):
        raise ValueError(f"an array of {array.dtype} {array.shape}; expected (H, W), (H, W, 3) or "
                         "(H, W, 4), of uint8 or of floats from 0 to 1")
    if is_float:
        array = (array * 255).round().astype(np.uint8)
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def to_array(image, size):
    """Decodes a PIL.Image, if need be, and resizes it; returns uint8 (size, size, 3)."""
    shape = (size, size)
    bicubic = Image.Resampling.BICUBIC
    is_jpeg = image.format in ("JPEG", "MPO")
    can_decode_small = is_jpeg and "progression" not in image.info
    if image.width * image.height > MAX_PIXELS and not can_decode_small:
        raise ValueError(f"{image.width} x {image.height} pixels is too large; scale it down")
    # large JPEGs decode faster at 1/2, 1/4 or 1/8 of their size, but never below `size`
    image.draft(None, shape)
    image.load()
    white = white_value(image)
    # damaged EXIF data can raise anything, but the image itself is fine
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    if white:
        # convert("RGB") would clip it instead of scaling it
        if image.mode == "F":
            values = np.nan_to_num(np.asarray(image), posinf=white, neginf=0)
            image = Image.fromarray(values.clip(0, white))
        else:
            image = image.convert("I")
        gray = np.asarray(image.resize(shape, bicubic)) * (255 / white)
        image = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA").resize(shape, bicubic)
        background = Image.new("RGBA", shape, "white")
        image = Image.alpha_composite(background, image).convert("RGB")
    else:
        image = image.convert("RGB").resize(shape, bicubic)
    return np.array(image)


def white_value(image):
    """
    The value that means white in a gray image of more than 8 bits; None for other images. For 16
    bits, it is the type's largest value. For 32 bits, it is 1 (floats only) or 255, or the image's
    largest value if that is larger.
    """
    if image.mode.startswith("I;16"):
        # TIFF also has 12 bits
        bits = image.tag_v2[258][0] if image.format == "TIFF" else 16
        return 2**bits - 1
    if image.mode == "I" and image.format in ("PPM", "PNG"):
        return 2**16 - 1
    if image.mode not in ("I", "F"):
        return None
    values = np.asarray(image)
    high = values.max(initial=0, where=np.isfinite(values))
    if image.mode == "F" and high < 8:
        # some values may exceed 1 a little
        return max(1, high)
    return max(255, high)


def error_text(error):
    """An exception's message in one line, without the addresses of Python objects."""
    if getattr(error, "strerror", None):
        return error.strerror
    text = re.sub("<_io.*>", "", str(error))
    return " ".join(text.split()) or type(error).__name__


# ------------------------------------------------------------------------------------------------
# folders and archives


def list_images(source):
    """
    The files in a folder, .zip or .tar(.gz): {path inside source: entry}, sorted, without macOS's
    __MACOSX/ and ._* files.

    An entry is what read_entry takes: in a folder a path, in a zip a ZipInfo, in a tar (offset,
    length). In a compressed tar, it is (None, name), for read_compressed_tar.
    """
    if os.path.isdir(source):
        entries = list_folder(source)
    elif not os.path.exists(source):
        raise UserError(f"{source}: no such file or folder")
    elif zipfile.is_zipfile(source):
        entries = list_zip(source)
    else:
        entries = list_tar(source)
    result = {}
    for path in sorted(entries):
        if not re.search(r"(^|/)(__MACOSX/|\._)", path):
            result[path] = entries[path]
    return result


def list_folder(source):
    """list_images of a folder. Follows links to folders, but enters no folder twice."""
    entries = {}
    seen = set()
    starts = [source]
    for start in starts:
        for folder, subfolders, files in os.walk(start, onerror=raise_unreadable):
            real = os.path.realpath(folder)
            if real in seen:
                subfolders.clear()
                continue
            seen.add(real)
            prefix = os.path.relpath(folder, source).replace(os.sep, "/") + "/"
            for file in files:
                entries[prefix.removeprefix("./") + file] = os.path.join(folder, file)
            for subfolder in sorted(subfolders):
                path = os.path.join(folder, subfolder)
                if os.path.islink(path):
                    # a link to a folder that contains it would list that folder's other files
                    target = os.path.join(os.path.realpath(path), "")
                    if not os.path.join(real, "").startswith(target):
                        starts.append(path)
    return entries


def raise_unreadable(error):
    """Called by os.walk for a folder that can't be read."""
    raise UserError(f"{error.filename} can't be read: {error.strerror}")


def list_zip(source):
    """list_images of a zip."""
    entries = {}
    links = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                path = zip_name(info).removeprefix("./")
                is_link = stat.S_ISLNK(info.external_attr >> 16) and info.file_size < 4096
                if is_link and not info.flag_bits & 1:
                    target = archive.read(info).decode(errors="replace")
                    links.setdefault(path, posixpath.join(posixpath.dirname(path), target))
                elif not info.is_dir():
                    entries.setdefault(path, info)
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError,
        OSError
    ) as error:
        raise UserError(f"{source}: damaged zip: {error}") from None
    if any(info.flag_bits & 1 for info in entries.values()):
        raise UserError(f"{source}: the zip is encrypted; unpack it and pass the folder")
    return resolve_links(links, entries) | entries


def zip_name(info):
    """A file's name in a zip. Many programs write UTF-8 without the flag that says so."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def list_tar(source):
    """list_images of a tar."""
    entries = {}
    links = {}
    try:
        with tarfile.open(source) as archive:
            is_stream = not isinstance(archive.fileobj, io.BufferedReader)
            for member in archive:
                path = member.name.removeprefix("./")
                if member.isfile():
                    entry = (None, path) if is_stream else (member.offset_data, member.size)
                    entries.setdefault(path, entry)
                elif member.issym():
                    target = posixpath.join(posixpath.dirname(path), member.linkname)
                    links.setdefault(path, target)
                elif member.islnk():
                    links.setdefault(path, member.linkname)
                # otherwise tarfile keeps all headers in memory
                archive.members = []
    except (
        tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OSError
    ) as error:
        raise UserError(f"{source}: not a folder, a zip or a complete tar: {error}") from None
    return resolve_links(links, entries) | entries


def resolve_links(links, entries):
    """{path: entry} of links, {path: target}, that lead to one of the entries."""
    found = {}
    for path, target in links.items():
        # a link may lead to another link; after so many, it must be a loop
        for _ in range(40):
            target = posixpath.normpath(target)
            if target in entries:
                found[path] = entries[target]
                break
            target = links.get(target, target)
    return found


def is_compressed(entries):
    """Whether list_images' entries are those of a compressed tar."""
    return any(isinstance(entry, tuple) and entry[0] is None for entry in entries.values())


def read_entry(source, entry, name):
    """
    An entry of list_images(source), or the bytes of a file -> what load_image takes: a path, or an
    open file with this name. Raises UserError if the entry is damaged or too large.
    """
    if isinstance(entry, str):
        return entry
    if isinstance(entry, bytes):
        length = len(entry)
    elif isinstance(entry, tuple):
        offset, length = entry
    else:
        length = entry.file_size
    if length > download.IMAGE_BYTES:
        raise UserError(f"more than {download.IMAGE_BYTES >> 20} MB, too large for an image")
    if isinstance(entry, bytes):
        data = entry
    else:
        with open(source, "rb") as archive:
            if isinstance(entry, tuple):
                archive.seek(offset)
                data = archive.read(length)
            else:
                data = read_zip_entry(source, archive, entry)
    file = io.BytesIO(data)
    file.name = name  # for messages
    return file


def same_bytes(source, entries):
    """Whether these entries of list_images(source) hold the same bytes; False if unknown."""
    first = None
    for entry in entries:
        if isinstance(entry, tuple) and entry[0] is None:
            return False
        try:
            file = read_entry(source, entry, "")
            if isinstance(file, str):
                file = open(file, "rb")
            with file:
                data = file.read()
        except (UserError, OSError):
            return False
        first = data if first is None else first
        if data != first:
            return False
    return True


def read_zip_entry(source, archive, entry):
    """The bytes of one file in an open zip, without reading the zip's directory again."""
    try:
        # the lengths of the name and the extra field, which precede the data
        archive.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", archive.read(4))
        archive.seek(name_length + extra_length, os.SEEK_CUR)
        with zipfile.ZipExtFile(archive, "r", entry) as file:
            return file.read(entry.file_size)
    except (
        zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, ValueError,
        NotImplementedError
    ) as error:
        raise UserError(f"{entry.filename}: damaged in {source}: {error}") from None


# ------------------------------------------------------------------------------------------------
# writing SPLIT_images.bin


def write_images(source, entries, images, out_dir, size, workers):
    """
    Decodes images into SPLIT_images.bin, uint8 (N, size, size, 3), in `workers` processes.

    entries: list_images(source). images: {split: [path inside source, ...]}, in the order of the
    rows. Returns {path: error} for images that can't be read; they get no row.
    """
    target = {}  # path inside source -> (file, row)
    for split, paths in images.items():
        file = f"{out_dir}/{split}_images.bin"
        with open(file, "wb"):
            pass  # created empty; the workers write to it
        for row, path in enumerate(paths):
            target[path] = (file, row)

    if is_compressed(entries):
        stream = read_compressed_tar(source, {path: entries[path][1] for path in target})
        batch_size = 32  # holds whole files in memory
    else:
        stream = ((path, entries[path]) for path in target)
        batch_size = 256
    if sys.platform == "win32":
        # the most that Windows can wait for
        workers = min(workers, 61)
    errors = {}
    done = 0
    start = time.monotonic()
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        while True:
            batch = list(itertools.islice(stream, batch_size))
            if not batch:
                break
            tasks = [(source, entry, path, size, *target[path]) for path, entry in batch]
            try:
                results = list(pool.map(write_image, tasks, chunksize=4))
            except BrokenProcessPool:
                raise OSError(
                    "a worker process was killed (out of memory?); try --workers 1"
                ) from None
            for (path, _), error in zip(batch, results):
                if error:
                    errors[path] = error
            done += len(batch)
            show_progress("images", done, len(target), start)

    for split, paths in images.items():
        rows = [row for row, path in enumerate(paths) if path not in errors]
        keep_rows(f"{out_dir}/{split}_images.bin", rows, size * size * 3)
    return errors


def read_compressed_tar(source, names):
    """Yields (path, bytes) for names, {path: name in the tar}, in the tar's order, in one pass."""
    paths = defaultdict(list)
    for path, name in names.items():
        paths[name].append(path)
    with tarfile.open(source, "r|*") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and name in paths:
                # one byte more than allowed, so that read_entry notices
                data = archive.extractfile(member).read(download.IMAGE_BYTES + 1)
                for path in paths.pop(name):
                    yield path, data
            archive.members = []


def start_worker():
    """Runs first in each worker process."""
    # the parent handles Ctrl-C; here it would only print a traceback
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # no worker survives a parent that was killed
    threading.Thread(target=exit_with_parent, daemon=True).start()


def exit_with_parent():
    """Waits for the parent process to end, then ends this one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def write_image(task):
    """In a worker: decodes one image into its row of a file. Returns the error's text, or None."""
    source, entry, name, size, path, row = task
    try:
        image = load_image(read_entry(source, entry, name), size)
    except UserError as error:
        return str(error)
    with open(path, "r+b") as file:
        file.seek(row * image.nbytes)
        file.write(image)
    return None


def keep_rows(path, rows, row_bytes):
    """Removes all rows but these (ascending) from a file of equally long rows."""
    with open(path, "r+b") as file:
        for new, old in enumerate(rows):
            if new != old:
                file.seek(old * row_bytes)
                row = file.read(row_bytes)
                file.seek(new * row_bytes)
                file.write(row)
        file.truncate(len(rows) * row_bytes)
