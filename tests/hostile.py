"""Damaged and hostile images, archives and caption files, for test_faults.py."""
import contextlib
import io
import json
import re
import struct
import tarfile
import warnings
import zipfile
import zlib

import numpy as np
from PIL import Image, PngImagePlugin

# -----------------------------------------------------------------------------
# images


def image_bytes(image, format, **options):
    """A PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def hostile_images(rng):
    """
    Yields (file name, bytes, expected): True if the image must be loaded, False if it must be
    refused, None if either is fine.
    """
    numpy_rng = np.random.default_rng(rng.randrange(2**32))
    noise = Image.fromarray(numpy_rng.integers(0, 256, (48, 64, 3), np.uint8))
    yield from odd_sizes(noise)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"
    yield "program.jpg", program, False
    yield from odd_modes(noise)
    yield from broken_metadata(noise, rng)
    yield from damaged_files(noise, rng)


def odd_sizes(noise):
    """Images that are extreme in size, or say that they are."""
    yield "one.png", image_bytes(noise.resize((1, 1)), "PNG"), True
    yield "tall.png", image_bytes(noise.resize((1, 20000)), "PNG"), True
    yield "wide.jpg", image_bytes(noise.resize((20000, 1)), "JPEG"), True
    yield "bomb.png", image_bytes(Image.new("1", (20000, 20000)), "PNG"), False
    # a header with another size, and the right checksum
    lies = bytearray(image_bytes(noise, "PNG"))
    lies[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    lies[29:33] = struct.pack(">I", zlib.crc32(lies[12:29]))
    yield "lies.png", bytes(lies), False


def odd_modes(noise):
    """Images in all of Pillow's modes, and animations."""
    jpeg = ("CMYK", "L", "YCbCr")
    png = ("1", "LA", "RGBA", "I;16")
    tiff = ("I", "F", "CMYK", "LAB", "HSV")
    for format, modes in dict(JPEG=jpeg, PNG=png, TIFF=tiff).items():
        for mode in modes:
            # some versions of Pillow can't write all of them
            with contextlib.suppress(OSError, ValueError, KeyError):
                if mode in ("I;16", "I", "F", "LAB"):
                    image = Image.new(mode, (64, 48))
                else:
                    image = noise.convert(mode)
                data = image_bytes(image, format)
                yield f"mode_{mode}.{format.lower()}", data, None if mode == "HSV" else True
    transparency = bytes(range(256))
    yield "palette.png", image_bytes(noise.convert("P"), "PNG", transparency=transparency), True
    frames = dict(save_all=True, append_images=[noise.rotate(90), noise])
    yield "animated.gif", image_bytes(noise, "GIF", **frames), True
    yield "animated.webp", image_bytes(noise, "WEBP", **frames), True


def broken_metadata(noise, rng):
    """Images with broken EXIF data or color profiles, or with megabytes of text."""
    for orientation in range(10):  # 1 to 8 are defined
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif{orientation}.jpg", image_bytes(noise, "JPEG", exif=exif), True
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(30):
        broken = bytearray(exif.tobytes() + rng.randbytes(40))
        for _ in range(5):
            broken[rng.randrange(6, len(broken))] = rng.randrange(256)
        yield f"exif_broken{i}.jpg", image_bytes(noise, "JPEG", exif=bytes(broken)), True
        profile = rng.randbytes(200)
        yield f"icc_broken{i}.jpg", image_bytes(noise, "JPEG", icc_profile=profile), True
    for name, n, size in (("text.png", 1, 500_000), ("texts.png", 80, 1_000_000)):
        text = PngImagePlugin.PngInfo()
        for i in range(n):
            text.add_text(f"comment{i}", "x" * size, zip=True)
        yield name, image_bytes(noise, "PNG", pnginfo=text), None


def damaged_files(noise, rng):
    """Files that are cut, have flipped bits, another extension or a tail, or are noise."""
    formats = {
        "jpg": image_bytes(noise, "JPEG"),
        "png": image_bytes(noise, "PNG"),
        "gif": image_bytes(noise.convert("P"), "GIF"),
        "webp": image_bytes(noise, "WEBP"),
        "bmp": image_bytes(noise, "BMP"),
        "tif": image_bytes(noise, "TIFF"),
    }
    for extension, data in formats.items():
        yield f"whole.{extension}", data, True
        for i in range(20):
            expected = False if i < 8 else None
            yield f"cut{i}.{extension}", data[:len(data) * i // 20], expected
        for i in range(45):
            broken = bytearray(data)
            for _ in range(rng.choice((1, 1, 10, 100))):
                flip_bit(broken, rng)
            yield f"flipped{i}.{extension}", bytes(broken), None
        other = "png" if extension == "jpg" else "jpg"
        yield f"wrong_{extension}.{other}", data, True
        yield f"tail.{extension}", data + rng.randbytes(1000), True
        yield f"noise.{extension}", rng.randbytes(2000), False


def flip_bit(data, rng):
    """Flips a random bit of a bytearray."""
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


# -----------------------------------------------------------------------------
# archives

N_IMAGES = 20  # good ones in each archive
BLUE = image_bytes(Image.new("RGB", (40, 40), "blue"), "JPEG")  # the good images
RED = image_bytes(Image.new("RGB", (40, 40), "red"), "JPEG")  # must never be taken for one
# file name: exit code of prepare_flickr.py, part of its message
ARCHIVES = {
    "climbs.zip": (0, ""),
    "absolute.zip": (0, ""),
    "double.zip": (0, ""),
    "rival.zip": (2, "p0.jpg may be"),
    "encrypted.zip": (2, "encrypted"),
    "bomb.zip": (2, "too large for an image"),
    "cut.zip": (2, "cut.zip"),
    "climbs.tar": (0, ""),
    "absolute.tar.gz": (0, ""),
    "links.tar": (2, "no such image"),
    "double.tar": (0, ""),
    "bomb.tar.gz": (2, "too large for an image"),
    "cut.tar.gz": (2, "cut.tar.gz"),
    "cut.tar": (2, "cut.tar"),
    "noise.zip": (2, "noise.zip"),
}


def captioned_names(name):
    """The images that the caption file of an archive names: the good ones and the bad."""
    kind = name.split(".")[0]
    n = N_IMAGES + {"bomb": 1, "links": 2}.get(kind, 0)
    return [f"p{i}.jpg" for i in range(n)]


def write_archive(path, outside, rng):
    """Writes an archive of ARCHIVES. outside: a folder that none of its files must appear in."""
    kind = path.name.split(".")[0]
    members = [(f"in/p{i}.jpg", BLUE) for i in range(N_IMAGES)]
    if kind == "climbs":
        members.append(("../../up.jpg", RED))
    elif kind == "absolute":
        members.append((f"{outside}/absolute.jpg", RED))
    elif kind == "double":
        members.append(("in/p0.jpg", RED))
    elif kind == "rival":
        members.append(("else/p0.jpg", RED))
    elif kind == "bomb":
        members.append((f"in/p{N_IMAGES}.jpg", bytes(300 << 20)))

    if path.suffix == ".zip":
        write_zip(path, members)
    else:
        write_tar(path, members, with_links=kind == "links")
    data = path.read_bytes()
    if kind == "encrypted":
        data = set_encrypted(data)
    elif kind == "noise":
        data = rng.randbytes(3000)
    elif kind == "cut":
        length = {".zip": len(data) - 100, ".gz": len(data) - 50, ".tar": 9000}[path.suffix]
        data = data[:length]
    path.write_bytes(data)


def write_zip(path, members):
    """Writes a zip of (name, bytes)."""
    with warnings.catch_warnings(action="ignore"):  # of names that occur twice
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members:
                archive.writestr(name, data)


def write_tar(path, members, with_links):
    """Writes a tar of (name, bytes), and of links to files outside of it."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        if with_links:
            add_link(archive, f"in/p{N_IMAGES}.jpg", "/etc/passwd", tarfile.SYMTYPE)
            add_link(archive, f"in/p{N_IMAGES + 1}.jpg", "/etc/passwd", tarfile.LNKTYPE)
            add_link(archive, "out", "/", tarfile.SYMTYPE)


def add_link(archive, name, target, kind):
    """Adds a symbolic or hard link to an open tar."""
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = target
    archive.addfile(info)


def set_encrypted(data):
    """Sets the flag "encrypted" of all files in a zip."""
    data = bytearray(data)
    for header, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for found in re.finditer(header, bytes(data)):
            data[found.start() + place] |= 1
    return bytes(data)


# -----------------------------------------------------------------------------
# caption files

def caption_files(rng):
    """
    Yields (format, text): the same 18 captions of 6 images in all formats. Each caption contains
    the name of its image, after "Zq".
    """
    stems = ["".join(rng.choice("0123456789abcdef") for _ in range(12)) for _ in range(6)]
    captions = {}
    for stem in stems:
        texts = [f'Zq{stem} runs, "{k}" times é Zq{stem}' for k in range(3)]
        captions[f"{stem}.jpg"] = texts
    yield "token", token_lines(captions)
    yield "csv", csv_lines(captions)
    yield "bars", bar_lines(captions)
    yield "raw csv", raw_csv_lines(captions)
    lines = [json.dumps({"image": name, "captions": texts}) for name, texts in captions.items()]
    yield "json lines", "".join(f"{line}\n" for line in lines)
    yield "names", json.dumps(captions, indent=1)
    yield "karpathy", karpathy(captions)
    yield "coco", coco(captions)


def token_lines(captions):
    """Flickr's .token; captions: {name: texts}."""
    lines = []
    for name, texts in captions.items():
        for k, text in enumerate(texts):
            lines.append(f"{name}#{k}\t{text}\n")
    return "".join(lines)


def csv_quote(text):
    """A quoted field of CSV."""
    return '"' + text.replace('"', '""') + '"'


def csv_lines(captions):
    """CSV with one caption per line."""
    lines = ["image,caption\n"]
    for name, texts in captions.items():
        lines += [f"{name},{csv_quote(text)}\n" for text in texts]
    return "".join(lines)


def bar_lines(captions):
    """Kaggle's results.csv."""
    lines = ["image_name| comment_number| comment\n"]
    for name, texts in captions.items():
        for k, text in enumerate(texts):
            lines.append(f"{name}| {k}| {text}\n")
    return "".join(lines)


def raw_csv_lines(captions):
    """The CSV of nlphuji/flickr30k, with a JSON list per line."""
    lines = ["raw,filename,split\n"]
    for name, texts in captions.items():
        lines.append(f"{csv_quote(json.dumps(texts))},{name},train\n")
    return "".join(lines)


def karpathy(captions):
    """Karpathy's JSON."""
    images = []
    for name, texts in captions.items():
        sentences = [{"raw": text} for text in texts]
        images.append({"filename": name, "split": "train", "sentences": sentences})
    return json.dumps({"images": images})


def coco(captions):
    """COCO's annotations."""
    images = []
    annotations = []
    for id, (name, texts) in enumerate(captions.items()):
        images.append({"id": id, "file_name": name})
        annotations += [{"image_id": id, "caption": text} for text in texts]
    return json.dumps({"images": images, "annotations": annotations})


def mangle(text, rng):
    """Breaks a caption file. Returns its bytes, and whether at most one line of it may be lost."""
    data = text.encode()
    lines = data.split(b"\n")
    i = rng.randrange(len(lines))
    kind = rng.choice(MANGLINGS)
    if kind == "cut file":
        return data[:rng.randrange(len(data))], False
    if kind == "other encoding":
        return text.encode(rng.choice(("utf-16", "utf-32", "latin-1", "utf-7"))), False
    if kind == "noise":
        return rng.randbytes(5000), False
    if kind == "nested":
        return rng.choice((b"[", b'{"a":')) * rng.choice((10, 100_000)), False
    if kind == "windows":
        return b"\xef\xbb\xbf" + b"\r\n".join(lines), True
    if kind == "shuffled":
        rng.shuffle(lines)
        return b"\n".join(lines), False

    if kind == "cut line":
        lines[i] = lines[i][:rng.randrange(len(lines[i]) + 1)]
    elif kind == "flipped bits":
        line = bytearray(lines[i] or b"x")
        for _ in range(rng.randint(1, 5)):
            flip_bit(line, rng)
        lines[i] = bytes(line)
    elif kind == "noise line":
        lines.insert(i, rng.randbytes(rng.randrange(200)).replace(b"\n", b""))
    elif kind == "long line":
        lines.insert(i, b"x" * 10_000_000)
    elif kind == "zeros":
        lines[i] += bytes(rng.randint(2, 101))
    elif kind == "other separator":
        old = rng.choice((b'"', b",", b"#", b"\t", b"|", b":", b"{"))
        lines[i] = lines[i].replace(old, rng.choice((b"", b'"', b"\xff", b"\t")))
    elif kind == "odd characters":
        odd = (b"\xed\xa0\x80", b"\\ud800", b"\xe2\x80\xa8", b"\x1a", b"\x0c", b"\x85", b'"' * 999)
        lines[i] += rng.choice(odd)
    return b"\n".join(lines), True


MANGLINGS = ("cut file", "other encoding", "noise", "nested", "windows", "shuffled", "cut line",
             "flipped bits", "noise line", "long line", "zeros", "other separator",
             "odd characters")
