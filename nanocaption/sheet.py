"""A contact sheet: images in a grid, each with its text below."""
import contextlib
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


def sheet_format(path):
    """The format of a sheet's extension. Raises UserError if it can't be written."""
    name = Image.registered_extensions().get(Path(path).suffix.lower())
    if name not in FORMATS or name not in Image.SAVE:
        raise UserError(f"--sheet {path}: expected an image file name, such as sheet.png")
    return name


def pick_font(texts):
    """The font that has most of the texts' characters; says on stderr how many it lacks."""
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
    """Those of the characters that a font draws as it draws what no font has."""
    unknown = draw_character(font, "\U0010ffff")
    return [c for c in characters if draw_character(font, c) == unknown]


def draw_character(font, character):
    """The pixels of a character, as bytes."""
    image = Image.new("L", (3 * FONT_SIZE, 3 * FONT_SIZE))
    ImageDraw.Draw(image).text((FONT_SIZE, FONT_SIZE), character, 255, font)
    return image.tobytes()


def wrap(text, font, width):
    """Splits a text into lines of at most `width` pixels; words that are wider are cut."""
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
    with `size` pixels per side; texts: one str, of any number of lines, for each image.

    Rows beyond the format's largest height go to more files: sheet-2.png, ... Returns the paths.
    """
    format = sheet_format(path)
    limit = 16_383 if format == "WEBP" else 65_500
    font = pick_font(texts)
    blocks = [wrap(text, font, size) for text in texts]
    columns = min(columns, len(blocks))
    parts = [[]]  # the rows of each file
    total = MARGIN
    for start in range(0, len(blocks), columns):
        row = range(start, min(start + columns, len(blocks)))
        height = size + LINE * max(len(blocks[i]) for i in row) + 12
        if height + MARGIN > limit:
            raise UserError(
                f"--sheet {path}: the texts of an image need {height:,} pixels; at most "
                f"{limit - MARGIN:,} fit into {format}; draw fewer captions"
            )
        if total + height > limit:
            parts.append([])
            total = MARGIN
        parts[-1].append((row, height))
        total += height

    os.makedirs(Path(path).parent, exist_ok=True)
    root, extension = os.path.splitext(path)
    paths = []
    for number, part in enumerate(parts, 1):
        paths.append(str(path) if number == 1 else f"{root}-{number}{extension}")
        sheet = draw_rows(part, images, blocks, font, size)
        with atomic_write(paths[-1]) as file:
            sheet.save(file, format)
    return paths


def draw_rows(rows, images, blocks, font, size):
    """A PIL.Image of some rows, (indices of images, height) each."""
    width = max(len(row) for row, _ in rows) * (size + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, sum(height for _, height in rows) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for row, height in rows:
        x = MARGIN
        for i in row:
            image = Image.fromarray(np.asarray(images[i]))
            sheet.paste(image.resize((size, size), Image.Resampling.BICUBIC), (x, y))
            for n, line in enumerate(blocks[i]):
                draw.text((x, y + size + 2 + LINE * n), line, "black", font)
            x += size + MARGIN
        y += height
    return sheet
