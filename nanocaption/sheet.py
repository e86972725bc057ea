"""A contact sheet: images in a grid, each with its text below."""
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanocaption.cli import atomic_write

MARGIN = 10
LINE = 16  # pixels from one line of text to the next


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
    """
    font = ImageFont.load_default(13)
    blocks = [wrap(text, font, size) for text in texts]
    columns = min(columns, len(blocks))
    rows = []
    for start in range(0, len(blocks), columns):
        rows.append(range(start, min(start + columns, len(blocks))))
    heights = [size + LINE * max(len(blocks[i]) for i in row) + 12 for row in rows]
    width = columns * (size + MARGIN) + MARGIN
    sheet = Image.new("RGB", (width, sum(heights) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    y = MARGIN
    for row, height in zip(rows, heights):
        x = MARGIN
        for i in row:
            image = Image.fromarray(np.asarray(images[i]))
            sheet.paste(image.resize((size, size), Image.Resampling.BICUBIC), (x, y))
            draw.multiline_text((x, y + size + 2), "\n".join(blocks[i]), "black", font, spacing=2)
            x += size + MARGIN
        y += height
    os.makedirs(Path(path).parent, exist_ok=True)
    extension = Path(path).suffix.lower()
    with atomic_write(path) as file:
        sheet.save(file, Image.registered_extensions()[extension])
