"""Errors at the command line, in words that say what to type instead."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import closest, config_dir, nearest, walk
from .foreign import names_of
from .typed import in_shell, quoted


def explain(error: BaseException, command: str = "") -> str:
    """What went wrong while Hydra composed `command`, and what would have been right; empty for any other error."""
    if isinstance(error, PermissionError):
        return f"{error}. Choose a folder that may be written: out=…."
    if isinstance(error, RecursionError):
        return "The configuration names itself without end: look at the defaults lists and interpolations."
    if "Config group override must be" in str(error):
        return _no_option(str(error))
    return _of_hydra(error, command) if isinstance(error, (HydraException, OmegaConfBaseException)) else ""


def of_another_command(command: str) -> str:
    """What to say where an experiment is named that is another command's; else empty."""
    for word in sys.argv[1:]:
        key, _, names = word.lstrip("+").partition("=")
        for name in names.split(",") if key == "experiment" else ():
            line = _owners().get(name, command)
            if (owner := line.split()[0]) != command:
                return f"experiment={name} is for {owner}, not {command}: {line}"
    return ""


def _owners() -> dict[str, str]:
    """The command that each experiment of ours is for, whole, as the first line of its file has it."""
    found = {}
    for path in Path(config_dir(), "experiment").glob("*.yaml"):
        mark, _, line = path.read_text(encoding="utf-8").partition("\n")[0].partition(" @run ")
        if mark == "#":
            found[path.stem] = " ".join(line.partition("#")[0].split())
    return found


def _of_hydra(error: BaseException, command: str) -> str:
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or [])
        if group == "experiment":
            owners = _owners()
            options = [name for name in options if owners.get(name, command).split()[0] == command]
        known = f" Options of {group}: {', '.join(options)}." if options else ""
        return f"There is no {group}={option}.{nearest(option, options)}{known}"
    if isinstance(error, OverrideParseException):
        return _unreadable(str(error.override), error.message.splitlines()[0])
    if match := re.search(r"Ambiguous value for argument '(.*?)'\n", str(error), re.DOTALL):
        key, _, value = match[1].partition("=")
        return (
            f"{match[1]} may be three things: a sweep, with -m; a list, {in_shell(f'{key}=[{value}]')}; or text with a "
            f"comma in it, {quoted(key, value)}."
        )
    if match := re.search(r"Could not override '([^']+)'\.\s+No match in the defaults", str(error)):
        return _unknown_group(match[1], command)
    if match := re.match(r"Multiple values for (\S+)\. ", str(error)):
        return f"{match[1]} is there already, to be chosen once and without +: {match[1]}=…."
    if match := re.search(r"Missing mandatory value: (\S+)", str(error)):
        return f"{match[1]} has no value yet; give it on the command line: {match[1]}=…."
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OmegaConfBaseException) and cause.full_key:
            if "is not in struct" in str(cause) and cause.parent_node is not None:
                return _unknown_key(str(cause.full_key), cause.parent_node)
            return f"{cause.full_key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    return str(error)


def _unreadable(word: str, why: str) -> str:
    key, equals, value = word.partition("=")
    if not equals:
        return f"{word!r} is not of the form key=value."
    return f"The override {word!r} cannot be read: {why}. If it is text, quote it: {quoted(key, value)}."


def _unknown_group(group: str, command: str) -> str:
    name, known = group.partition("@")[0], names_of(Path(config_dir(), f"{command.removeprefix('scoresde-')}.yaml"))
    cure = nearest(name, known) or " There are " + ", ".join(known) + "."
    return f"There is no group {name!r}.{cure}"


def _no_option(text: str) -> str:
    """What to say where a group is given something else than one of its options."""
    for word in sys.argv[1:]:
        group, _, value = word.lstrip("+~").partition("=")
        options = sorted(path.stem for path in Path(config_dir(), group).glob("*.yaml")) if group else []
        if options and value not in options:
            return f"{word}: {group} takes the name of one of its options: {', '.join(options)}."
    return text


def _unknown_key(key: str, parent: Any) -> str:
    """Names the nearest key beside it, else the nearest farther down, else all that are beside it."""
    prefix, _, last = key.rpartition(".")
    siblings = [str(name) for name in parent if name not in ("hydra", "_target_")]
    paths = [path for path, _ in walk(OmegaConf.to_container(parent), prefix) if not path.startswith("hydra")]
    below = {path.rpartition(".")[2]: path for path in paths}
    group, _, rest = key.partition(".")
    files = Path(config_dir(), group).glob("*.yaml") if rest else ()
    leaves = {path.stem: OmegaConf.to_container(OmegaConf.load(path)) for path in files}
    if has := [f"{group}={name}" for name, leaf in sorted(leaves.items()) if rest in dict(walk(leaf))]:
        return f"There is no key {key!r} in what was chosen; {' and '.join(has)} have it."
    if found := closest(last, siblings, 0.6):
        return f"There is no key {key!r}. Did you mean {'.'.join(filter(None, (prefix, found)))!r}?"
    if found := closest(last, below, 0.7):
        return f"There is no key {key!r}. Did you mean {below[found]!r}?"
    return f"There is no key {key!r}; {prefix or 'the configuration'} has {', '.join(siblings)}."
