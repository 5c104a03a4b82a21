"""YAML files of the user's own (`--config-dir`), checked before Hydra reads them, so that a mistake names its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

_LARGEST = 10_000  # values in one file, its aliases written out


def problem_in_options(arguments: Sequence[str]) -> str:
    """The first file of `--config-dir` that cannot be used, and why; empty if there is none.

    Args:
        arguments: the command line, without the command.
    """
    for name, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, equals, value = name.partition("=")
        if option in ("--config-dir", "-cd"):
            for path in sorted(Path(value if equals else following).rglob("*.yaml")):
                if problem := _problem(path):
                    return f"{path}: {problem}"
    return ""


def _problem(path: Path) -> str:
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        _count(node, {})
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{error.problem or error.context}{line}."
    except RecursionError:
        return "it is nested too deep."
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{str(error).splitlines()[0]}."
    if node is not None and not isinstance(node, yaml.MappingNode):
        return "options are lines of the form key: value."
    return ""


def _count(node: yaml.Node | None, known: dict[int, int]) -> int:
    """Values below a node, with aliases written out; each node is visited once.

    Raises:
        ValueError: there are too many, an alias holds itself, a key is there twice, or a tag asks for an object.
    """
    if node is None:
        return 0
    if "python" in node.tag or not node.tag.startswith("tag:yaml.org,2002:"):
        asks = ", it asks for a Python object" if "python" in node.tag else ""
        raise ValueError(f"the tag {node.tag} is not plain YAML{asks}")
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError(f"an alias stands for what it is in, line {node.start_mark.line + 1}")
        return known[id(node)]
    known[id(node)] = 0
    children = node.value
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"the key {twice[0]!r} is there twice")
        children = [value for _, value in node.value]
    known[id(node)] = total = 1 + sum(_count(child, known) for child in children)
    if total > _LARGEST:
        raise ValueError(f"its aliases (&, *) stand for more than {_LARGEST:,} values")
    return total
