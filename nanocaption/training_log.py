"""The log of a run: readable lines on stdout, the same numbers as JSON in out_dir/log.jsonl."""
import json
import math
import re
from pathlib import Path

from nanocaption.cli import atomic_write, lock_folder
from nanocaption.metrics import cider_baselines

MAX_SKIPPED = 10  # give up after this many steps in a row without a finite gradient


def open_out_dir(options, state, lock, resume):
    """Creates and locks out_dir; deletes checkpoints and log lines that the run will replace."""
    out_dir = Path(options.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    lock = lock or lock_folder(out_dir)
    if options.force and not resume:
        (out_dir / "last.pt").unlink(missing_ok=True)
        (out_dir / "best.pt").unlink(missing_ok=True)
    if state.step == 0:
        (out_dir / "log.jsonl").unlink(missing_ok=True)
    cut_log(out_dir / "log.jsonl", state.step)
    (out_dir / "log.jsonl").touch()
    return lock


def describe(options, state, model, train, device, world, dtype_reason):
    """The line that describes a run, and a second one if the run is already finished."""
    n = sum(p.numel() for p in model.parameters()) / 1e6
    n_encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    where = f"{device.type} x {world}" if world > 1 else device.type
    n_tokens = options.batch_size * train.n_tokens.mean()
    text = (f"{n:.2f}M parameters ({n_encoder:.2f}M in the encoder) | {where}, {options.dtype} "
            f"({dtype_reason}) | {len(train)} training images, {options.batch_size} per step "
            f"(about {n_tokens:.0f} tokens)")
    if train.n_cut:
        text += f" | {train.n_cut} captions cut to {model.max_tokens} tokens"
    if state.progress(options) >= 1:
        text += (f"\nthe run is finished: already at step {state.step}, after "
                 f"{state.seconds / 60:.1f} minutes; raise max_iters or max_minutes to continue")
    return text


def log_start(options, state, model, train, val, device, world, dtype_reason):
    """Prints a description of the run; a new run also logs baselines for its CIDEr."""
    print(describe(options, state, model, train, device, world, dtype_reason), flush=True)
    if state.step > 0:
        return
    baselines = cider_baselines(val.words, val.references)
    text = f"CIDEr of one caption for all images: {baselines['constant']:.3f}"
    if baselines["human"] is not None:
        text += f", of humans: {baselines['human']:.3f}"
    log(options.out_dir, 0, text, baselines=baselines)


def log(out_dir, step, text, **record):
    """Prints a text and appends the record to log.jsonl."""
    print(text, flush=True)
    with open(Path(out_dir, "log.jsonl"), "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(dict(iter=step, **record)) + "\n")


def cut_log(path, step):
    """Drops half-written lines, and lines of later steps, which will be rerun."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        found = re.match(rb'{"iter": (\d+), .*}\n$', line)
        if found and int(found[1]) <= step:
            kept.append(line)
    if kept != lines:
        with atomic_write(path) as file:
            file.write(b"".join(kept))


def log_step(options, state, n_train, multiplier, grad_norm):
    """Logs the training steps since the last such line; resets state.sums."""
    ce, n_tokens, n_images, n_captions, seconds = state.sums
    state.sums = [0.0] * 5
    loss = ce / n_tokens if n_tokens else None
    lr = multiplier * options.learning_rate
    record = dict(
        epoch=state.images / n_train,
        seconds=state.seconds,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm if math.isfinite(grad_norm) else None,
        images_per_s=n_images / seconds,
        captions_per_s=n_captions / seconds,
    )
    progress = state.progress(options)
    left = round(state.seconds * (1 - progress) / progress)
    what = "-reward" if options.samples else "loss"
    number = "nan" if loss is None else f"{loss:.4f}"
    text = (f"step {state.step} | epoch {record['epoch']:.2f} | {what} {number} | lr {lr:.2e} | "
            f"{record['images_per_s']:.1f} images/s | {left // 60}:{left % 60:02d} left")
    log(options.out_dir, state.step, text, **record)


def log_evaluation(out_dir, step, results, texts, references, saved):
    """
    Logs the scores of student and teacher; prints three captions, each with a reference. saved:
    which of the two has just become best.pt, or None.
    """
    lines = []
    for name, scores in results.items():
        numbers = " | ".join(f"{key} {value:.4f}" for key, value in scores.items())
        note = " | saved as best.pt" if name == saved else ""
        lines.append(f"  {name} | {numbers}{note}")
    for text, captions in zip(texts[:3], references):
        lines.append(f"    {text}    (reference: {captions[0]})")
    log(out_dir, step, "\n".join(lines), eval=results)


def report_skipped(options, state, multiplier):
    """Logs a step without a finite gradient. Raises ArithmeticError after too many in a row."""
    if state.skipped >= MAX_SKIPPED:
        lr = multiplier * options.learning_rate
        raise ArithmeticError(f"step {state.step}: no finite gradient for {state.skipped} steps; "
                              f"lower the learning rate (now {lr:.2e}); checkpoints saved "
                              "so far are unaffected")
    text = f"step {state.step} skipped: its gradient is not finite"
    log(options.out_dir, state.step, text, skipped=state.skipped)
