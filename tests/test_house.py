"""Repository rules: allowed imports, line length, docstrings, encodings, length of main."""
import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import HERE

SCRIPTS = ("train", "sample", "evaluate", "prepare_flickr", "serve")
# each may import what stands before it, and nanocaption
FLOORS = ("model", "pretrained", "checkpoint")
FREE = ("dev", "data", "tests")  # may import anything


def python_files(folder):
    """{path relative to folder: source}, of tracked files where there is a git repository."""
    paths = [path.relative_to(folder) for path in folder.rglob("*.py")]
    if shutil.which("git"):
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
        listed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if listed.returncode == 0 and listed.stdout:
            paths = [Path(line) for line in listed.stdout.splitlines()]
    files = {}
    for path in paths:
        hidden = any(part.startswith(".") for part in path.parts)
        if not hidden and (folder / path).exists():
            files[path] = (folder / path).read_text(encoding="utf-8")
    return files


def imports(source):
    """The top-level names of all imported modules, nested imports too."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def forbidden_imports(path):
    """What the file at path, relative to the repository, must not import."""
    if path.parts[0] == "nanocaption":
        return {*FLOORS, *SCRIPTS}
    if path.stem in FLOORS:
        return {*FLOORS[FLOORS.index(path.stem):], *SCRIPTS} - {path.stem}
    if path.stem in SCRIPTS:
        return set(SCRIPTS)
    return set()


def wrong_imports(files):
    found = []
    for path, source in files.items():
        if path.parts[0] not in FREE and not path.stem.startswith("test_"):
            for name in imports(source) & forbidden_imports(path):
                found.append(f"{path} imports {name}")
    return found


def long_lines(files):
    found = []
    for path, source in files.items():
        for number, line in enumerate(source.splitlines(), 1):
            if len(line) > 100:
                found.append(f"{path}:{number} has {len(line)} columns")
    return found


def missing_docstrings(files):
    found = []
    for path, source in files.items():
        if path.parts[0] == "tests" or path.stem.startswith("test_"):
            continue
        for node in ast.parse(source).body:
            public = isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
            if public and ast.get_docstring(node) is None:
                found.append(f"{path}:{node.lineno} {node.name} has no docstring")
    return found


def locale_files(files):
    """Text files that are read or written in the locale's encoding."""
    found = []
    for path, source in files.items():
        if path.parts[0] == "tests" or path.stem.startswith("test_"):
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and is_text_file(node):
                if "encoding" not in [keyword.arg for keyword in node.keywords]:
                    found.append(f"{path}:{node.lineno}")
    return found


def is_text_file(call):
    """Whether a call, an ast.Call, is open, Path.open, read_text or write_text for text."""
    name = getattr(call.func, "attr", None) or getattr(call.func, "id", None)
    if name in ("read_text", "write_text"):
        return not call.args or name == "write_text"
    if name != "open":
        return False
    is_method = isinstance(call.func, ast.Attribute)
    arguments = call.args if is_method else call.args[1:]
    mode = getattr(arguments[0], "value", None) if arguments else "r"
    # other methods named open take a path
    return isinstance(mode, str) and set(mode) <= set("rwax+t")


def long_main(source):
    """main has fewer than 100 lines, and a while loop in it fewer than 60."""
    found = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == "main":
            sizes = [("main", node, 100)]
            for inner in ast.walk(node):
                if isinstance(inner, ast.While):
                    sizes.append(("its loop", inner, 60))
            for name, part, limit in sizes:
                n_lines = part.end_lineno - part.lineno + 1
                if n_lines >= limit:
                    found.append(f"{name} has {n_lines} lines")
    return found


def loads_torch(folder):
    """Whether prepare_flickr.py imports torch, by itself or through its parts."""
    code = "import sys, prepare_flickr; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


def test_the_house_is_in_order():
    files = python_files(HERE)
    assert {Path("train.py"), Path("nanocaption/cli.py"), Path("dev/bench.py")} <= set(files)
    assert wrong_imports(files) == []
    assert long_lines(files) == []
    assert missing_docstrings(files) == []
    assert locale_files(files) == []
    assert long_main(files[Path("train.py")]) == []
    assert not loads_torch(HERE)


@pytest.mark.parametrize("path, source", [
    ("train.py", "import sample"),
    ("evaluate.py", "def f():\n    def g():\n        from train import main"),
    ("nanocaption/cli.py", "import model"),
    ("nanocaption/cli.py", "if 1:\n    from checkpoint import load"),
    ("model.py", "import pretrained"),
    ("pretrained.py", "import checkpoint"),
    ("checkpoint.py", "from train import Options"),
])
def test_a_wrong_import_is_found(path, source):
    assert len(wrong_imports({Path(path): source})) == 1
    assert wrong_imports({Path("dev/x.py"): source, Path("tests/x.py"): source}) == []


@pytest.mark.parametrize("git", [True, False])
def test_files_are_found_without_a_repository(tmp_path, monkeypatch, git):
    """As in a source tarball, with or without git installed."""
    for name in ("train.py", "nanocaption/cli.py", ".venv/lib/x.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import torch\n")
    if not git:
        monkeypatch.setenv("PATH", "")
    assert set(python_files(tmp_path)) == {Path("train.py"), Path("nanocaption/cli.py")}


def test_other_violations_are_found(tmp_path):
    assert long_lines({Path("x.py"): f"# {'é' * 98}\n# {'x' * 99}"}) == ["x.py:2 has 101 columns"]
    source = "def f():\n    pass\n\ndef _g():\n    pass\n\ndef h():\n    'Fine.'"
    assert missing_docstrings({Path("x.py"): source}) == ["x.py:1 f has no docstring"]
    source = """
open(path)
open(path, "a")
path.open("w")
path.read_text()
path.write_text(text)
open(path, "rb")
open(path, "w", encoding="utf-8")
path.write_text(text, encoding="utf-8")
Image.open(path)
os.open(path, os.O_RDONLY)
read_text(path)
"""
    assert locale_files({Path("x.py"): source}) == [f"x.py:{line}" for line in range(2, 7)]
    main = "def main():\n" + "    pass\n" * 40 + "    while 1:\n" + "        pass\n" * 57
    assert long_main(main) == []
    assert len(long_main(main + "        pass\n")) == 1
    assert len(long_main(main + "        pass\n" * 2)) == 2
    nested = main + "        pass\n" + "        while 1:\n            pass\n"
    assert "its loop has 61 lines" in long_main(nested)
    (tmp_path / "prepare_flickr.py").write_text("import part")
    (tmp_path / "part.py").write_text("import torch")
    assert loads_torch(tmp_path)
