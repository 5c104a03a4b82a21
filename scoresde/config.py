"""From configuration to objects: the only caller of `hydra.utils.instantiate`.

A `_target_` is looked up in a list of exact public names before anything is imported or called, so a configuration
(one found beside a checkpoint, say) can build what scoresde publishes and nothing else. Hydra's own block list is a
second line of defence, not the first: it has been walked around by aliases such as `logging.os.system`.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, Union, Unpack, get_args, get_origin, get_type_hints

# A configuration may build what `__all__` of scoresde and of these packages of it names, and this of other packages.
_DATA_OF_RUNS = ("runs.latent", "runs.embedded")
_PUBLISHING = ("nn", "codecs", "data", "metrics", "losses", "train", "evaluate", "runs", *_DATA_OF_RUNS, "interop")
_FOREIGN = ("torch.optim.Adam", "torch.optim.AdamW")
# Modules, and single names, that stored configurations have from older versions, and where they are now.
_MOVED = {"scoresde.loss": "scoresde.losses", "scoresde.coupling": "scoresde.losses"}
_MOVED_NAMES = {
    "scoresde.loss.LogVariance": "scoresde.nn.LogVariance",
    "scoresde.losses.LogVariance": "scoresde.nn.LogVariance",
    "scoresde.train.OdeLikelihood": "scoresde.evaluate.OdeLikelihood",
    "scoresde.train.WandbLogger": "scoresde.runs.WandbLogger",
    "scoresde.train.NullLogger": "scoresde.runs.NullLogger",
    "scoresde.data.Scaling": "scoresde.codecs.Scaling",
}
_OWN_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
_CONVERT = ("none", "partial", "object", "all")
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}
_DEPTH = 50  # of a configuration; ours is 6 deep


class ConfigError(ValueError):
    """A configuration that cannot be built: says which key, what was expected and what to do."""


class Refusal(Exception):
    """The command cannot be carried out as given. Nothing has been started; the message says what to change."""


def config_dir() -> str:
    """The folder of the Hydra tree: inside the package when installed, beside it in a checkout.

    Raises:
        FileNotFoundError: neither is there.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "conf", here.parent / "conf"):
        if (folder / "train.yaml").is_file():
            return str(folder)
    raise FileNotFoundError(f"There is no train.yaml in {here / 'conf'} or {here.parent / 'conf'}.")


@functools.cache
def targets() -> tuple[str, ...]:
    """Every `_target_` that a configuration may name without `allow_targets`: classes and functions."""
    paths = ["scoresde", *(f"scoresde.{name}" for name in _PUBLISHING)]
    modules = {path: importlib.import_module(path) for path in paths}
    ours = [
        f"{path}.{name}"
        for path, module in modules.items()
        for name in module.__all__
        if isinstance(getattr(module, name), (type, FunctionType)) and name != "load"  # which takes names to allow
    ]
    return (*ours, *_FOREIGN)


def build(node: Any, allow: Sequence[str] = (), *given: Any, key: str | None = None, **runtime: Any) -> Any:
    """The object that a node with a `_target_` describes.

    The whole tree is checked before anything in it is made: each target against the allow-list, each key against
    the parameters of its target.

    Args:
        node: a mapping with `_target_` (OmegaConf or plain; interpolations are resolved).
        allow: further exact targets, as the user gave them on the command line (`allow_targets=[my_pkg.MyNet]`).
        given, runtime: arguments known only now (a model, an event shape), by position and by name. Nodes with
            `_partial_: true` that are given none stay callables.
        key: what to call the node in messages; default its key in the configuration.

    Raises:
        ConfigError: a target that is not allowed, a key that is not a parameter, or a value its target refuses.
    """
    import hydra.utils
    from hydra.errors import InstantiationException

    name = _full_key(node) if key is None else key
    tree = _checked(node, allow, name)
    _check_keys(tree, name, runtime)
    try:
        if not given and not runtime:
            return hydra.utils.instantiate(tree)
        # by a partial, so that Hydra never copies the runtime objects
        return hydra.utils.instantiate({**tree, "_partial_": True})(*given, **runtime)
    except InstantiationException as error:
        raise _explained(error, tree, name) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{name or tree['_target_']}: {error}") from error


def build_network(
    node: Any, allow: Sequence[str] = (), *, key: str = "network", classes: int, cond_augment: int = 0, **facts: Any
) -> Any:
    """A network: with `_partial_: true` it is built with those of the facts (event_shape, classes, cond_augment where
    it is told of augmentation, and told where it is a flow map) that it takes."""
    tree = _checked(node, allow, key)
    if not tree.get("_partial_"):
        return build(node, allow, key=key)
    names, open_ended = parameters(tree["_target_"])
    facts |= {"classes": classes} | ({"cond_augment": cond_augment} if cond_augment else {})
    taken = {name: value for name, value in facts.items() if name in names or open_ended}
    ways = {"classes": (classes, "conditional=true"), "cond_augment": (cond_augment, "augment.tell=true")}
    for name, (count, by) in (ways | {"told": ("told" in facts, "denoiser.told")}).items():
        if count and name not in taken:
            raise ConfigError(f"{key}: {tree['_target_']} has no parameter {name!r}, of which {by} tells it.")
    return build(node, allow, key=key, **taken)


def renamed(tree: Any, depth: int = 0) -> Any:
    """A configuration with every `_target_` of older versions under its present name, as far down as one may nest."""
    if depth > _DEPTH:
        return tree
    if isinstance(tree, dict):
        node = {n: _today(value) if n == "_target_" else renamed(value, depth + 1) for n, value in tree.items()}
        return _with_solver(node) if node.get("_target_") == "scoresde.evaluate.OdeLikelihood" else node
    return [renamed(value, depth + 1) for value in tree] if isinstance(tree, list) else tree


def essential(node: Any) -> Any:
    """A node without what its target, if it is one of ours, does by default: what two of them are compared by."""
    if not isinstance(node, dict) or node.get("_target_") not in targets():
        return node
    signature = inspect.signature(_locate(node["_target_"])).parameters
    usual = {name: parameter.default for name, parameter in signature.items()}
    usual = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    return {n: essential(v) for n, v in node.items() if n != "_partial_" and not (n in usual and usual[n] == v)}


def _with_solver(node: dict[str, Any]) -> dict[str, Any]:
    """An `OdeLikelihood` of before, with tolerances or a budget of its own, as one that has a solver."""
    names = ("rtol", "atol", "backend", "method", "budget")
    old = {name: node[name] for name in names if name in node}
    if not old:
        return node
    calls = old.pop("budget", None)
    tolerance = {"_target_": "scoresde.Tolerance", "max_evaluations": 20_000, **old}
    solver = tolerance if calls is None else {"_target_": "scoresde.Budget", "calls": calls, "grid": None}
    return {"solver": solver, **{name: value for name, value in node.items() if name not in names}}


def _today(target: Any) -> Any:
    if not isinstance(target, str):
        return target
    module, _, name = target.rpartition(".")
    return _MOVED_NAMES.get(target, f"{_MOVED[module]}.{name}" if module in _MOVED else target)


def leaves_open(node: Any, name: str, allow: Sequence[str] = (), *, key: str) -> bool:
    """Whether the target of a node takes an argument `name` that the node does not set.

    Raises:
        ConfigError: a target that `build` refuses; nothing is imported for it.
    """
    tree = _checked(node, allow, key)
    names, open_ended = parameters(tree["_target_"])
    return name not in tree and (name in names or open_ended)


def resolved(node: Any) -> Any:
    """`node` as dicts, lists and scalars, its interpolations resolved.

    Raises:
        ConfigError: a mandatory value (`???`) is missing.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue

    if not OmegaConf.is_config(node):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key} has no value yet; give it on the command line: {key}=…") from error


def closest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The most similar of `names`, None if none is similar enough (`cutoff` in [0, 1])."""
    return next(iter(difflib.get_close_matches(name, list(names), n=1, cutoff=cutoff)), None)


def nearest(name: str, names: Iterable[str], cutoff: float = 0.5) -> str:
    """' Did you mean …?' with the closest of `names`, or an empty string."""
    found = closest(name, names, cutoff)
    return f" Did you mean {found!r}?" if found else ""


def _full_key(node: Any) -> str:
    from omegaconf import OmegaConf

    return node._get_full_key("") if OmegaConf.is_config(node) else ""


def _checked(node: Any, allow: Sequence[str], key: str) -> dict[str, Any]:
    tree = renamed(resolved(node))
    if not isinstance(tree, dict) or "_target_" not in tree:
        raise ConfigError(f"{key or 'This node'} has no _target_, so there is nothing to build; got {tree!r}.")
    _check(tree, frozenset(allow), key)
    return tree


def _check(tree: Any, allow: frozenset[str], key: str) -> None:
    """Refuses, before anything is imported for it, every target that is not on the list and all that may hide one.

    An interpolation that is still there would be resolved by Hydra after this check, and `${oc.create:…}` can become
    a node with any target.
    """
    for at, value in walk(tree, key):
        if isinstance(value, dict):
            if "_target_" in value:
                _check_target(value["_target_"], allow, f"{at}._target_" if at else "_target_")
            if value.get("_convert_", "none") not in _CONVERT:
                raise ConfigError(f"{at}._convert_ is one of {', '.join(_CONVERT)}; got {value['_convert_']!r}.")
        elif isinstance(value, str) and ("${" in value or value == "???"):
            raise ConfigError(f"{at}={value} is not a value yet; write what it stands for.")
        elif isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{at} is nan, which is no number.")
        elif not isinstance(value, (str, int, float, list, tuple, bytes, Path, NoneType)):
            raise ConfigError(f"{at} is a {type(value).__name__}; a configuration holds mappings, lists and scalars.")


def _check_target(target: Any, allow: frozenset[str], where: str) -> None:
    if not isinstance(target, str):
        raise ConfigError(f"{where} is the dotted name of a class, as text; got {target!r}.")
    if target not in allow and target not in targets():
        similar, own = nearest(target, targets(), 0.75), f"'allow_targets=[{target}]'"
        python = f"scoresde.load(…, allow_targets=[{target!r}])"
        cure = f"A network or data set of your own is allowed on the command line: {own}; or in Python: {python}."
        raise ConfigError(f"{where}={target} is not a name that a configuration may call.{similar} {cure}")


def walk(node: Any, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(key, value) of `node` and of everything below it, from the top down."""
    if depth > _DEPTH:
        raise ConfigError(f"{key[:60]}… is nested more than {_DEPTH} deep.")
    yield key, node
    if isinstance(node, dict):
        for name, value in node.items():
            yield from walk(value, f"{key}.{name}" if key else str(name), depth + 1)
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from walk(value, f"{key}[{index}]", depth + 1)


def _check_keys(tree: Any, key: str, runtime: Mapping[str, Any]) -> None:
    """Refuses keys that are no parameter of their target and names the nearest that is; and scalars of a wrong type."""
    for at, node in walk(tree, key):
        if not isinstance(node, dict) or "_target_" not in node:
            continue
        target, prefix = node["_target_"], f"{at}." if at else ""
        kinds, open_ended = parameters(target)
        for name in [*node, *(runtime if node is tree else ())]:
            if name not in _OWN_KEYS and name not in kinds and not open_ended:
                known = f"{nearest(name, kinds)} It takes {', '.join(kinds)}."
                raise ConfigError(f"{prefix}{name}: {target} has no parameter {name!r}.{known}")
        for name in node.keys() & kinds.keys():
            if expected := _expected(node[name], kinds[name]):
                raise ConfigError(f"{prefix}{name} is {expected}; got {node[name]!r}.")


def parameters(target: str) -> tuple[dict[str, Any], bool]:
    """(name -> annotation of each parameter of `target`, whether it takes any others).

    Keyword arguments that a `**kwargs: Unpack[SomeTypedDict]` lists are parameters. Annotations of other packages are
    not relied on: theirs are `Any`.
    """
    found, hints, open_ended = _locate(target), {}, False
    if target in targets():
        with contextlib.suppress(NameError):  # a name that is there for type checkers only
            hints = get_type_hints(found.__init__ if isinstance(found, type) else found)  # type: ignore[misc]
    kinds: dict[str, Any] = {}
    for name, parameter in inspect.signature(found).parameters.items():
        kind = hints.get(name, Any)
        if get_origin(kind) is Unpack:
            kinds |= get_type_hints(get_args(kind)[0])
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            open_ended = True
        elif name != "self":
            kinds[name] = kind
    return kinds, open_ended


def _expected(value: Any, kind: Any) -> str:
    """What an annotation asks for, in a user's words, where a scalar is none of it; else empty.

    What is no scalar is left to the constructor.
    """
    if not isinstance(value, (bool, int, float, str)):
        return ""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    misfits = [_misfit(value, part) for part in parts]
    return " or ".join(misfits) if all(misfits) else ""


def _misfit(value: bool | int | float | str, part: Any) -> str:
    """What one type asks for, where a scalar is not of it; else empty."""
    if get_origin(part) is Literal:
        return "" if value in get_args(part) else " or ".join(map(repr, get_args(part)))
    if part in _SCALARS:
        return "" if type(value) is part or (part is float and type(value) is int) else _SCALARS[part]
    # an object or a function, which no scalar is; a Path may be made from one
    ours = isinstance(part, type) and part.__module__.split(".")[0] in ("scoresde", "torch")
    return "a mapping with _target_" if ours or get_origin(part) is Callable else ""


def _locate(target: str) -> Callable[..., Any]:
    module, _, name = target.rpartition(".")
    if target not in targets() and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # last, so that no file there stands in for a package
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever a user's file raises
        raise ConfigError(
            f"{target} cannot be imported: {type(error).__name__}: {error}. Is the name right, and is its package "
            f"installed or its file in {os.getcwd()}?"
        ) from error
    if not callable(found):
        raise ConfigError(f"{target} is a {type(found).__name__}, which cannot be called; name a class or a function.")
    return found


def _explained(error: Exception, tree: Mapping[str, Any], name: str) -> ConfigError:
    """Hydra's instantiation error with its own wording replaced by the cause and the full key."""
    text = str(error)
    inner = text.rsplit("full_key:", 1)[1].strip() if "full_key:" in text else ""
    where = ".".join(part for part in (name, inner) if part) or str(tree["_target_"])
    cause = error.__cause__
    return ConfigError(f"{where}: {cause if cause is not None else text}")
