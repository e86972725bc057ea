"""
Plot a run: losses and CIDEr over time, from the log.jsonl of each of its stages.

    python dev/plot.py out/nano out/nano_scst --output curve.png

Needs matplotlib.
"""
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from nanocaption.cli import Parser, UserError, atomic_write, run

# colors that color-blind people can tell apart (Okabe and Ito)
LOSSES = {
    "train": dict(color="#999999", linewidth=1.2),
    "val": dict(color="#0072b2", marker="o"),
    "val, shuffled images": dict(color="#d55e00", marker="s", linestyle="--"),
}
CIDER = {
    "student": dict(color="#009e73", marker="o"),
    "teacher": dict(color="#cc79a7", marker="s", linestyle="--"),
}
BASELINES = {"human": "humans", "constant": "one caption for all"}


def read_log(path):
    """
    Reads a log, or the log.jsonl in a folder. Returns a list of stages, each a list of dicts: a
    published log may hold several stages, one after another.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "log.jsonl"
    stages = []
    last = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for line in lines:
            # a run may still be writing its last line
            if not line.endswith("\n"):
                break
            record = json.loads(line)
            if not stages or record["iter"] < last:
                stages.append([])
            stages[-1].append(record)
            last = record["iter"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path} ({error}); expected what train.py logs") from None
    if not any("seconds" in record for stage in stages for record in stage):
        raise UserError(f"{path} has no training steps yet; train for longer, or with a smaller "
                        "--log_interval")
    return stages


def read_curves(stages):
    """
    Joins the stages. Returns {curve: [(minutes, value), ...]} for the keys of LOSSES and CIDER;
    the minutes and epochs at each line of the log, a pair of lists; the minutes at which each stage
    ends; and the last baselines in the log (see nanocaption.metrics.cider_baselines), or {}.
    """
    curves = {name: [] for name in (*LOSSES, *CIDER)}
    minutes = [0.0]
    epochs = [0.0]
    ends = []
    baselines = {}
    for stage in stages:
        steps = [record for record in stage if "seconds" in record]
        iters = [0, *(record["iter"] for record in steps)]
        times = [minutes[-1] + seconds / 60 for seconds in (0, *(r["seconds"] for r in steps))]
        epochs += [epochs[-1] + record["epoch"] for record in steps]
        minutes += times[1:]
        ends.append(minutes[-1])
        for record in stage:
            # evaluations have no time in the log; it follows from their step
            x = float(np.interp(record["iter"], iters, times))
            # self-critical training logs minus the reward, which is not a loss
            if (record.get("loss") or 0) > 0:
                curves["train"].append((x, record["loss"]))
            if "eval" in record:
                student = record["eval"]["student"]
                curves["val"].append((x, student["loss"]))
                curves["val, shuffled images"].append((x, student["loss_shuffled"]))
                for name, scores in record["eval"].items():
                    curves[name].append((x, scores["cider"]))
            baselines = record.get("baselines", baselines)
    return curves, (minutes, epochs), ends, baselines


def draw(path, curves, progress, ends, baselines):
    """Writes two panels, losses and CIDEr, as PNG; the arguments are from read_curves."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise UserError(f"plots need matplotlib ({error}); install it with pip install matplotlib"
                        ) from None
    figure, panels = pyplot.subplots(1, 2, figsize=(8.3, 3.4), layout="constrained")
    minutes, epochs = progress
    panels[0].set_ylabel("loss, nats per token")
    panels[1].set_ylabel("CIDEr of greedy captions")
    for panel, styles in zip(panels, (LOSSES, CIDER)):
        for name, style in styles.items():
            points = np.array(curves[name]).reshape(-1, 2)
            panel.plot(*points.T, label=name, markersize=4, **style)
    for key, name in BASELINES.items():
        value = baselines.get(key)
        if value is not None:
            panels[1].axhline(value, color="black", linewidth=1, linestyle=":")
            panels[1].text(0.02, value, f"{name} {value:.2f}", va="bottom",
                           transform=panels[1].get_yaxis_transform())
    panels[1].set_ylim(0, 1.1 * panels[1].get_ylim()[1])
    for panel in panels:
        panel.set_xlim(0, minutes[-1] * 1.02)
        panel.set_xlabel("minutes of training")
        panel.grid(color="#eeeeee")
        panel.xaxis.set_major_locator(MaxNLocator(7, integer=True))
        if len(ends) > 1:
            panel.vlines(ends[:-1], 0, 1, color="black", linewidth=0.8, label="next stage",
                         transform=panel.get_xaxis_transform())
        panel.legend(fontsize=9)
        top = panel.twiny()
        top.set_xlim(panel.get_xlim())
        whole = MaxNLocator(6, integer=True).tick_values(0, epochs[-1])
        whole = whole[whole <= epochs[-1]]
        top.set_xticks(np.interp(whole, epochs, minutes), [f"{epoch:g}" for epoch in whole])
        top.set_xlabel("epochs")
    with atomic_write(path) as file:
        figure.savefig(file, dpi=160)
    pyplot.close(figure)


def main():
    """See the top of this file."""
    parser = Parser(description=__doc__)
    parser.add_argument("runs", nargs="+", help="out_dir or log file of each stage, in order")
    parser.add_argument("--output", default="curve.png", metavar="PNG",
                        help="image to write (default: %(default)s)")
    args = parser.parse_args()
    if not args.output.lower().endswith(".png"):
        raise UserError(f"--output {args.output}: expected a PNG file name, such as curve.png")
    stages = []
    for path in args.runs:
        stages += read_log(path)
    curves, progress, ends, baselines = read_curves(stages)
    if not baselines:
        print("the log has no baselines, so the plot lacks humans and one caption for all")
    draw(args.output, curves, progress, ends, baselines)
    print(f"{args.output}: {progress[0][-1]:.1f} minutes, {progress[1][-1]:.1f} epochs")


if __name__ == "__main__":
    run(main)
