"""Options: the fields of a dataclass, set by a config file and by the command line."""
import difflib
import inspect
import re
from dataclasses import fields
from pathlib import Path

from nanocaption.cli import Parser, UserError, expand_user


def parse_options(cls, argv, description):
    """
    Sets the fields of a dataclass from argv: first from the config file, a Python file, if one is
    given, then from --name=value arguments.

    Returns the instance and a dict that says where each option was set: "command line" or the
    config's path. Raises UserError for an unknown name or a wrong type.
    """
    parser = Parser(prog=Path(inspect.getfile(cls)).name, description=description)
    parser.add_argument("config", nargs="?", help="a Python file that sets options")
    comments = field_comments(cls)
    for field in fields(cls):
        text = f"{comments.get(field.name, '')} (default: {field.default})".strip()
        flag = dict(nargs="?", const="True") if field.type is bool else {}
        parser.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **flag)
    arguments = vars(parser.parse_args(argv))
    config = arguments.pop("config")

    options = cls()
    source = {}
    if config:
        for name, value in read_config_file(config).items():
            set_option(options, name, value, config)
            source[name] = config
    for name, value in arguments.items():
        if value is not None:
            set_option(options, name, value, "command line")
            source[name] = "command line"
    return options, source


def field_comments(cls):
    """{field's name: the comment on its line} of a dataclass and its bases."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        found = re.findall(r"(\w+): \w+ = [^#\n]+# (.*)", inspect.getsource(base))
        comments.update(found)
    return comments


def read_config_file(path):
    """Runs a Python file; returns the names it sets, except modules and names that begin with _."""
    names = {}
    try:
        # bytes: compile decodes them as UTF-8, with or without a byte order mark
        source = Path(path).read_bytes()
        exec(compile(source, path, "exec"), names)
    except OSError as error:
        raise UserError(f"cannot read config file {path}: {error.strerror}") from None
    except Exception as error:
        raise UserError(f"config file {path} fails: {type(error).__name__}: {error}") from None
    options = {}
    for name, value in names.items():
        if not name.startswith("_") and not inspect.ismodule(value):
            options[name] = value
    return options


def set_option(options, name, value, source):
    """Sets one field from a value or its text. Raises UserError, which names the source."""
    types = {field.name: field.type for field in fields(options)}
    if name not in types:
        similar = difflib.get_close_matches(name, types, 1, 0.5)
        hint = f" (did you mean {similar[0]!r}?)" if similar else ""
        raise UserError(f"{source}: unknown option {name!r}{hint}")
    wanted = types[name]
    converted = value
    if isinstance(value, str):
        converted = from_text(expand_user(value), wanted)
    elif wanted is float and type(value) is int:
        converted = float(value)
    if type(converted) is not wanted:
        raise UserError(f"{source}: {name} takes {wanted.__name__}, not {value!r}")
    setattr(options, name, converted)


def from_text(text, wanted):
    """"3" -> 3 and so on for int, float and bool; text that does not fit is returned as is."""
    if wanted is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    try:
        return wanted(text)
    except ValueError:
        return text
