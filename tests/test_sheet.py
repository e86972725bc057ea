"""Tests of nanocaption/sheet.py: formats and their limits, fonts."""
import numpy as np
import pytest
from PIL import Image

from helpers import random_images
from nanocaption import sheet
from nanocaption.sheet import draw_sheet


def try_draw(path, n, text="a dog"):
    """Draws n images in one column; returns the text of an exception."""
    images = random_images(n, 8).numpy()
    try:
        draw_sheet(str(path), images, [text] * n, columns=1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name, n", [("s.webp", 75), ("s.jpg", 300)])
def test_a_sheet_that_is_too_tall_is_split(tmp_path, monkeypatch, name, n):
    assert try_draw(tmp_path / name, n) == ""
    heights = []
    for path in sorted(tmp_path.iterdir(), key=lambda path: len(path.name)):
        with Image.open(path) as image:
            assert image.width == 220
            heights.append(image.height)
    stem, extension = name.split(".")
    assert {path.name for path in tmp_path.iterdir()} == {name, f"{stem}-2.{extension}"}
    # a margin at the top, and a row for each image
    row = 200 + 16 + 12
    limit = {"webp": 16_383, "jpg": 65_500}[extension]
    fit = (limit - 10) // row
    assert heights == [10 + fit * row, 10 + (n - fit) * row]


def test_a_row_that_is_too_tall_is_an_error(tmp_path):
    error = try_draw(tmp_path / "s.webp", 1, "a\n" * 2000)
    assert error.startswith("UserError: ") and "32,228 pixels" in error and "16,373 fit" in error
    assert list(tmp_path.iterdir()) == []


def test_what_no_font_has_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sheet, "SYSTEM_FONTS", ("nowhere.ttf",), raising=False)
    assert try_draw(tmp_path / "s.png", 1, "a dog") == ""
    assert capsys.readouterr().err == ""
    assert try_draw(tmp_path / "s.png", 1, "a 犬 or собака") == ""
    assert "no font for 6 characters, such as а" in capsys.readouterr().err


def test_a_system_font_is_taken(tmp_path, monkeypatch, capsys):
    """A font that has all characters, here Pillow's own under another name."""
    first, few, own = [sheet.ImageFont.load_default(13) for _ in range(3)]
    fonts = {"few.ttf": few, "all.ttf": own}
    drawn = []

    def missing(font, characters):
        drawn.append(font)
        return {id(first): ["x", "y"], id(few): ["x"], id(own): []}[id(font)]

    monkeypatch.setattr(sheet, "SYSTEM_FONTS", ("none.ttf", *fonts, "not.ttf"), raising=False)
    monkeypatch.setattr(sheet, "missing_in", missing, raising=False)
    monkeypatch.setattr(sheet.ImageFont, "load_default", lambda size: first)
    monkeypatch.setattr(sheet.ImageFont, "truetype", lambda name, size: load(fonts, name))
    assert try_draw(tmp_path / "s.png", 1, "собака") == ""
    assert len(drawn) == 3 and drawn[-1] is own
    assert capsys.readouterr().err == ""


def load(fonts, name):
    """A font, or OSError like ImageFont.truetype."""
    if name not in fonts:
        raise OSError("cannot open resource")
    return fonts[name]


def test_images_and_texts_are_where_they_belong(tmp_path):
    images = np.zeros((3, 8, 8, 3), np.uint8)
    images[1] = 255
    draw_sheet(str(tmp_path / "s.png"), images, ["one", "two\nlines", ""], columns=2)
    with Image.open(tmp_path / "s.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (10 + 244 + 228, 430, 3)
    assert (pixels[10:210, 10:210] == 0).all()
    assert (pixels[10:210, 220:420] == 255).all()
    assert (pixels[254:454, 10:210] == 0).all()
    assert (pixels[212:228, 10:210] < 128).any()
    assert (pixels[228:244, 10:210] == 255).all()
    assert (pixels[228:244, 220:420] < 128).any()
