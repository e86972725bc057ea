"""
Captions for pictures.

    python sample.py --image photo.jpg more_photos/           # by the captioner that comes along, out/flickr8k/best.pt
    python sample.py --image data/flickr8k --split val --limit 10 --sheet sheet.png --out_dir out/nano

From Python:

    from sample import load, caption
    captioner = load()
    print(caption(captioner, "photo.jpg"))
"""
# before what is slow to import: from here on Ctrl-C is answered in one line
from common import PUBLISHED, Parser, UserError, atomic_write, check_ranges, one_line, run

import itertools
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from bpe import make_tokenizer, text_to_ranks
from model import Captioner, ModelOptions
from prepare_flickr import EXTENSION, list_images, load_image, read_records, read_split

VERSION = 1  # of the checkpoint's layout


def pick_device(name="auto"):
    """ "auto" -> CUDA where there is one, else MPS, else the CPU. UserError for a name that torch doesn't know or have."""
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name} can't be used here ({str(e).splitlines()[0]}): take cpu, cuda or mps") from None


def read_checkpoint(path):
    """
    path: a checkpoint, or a folder that holds best.pt or last.pt -> the checkpoint's dict (tensors on the CPU).
    UserError where there is none, or what is there isn't a checkpoint of this program.
    """
    path = Path(path)
    if path.is_dir():
        path = next((path / name for name in ("best.pt", "last.pt") if (path / name).exists()), path / "best.pt")
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}: train one first (python train.py config/nano.py) or name its folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # torch raises many kinds for a file that isn't one, or holds more than weights
        raise UserError(f"{path} can't be read as a checkpoint ({type(e).__name__}: {' '.join(str(e).split())[:200]})") from None
    missing = {"model", "options", "tokenizer", "version"} - set(checkpoint if isinstance(checkpoint, dict) else ())
    if missing:
        raise UserError(f"{path} is no checkpoint of nanoCaption: {', '.join(sorted(missing))} missing")
    if checkpoint["version"] != VERSION:
        raise UserError(f"{path} has layout version {checkpoint['version']}, this program reads version {VERSION}")
    return checkpoint


def make_model(options, vocab_size, mean=(0.5,) * 3, std=(0.25,) * 3, ids=None, frozen_dtype=torch.float32):
    """A Captioner as train.py's Options ask for, on the CPU; ids and frozen_dtype: see pretrained.assemble."""
    if options.encoder or options.decoder:
        from pretrained import assemble
        return assemble(options, vocab_size, mean, std, ids, frozen_dtype)
    return Captioner(options, vocab_size, mean, std)


def frozen_names(model):
    """The parameters that training leaves as they came: a checkpoint doesn't hold them."""
    return {name for name, p in model.named_parameters() if not p.requires_grad}


def restore(model, state, frozen=None):
    """Loads a checkpoint's weights into a model that already has the frozen ones. UserError where they don't fit."""
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
        if unexpected or set(missing) - (frozen_names(model) if frozen is None else frozen):
            raise RuntimeError(f"{', '.join([*unexpected, *missing][:3])}")
    except RuntimeError as e:
        raise UserError(f"the checkpoint's weights don't fit its options: {' '.join(str(e).split())[:200]}") from None


def build(checkpoint):
    """A checkpoint's dict -> its Captioner, on the CPU, in eval mode, LoRA merged."""
    options = ModelOptions()
    for name, value in {**dict(encoder="", decoder="", freeze_encoder=False, lora_rank=0), **checkpoint["options"]}.items():
        setattr(options, name, value)
    if not options.freeze_encoder:  # then it is in the checkpoint, whole
        options.encoder = ""
    if not options.lora_rank:
        options.decoder = ""
    model = make_model(options, checkpoint.get("vocab_size") or len(checkpoint["model"]["wte.weight"]), ids=checkpoint["tokenizer"].get("ids"))
    restore(model, checkpoint["model"])
    if options.lora_rank:
        from pretrained import merge_lora
        merge_lora(model)
    return model.eval()


def load(path=PUBLISHED, device="auto"):
    """
    path: a checkpoint or its folder -> a captioner: .model (Captioner on the device), .tokenizer (tiktoken.Encoding),
    .image_size (pixels a side that the model sees).
    """
    checkpoint = read_checkpoint(path)
    device = pick_device(device)
    try:
        tokenizer = make_tokenizer(text_to_ranks(checkpoint["tokenizer"]["ranks"]), checkpoint["tokenizer"]["pattern"])
        model = build(checkpoint).to(device)
    except (ValueError, TypeError, KeyError, AttributeError) as e:
        raise UserError(f"{path}: {e if isinstance(e, UserError) else f'damaged ({type(e).__name__}: {e})'}") from None
    return SimpleNamespace(model=model, tokenizer=tokenizer, image_size=model.options.image_size)


def caption_images(captioner, images, beam=3, num_samples=1, batch_size=64, seed=0, temperature=1.0, top_k=0, top_p=1.0,
                   length_penalty=0.5, **limits):
    """
    images: uint8 (N, S, S, 3) of any size S -> for each picture a list of {"text": str, "logprob": float, in nats}: one
    caption by beam search (beam=1: greedy), or num_samples > 1 sampled ones. limits: min_tokens, max_tokens,
    no_repeat_ngram (see model.py).
    """
    model, results = captioner.model, []
    for start in range(0, len(images), batch_size):
        batch = torch.from_numpy(np.ascontiguousarray(images[start:start + batch_size])).to(model.mean.device)
        if num_samples > 1:
            results += model.sample(batch, num_samples, temperature, top_k, top_p, seed=seed + start, **limits)
        else:
            results += model.beam_search(batch, beam, length_penalty, **limits)
    return [[{"text": captioner.tokenizer.decode(tokens).strip(), "logprob": logprob} for tokens, logprob in texts]
            for texts in results]


def caption(captioner, image, **options):
    """
    image: a path, an http(s) address, bytes or a binary file -> its caption, str; a list of those -> a list of str. With num_samples=k, a list
    of k str for each. UserError, a ValueError, for what isn't a picture.
    """
    sources = image if isinstance(image, (list, tuple)) else [image]
    if not sources:
        return []
    images = np.stack([load_image(source, captioner.image_size) for source in sources])
    texts = [[c["text"] for c in captions] for captions in caption_images(captioner, images, **options)]
    if options.get("num_samples", 1) == 1:
        texts = [t[0] for t in texts]
    return texts if isinstance(image, (list, tuple)) else texts[0]


def draw_sheet(path, images, texts, columns=4, size=200):
    """Writes a contact sheet to path (.png, .jpg, …): images uint8 (N, S, S, 3), each with its text (str, lines) under it."""
    from PIL import Image, ImageDraw, ImageFont
    font = ImageFont.load_default(13)

    def wrap(text):
        lines = []
        for paragraph in text.split("\n"):
            line = ""
            for word in paragraph.split(" "):
                if line and font.getlength(f"{line} {word}") > size:
                    lines, line = [*lines, line], ""
                line = f"{line} {word}" if line else word
                while font.getlength(line) > size:  # one long word
                    n = max(n for n in range(1, len(line)) if font.getlength(line[:n]) <= size or n == 1)
                    lines, line = [*lines, line[:n]], line[n:]
            lines.append(line)
        return lines

    blocks = [wrap(text) for text in texts]
    columns = min(columns, len(blocks))
    rows = [range(i, min(i + columns, len(blocks))) for i in range(0, len(blocks), columns)]
    heights = [size + 12 + 16 * max(len(blocks[i]) for i in row) for row in rows]
    sheet = Image.new("RGB", (columns * (size + 10) + 10, sum(heights) + 10), "white")
    draw, y = ImageDraw.Draw(sheet), 10
    for row, height in zip(rows, heights):
        for column, i in enumerate(row):
            x = 10 + column * (size + 10)
            sheet.paste(Image.fromarray(np.asarray(images[i])).resize((size, size), Image.Resampling.BICUBIC), (x, y))
            draw.multiline_text((x, y + size + 2), "\n".join(blocks[i]), "black", font, spacing=2)
        y += height
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        sheet.save(file, Image.registered_extensions()[Path(path).suffix.lower()])


def find_pictures(paths, split, limit):
    """
    What --image names -> a list of (name, source, references): source is a path, an address, bytes ("-": stdin) or, from a
    prepared split, an array uint8 (S, S, 3); references are a prepared split's captions, else [].
    """
    found = []
    for path in paths:
        if path == "-":
            found.append(("-", sys.stdin.buffer.read(), []))
        elif os.path.isfile(os.path.join(path, "meta.json")):
            images, records = read_split(path, split)["images"], read_records(path, split)
            found += [(record["image"], images[i], record["captions"]) for i, record in enumerate(records[:limit])]
        elif re.match("https?://", path):
            found.append((path, path, []))
        elif re.match(r"\w+://", path):
            raise UserError(f"{path}: of addresses only http:// and https:// are fetched")
        elif os.path.isdir(path):
            inside = [file for name, file in list_images(path).items() if EXTENSION.search(name)]
            if not inside:
                raise UserError(f"no pictures in {path} (looked for .jpg, .png and the like, at any depth)")
            found += [(name, name, []) for name in inside[:limit]]
        elif not os.path.exists(path):
            raise UserError(f"--image {path}: no picture or folder is found there")
        else:
            found.append((path, path, []))
    return found


def main():
    """The command: see the top of this file."""
    parser = Parser(description="Captions for pictures.")
    parser.add_argument("--image", nargs="+", required=True, metavar="PATH",
                        help="pictures, http(s) addresses of such, folders of pictures (any depth), '-' for one on stdin, or a prepared "
                        "folder (data/NAME)")
    parser.add_argument("--split", default="val", help="which split of a prepared folder (default: val)")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each folder")
    parser.add_argument("--out_dir", default=PUBLISHED, help="a checkpoint or the folder that holds it (default: out/flickr8k beside this file)")
    parser.add_argument("--beam", type=int, help="beams of the search, 1: greedy (default: 3)")
    parser.add_argument("--num_samples", type=int, default=1, help="above 1: so many sampled captions a picture")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling; below 1 keeps to what is likely")
    parser.add_argument("--top_k", type=int, default=0, help="sample among so many likeliest tokens (0: all)")
    parser.add_argument("--top_p", type=float, default=1.0, help="sample among the likeliest of this probability together")
    parser.add_argument("--no_repeat_ngram", type=int, default=0, help="no n-gram of this length twice (0: no limit)")
    parser.add_argument("--min_tokens", type=int, default=1, help="no caption shorter than this")
    parser.add_argument("--max_tokens", type=int, help="no caption longer than this (default: what the model was trained on)")
    parser.add_argument("--length_penalty", type=float, default=0.5,
                        help="beam search compares log-probability / length ** this (0: no compensation)")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each picture: image, captions (a list of "
                        "{text, logprob}), references (people's captions, of a prepared folder)")
    parser.add_argument("--sheet", metavar="PNG", help="write the pictures with their captions as one picture")
    args = parser.parse_args()
    if args.beam and args.num_samples > 1:
        parser.error("--beam searches and --num_samples samples: give one of them")
    check_ranges(args, beam=(1, 1e4), num_samples=(1, 1e5), top_k=(0, 1e9), no_repeat_ngram=(0, 1e9), min_tokens=(0, 1e9), max_tokens=(1, 1e9),
                 batch_size=(1, 1e6), limit=(1, 1e12), length_penalty=(0, 100), seed=(0, 2**63 - 1), temperature=(1e-3, 1e3), top_p=(1e-6, 1))
    if args.num_samples == 1 and (args.temperature, args.top_k, args.top_p) != (1, 0, 1):
        parser.error("--temperature, --top_k and --top_p are for --num_samples above 1")
    if args.max_tokens and args.min_tokens > args.max_tokens:
        parser.error(f"--min_tokens {args.min_tokens} is more than --max_tokens {args.max_tokens}")
    if args.sheet and not EXTENSION.search(args.sheet):
        parser.error(f"--sheet {args.sheet}: name a picture file, such as sheet.png")

    captioner = load(args.out_dir, args.device)
    pictures = find_pictures(args.image, args.split, args.limit)
    limits = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "no_repeat_ngram", "min_tokens",
                                                     "max_tokens", "length_penalty", "num_samples", "seed")}
    failed, sheet_images, sheet_texts = 0, [], []
    alike = [list(group) for _, group in itertools.groupby(pictures, lambda p: getattr(p[1], "shape", None))]
    batches = [group[i:i + args.batch_size] for group in alike for i in range(0, len(group), args.batch_size)]
    for pictures_of_batch in batches:  # loaded and captioned one after the other: memory stays flat
        batch = []
        for name, source, references in pictures_of_batch:
            try:
                image = source if isinstance(source, np.ndarray) else load_image(source, captioner.image_size)
                batch.append((name, image, references))
            except UserError as e:
                print(f"sample.py: error: {one_line(str(e))}", file=sys.stderr)
                failed += 1
        if not batch:
            continue
        results = caption_images(captioner, np.stack([image for _, image, _ in batch]), beam=args.beam or 3,
                                 batch_size=args.batch_size, **limits)
        limits["seed"] += len(batch)  # other draws for other pictures
        for (name, image, references), captions in zip(batch, results):
            if args.json:
                print(json.dumps({"image": name, "captions": captions, "references": references}))
            else:
                for c in captions:
                    print(one_line(f"{name}: {c['text']}"))
                for reference in references:
                    print(f"    a person: {reference}")
            if args.sheet:
                sheet_images.append(image)
                sheet_texts.append("\n".join([c["text"] for c in captions] + [f"a person: {r}" for r in references]))
        sys.stdout.flush()
    if sheet_images:
        draw_sheet(args.sheet, sheet_images, sheet_texts)
        print(f"sheet: {args.sheet}", file=sys.stderr)
    if failed:
        print(f"sample.py: {failed} of {len(pictures)} pictures could not be captioned", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run(main)
