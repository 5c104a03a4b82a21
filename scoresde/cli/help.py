"""What `--help` says of each key: the comment beside it in conf/, else what the docstring of its target says."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ..config import config_dir, targets

_COLUMN = 43  # where the words begin
_WIDTH = 76  # of the words, at most
_LINE = re.compile(r"( *)(\"?[\w.]+\"?):(?: +(.*?))?(?: +# (.*))?$")


def keys(*, _root_: DictConfig) -> str:
    """Every key of the composed configuration, its value, and half a line of words; for a template of Hydra's help."""
    tree: Any = OmegaConf.to_container(_root_, resolve=False)
    runtime = HydraConfig.get()
    said = comments(str(runtime.job.config_name), dict(runtime.runtime.choices))
    lines = []
    for path, value, target in leaves({name: node for name, node in tree.items() if name != "hydra"}):
        start = f"{'  ' * (len(path) - 1)}{path[-1]}:{'' if isinstance(value, dict) and value else ' ' + _typed(value)}"
        words = said.get(path) or described(target).get(path[-1], "")
        lines.append(f"{start:<{_COLUMN}} # {words}" if words else start)
    return "\n".join(lines).replace("$", "$$")


def leaves(
    tree: Mapping[str, Any], above: tuple[str, ...] = (), target: str = ""
) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """(path, value, target of the mapping that it is in) of every key, from the top down."""
    target = str(tree.get("_target_", target if above else ""))
    for name, value in tree.items():
        yield (*above, str(name)), value, target
        if isinstance(value, dict):
            yield from leaves(value, (*above, str(name)))


def comments(primary: str, choices: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """The comment beside each key: of the files of the chosen options, and of the command's own file.

    Args:
        primary: name of the command's file.
        choices: option by group, as Hydra has them: `sde`, or `sampler@samplers.ode`.
    """
    folder = Path(config_dir())
    found: dict[tuple[str, ...], str] = {}
    for group, option in choices.items():
        name, _, package = group.partition("@")
        path = folder / name / f"{option}.yaml"
        if not group.startswith("hydra/") and option is not None and path.is_file():
            header = re.search(r"^# @package (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            package = package or (header[1].replace("_global_", "") if header else name.replace("/", "."))
            found |= _beside(path, tuple(package.split(".")) if package else ())
    return found | _beside(folder / f"{primary}.yaml", ())


def _beside(path: Path, above: tuple[str, ...]) -> dict[tuple[str, ...], str]:
    """The comments of a file, those of the options that it begins with first; a comment goes down to no other key."""
    text = path.read_text(encoding="utf-8")
    found: dict[tuple[str, ...], str] = {}
    for base in yaml.safe_load(text).get("defaults", ()) if "defaults:" in text else ():
        if isinstance(base, str) and (other := path.with_name(f"{base}.yaml")).is_file():
            found |= _beside(other, above)
    stack: list[tuple[int, str]] = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            indent, name, _, words = match.groups()
            stack = [*(entry for entry in stack if entry[0] < len(indent)), (len(indent), name.strip('"'))]
            if words:
                found[(*above, *(entry[1] for entry in stack))] = words
    return found


@functools.cache
def described(target: str) -> dict[str, str]:
    """The first clause that the docstring of one of our targets has for each argument, and of itself as `_target_`."""
    if target not in targets():
        return {}
    module, _, name = target.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return _arguments(inspect.getdoc(found) or "") if inspect.isfunction(found) else _of_class(found)


def _of_class(found: type) -> dict[str, str]:
    """Of its bases first; and of what an argument `see `Other`` is handed on to."""
    said: dict[str, str] = {}
    for base in reversed(found.__mro__):
        for name in re.findall(r"see `(\w+)`", base.__doc__ or ""):
            if inspect.isclass(other := vars(sys.modules[base.__module__]).get(name)):
                said |= _of_class(other)
        said |= _arguments(base.__doc__ or "")
    return said | {"_target_": _clause(found.__doc__ or "")}


def _arguments(doc: str) -> dict[str, str]:
    """`name: words` and `one, other: words` of the sections Args and Attributes."""
    found: dict[str, str] = {}
    for section in re.findall(r"^(?:Args|Attributes):\n((?: .*\n?|\n)*)", inspect.cleandoc(doc), re.MULTILINE):
        for names, words in re.findall(r"^    ([\w, ]+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE):
            found |= dict.fromkeys(names.split(", "), _clause(words))
    return found | {"_target_": _clause(doc)}


def _clause(text: str) -> str:
    """The first sentence, cut at a clause's end where it is longer than half a line."""
    text = re.split(r"(?<!\.)(?<!\bal)(?<!\beqs)(?<!\beq)\.(?:\s|$)", re.sub(r"\s+", " ", text.strip()))[0].replace(
        "`", ""
    )
    while len(text) > _WIDTH and (cut := max(text.rfind(mark) for mark in ("; ", ": ", ", ", " ("))) > 0:
        text = text[:cut]
    return text


def _typed(value: Any) -> str:
    """A value as it is typed."""
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=1000).removesuffix("\n...\n").strip()
    )
