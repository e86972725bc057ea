"""train.py as it is used: resumed, accumulated, on two ranks, interrupted, misused."""
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import train
from helpers import (CONFIG, HERE, one_line_error, random_images, read_log, run, start,
                     tiny_dataset, torchrun, write_config)
from nanocaption.cli import Parser, UserError
from nanocaption.cli import run as run_main
from nanocaption.dataset import Dataset, write_dataset
from nanocaption.distributed import init_distributed
from nanocaption.metrics import baselines, cider, cider_references, tokenize

STATE = ("model", "teacher", "optimizer")
PRELUDE = f"import os, sys\nsys.path.insert(0, {str(HERE)!r})\nimport torch, train\n"


def last(out_dir):
    return torch.load(out_dir / "last.pt", weights_only=True)


def best(out_dir):
    return torch.load(out_dir / "best.pt", weights_only=True)


def assert_same(a, b, path="", **tolerance):
    """Two nested structures are equal: bit for bit, or to a tolerance if one is given."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}", **tolerance)
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]", **tolerance)
    elif torch.is_tensor(a):
        tolerance = tolerance or dict(rtol=0, atol=0)
        torch.testing.assert_close(a, b, msg=f"{path} differs", **tolerance)
    else:
        assert a == b, path


def without_times(state):
    """A saved State, less its seconds."""
    return {**state, "seconds": None, "sums": state["sums"][:-1]}


def assert_same_run(a, b):
    """Two out_dirs hold the same run, except for its times."""
    for key in STATE:
        assert_same(last(a)[key], last(b)[key], key)
    assert_same(without_times(last(a)["state"]), without_times(last(b)["state"]))
    assert_same(best(a)["model"], best(b)["model"])
    assert read_log(a) == read_log(b)


# -----------------------------------------------------------------------------
# resuming

@pytest.mark.parametrize("options", [
    dict(),
    dict(dtype="bfloat16"),
    dict(optimizer="muon", samples=2, alpha=0.0),
])
def test_interrupted_and_resumed_equals_uninterrupted(data, tmp_path, options):
    options = {**CONFIG, **options, "dropout": 0.2, "max_iters": 12}
    start(data, tmp_path / "whole", options=options)
    config = write_config(tmp_path / "config.py", options)
    out = tmp_path / "parts"
    command = ["train.py", config, f"--data_dir={data}", f"--out_dir={out}", "--init_from=resume"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=HERE, env=environment,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step 6"):
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert "--init_from=resume" in process.stderr.read()
    assert 6 <= last(out)["state"]["step"] < 12
    # what a killed run may have written after its checkpoint
    with open(out / "log.jsonl", "a") as file:
        file.write('{"iter": 11, "loss": 1}\n{"iter": 12, "lo')
    run(*command)
    assert_same_run(tmp_path / "whole", out)
    done = run(*command)
    assert b"already at step 12" in done.stdout
    assert_same_run(tmp_path / "whole", out)


def test_killed_between_evaluations_resumes_from_the_last_checkpoint(data, tmp_path):
    options = dict(max_iters=12, eval_interval=50)
    start(data, tmp_path / "whole", options=options)
    # train.py with a checkpoint after each step, killed in its fifth
    worker = tmp_path / "worker.py"
    worker.write_text(PRELUDE + """
train.SAVE_SECONDS = -1
update_teacher = train.update_teacher
calls = []
def killed(*args):
    update_teacher(*args)
    calls.append(0)
    if len(calls) == 5:
        os._exit(9)
train.update_teacher = killed
train.run(train.main)
""")
    done = start(data, tmp_path / "killed", "--init_from=resume", options=options, script=worker,
                 check=False)
    assert done.returncode == 9
    assert last(tmp_path / "killed")["state"]["step"] == 4
    start(data, tmp_path / "killed", "--init_from=resume", options=options)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


# auto alone would pick the same one in both cases
@pytest.mark.parametrize("dtype, other", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_resumed_run_keeps_its_precision(data, tmp_path, dtype, other):
    out = tmp_path / "out"
    start(data, out, f"--dtype={dtype}", "--max_iters=2")
    assert last(out)["options"]["dtype"] == dtype
    done = start(data, out, "--dtype=auto", "--init_from=resume", "--max_iters=4")
    assert f"{dtype} (as before)" in done.stdout.decode()
    assert last(out)["options"]["dtype"] == dtype
    done = start(data, out, f"--dtype={other}", "--init_from=resume", "--max_iters=6")
    assert f"dtype={other} (was {dtype})" in done.stdout.decode()
    assert last(out)["options"]["dtype"] == other


# -----------------------------------------------------------------------------
# micro-steps and ranks

def test_accumulation_changes_nothing_but_rounding(data, tmp_path):
    for accum in (1, 4):
        start(data, tmp_path / f"a{accum}", f"--grad_accum={accum}", "--max_iters=3")
    one = last(tmp_path / "a1")
    four = last(tmp_path / "a4")
    for key in ("model", "teacher"):
        assert_same(one[key], four[key], key, rtol=1e-3, atol=2e-4)
    moved = one["model"]["wte.weight"] - one["teacher"]["wte.weight"]
    assert moved.abs().max() > 0


def test_two_ranks_equal_one_process(data, tmp_path):
    # train.py whose ranks save their weights at the end
    worker = tmp_path / "worker.py"
    worker.write_text(PRELUDE + f"""
make_teacher = train.make_teacher
def keep(model):
    train.kept = model
    return make_teacher(model)
train.make_teacher = keep
train.main()
torch.save(train.kept.state_dict(), {str(tmp_path)!r} + "/rank" + os.environ["RANK"] + ".pt")
""")
    options = {**CONFIG, "max_iters": 1, "grad_clip": 0.0}
    start(data, tmp_path / "one", options=options)
    config = write_config(tmp_path / "two.py", options)
    done = torchrun(worker, config, f"--data_dir={data}", f"--out_dir={tmp_path / 'two'}")
    # the gradients of local convolutions have strides of their own
    assert b"strides" not in done.stderr
    # after one step AdamW's first moment is a tenth of the gradient
    one = last(tmp_path / "one")["optimizer"][0]["state"]
    two = last(tmp_path / "two")["optimizer"][0]["state"]
    assert one.keys() == two.keys()
    for i, state in one.items():
        torch.testing.assert_close(two[i]["exp_avg"], state["exp_avg"], rtol=1e-3, atol=1e-7)
        assert state["exp_avg"].abs().max() > 0
    evals = [read_log(tmp_path / run)[-1]["eval"] for run in ("one", "two")]
    assert evals[0].keys() == evals[1].keys() == {"student", "teacher"}
    for name in ("student", "teacher"):
        assert evals[1][name]["loss"] == pytest.approx(evals[0][name]["loss"], rel=1e-3)
    out = tmp_path / "five"
    torchrun(worker, config, f"--data_dir={data}", f"--out_dir={out}", "--max_iters=5")
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert_same(dict(ranks[0]), dict(ranks[1]))
    assert_same(dict(ranks[0]), last(out)["model"])


def test_ranks_that_differ_stop_before_the_first_step(data, tmp_path):
    tiny_dataset(tmp_path / "other", image_size=24)
    worker = tmp_path / "worker.py"
    worker.write_text(PRELUDE + """
folders = sys.argv.pop(1).split(",")
sys.argv.append("--data_dir=" + folders[int(os.environ["RANK"])])
train.run(train.main)
""")
    config = write_config(tmp_path / "config.py", CONFIG)
    out = tmp_path / "out"
    done = torchrun(worker, f"{data},{tmp_path / 'other'}", config, f"--out_dir={out}",
                    check=False)
    assert done.returncode != 0
    assert b"worker.py: error: rank 1 has data" in done.stderr, done.stderr
    assert done.stderr.count(b"worker.py: error:") == 1
    assert not out.exists()


@pytest.mark.parametrize("environment, parts", [
    (dict(RANK="0", WORLD_SIZE="2"), ["WORLD_SIZE is 2", "lacks MASTER_ADDR, MASTER_PORT"]),
    (dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999"), ["lacks RANK"]),
    (dict(RANK="1"), ["RANK is '1' and WORLD_SIZE is '1'"]),
    (dict(RANK="2", WORLD_SIZE="2"), ["RANK is '2' and WORLD_SIZE is '2'"]),
    (dict(RANK="0", WORLD_SIZE="two"), ["WORLD_SIZE is 'two'", "torchrun"]),
    (dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="port"),
     ["rank 0 cannot reach the others at 127.0.0.1:port"]),
])
def test_an_environment_that_no_launcher_sets(data, tmp_path, environment, parts, monkeypatch,
                                              capsys):
    config = write_config(tmp_path / "c.py", CONFIG)
    arguments = ["train.py", str(config), f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", arguments)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    error = None
    try:
        run_main(train.main)
    except BaseException as left:
        error = left
    assert isinstance(error, SystemExit) and error.code == 2, error
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    for part in parts:
        assert part in message, message


def test_a_launcher_without_local_ranks(monkeypatch):
    """As Slurm with eight tasks on two machines with four GPUs each."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda backend: None)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "first")
    monkeypatch.setenv("MASTER_PORT", "29500")
    devices = []
    for rank in range(8):
        monkeypatch.setenv("RANK", str(rank))
        found, world, device = init_distributed(torch.device("cuda"), train.Options())
        assert (found, world) == (rank, 8)
        devices.append(device.index)
    assert devices == [0, 1, 2, 3, 0, 1, 2, 3]


# -----------------------------------------------------------------------------
# what happens in a run

def test_self_critical_training_sharpens_what_was_smoothed_once(data, tmp_path):
    start(data, tmp_path / "smoothed", "--smoothing=0.1", "--max_iters=2")
    weights = [best(tmp_path / "smoothed")["model"]]
    for stage, before in (("first", "smoothed"), ("second", "first")):
        start(data, tmp_path / stage, f"--init_from={tmp_path / before}", "--samples=2",
              "--alpha=0", "--learning_rate=0", "--max_iters=1")
        weights.append(last(tmp_path / stage)["model"])
    for name, smoothed in weights[0].items():
        factor = 2 if name in ("norm.weight", "norm.bias") else 1
        assert_same(weights[1][name], smoothed.float() * factor, name)
        torch.testing.assert_close(weights[2][name], weights[1][name], rtol=1e-3, atol=1e-3)


def test_steps_without_a_finite_gradient_are_skipped(data, tmp_path):
    # train.py with NaN images from step 3 to a given step
    worker = tmp_path / "worker.py"
    worker.write_text(PRELUDE + """
calls = []
end = int(sys.argv.pop(1))
augment = train.augment
def broken(*args):
    calls.append(0)
    images = augment(*args)
    return images * float("nan") if 3 <= len(calls) <= end else images
train.augment = broken
train.run(train.main)
""")
    config = write_config(tmp_path / "c.py", {**CONFIG, "max_iters": 14, "eval_interval": 2})
    command = (config, f"--data_dir={data}")
    run(worker, 3, *command, f"--out_dir={tmp_path / 'once'}")
    skipped = [line["skipped"] for line in read_log(tmp_path / "once") if "skipped" in line]
    assert skipped == [1]
    assert last(tmp_path / "once")["state"]["step"] == 14
    done = run(worker, 99, *command, f"--out_dir={tmp_path / 'always'}", check=False)
    one_line_error(done, 1, "no finite gradient for 10 steps", "lower the learning rate")
    for out in ("once", "always"):
        for part in ("model", "teacher"):
            assert all(t.isfinite().all() for t in last(tmp_path / out)[part].values())
    for line in read_log(tmp_path / "always"):
        assert line.get("loss") is None or line["loss"] >= 0
    # fine-tuning that ends before its first evaluation has saved what it started from
    run(worker, 99, *command, f"--out_dir={tmp_path / 'tuned'}",
        f"--init_from={tmp_path / 'once'}", "--eval_interval=50", check=False)
    given = {name: t.float() for name, t in best(tmp_path / "once")["model"].items()}
    assert last(tmp_path / "tuned")["state"]["step"] == 0
    assert not (tmp_path / "tuned/best.pt").exists()
    assert_same(last(tmp_path / "tuned")["model"], given)


def test_a_log_begins_with_the_cider_to_compare_with(data, tmp_path):
    """Once, of the images of its evaluations; that of blind captions is what evaluate.py prints."""
    references = []
    for texts in Dataset(data).split("val").captions[:CONFIG["eval_images"]]:
        references.append([tokenize(text) for text in texts])
    prepared = cider_references(references)
    expected = {name: scores["cider"] for name, scores in baselines(references, prepared).items()}
    # each reference against the image's others, with the n-gram frequencies of all
    frequencies, _ = prepared
    human = []
    for captions in references:
        if len(captions) > 1:
            scores = []
            for i, words in enumerate(captions):
                others = cider_references([captions[:i] + captions[i + 1:]], frequencies)
                scores.append(cider([words], others)[0])
            human.append(sum(scores) / len(scores))
    expected["human"] = sum(human) / len(human)

    def logged():
        """The baselines of the run's only such line, its first."""
        log = read_log(tmp_path / "out")
        assert [record["iter"] for record in log if "baselines" in record] == [0]
        return log[0].get("baselines")

    done = start(data, tmp_path / "out", "--max_iters=2")
    start(data, tmp_path / "out", "--max_iters=4", "--init_from=resume")
    assert logged() == pytest.approx(expected)
    start(data, tmp_path / "out", "--max_iters=2", "--force", "--eval_images=2")
    assert logged() != pytest.approx(expected)
    text = (f"CIDEr of one caption for all images: {expected['constant']:.3f}, of humans: "
            f"{expected['human']:.3f}\n")
    assert text in done.stdout.decode()


def test_a_run_that_ends_before_the_learning_rate_is_0(data, tmp_path):
    """Its learning rates are those of the longer run."""
    args = ["--warmup_iters=2", "--log_interval=1", "--eval_interval=100", "--eval_images=2"]
    start(data, tmp_path / "long", "--max_iters=12", *args)
    start(data, tmp_path / "short", "--max_iters=6", "--lr_decay=0.5", *args)
    rates = {}
    for name in ("long", "short"):
        rates[name] = [line["lr"] for line in read_log(tmp_path / name) if "lr" in line]
    quarter = CONFIG["learning_rate"] * (1 + math.cos(math.pi * 3 / 12)) / 2
    assert rates["long"][3] == pytest.approx(quarter)
    assert len(rates["short"]) == 6
    assert rates["short"] == pytest.approx(rates["long"][:6])


def test_stops_by_minutes_and_reports(data, tmp_path):
    done = start(data, tmp_path / "out", "--max_iters=0", "--max_minutes=0.02",
                 "--log_interval=1")
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").open()]
    steps = [line for line in lines if "loss" in line]
    assert {"iter", "epoch", "seconds", "loss", "lr", "images_per_s", "captions_per_s"} <= set(
        steps[0])
    assert 1.2 <= steps[-1]["seconds"] < 10
    assert steps[-1]["lr"] < steps[len(steps) // 2]["lr"]
    assert set(lines[-1]["eval"]["teacher"]) == {"loss", "loss_shuffled", "cider", "distinct"}
    output = done.stdout.decode()
    assert re.match(r"[\d.]+M parameters .* cpu, float32 \(as requested\) .* 8 per step", output)
    # student and teacher are aligned, above three captions with a reference
    student, teacher, *captions = output.splitlines()[-5:]
    assert student.startswith("  student | loss") and teacher.startswith("  teacher | loss")
    assert student.index("cider") == teacher.index("cider")
    assert all("(reference: " in line for line in captions)


# -----------------------------------------------------------------------------
# where a run starts from

def test_fine_tuning(data, tmp_path):
    start(data, tmp_path / "out")
    # the checkpoint's n_embd holds, not the config's
    start(data, tmp_path / "tuned", f"--init_from={tmp_path / 'out'}", "--learning_rate=0",
          options=dict(n_embd=64))
    weights = best(tmp_path / "out")["model"]
    assert all(t.dtype == torch.float16 for t in weights.values() if t.shape != (3,))
    given = {name: t.float() for name, t in weights.items()}
    assert_same(last(tmp_path / "tuned")["model"], given)


def test_what_init_from_refuses(data, tmp_path):
    out = tmp_path / "out"
    start(data, out, "--max_iters=2")
    one_line_error(start(data, out, check=False), 2, "last.pt exists", "--force")
    again = start(data, out, "--init_from=resume", "--max_iters=2", "--learning_rate=0.5")
    assert b"changed options: learning_rate=0.5 (was 0.01)" in again.stdout
    weights = tmp_path / "weights"
    weights.mkdir()
    found = (out / "best.pt").read_bytes()
    (weights / "best.pt").write_bytes(found)
    one_line_error(start(data, weights, check=False), 2, "best.pt exists", "--force")
    done = start(data, weights, "--init_from=resume", check=False)
    one_line_error(done, 2, "cannot resume from", "fine-tunes")
    assert (weights / "best.pt").read_bytes() == found
    done = start(data, out, "--init_from=resume", "--n_embd=64", check=False)
    one_line_error(done, 2, "n_embd is 64 here but 32 in the checkpoint")
    done = start(data, tmp_path / "x", "--init_from=nowhere", check=False)
    one_line_error(done, 2, "no checkpoint at nowhere")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    done = start(data, tmp_path / "x", f"--init_from={tmp_path / 'junk.pt'}", check=False)
    one_line_error(done, 2, "junk.pt")
    assert not (tmp_path / "x").exists()


# -----------------------------------------------------------------------------
# mistakes

def refused(monkeypatch, capsys, args, parts):
    """train.py, run in this process, exits with code 2 and one line that holds all parts."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    with pytest.raises(SystemExit) as left:
        run_main(train.main)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1, error
    for part in parts:
        assert part in error, error


@pytest.mark.parametrize("args, parts", [
    (["--learning_rte=1"], ["--learning_rte", "--learning_rate"]),
    (["--batch_size=2.5"], ["batch_size", "int", "2.5"]),
    (["--crop=7"], ["crop", "7"]),
    (["--optimizer=sgd"], ["adamw or muon", "sgd"]),
    (["--dtype=int8"], ["float32", "int8"]),
    (["--flip=perhaps"], ["flip", "perhaps"]),
    (["--batch_size=9", "--grad_accum=2"], ["batch_size 9", "1 x 2"]),
    (["--image_size=64"], ["image_size 64", "20"]),
    (["--data_dir=/nowhere"], ["/nowhere"]),
    (["--device=tpu"], ["tpu"]),
    (["--samples=1"], ["samples >= 2"]),
    (["--stem=conv"], ["--stem"]),
])
def test_wrong_options(data, tmp_path, args, parts, monkeypatch, capsys):
    config = write_config(tmp_path / "c.py", CONFIG)
    command = [config, f"--data_dir={data}", f"--out_dir={tmp_path / 'out'}", *args]
    refused(monkeypatch, capsys, command, parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, parts", [
    ("learnin_rate = 1", ["c.py", "learnin_rate", "learning_rate"]),
    ("n_embd = 'big'", ["n_embd", "int", "big"]),
    ("x = (", ["c.py", "SyntaxError"]),
    ("import math\nmax_iters = 10", ["data/"]),
    ("", ["max_iters", "max_minutes"]),
])
def test_wrong_configs(tmp_path, text, parts, monkeypatch, capsys):
    config = tmp_path / "c.py"
    config.write_text(text)
    refused(monkeypatch, capsys, [config, "--data_dir=data/no_such_data"], parts)


def test_a_config_is_utf8_whatever_the_locale(tmp_path):
    config = tmp_path / "c.py"
    # Windows's Notepad begins with a byte order mark
    config.write_bytes("\ufeffout_dir = 'out/Füße'  # für später\nmax_iters = 1\n".encode())
    try:
        found = train.read_options([str(config)])[0].out_dir
    except UserError as error:
        found = str(error)
    assert found == "out/Füße"


def test_the_home_folder_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "c.py").write_text("max_iters = 1\ndata_dir = '~/data'\nlr_scale = 'wte=0.5'\n")
    options, _ = train.read_options([str(tmp_path / "c.py"), "--out_dir=~/out", "--init_from",
                                     "~/start"])
    assert options.data_dir == f"{tmp_path}/data"
    assert options.out_dir == f"{tmp_path}/out"
    assert options.init_from == f"{tmp_path}/start"
    assert options.lr_scale == "wte=0.5"
    # every script's parser
    parser = Parser()
    parser.add_argument("--captions", nargs="+")
    parser.add_argument("--sheet")
    arguments = parser.parse_args(["--captions", "train=~/a.csv", "~/b.csv", "c~d", "--sheet=~/s"])
    assert arguments.captions == [f"train={tmp_path}/a.csv", f"{tmp_path}/b.csv", "c~d"]
    assert arguments.sheet == f"{tmp_path}/s"


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_val_images(tmp_path, n):
    splits = {}
    for split, count in (("train", 4), ("val", n)):
        names = [f"{split}{i}.jpg" for i in range(count)]
        splits[split] = names, [["a dog"]] * count, random_images(count, 20).numpy()
    write_dataset(tmp_path / "data", {split: splits[split] for split in splits if splits[split][0]},
                  image_size=20, vocab_size=280)
    done = start(tmp_path / "data", tmp_path / "out", check=False)
    one_line_error(done, 2, f"too few val images ({n}; training needs 2)", "--split_files")


def test_compile_without_a_compiler(data, tmp_path):
    config = write_config(tmp_path / "c.py", CONFIG)
    command = [sys.executable, "train.py", config, f"--data_dir={data}", "--compile",
               f"--out_dir={tmp_path / 'out'}"]
    environment = {**os.environ, "PATH": "", "CXX": "/no/such/compiler",
                   "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([str(part) for part in command], cwd=HERE, env=environment,
                          capture_output=True, timeout=120)
    one_line_error(done, 2, "torch.compile does not work here", "install", "--compile=False")
    assert not (tmp_path / "out").exists()


def test_a_missing_config(tmp_path):
    done = run("train.py", tmp_path / "none.py", check=False)
    one_line_error(done, 2, "none.py")


@pytest.mark.parametrize("config", sorted((HERE / "config").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_parses(config, monkeypatch):
    if "encoder" in config.read_text() and config.stem != "small":
        # the hub is not asked
        monkeypatch.setattr("pretrained.part_options", lambda encoder, decoder: ({}, None, None))
    options, source = train.read_options([str(config)])
    assert source and set(source.values()) == {str(config)}
    assert options.max_iters or options.max_minutes
