"""
Measures what each part of config/nano.py contributes, and writes ablation.md.

    python dev/ablation.py --minutes 12 --seeds 0 1

Every run takes the same time. Runs that are already in ablation.jsonl are skipped, so you can
interrupt and restart this script; to repeat a run, delete its line there. Needs data/flickr8k and,
for dev/pretrain_gpt2.py, transformers.
"""
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from nanocaption.cli import Parser, atomic_write, check_ranges, run

RESULTS = ROOT / "dev" / "ablation.jsonl"
TABLE = ROOT / "dev" / "ablation.md"
PRETRAINED = "decoder pretrained on captions"
PRETRAINING_MINUTES = 2  # of that run's minutes
VARIANTS = {  # name: options that differ from config/nano.py
    "config/nano.py": [],
    "no unigram loss": ["--unigram=0"],
    "no local convolutions": ["--local_conv=False"],
    "no unigram loss, no local convolutions": ["--unigram=0", "--local_conv=False"],
    "AdamW instead of Muon": ["--optimizer=adamw"],
    "no augmentation": ["--crop=1", "--flip=False", "--jitter=0"],
    "no word dropout": ["--word_dropout=0"],
    "teacher in the loss (alpha 0.4)": ["--alpha=0.4"],
    PRETRAINED: ["--decoder=out/gpt2_captions"],
}
SCORES = ("cider", "bleu4", "loss", "loss_shuffled", "bits_per_char", "distinct")
INTRODUCTION = """Written by `python dev/ablation.py`. Each row is config/nano.py with the listed
changes. Scores are means over seeds on Flickr8k's validation split (1,000 images, beam search);
CIDEr is also given by seed. The shuffled gap is how much shuffled images raise the loss, in bits
per character; distinct is the fraction of captions that are distinct. The unigram loss predicts
tokens from the mean patch, local convolutions are depthwise 3x3 ones before each encoder block, and
word dropout hides input tokens in training."""
HEADER = """| | steps | loss, bits per character | shuffled gap | CIDEr | by seed | distinct |
|---|---|---|---|---|---|---|"""
RECORDED = """These runs used a stem of strided convolutions instead of the linear patch embedding.
It did worse, so the option was removed. The first row is their baseline."""
NOTES = """Equal time is not equal work. AdamW's steps are cheaper, steps with the teacher in the
loss are more expensive, the pretrained decoder spends two of its twelve minutes on language alone,
and the speed of a machine varies. All runs used float32 and an earlier version of the code and
of config/nano.py (dropout 0.2, word dropout 0.15, crop 0.5, jitter 0.2). Two seeds of the same row
differ by up to 0.020 CIDEr, so smaller differences mean little, and twelve-minute runs do not
predict what happens over hours.

Three results hold for CIDEr and loss in both seeds:

* Muon beats AdamW.
* The linear patch embedding beats strided convolutions.
* In runs this short, the teacher in the loss costs more than it gains: a fifth fewer steps fit in,
  and we suspect that the teacher is still too weak.

A decoder pretrained on the captions may gain a little CIDEr, at the same loss.

With strided convolutions, leaving out the unigram loss, the local convolutions, augmentation or
word dropout raised CIDEr in both seeds. With the linear embedding, leaving out the unigram loss
lowers the loss, but it also lowers CIDEr by 0.010 on average (-0.023 and +0.003), and the decoder
relies less on the images. Leaving out the local convolutions as well does not change CIDEr and
raises the loss. config/nano.py keeps both.

Word dropout raises the loss in both seeds, augmentation in one. We keep them because longer runs
begin to memorize the training images; that they help there is a guess.

Not tried: other vocabularies, smoothing, dropout, width against depth, resolution, batch size,
lowercase captions, a contrastive loss, self-supervised pretraining."""


def read_results():
    """The finished runs, a list of dicts."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]


def run_script(*command):
    """Runs a script of the repository; returns what it prints."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    return done.stdout


def measure(name, seed, minutes):
    """Trains and evaluates a variant; returns its line of ablation.jsonl, a dict."""
    training_minutes = minutes
    if name == PRETRAINED:
        training_minutes -= PRETRAINING_MINUTES
        run_script("dev/pretrain_gpt2.py", "data/flickr8k", "out/gpt2_captions",
                   "--minutes", PRETRAINING_MINUTES)
    run_script("train.py", "config/nano.py", "--data_dir=data/flickr8k",
               f"--max_minutes={training_minutes}", f"--seed={seed}", "--out_dir=out/ablation",
               "--force", "--eval_interval=100000", *VARIANTS[name])
    printed = run_script("evaluate.py", "--out_dir", "out/ablation", "--data_dir", "data/flickr8k",
                         "--json")
    scores = json.loads(printed)
    log = (ROOT / "out/ablation/log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = json.loads(log[-1])["iter"]
    machine = f"{os.cpu_count()} CPU cores ({torch.backends.cpu.get_cpu_capability()})"
    result = dict(name=name, seed=seed, minutes=minutes, machine=machine, steps=steps)
    result.update({key: scores[key] for key in SCORES})
    return result


def table_row(name, results):
    """A row of the table for the runs of one variant."""
    def mean(key):
        return statistics.mean(result[key] for result in results)

    gaps = []
    for result in results:
        relative = result["loss_shuffled"] / result["loss"] - 1
        gaps.append(relative * result["bits_per_char"])
    seeds = " ".join(f"{result['cider']:.3f}" for result in results)
    return (f"| {name} | {mean('steps'):.0f} | {mean('bits_per_char'):.4f} "
            f"| {statistics.mean(gaps):.3f} | {mean('cider'):.3f} | {seeds} "
            f"| {mean('distinct'):.2f} |")


def write_table(results, minutes):
    """Writes ablation.md: the variants, then any others in ablation.jsonl."""
    by_name = {}
    for result in results:
        if result["minutes"] == minutes:
            by_name.setdefault(result["name"], []).append(result)
    rows = [table_row(name, by_name[name]) for name in VARIANTS if name in by_name]
    recorded = [table_row(name, by_name[name]) for name in by_name if name not in VARIANTS]
    machines = sorted({result["machine"] for result in results})
    parts = [f"# Ablation: {minutes:g} minutes each on {', '.join(machines)}", INTRODUCTION,
             "\n".join([HEADER, *rows])]
    if recorded:
        parts += [RECORDED, "\n".join([HEADER, *recorded])]
    parts.append(NOTES)
    with atomic_write(TABLE) as file:
        file.write(("\n\n".join(parts) + "\n").encode())


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=12, help="minutes per run (default: 12)")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1],
                        help="seeds to run; without any, only write ablation.md (default: 0 1)")
    args = parser.parse_args()
    check_ranges(args, minutes=(PRETRAINING_MINUTES + 0.1, 1e6))
    results = read_results()
    done = {(result["name"], result["seed"], result["minutes"]) for result in results}
    for seed in args.seeds:
        for name in VARIANTS:
            if (name, seed, args.minutes) in done:
                continue
            results.append(measure(name, seed, args.minutes))
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
            write_table(results, args.minutes)
    write_table(results, args.minutes)


if __name__ == "__main__":
    run(main)
