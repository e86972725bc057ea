"""Contact sheets: images in a grid, each with its text below; and strips of attention maps."""
import contextlib
import math
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanocaption.cli import UserError, atomic_write
from nanocaption.images import FORMATS

MARGIN = 10
LINE = 16  # pixels from one line of text to the next
FONT_SIZE = 13
# on Linux, macOS and Windows, for what Pillow's own font lacks
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf", "Arial Unicode.ttf", "arial.ttf", "msyh.ttc", "Nirmala.ttf",
)
# matplotlib's color map, from low to high: its brightness rises evenly, so it works in gray too
VIRIDIS = np.array([
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
    (40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37),
])


def sheet_format(option, path):
    """The format of a path's extension. Raises UserError, naming the option, if it has none."""
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in FORMATS or name not in Image.SAVE:
        raise UserError(f"{option} {path}: expected an image file name, such as sheet.png")
    return name


def pick_font(texts):
    """The font that lacks the fewest of the texts' characters. Reports on stderr how many."""
    characters = sorted(c for c in set("".join(texts)) if c.isprintable())
    best = ImageFont.load_default(FONT_SIZE)
    missing = missing_in(best, characters)
    for name in SYSTEM_FONTS:
        if not missing:
            break
        # if it isn't installed
        with contextlib.suppress(OSError):
            font = ImageFont.truetype(name, FONT_SIZE)
            found = missing_in(font, characters)
            if len(found) < len(missing):
                best = font
                missing = found
    if missing:
        print(
            f"sheet: no font for {len(missing)} characters, such as {missing[0]}; "
            f"install one of {', '.join(SYSTEM_FONTS)}",
            file=sys.stderr,
        )
    return best


def missing_in(font, characters):
    """The characters that a font lacks: it draws them like one that no font has."""
    unknown = draw_character(font, "\U0010ffff")
    return [c for c in characters if draw_character(font, c) == unknown]


def draw_character(font, character):
    """The pixels of a character, as bytes."""
    image = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
    ImageDraw.Draw(image).text((FONT_SIZE, FONT_SIZE), character, 255, font)
    return image.tobytes()


def wrap(text, font, width):
    """Splits a text into lines of at most `width` pixels; wider words are broken up."""
    lines = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}" if line else word
            while font.getlength(line) > width:
                n = 1
                while font.getlength(line[:n + 1]) <= width:
                    n += 1
                lines.append(line[:n])
                line = line[n:]
        lines.append(line)
    return lines


def draw_sheet(path, images, texts, columns=4, size=200):
    """
    Writes a sheet to path, in the format of its extension. images: uint8 (S, S, 3) each, drawn
    with `size` pixels per side; texts: one str, of any number of lines, for each image. Returns
    the paths of the files written, see save_bands.
    """
    font = pick_font(texts)
    blocks = [wrap(text, font, size) for text in texts]
    columns = min(columns, len(blocks))
    width = columns * (size + MARGIN) + MARGIN
    bands = []
    for start in range(0, len(blocks), columns):
        row = range(start, min(start + columns, len(blocks)))
        height = size + LINE * max(len(blocks[i]) for i in row) + 12
        band = Image.new("RGB", (width, height), "white")
        for column, i in enumerate(row):
            x = MARGIN + column * (size + MARGIN)
            band.paste(resize(images[i], size), (x, 0))
            draw_text(band, (x, size + 2), blocks[i], font)
        bands.append(band)
    return save_bands(path, bands)


def draw_strips(path, images, texts, attention, columns=6, size=126):
    """
    Writes strips to path: each image's text, then the image and, for each word, the image with the
    word's attention over it. images, texts: see draw_sheet; attention: a list of (word, float
    (g, g)) for each image, as from caption_images. Returns the paths, see save_bands.
    """
    font = pick_font(texts)
    width = columns * (size + MARGIN) + MARGIN
    cell = size + LINE + 6
    bands = []
    for image, text, words in zip(images, texts, attention):
        heading = wrap(text, font, width - 2 * MARGIN)
        image = resize(image, size)
        tiles = [(image, "")]
        for word, weights in words:
            tiles.append((overlay(image, weights), wrap(word, font, size)[0]))
        top = LINE * len(heading) + 6
        n_rows = math.ceil(len(tiles) / columns)
        band = Image.new("RGB", (width, top + cell * n_rows + 2 * MARGIN), "white")
        draw_text(band, (MARGIN, 0), heading, font)
        for i, (tile, word) in enumerate(tiles):
            x = MARGIN + i % columns * (size + MARGIN)
            y = top + i // columns * cell
            band.paste(tile, (x, y))
            draw_text(band, (x, y + size + 2), [word], font)
        bands.append(band)
    return save_bands(path, bands)


def resize(image, size):
    """uint8 (S, S, 3) -> a PIL image of `size` pixels per side"""
    return Image.fromarray(np.asarray(image)).resize((size, size), Image.Resampling.BICUBIC)


def draw_text(image, place, lines, font):
    """Draws lines of text on a PIL image; place: (x, y) of the first one."""
    x, y = place
    draw = ImageDraw.Draw(image)
    for n, line in enumerate(lines):
        draw.text((x, y + LINE * n), line, "black", font)


def overlay(image, weights):
    """
    A PIL image with weights (g, g) over it, in viridis from 0 to the largest weight. The result is
    always brighter at the largest weight than where the weight is 0.
    """
    weights = Image.fromarray(np.float32(weights / weights.max()))
    weights = np.asarray(weights.resize(image.size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 1, len(VIRIDIS))
    colors = np.stack([np.interp(weights, stops, channel) for channel in VIRIDIS.T], axis=2)
    gray = np.asarray(image.convert("L"))[..., None]
    opacity = 0.6 + 0.25 * weights[..., None]
    return Image.fromarray(np.uint8(opacity * colors + (1 - opacity) * gray))


def save_bands(path, bands):
    """
    Writes bands, PIL images of the same width, to path, one below the other. What exceeds the
    maximum height goes to further files: sheet-2.png, ... Returns the paths.
    """
    format = sheet_format("sheet", path)
    limit = 16_383 if format == "WEBP" else 65_500  # JPEG's, for all others too
    parts = []  # the bands of each file
    total = limit
    for band in bands:
        if band.height + MARGIN > limit:
            raise UserError(f"{path}: an image and its texts need {band.height:,} pixels; at most "
                            f"{limit - MARGIN:,} fit in one file; draw fewer captions")
        if total + band.height + MARGIN > limit:
            parts.append([])
            total = MARGIN
        parts[-1].append(band)
        total += band.height

    os.makedirs(Path(path).parent, exist_ok=True)
    root, extension = os.path.splitext(path)
    paths = []
    for number, part in enumerate(parts, 1):
        height = sum(band.height for band in part) + MARGIN
        sheet = Image.new("RGB", (bands[0].width, height), "white")
        y = MARGIN
        for band in part:
            sheet.paste(band, (0, y))
            y += band.height
        paths.append(str(path) if number == 1 else f"{root}-{number}{extension}")
        with atomic_write(paths[-1]) as file:
            sheet.save(file, format)
    return paths
