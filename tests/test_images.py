"""Tests of nanocaption/images.py: color modes, odd and broken images."""
import io
import os
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nanocaption import images
from nanocaption.cli import UserError
from nanocaption.images import list_images, load_image

RED = (255, 0, 0)
BLUE = (0, 0, 255)
WHITE = (255, 255, 255)
BLACK = (0, 0, 0)


def random_image(seed, size=(48, 32)):
    """A PIL.Image of noise."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8))


def as_bytes(image, format="PNG", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def try_load(source, size):
    """load_image's array, or the text of its error."""
    try:
        return load_image(source, size)
    except UserError as error:
        return str(error)


def two_halves(mode="RGB", left=RED, right=BLUE, size=(40, 20)):
    """An image whose halves have different colors."""
    image = Image.new(mode, size, right)
    image.paste(left, (0, 0, size[0] // 2, size[1]))
    return image


@pytest.mark.parametrize("image, format, left, right", [
    (two_halves(), "PNG", RED, BLUE),  # squashed, not cropped
    (two_halves("RGBA", (255, 0, 0, 0), (0, 0, 255, 255)), "PNG", WHITE, BLUE),
    (two_halves("LA", (0, 0), (90, 255)), "PNG", WHITE, (90, 90, 90)),
    (two_halves("L", 10, 200), "PNG", (10, 10, 10), (200, 200, 200)),
    (two_halves("1", 0, 1), "PNG", BLACK, WHITE),
    (two_halves("I;16", 0, 51 * 256), "PNG", BLACK, (51, 51, 51)),
    (two_halves("CMYK", (0, 0, 0, 255), (0, 0, 0, 0)), "TIFF", BLACK, WHITE),
    (two_halves("F", 0.0, 77.0), "TIFF", BLACK, (77, 77, 77)),
    (two_halves("F", 0.0, 0.2), "TIFF", BLACK, (51, 51, 51)),
    (two_halves("F", float("nan"), 1.0), "TIFF", BLACK, WHITE),
    (two_halves("F", -1.0, 5e4), "TIFF", BLACK, WHITE),
    (two_halves("I", 0, 77), "TIFF", BLACK, (77, 77, 77)),
    (two_halves("I", 0, 100_000), "TIFF", BLACK, WHITE),
    # 16 bits, by its type
    (two_halves("I", 257, 51 * 257), "PPM", (1, 1, 1), (51, 51, 51)),
])
def test_modes(image, format, left, right):
    array = load_image(as_bytes(image, format), 20)
    assert array.shape == (20, 20, 3) and array.dtype == np.uint8
    assert (array[:, :7] == left).all()
    assert (array[:, 13:] == right).all()


def test_palette_with_transparency():
    image = two_halves().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    transparent = image.getpixel((0, 0))
    array = load_image(as_bytes(image, "PNG", transparency=transparent), 20)
    assert (array[:, :7] == WHITE).all()
    assert (array[:, 13:] == BLUE).all()


def test_the_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime")]
    data = as_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (load_image(data, 4) == RED).all()


def test_exif_rotation_is_applied_and_broken_exif_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise: the left half becomes the top
    array = load_image(as_bytes(two_halves(), "PNG", exif=exif), 20)
    assert (array[:7] == RED).all()
    assert (array[13:] == BLUE).all()
    broken = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12"
    array = load_image(as_bytes(two_halves(), "JPEG", exif=broken), 20)
    assert array[10, 2, 0] > 200


def test_a_large_jpeg_is_decoded_at_reduced_size_but_well():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    image = image.resize((1600, 1200), Image.Resampling.BICUBIC)
    data = as_bytes(image, "JPEG", quality=95)
    exact = Image.open(io.BytesIO(data)).resize((160, 160), Image.Resampling.LANCZOS)
    error = load_image(data, 160) - np.asarray(exact).astype(float)
    assert np.abs(error).mean() < 1


def test_unreadable_images_are_one_line(tmp_path, monkeypatch):
    jpeg = as_bytes(random_image(0, (200, 200)), "JPEG")
    (tmp_path / "cut.jpg").write_bytes(jpeg[:len(jpeg) // 2])
    (tmp_path / "text.jpg").write_text("not an image\n")
    files = [tmp_path / "cut.jpg", tmp_path / "text.jpg", tmp_path / "none.jpg", tmp_path]
    for source in (*files, b"", io.BytesIO(b"x")):
        with pytest.raises(UserError, match="not a readable image: .") as error:
            load_image(source, 8)
        assert "\n" not in str(error.value)
        if isinstance(source, Path):
            assert str(error.value).startswith(str(source))
    monkeypatch.setattr(images, "MAX_PIXELS", 100)
    with pytest.raises(UserError, match="too large"):
        load_image(as_bytes(random_image(0, (200, 200)), "PNG"), 8)
    # a JPEG is decoded at reduced size and may have more
    assert load_image(jpeg, 8).shape == (8, 8, 3)


def test_a_tiff_with_12_bits():
    shorts = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (277, 1), (278, 1)]
    tags = [(tag, 3, 1, value) for tag, value in shorts]
    tags += [(273, 4, 1, 8), (279, 4, 1, 3)]  # where the pixels are, and how many bytes
    pixels = bytes([0x00, 0x0F, 0xFF, 0x00])  # 0 and 4095
    data = b"II*\0" + struct.pack("<I", 12) + pixels + struct.pack("<H", len(tags))
    for tag in sorted(tags):
        data += struct.pack("<HHII", *tag)
    array = load_image(data + bytes(4), 20)
    assert (array[:, :4] == BLACK).all() and (array[:, 16:] == WHITE).all()


# -----------------------------------------------------------------------------
# sound images in odd files

def png_chunks(data):
    """The chunks of a PNG, with lengths and checksums."""
    start = 8
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start:start + 4], "big")
        yield data[start:end]
        start = end


def with_wrong_checksum(data, kind):
    """A PNG in which the chunks of a kind have a wrong checksum."""
    chunks = []
    for chunk in png_chunks(data):
        if chunk[4:8] == kind:
            chunk = chunk[:-1] + bytes([chunk[-1] ^ 1])
        chunks.append(chunk)
    return data[:8] + b"".join(chunks)


def odd_pngs():
    """{name: PNG} of two_halves, rotated by EXIF data in one of them."""
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    late = PngImagePlugin.PngInfo()
    late.add_text("comment", "short")
    exif = Image.Exif()
    exif[0x0112] = 3  # by 180 degrees
    plain = as_bytes(two_halves(), pnginfo=late)
    *chunks, end = png_chunks(as_bytes(two_halves(), pnginfo=text))
    compressed = next(chunk for chunk in chunks if chunk[4:8] == b"zTXt")
    chunks.remove(compressed)
    return {
        "2 MB of text": as_bytes(two_halves(), pnginfo=text),
        "2 MB of text at the end": plain[:8] + b"".join([*chunks, compressed, end]),
        "2 MB profile": as_bytes(two_halves(), icc_profile=bytes(2_000_000)),
        "checksum of text": with_wrong_checksum(plain, b"tEXt"),
        "text and EXIF": as_bytes(two_halves(left=BLUE, right=RED), pnginfo=text, exif=exif),
    }


@pytest.mark.parametrize("name", odd_pngs())
def test_metadata_does_not_make_a_png_unreadable(name):
    found = try_load(odd_pngs()[name], 20)
    assert not isinstance(found, str), found
    assert (found[:, :7] == RED).all() and (found[:, 13:] == BLUE).all()


def test_transparency_survives_damaged_metadata():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "short")
    image = two_halves("L", 0, 255)
    data = with_wrong_checksum(as_bytes(image, pnginfo=text, transparency=0), b"tEXt")
    found = try_load(data, 20)
    assert not isinstance(found, str), found
    assert (found == WHITE).all()


def test_wrong_pixels_are_still_refused():
    data = with_wrong_checksum(as_bytes(random_image(0)), b"IHDR")
    assert "not a readable image" in try_load(data, 8)
    data = as_bytes(random_image(0))
    assert "truncated" in try_load(data[:len(data) // 2], 8)


@pytest.mark.parametrize("image", [random_image(0, (90, 70)), two_halves(), two_halves("L", 0, 9)])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_is_decoded_with_a_note(tmp_path, capsys, image, progressive):
    data = as_bytes(image, "JPEG", progressive=progressive)
    path = tmp_path / "cut.jpg"
    path.write_bytes(data[:-2])
    found = try_load(path, 16)
    assert not isinstance(found, str), found
    assert np.array_equal(found, load_image(data, 16))
    assert capsys.readouterr().err == f"{path}: the file is cut off; using what is there\n"


def test_jpegs_of_any_size_are_decoded_small(monkeypatch):
    image = Image.new("L", (20_000, 10_000), 77)
    found = try_load(as_bytes(image, "JPEG"), 8)
    assert not isinstance(found, str), found
    assert (found == 77).all()
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    frames = dict(save_all=True, append_images=[random_image(1)])
    data = as_bytes(two_halves(size=(400, 200)), "MPO", **frames)
    assert Image.open(io.BytesIO(data)).format == "MPO"
    found = try_load(data, 8)
    assert not isinstance(found, str), found
    assert found.shape == (8, 8, 3)
    progressive = as_bytes(two_halves(size=(400, 200)), "JPEG", progressive=True)
    assert "400 x 200 pixels is too large" in try_load(progressive, 8)


@pytest.mark.parametrize("brands", [b"heic\0\0\0\0mif1heic", b"mif1\0\0\0\0mif1heic"])
def test_heic_is_named(brands):
    data = struct.pack(">I", 8 + len(brands)) + b"ftyp" + brands + bytes(100)
    found = try_load(data, 8)
    assert "HEIC" in found and "convert it to JPEG" in found


# -----------------------------------------------------------------------------
# folders and archives

def test_linked_folders_are_entered_once(tmp_path):
    outside = tmp_path / "outside"
    photos = tmp_path / "photos"
    for folder in (outside / "deep", photos / "own"):
        folder.mkdir(parents=True)
    (outside / "deep" / "1.jpg").write_bytes(b"1")
    (photos / "own" / "2.jpg").write_bytes(b"2")
    (tmp_path / "secret.jpg").write_bytes(b"3")
    (photos / "link").symlink_to(outside)
    (photos / "again").symlink_to(photos / "own")
    # loops
    (photos / "parent").symlink_to(tmp_path)
    (photos / "self").symlink_to(photos / "self")
    (outside / "back").symlink_to(photos)
    (outside / "deep" / "loop").symlink_to(outside)
    found = list_images(str(photos))
    assert {name for name in found if name.endswith(".jpg")} == {"link/deep/1.jpg", "own/2.jpg"}
    assert Path(found["link/deep/1.jpg"]).read_bytes() == b"1"


def add_links(archive, links):
    """Adds (name, target, type) to an open tar."""
    for name, target, kind in links:
        info = tarfile.TarInfo(name)
        info.type = kind
        info.linkname = target
        archive.addfile(info)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_in_a_tar(tmp_path, mode):
    path = tmp_path / "a.tar"
    photo = as_bytes(two_halves())
    with tarfile.open(path, mode) as archive:
        # a symbolic link may precede its target
        add_links(archive, [("./b/soft.png", "../a/1.png", tarfile.SYMTYPE)])
        info = tarfile.TarInfo("./a/1.png")
        info.size = len(photo)
        archive.addfile(info, io.BytesIO(photo))
        add_links(archive, [
            ("./b/hard.png", "./a/1.png", tarfile.LNKTYPE),
            ("./b/chain.png", "hard.png", tarfile.SYMTYPE),
            ("./b/outside.png", "../../a/1.png", tarfile.SYMTYPE),
            ("./b/absolute.png", "/a/1.png", tarfile.SYMTYPE),
            ("./b/loop.png", "loop.png", tarfile.SYMTYPE),
        ])
    entries = list_images(str(path))
    names = ["a/1.png", "b/chain.png", "b/hard.png", "b/soft.png"]
    assert list(entries) == names
    (tmp_path / "out").mkdir()
    errors = images.write_images(
        str(path), entries, {"train": names}, str(tmp_path / "out"), 8, workers=1
    )
    assert errors == {}
    rows = np.fromfile(tmp_path / "out" / "train_images.bin", np.uint8).reshape(4, 8, 8, 3)
    assert (rows == load_image(photo, 8)).all()


def test_links_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a/1.png", b"photo")
        for name, target in (("b/link.png", "../a/1.png"), ("b/out.png", "/etc/passwd")):
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o120777 << 16
            archive.writestr(info, target)
    entries = list_images(str(tmp_path / "a.zip"))
    assert list(entries) == ["a/1.png", "b/link.png"]
    assert entries["b/link.png"].filename == "a/1.png"


def test_names_in_a_zip_without_the_utf8_flag(tmp_path):
    path = tmp_path / "a.zip"
    names = ["Käse.jpg", "犬.jpg", "plain.jpg"]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    data = bytearray(path.read_bytes())
    for header, place in ((b"PK\3\4", 7), (b"PK\1\2", 9)):
        start = data.find(header)
        while start >= 0:
            data[start + place] &= ~8
            start = data.find(header, start + 1)
    path.write_bytes(data)
    assert list(list_images(str(path))) == sorted(names)
    # what is not UTF-8 stays code page 437
    path.write_bytes(data.replace("ä".encode(), b"\x84a"))
    assert list(list_images(str(path))) == sorted(["Käase.jpg", "犬.jpg", "plain.jpg"])


def test_windows_gets_at_most_61_workers(tmp_path, monkeypatch):
    asked = []

    class Pool:
        def __init__(self, workers, initializer):
            asked.append(workers)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(images, "ProcessPoolExecutor", Pool)
    for platform in ("win32", "linux"):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "platform", platform)
            images.write_images("none", {}, {"train": []}, str(tmp_path), 8, workers=100)
    assert asked == [61, 100]
    assert os.path.getsize(tmp_path / "train_images.bin") == 0
