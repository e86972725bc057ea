"""Tests of nanocaption/images.py: color modes, odd and broken images."""
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanocaption import images
from nanocaption.cli import UserError
from nanocaption.images import load_image

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
    with pytest.raises(UserError, match="too many"):
        load_image(as_bytes(random_image(0, (200, 200)), "PNG"), 8)
    # a JPEG is decoded at reduced size and may have more
    assert load_image(jpeg, 8).shape == (8, 8, 3)
