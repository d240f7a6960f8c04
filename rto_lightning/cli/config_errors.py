"""Turns the parser's multi-line complaints about a configuration into one sentence.

jsonargparse reports a mistake as an indented tree of every type that was tried. `explain` finds the branch
that went deepest, joins the keys on the way to it, looks the full key up in the configuration files to say in
which file and line it stands, and proposes the accepted key that is spelled most alike.
"""

import argparse
import difflib
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml

from rto_lightning.errors import UserError

_KEY = re.compile(r'Parser key "(?P<key>[^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '(?P<path>[^']+)':")
_UNKNOWN = re.compile(
    r"(?:Subcommand '[^']*' does not accept option '(?P<sub>[^']+)'"
    r"|Group '(?P<group>[^']+)' does not accept option '(?P<option>[^']+)'"
    r"|Option '(?P<plain>[^']+)' is not accepted"
    r"|unrecognized arguments: --(?P<flag>[^\s=]+))"
)
_TYPE = re.compile(r"Expected (?:a|an) (?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")
_NO_CLASS = re.compile(r"(?P<why>module '(?P<module>[^']+)' has no attribute '(?P<name>[^']+)'|No module named .*)")
_NOT_SUBCLASS = re.compile(
    r"(?:Import path |Expected ')(?P<path>[^\s']+)'? (?:does not correspond to|to be) a subclass of "
    r"(?:<class ')?(?P<base>\w+)"
)
_NO_HELP = re.compile(r"--(?P<key>[\w.]+)\.help: Expected a dot import path string: (?P<name>\w+)")
_NO_SHORT_NAME = re.compile(r"Expected a dot import path string: (?P<name>\w+)")
# Of a class that is not instantiated at once, such as an optimizer; its class path comes last.
_FACTORY = re.compile(r"expects a function or a callable class: (?P<why>.*?)\.* Got value: (?P<value>.*)")
_FACTORY_KEY = re.compile(r"expects a function or a callable class: (?=Parser key )")
_CLASS_PATH = re.compile(r"class_path='(?P<path>[^']+)'")
_LITERAL = re.compile(r"typing\.Literal\[(.*)\]")
_NO_FILE = re.compile(r'Parser key "config": .*does not exist: \'?(?P<path>[^\']+)')
_REQUIRED = re.compile(r"the following arguments are required: (?P<keys>.+)")


class ConfigurationError(UserError):
    """A configuration that cannot be read: an unknown key, a value of the wrong type, a missing file.

    The command ends with status 2, as it does for every mistake on a command line.
    """

    exit_status = 2


class CommandParser(argparse.ArgumentParser):
    """Reads the options of a command of ours, and raises a `ConfigurationError` for those that it cannot read."""

    def error(self, message: str) -> NoReturn:
        """Raises, where argparse would end the process."""
        raise ConfigurationError(f"{message}; `{self.prog} --help` lists the options.")


@dataclass
class _Branch:
    """One leaf of the parser's tree: the keys and class paths on the way to it, and what it says."""

    keys: list[str]
    classes: list[str]
    text: str


@dataclass
class _Level:
    indent: int
    keys: list[str] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)


def check_config_files(config_files: Sequence[str]) -> None:
    """Checks that every configuration file exists and holds a YAML mapping.

    It runs before the heavy imports, so that a misspelled path is answered at once.

    Raises:
        ConfigurationError: If a file is missing, is not YAML, or holds something else than a mapping.
    """
    for name in config_files:
        if name.lstrip().startswith("{") or "\n" in name:
            continue  # settings given in place, which the parser takes too
        path = Path(name)
        if not path.is_file():
            raise ConfigurationError(f"the configuration file {name} does not exist; check the path after --config.")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{name} is not a YAML file: {describe_yaml_error(error)}.") from error
        if not isinstance(content, dict):
            raise ConfigurationError(
                f"{name} holds no settings; a configuration is a YAML mapping such as `trainer: {{...}}`."
            )


def describe_yaml_error(error: Exception) -> str:
    """Says in a few words, with the line, why a text is not YAML."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"{problem} in line {mark.line + 1}" if mark is not None else problem


def explain(message: str, config_files: Sequence[str] = (), accepted: Sequence[str] = ()) -> str:
    """Says in one sentence what a message of the parser means.

    Args:
        message: What jsonargparse gave, often a tree of many lines.
        config_files: The files given by `--config`, in their order.
        accepted: The dotted keys that the parser accepts at the top, for proposals.

    Returns:
        A sentence that names the key, and the file and line if the key stands in a file.
    """
    if match := _NO_FILE.search(message):
        return f"the configuration file {match['path']} does not exist; check the path after --config."
    if match := _REQUIRED.match(message):
        return _explain_required(match["keys"], config_files)
    if match := _NO_HELP.match(message):
        from rto_lightning.cli.short_names import explain_name  # imports torch

        return f"--{match['key']}.help: {explain_name(match['key'], match['name'])}"
    branches = [branch for branch in _branches(message) if not _is_filler(branch.text)]
    if not branches:
        return _one_line(message)
    if "<class 'jsonargparse._util.NestedArg'>" in message:
        config_files = ()  # it stands on the command line, whatever the files say
    # The first type that was tried is the one the user most likely meant, unless another got further down.
    branch = max(branches, key=lambda b: (len(b.classes), len(b.keys), bool(_UNKNOWN.search(b.text))))
    key = ".".join(branch.keys)
    if match := _UNKNOWN.search(branch.text):
        option = match["sub"] or match["option"] or match["plain"] or match["flag"]
        unknown = ".".join([*branch.keys, *([match["group"]] if match["group"] else []), option])
        return _explain_unknown(unknown, branch, config_files, accepted)
    where, key = _locate(key, config_files)
    if match := _REQUIRED.search(branch.text):
        return f"{where}{_missing(f'{key}.init_args.{name}' for name in match['keys'].split(', '))}."
    if match := _NOT_SUBCLASS.search(branch.text):
        return f"{where}`{key}.class_path`: {match['path']} is no {match['base']}."
    if match := _NO_SHORT_NAME.match(branch.text):
        from rto_lightning.cli.short_names import explain_name  # imports torch

        return f"{where}`{key}`: {explain_name(key, match['name'])}"
    if match := _NO_CLASS.match(branch.text):
        name = f"{match['module']}.{match['name']}" if match["module"] else branch.classes[-1]
        return f"{where}`{key}.class_path`: cannot import {name} ({match['why']})."
    if branch.text.startswith("Expected an import path or a subclass spec"):
        given = branch.text.rpartition("but got ")[2]
        return f"{where}`{key}` must be the name of a class or a mapping of `class_path` and `init_args`, not {given}."
    if match := _TYPE.search(branch.text):
        wanted = [_TYPE.search(other.text) for other in branches if other.keys == branch.keys]
        found = [other["type"] for other in wanted if other is not None]
        # A name of a class is taken wherever an instance is; whoever mistypes a number means none.
        types = _join_types([name for name in found if not name.startswith("dot import path")] or found)
        given = match["value"] or _given_value(message)
        return f"{where}`{key}` must be {types}" + (f", not {given}." if given else ".")
    if branch.text.startswith("Not a valid subclass of"):
        base = branch.text.split()[-1]
        return f"{where}`{key}` must be a mapping of `class_path` (a {base}) and `init_args` and nothing else."
    if "Unable to load config" in branch.text:
        return f"{where}`{key}` must be a mapping of settings or the path of a YAML file."
    return f"{where}`{key}`: {_one_line(branch.text).removesuffix('.')}." if key else _one_line(branch.text)


def _branches(message: str) -> Iterator[_Branch]:
    """Walks the indented tree and gives each line that is neither a key nor a class as a leaf."""
    stack = [_Level(-1)]
    for line in filter(str.strip, message.splitlines()):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        if text.startswith("- "):
            text, indent = text[2:], indent + 1
        if match := _FACTORY_KEY.search(text):  # of a class as `_FACTORY` has it, told about one of its settings
            text = text[match.end() :]
        while stack[-1].indent >= indent:
            stack.pop()
        top = stack[-1]
        if match := _CLASS.match(text):
            stack.append(_Level(indent, top.keys, [*top.classes, match["path"]]))
            text = text[match.end() :].strip()
        elif match := _KEY.match(text):
            keys = top.keys if top.keys[-1:] == [match["key"]] else [*top.keys, match["key"]]
            stack.append(_Level(indent, keys, top.classes))
            text = text[match.end() :].strip()
        classes = stack[-1].classes
        if match := _FACTORY.search(text):
            found = _CLASS_PATH.search(match["value"])
            classes, text = [*classes, found["path"] if found else match["value"]], match["why"]
        if text:
            yield _Branch(stack[-1].keys, classes, text)


def _is_filler(text: str) -> bool:
    return text.startswith(
        (
            "Does not validate against",
            "Subtypes:",
            "Errors:",
            "Given value",
            "Expected a <class 'NoneType'>",
            "Expected a path but ",
            "Subclass types expect",
            "a class path (str)",
            "a dict with",
        )
    )


def _explain_required(keys: str, config_files: Sequence[str]) -> str:
    names = sorted((key.strip().split(".", 1)[-1] for key in keys.split(",")), reverse=True)
    if not {"model", "data"}.issuperset(names):
        return f"{_missing(names)}."
    if config_files:
        return f"{', '.join(config_files)}: {_missing(names)}; give `class_path` and `init_args`."
    return f"{_missing(names)}; give a configuration file with --config FILE.yaml."


def _missing(names: Iterable[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return f"{' and '.join(quoted)} {'is' if len(quoted) == 1 else 'are'} not set"


def _explain_unknown(unknown: str, branch: _Branch, config_files: Sequence[str], accepted: Sequence[str]) -> str:
    if branch.classes:
        inner = unknown[len(".".join(branch.keys)) + 1 :] if branch.keys else unknown
        accepted = _accepted_by_class(branch.classes[-1])
        unknown = ".".join([*branch.keys, cut := _shortest_unknown(inner, accepted)])
    else:
        unknown = cut = _shortest_unknown(unknown, accepted)
    parent, _, name = cut.rpartition(".")
    siblings = _children(accepted, parent)
    close = difflib.get_close_matches(name, siblings, n=1)
    hint = "."
    if close:
        hint = f"; did you mean `{close[0]}`?"
    elif siblings:
        hint = f"; known there: {', '.join(siblings)}."
    where, unknown = _locate(unknown, config_files)
    return f"{where}unknown key `{unknown}`{hint}"


def _shortest_unknown(key: str, accepted: Sequence[str]) -> str:
    """Cuts `modell.class_path` to `modell` where no accepted key begins with `modell`."""
    parts = key.split(".")
    for count in range(1, len(parts) + 1):
        head = ".".join(parts[:count])
        if accepted and not any(name == head or name.startswith(head + ".") for name in accepted):
            return head
    return key


def _children(accepted: Sequence[str], parent: str) -> list[str]:
    prefix = parent + "." if parent else ""
    return sorted({name[len(prefix) :].split(".")[0] for name in accepted if name.startswith(prefix)} - {""})


def _accepted_by_class(class_path: str) -> list[str]:
    """The dotted keys of a class's settings; empty when they cannot be told."""
    from jsonargparse import ArgumentParser

    try:
        module, _, name = class_path.rpartition(".")
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(getattr(importlib.import_module(module), name), fail_untyped=False)
        return list(parser.get_defaults(skip_validation=True).keys())
    except Exception:  # a proposal is a courtesy: no failure of it may hide the mistake itself
        return []


def _locate(key: str, config_files: Sequence[str]) -> tuple[str, str]:
    """Finds a dotted key in the configuration files, the last file first.

    Returns:
        "FILE line N: " and the key as spelled there (with `init_args`); "" and the key if it is nowhere.
    """
    for name in reversed(config_files):
        try:
            node = yaml.compose(Path(name).read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except (OSError, yaml.YAMLError):
            continue
        if node is not None and (found := _find(node, key.split("."), [])) is not None:
            line, spelled = found
            return f"{name} line {line}: ", spelled
    return "", key


def _find(node: yaml.Node, parts: list[str], path: list[str]) -> tuple[int, str] | None:
    if isinstance(node, yaml.SequenceNode):  # the items of a list have no key of their own in the message
        return next((found for item in node.value if (found := _find(item, parts, path))), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    children = {key.value: (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    if parts[0] in children:
        key, value = children[parts[0]]
        spelled = [*path, parts[0]]
        if len(parts) == 1:
            return key.start_mark.line + 1, ".".join(spelled)
        return _find(value, parts[1:], spelled)
    if "init_args" in children:
        return _find(children["init_args"][1], parts, [*path, "init_args"])
    return None


def _join_types(types: Sequence[str]) -> str:
    """`a number or one of 'a', 'b'` from the parser's names of the types of a union."""
    choices = [match[1] for text in types if (match := _LITERAL.fullmatch(text))]
    names = [_type_name(text) for text in types if not _LITERAL.fullmatch(text)]
    if choices:
        names.append("one of " + ", ".join(choices))
    return " or ".join(dict.fromkeys(names))


def _type_name(text: str) -> str:
    if match := re.fullmatch(r"<class '(?:.*\.)?(\w+)'>", text):
        names = {"str": "a text", "int": "a whole number", "float": "a number", "bool": "true or false"}
        return names.get(match[1], f"a {match[1]}")
    return text


def _given_value(message: str) -> str:
    match = re.search(r"Given value: (.*?)(?:\. Got value: .*)?$", message, re.MULTILINE)
    return match[1] if match and len(match[1]) < 80 else ""


def _one_line(text: str) -> str:
    """Joins the lines of a message, and cuts it where it gets too long to read."""
    line = " ".join(text.split())
    return line if len(line) <= 400 else line[:400] + " ..."
