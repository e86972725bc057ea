"""
What each part of config/nano.py is worth: the table in ablation.md. Every run has the same minutes. A run that ablation.jsonl
has already is not done again: it may be stopped and started. Delete that file when code or config has changed.

    python docs/ablation.py --minutes 12 --seeds 0 1

Wants data/flickr8k and transformers (for docs/pretrain_gpt2.py).
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
VARIANTS = {  # what changes: train.py's options beside BASE
    "strided convolutions, else config/nano.py": [],
    "a decoder pretrained on the captions": ["--decoder=out/gpt2_captions"],
    "AdamW for all, no Muon": ["--optimizer=adamw"],
    "no depthwise convolutions": ["--local=False"],
    "no unigram loss": ["--unigram=0"],
    "patches by one linear layer: config/nano.py": ["--stem=patch"],
    "config/nano.py without unigram loss": ["--stem=patch", "--unigram=0"],
    "config/nano.py without unigram loss and depthwise convolutions": ["--stem=patch", "--unigram=0", "--local=False"],
    "no crops, no mirror images, no changes of light": ["--crop=1", "--flip=False", "--jitter=0"],
    "no hidden words": ["--word_dropout=0"],
    "the teacher in the loss (alpha 0.4)": ["--alpha=0.4"],
}
BASE = ["--stem=conv"]  # as config/nano.py was before this table spoke against it
KEPT = ("cider", "bleu4", "loss", "loss_shuffled", "bits_per_char", "distinct")
NOTES = """The same minutes are not the same work: AdamW's steps are cheaper, those with the teacher in the loss dearer, the pretrained decoder
spends two of its minutes on language alone, and a machine slows down and speeds up. Two seeds of one row lay up to 0.020 apart in CIDEr, so
smaller differences say little; what becomes of them in hours the table doesn't say.

By CIDEr and by loss in both seeds: Muon beats AdamW, patches by one linear layer beat strided convolutions, and the teacher in the loss costs
more than it gives in a run this short (its steps are a fifth fewer, and what it teaches is not yet worth learning: a guess). A decoder that
was pretrained on the captions gains a little CIDEr, its loss is the same. With strided convolutions, leaving out any other part (unigram loss, depthwise
convolutions, augmentation, hidden words) lost no CIDEr in either seed. With linear patches, leaving out unigram loss lowers the loss, but costs 0.010
CIDEr in the mean (0.023 in one seed, 0.003 more in the other) and looks less at the pictures; leaving out depthwise convolutions as well
changes no CIDEr and raises the loss again: config/nano.py keeps both. Hidden words cost loss in both seeds, augmentation in one; they are kept for longer
runs, which begin to learn the training pictures by heart (that they help there is a guess). Not tried here: another vocabulary, smoothing,
dropout, width against depth, resolution, batch size, lower-casing, a contrastive loss, a self-supervised warm start."""
PRETRAINING = 2  # minutes of its time that the pretrained decoder's variant spends on language alone


def main():
    """The command: see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    args = parser.parse_args()
    call = lambda *command: subprocess.run([sys.executable, *map(str, command)], check=True, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    results = HERE / "ablation.jsonl"
    found = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(r["name"], r["seed"], r["minutes"]) for r in found}
    for seed, (name, options) in itertools.product(args.seeds, VARIANTS.items()):
        if (name, seed, args.minutes) in done:
            continue
        minutes = args.minutes
        if "--decoder=out/gpt2_captions" in options:
            minutes -= PRETRAINING
            call("docs/pretrain_gpt2.py", "data/flickr8k", "out/gpt2_captions", "--minutes", PRETRAINING)
        call("train.py", "config/nano.py", f"--max_minutes={minutes}", f"--seed={seed}", "--out_dir=out/ablation", "--force",
             "--eval_interval=100000", *BASE, *options)
        scores = json.loads(call("evaluate.py", "--out_dir", "out/ablation", "--data_dir", "data/flickr8k", "--json").stdout)
        steps = json.loads((HERE.parent / "out/ablation/log.jsonl").read_text().splitlines()[-1])["iter"]
        found.append(dict(name=name, seed=seed, minutes=args.minutes, steps=steps, **{k: scores[k] for k in KEPT}))
        with results.open("a") as file:
            file.write(json.dumps(found[-1]) + "\n")
        write(args.minutes, found)
    write(args.minutes, found)


def write(minutes, found):
    """The table as it stands, into ablation.md."""
    mean = lambda results, key: statistics.mean(r[key] for r in results)
    lines = [f"# {minutes:g} minutes each", "",
             f"Each row changes what it names in the first, which is config/nano.py with strided convolutions. Flickr8k's dev photos (1,000), beam search; the mean of the seeds and, of CIDEr, each. "
             f"`python docs/ablation.py` on {os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()}).", "",
             "| | steps | loss, bits a character | more with exchanged pictures | CIDEr | seeds | distinct |",
             "|---|---|---|---|---|---|---|"]
    for name in VARIANTS:
        results = [r for r in found if r["name"] == name and r["minutes"] == minutes]
        if not results:
            continue
        gap = statistics.mean((r["loss_shuffled"] / r["loss"] - 1) * r["bits_per_char"] for r in results)
        lines.append(f"| {name} | {mean(results, 'steps'):.0f} | {mean(results, 'bits_per_char'):.4f} | {gap:.3f} | {mean(results, 'cider'):.3f} | "
                     + " ".join(f"{r['cider']:.3f}" for r in results) + f" | {mean(results, 'distinct'):.2f} |")
    lines += ["", NOTES]
    (HERE / "ablation.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
