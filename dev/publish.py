"""
Writes a copy of a checkpoint with all of its weights, even frozen ones, in half precision.

    python dev/publish.py out/small_scst out/flickr8k/best.pt

The copy needs neither the packages nor the files that the frozen weights came from.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from checkpoint import build, halve, read_checkpoint
from nanocaption.cli import Parser, atomic_write, check_ranges, run

KEPT = ("version", "vocab_size", "tokenizer", "fingerprint", "which", "step", "eval",
        "flickr_ids")


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="a checkpoint, or the folder that holds it")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--beam", type=int, default=3,
                        help="beam size in sample.py and evaluate.py (default: %(default)s)")
    parser.add_argument("--length_penalty", type=float, default=0.5,
                        help="length penalty there (default: %(default)s)")
    args = parser.parse_args()
    check_ranges(args, beam=(1, 1e4), length_penalty=(0, 100))
    checkpoint = read_checkpoint(args.checkpoint)
    model = build(checkpoint)
    published = {name: checkpoint[name] for name in KEPT if name in checkpoint}
    # fine-tuning still freezes the encoder, but reads its weights from this file
    changes = dict(encoder="", decoder="", lora_rank=0)
    published["options"] = {**checkpoint["options"], **changes}
    published["model"] = halve(model.state_dict())
    published["search"] = dict(beam=args.beam, length_penalty=args.length_penalty)
    with atomic_write(args.output) as file:
        torch.save(published, file)
    print(f"{args.output}: {Path(args.output).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run(main)
