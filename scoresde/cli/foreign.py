"""What a configuration asks Hydra itself for, looked at before Hydra does any of it, and keys that no command has.

Hydra builds its callbacks, launchers, sweepers and log handlers past `config.build`, and sets environment variables; a
file of experiments from elsewhere may name them. Targets are of a list here as well, and what else runs code is taken
from the command line alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from ..config import Refusal, closest, config_dir, walk
from ..runs.redact import redacted

_TARGETS = (
    "scoresde.cli._hydra.OutputFolder",
    "scoresde.sweep.sweep.SweepSummary",
    *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler", "logging.Formatter"),
    "colorlog.ColoredFormatter",
)
# Hydra looks these up among the plugins that are installed.
_PLUGINS = ("hydra.launcher._target_", "hydra.sweeper._target_")
_BUILT = ("hydra.callbacks", "hydra.launcher", "hydra.sweeper", "hydra.job_logging", "hydra.hydra_logging")
_COMMANDS = r"hydra\.launcher\.(setup|srun_args|additional_parameters)\b"  # lines that a shell runs for submitit
_HARMLESS = re.compile(r"\$\{(hydra(\.\w+)+|now:[^{}]*|oc\.env:[^{}]*)\}")


class CheckedLoader(ConfigLoaderImpl):
    """Composes a configuration, that of each job of a sweep too, and looks at it before Hydra acts on it."""

    def load_configuration(
        self, config_name: str | None, overrides: list[str], run_mode: RunMode, *args: Any, **kwargs: Any
    ) -> DictConfig:
        config = super().load_configuration(config_name, overrides, run_mode, *args, **kwargs)
        check_hydra(config)
        check_names(config, Path(config_dir(), f"{config_name}.yaml"))
        return config


def check_hydra(config: DictConfig) -> None:
    """Refuses what a file may not ask Hydra for.

    Raises:
        Refusal: a target that is not allowed; commands or environment variables that nobody typed; a secret that
            submitit would write into its files.
    """
    hydra: Any = {"hydra": OmegaConf.to_container(config.hydra, resolve=False)}
    overrides = hydra["hydra"]["overrides"]
    words = [*overrides["hydra"], *overrides["task"]]
    given = {word.lstrip("+").partition("=")[0] for word in words}
    names = OmegaConf.select(config, "allow_targets") if "allow_targets" in given else None
    allowed = (*_TARGETS, *(names or ()))
    for key, value in _leaves(hydra):
        if key in _PLUGINS:
            continue
        last, typed = key.rpartition(".")[2], any(key == name or key.startswith(f"{name}.") for name in given)
        built = key.startswith(_BUILT)
        if last in ("_target_", "()") or (last == "class" and "_logging." in key):
            if value not in allowed:
                cure = f"It is allowed on the command line: 'allow_targets=[{value}]'."
                raise Refusal(f"{key}={value} is not a name that a configuration may call. {cure}")
        elif built and not typed and "${" in _HARMLESS.sub("", str(value)):
            raise Refusal(f"{key}={value} is not a value yet; write what it stands for.")
        elif "_logging." in key and re.match(r"(ext|cfg)://(?!sys\.std(out|err)$)", str(value)):
            raise Refusal(f"{key}={value} names an object; ext://sys.stdout and ext://sys.stderr may be named.")
        elif last == "filename" and not typed and not re.fullmatch(r"\$\{hydra\.runtime\.output_dir\}/[^/]+", value):
            raise Refusal(f"{key}={value} is taken from the command line alone, not from a file.")
        elif key.startswith("hydra.job.env_set.") and not typed and os.environ.get(last) != value:
            raise Refusal(f"{key} is taken from the command line alone, not from a file: ++{key}={value}.")
        elif re.match(_COMMANDS, key) and value and not typed:
            raise Refusal(f"{key}={value} is taken from the command line alone, not from a file.")
    if "submitit" in str(hydra["hydra"]["launcher"].get("_target_")):
        for (key, value), (_, hidden) in zip(*map(_leaves, (hydra, redacted(hydra))), strict=False):
            if value != hidden:
                where = f"{key} ({hidden})" if key.startswith("hydra.overrides") else key
                raise Refusal(
                    f"{where} reads as a secret, and submitit would keep it in files of the sweep's folder. "
                    "Give it as an environment variable, which jobs inherit."
                )


def check_names(config: DictConfig, primary: Path) -> None:
    """Refuses a key that was typed with + and belongs to nothing, and one of a file that is a known one misspelt.

    Raises:
        Refusal: names it, and the nearest.
    """
    if not primary.is_file():
        return
    known = names_of(primary)
    words: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    typed = {re.split(r"[.@=]", word.lstrip("+"))[0] for word in words if word.startswith("+")}
    for name in map(str, [*typed, *config]):
        near = closest(name, known, 0.6 if name in typed else 0.8)
        if name not in known and (name in typed or near):
            cure = f" Did you mean {near!r}?" if near else f" There are {', '.join(known)}."
            raise Refusal(f"There is no key {name!r}.{cure}")


def names_of(primary: Path) -> list[str]:
    """The groups and keys of a command, whose configuration is in the file `primary`."""
    tree: Any = OmegaConf.to_container(OmegaConf.load(primary))
    groups = [str(name) for entry in tree.pop("defaults") if isinstance(entry, dict) for name in entry]
    return [*(name for name in groups if "/" not in name), *map(str, tree)]


def _leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    return ((key, value) for key, value in walk(tree) if not isinstance(value, (dict, list)))
