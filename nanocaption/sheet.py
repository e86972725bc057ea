"""A contact sheet: images in a grid, each with its text below; and strips of attention maps."""
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nanocaption.cli import atomic_write

MARGIN = 10
LINE = 16  # pixels from one line of text to the next
# matplotlib's color map, from low to high: its brightness rises evenly, so it works in gray too
VIRIDIS = np.array([
    (68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140),
    (40, 174, 128), (94, 201, 98), (173, 220, 48), (253, 231, 37),
])


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
    save_image(path, sheet)


def draw_strips(path, images, texts, attention, columns=6, size=126):
    """
    Writes strips to path: each image's text, then the image and, for each word, the image with the
    word's attention over it. images, texts: see draw_sheet; attention: a list of (word, float
    (g, g)) for each image, as from caption_images.
    """
    font = ImageFont.load_default(13)
    width = columns * (size + MARGIN) + MARGIN
    headings = [wrap(text, font, width - 2 * MARGIN) for text in texts]
    cell = size + LINE + 6
    height = MARGIN
    for heading, words in zip(headings, attention):
        n_rows = -(-(1 + len(words)) // columns)
        height += LINE * len(heading) + 6 + cell * n_rows + 2 * MARGIN
    strips = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strips)
    y = MARGIN
    for image, heading, words in zip(images, headings, attention):
        draw.multiline_text((MARGIN, y), "\n".join(heading), "black", font, spacing=2)
        y += LINE * len(heading) + 6
        small = Image.fromarray(np.asarray(image)).resize((size, size), Image.Resampling.BICUBIC)
        tiles = [(small, "")]
        for word, weights in words:
            tiles.append((overlay(small, weights), wrap(word, font, size)[0]))
        for i, (tile, word) in enumerate(tiles):
            x = MARGIN + i % columns * (size + MARGIN)
            strips.paste(tile, (x, y + i // columns * cell))
            draw.text((x, y + i // columns * cell + size + 2), word, "black", font)
        y += cell * (-(-len(tiles) // columns)) + 2 * MARGIN
    save_image(path, strips)


def overlay(image, weights):
    """
    A PIL image with weights (g, g) over it, in viridis from 0 to the largest weight. Where that
    is, the result is brighter than any pixel with weight 0, whatever the image.
    """
    weights = Image.fromarray(np.float32(weights / weights.max()))
    weights = np.asarray(weights.resize(image.size, Image.Resampling.BILINEAR))
    stops = np.linspace(0, 1, len(VIRIDIS))
    colors = np.stack([np.interp(weights, stops, channel) for channel in VIRIDIS.T], axis=2)
    gray = np.asarray(image.convert("L"))[..., None]
    opacity = 0.6 + 0.25 * weights[..., None]
    return Image.fromarray(np.uint8(opacity * colors + (1 - opacity) * gray))


def save_image(path, image):
    """Writes a PIL image to path, in the format of its extension."""
    os.makedirs(Path(path).parent, exist_ok=True)
    extension = Path(path).suffix.lower()
    with atomic_write(path) as file:
        image.save(file, Image.registered_extensions()[extension])
