"""Images: one loader for all scripts, and image files in folders and archives."""
import contextlib
import io
import itertools
import logging
import lzma
import multiprocessing
import os
import re
import signal
import struct
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
from PIL import Image, ImageOps

from nanocaption import download
from nanocaption.cli import UserError, show_progress

Image.init()
# without EPS, which runs code
SAFE_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in SAFE_FORMATS if name in Image.OPEN]
EXTENSION = re.compile(r"\.(jpe?g|png|gif|bmp|webp|tiff?|ppm|pgm|jp2|avif)$", re.IGNORECASE)
MAX_PIXELS = 64_000_000  # of an image that must be decoded at full size
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


def load_image(source, size):
    """
    An image as the model sees it: upright, RGB, transparency on white, squashed (never cropped) to
    a square. Returns uint8 (size, size, 3).

    source: a path, an http(s) URL, the bytes of a file, an open binary file, a PIL.Image or an
    array (see from_array). Raises UserError, which names the source, if it is not a readable image.
    """
    is_path = isinstance(source, (str, os.PathLike))
    name = source if is_path else getattr(source, "name", "image")
    if isinstance(source, str) and re.match("https?://", source):
        source = download.fetch_image(source)
        is_path = False
    if isinstance(source, bytes):
        source = io.BytesIO(source)
    try:
        if isinstance(source, np.ndarray):
            source = from_array(source)
        if isinstance(source, Image.Image):
            # a copy, because to_array may make it smaller
            return to_array(source.copy(), size)
        if is_path and os.path.exists(source) and not os.path.isfile(source):
            # a named pipe would block forever
            raise ValueError("a folder or a device, not a file")
        with warnings.catch_warnings(action="ignore"):
            with Image.open(source, formats=FORMATS) as image:
                return to_array(image, size)
    except Exception as error:
        # for damaged files, Pillow raises OSError, SyntaxError, struct.error, IndexError, ...; for
        # huge images, a DecompressionBombError
        raise UserError(f"{name}: not a readable image: {error_text(error)}") from None


def from_array(array):
    """An array (H, W) or (H, W, 1, 3 or 4), uint8 or float in 0..1, -> a PIL.Image."""
    is_float = array.dtype.kind == "f" and array.size and 0 <= array.min() <= array.max() <= 1
    has_channels = array.ndim == 3 and array.shape[2] in (1, 3, 4)
    if not (array.ndim == 2 or has_channels) or not (array.dtype == np.uint8 or is_float):
        raise ValueError(f"an array {array.dtype} {array.shape}; expected (H, W), (H, W, 3) or "
                         "(H, W, 4), of uint8 or of floats from 0 to 1")
    if is_float:
        array = (array * 255).round().astype(np.uint8)
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def to_array(image, size):
    """Decodes a PIL.Image that has just been opened; returns uint8 (size, size, 3)."""
    shape = (size, size)
    bicubic = Image.Resampling.BICUBIC
    can_decode_small = image.format == "JPEG" and "progression" not in image.info
    if image.width * image.height > MAX_PIXELS and not can_decode_small:
        raise ValueError(f"{image.width} x {image.height} pixels are too many; make it smaller")
    # large JPEGs decode faster at 1/2, 1/4 or 1/8 of their size, but never below `size`
    image.draft(None, shape)
    image.load()
    # damaged EXIF data can raise anything, but the image itself is fine
    with contextlib.suppress(Exception):
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16-bit gray: convert() would clip it instead of scaling it
        image = image.convert("I").resize(shape, bicubic)
        gray = np.asarray(image).clip(0, 65535) >> 8
        image = Image.fromarray(gray.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA").resize(shape, bicubic)
        white = Image.new("RGBA", shape, "white")
        image = Image.alpha_composite(white, image).convert("RGB")
    else:
        image = image.convert("RGB").resize(shape, bicubic)
    return np.array(image)


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

    An entry is what read_entry takes: a path in a folder, a ZipInfo in a zip, (offset, length) in a
    tar. It is None in a compressed tar, which can only be read from its beginning.
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
    """list_images of a folder."""
    entries = {}
    for folder, _, files in os.walk(source, onerror=raise_unreadable):
        for file in files:
            path = os.path.join(folder, file)
            name = os.path.relpath(path, source).replace(os.sep, "/")
            entries[name] = path
    return entries


def raise_unreadable(error):
    """Called by os.walk for a folder that can't be read."""
    raise UserError(f"{error.filename} can't be read: {error.strerror}")


def list_zip(source):
    """list_images of a zip."""
    entries = {}
    try:
        with zipfile.ZipFile(source) as archive:
            for info in archive.infolist():
                if not info.is_dir():
                    entries.setdefault(info.filename.removeprefix("./"), info)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as error:
        raise UserError(f"{source}: damaged zip: {error}") from None
    if any(info.flag_bits & 1 for info in entries.values()):
        raise UserError(f"{source}: the zip is encrypted; unpack it and pass the folder")
    return entries


def list_tar(source):
    """list_images of a tar."""
    entries = {}
    try:
        with tarfile.open(source) as archive:
            is_compressed = not isinstance(archive.fileobj, io.BufferedReader)
            for member in archive:
                if member.isfile():
                    entry = None if is_compressed else (member.offset_data, member.size)
                    entries.setdefault(member.name.removeprefix("./"), entry)
                # otherwise tarfile keeps all headers in memory
                archive.members = []
    except (
        tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OSError
    ) as error:
        raise UserError(f"{source}: not a folder, a zip or a complete tar: {error}") from None
    return entries


def read_entry(source, entry):
    """
    What load_image takes, for an entry of list_images(source) or for the bytes of a file. Raises
    UserError if the entry is damaged or too large.
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
        return entry
    with open(source, "rb") as archive:
        if isinstance(entry, tuple):
            archive.seek(offset)
            return archive.read(length)
        return read_zip_entry(source, archive, entry)


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

    is_compressed = None in entries.values()
    if is_compressed:
        stream = read_compressed_tar(source, set(target))
    else:
        stream = ((path, entries[path]) for path in target)
    # files of a compressed tar are passed to the workers in memory
    batch_size = 32 if is_compressed else 256
    errors = {}
    done = 0
    start = time.monotonic()
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        while True:
            batch = list(itertools.islice(stream, batch_size))
            if not batch:
                break
            tasks = [(source, entry, size, *target[path]) for path, entry in batch]
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


def read_compressed_tar(source, paths):
    """Yields (path, bytes) for these paths, in the tar's order, in one pass."""
    with tarfile.open(source, "r|*") as archive:
        for member in archive:
            path = member.name.removeprefix("./")
            if member.isfile() and path in paths:
                paths.remove(path)
                # one byte more than allowed, so that read_entry notices
                yield path, archive.extractfile(member).read(download.IMAGE_BYTES + 1)
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
    source, entry, size, path, row = task
    try:
        image = load_image(read_entry(source, entry), size)
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
