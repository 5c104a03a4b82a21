"""YAML files of the user's own (`--config-dir`), checked before Hydra reads them, so that a mistake names its file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from .typed import is_text

_LARGEST = 10_000  # values in one file, its aliases written out


def problem_in_options(arguments: Sequence[str]) -> str:
    """The first file of `--config-dir` that cannot be used, and why; empty if there is none.

    Args:
        arguments: the command line, without the command.
    """
    for option, following in zip(arguments, [*arguments[1:], ""], strict=False):
        name, equals, value = option.partition("=")
        if name in ("-cd", "-cp") or name.startswith(("--config-d", "--config-p")):
            for path in sorted(Path(value if equals else following).rglob("*.yaml")):
                if problem := _problem(path):
                    return f"{path}: {problem}"
    return ""


def _problem(path: Path) -> str:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        for count, node in enumerate(_nodes(root) if root else ()):
            _check(node)
            if count >= _LARGEST:
                raise ValueError(f"its aliases (&, *) stand for more than {_LARGEST:,} values")
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        return f"{error.problem or error.context}{line}."
    except RecursionError:
        return "it is nested too deep."
    except (OSError, ValueError, yaml.YAMLError) as error:
        return f"{str(error).splitlines()[0]}."
    if root is not None and not isinstance(root, yaml.MappingNode):
        return "options are lines of the form key: value."
    return ""


def _nodes(node: yaml.Node, above: tuple[yaml.Node, ...] = ()) -> Iterator[yaml.Node]:
    """The values at and below a node, aliases written out."""
    if any(node is one for one in above):
        raise ValueError(f"an alias stands for what it is in, line {node.start_mark.line + 1}")
    yield node
    if not isinstance(node, yaml.ScalarNode):
        for child in node.value:
            yield from _nodes(child[1] if isinstance(node, yaml.MappingNode) else child, (*above, node))


def _check(node: yaml.Node) -> None:
    """Refuses a tag that is not YAML's own, and a key that is there twice."""
    if "python" in node.tag or not node.tag.startswith("tag:yaml.org,2002:"):
        asks = ", it asks for a Python object" if "python" in node.tag else ""
        raise ValueError(f"the tag {node.tag} is not plain YAML{asks}")
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == "searchpath":  # Hydra imports what is on it, before anything is composed
                raise ValueError("searchpath is taken from the command line alone, not from a file")
            if is_text(str(key.value)) and value.tag.endswith((":int", ":float", ":bool", ":timestamp")):
                raise ValueError(
                    f'{key.value}: {value.value} reads as a number; quote it: {key.value}: "{value.value}"'
                )
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"the key {twice[0]!r} is there twice")
