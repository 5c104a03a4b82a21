"""Hydra at the door: starting a task, and errors that say what to type instead."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.main import main as hydra_main
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..config import ConfigError, Refusal, build, closest, config_dir, nearest
from ..runs.redact import guard, redacted_text
from ..sampling import Sampler
from ..sweep.sweep import launching
from .own_options import problem_in_options


def launch(task: Callable[[DictConfig], Any], config_name: str) -> None:
    """Composes `config_name` with the command line and runs `task`; exits with 1 on any error.

    What the user can mend is told in a few lines. HYDRA_FULL_ERROR=1 shows the whole trace.
    """
    from ..evaluate.shards import ShardError
    from ..ode import SolverError
    from ..runs.checkpoint import CheckpointError
    from ..train.trainer import TrainingDiverged
    from ..train.world import ProcessLost

    OmegaConf.register_new_resolver("command", name_of_command, replace=True)
    guard()  # Hydra logs and prints the overrides of every job
    if problem := problem_in_options(sys.argv[1:]) or _of_another_command(f"scoresde-{config_name}"):
        sys.exit(f"error: {problem}")
    full = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
    try:
        launching(hydra_main(version_base="1.3", config_path=config_dir(), config_name=config_name)(task))
    except (
        Refusal, HydraException, OmegaConfBaseException, SolverError, CheckpointError, ProcessLost, ShardError,
        TrainingDiverged,
    ) as error:  # fmt: skip
        OutputFolder.remove_created()
        if full:
            raise
        print(f"error: {explain(error, f'scoresde-{config_name}')}", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        OutputFolder.remove_created()
        if full or not (wrong := _no_configuration(error)):
            raise
        print(f"error: {wrong}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        how = "with resume=auto continues from the last checkpoint" if config_name == "train" else "goes on from here"
        print(f"stopped; the same command {how}", file=sys.stderr)
        sys.exit(130)


def name_of_command(run: str) -> str:
    """`step-00000010-3fa9c2e1`: the newest checkpoint of `run`, and a hash of the command line.

    The same for every process of `torchrun`, and for the same command typed again.
    """
    steps = [path.name for path in Path(run, "checkpoints").glob("step-*")]
    digest = hashlib.sha256("\0".join(sys.argv[1:]).encode()).hexdigest()
    return f"{max(steps, default='step')}-{digest[:8]}"


class OutputFolder(Callback):
    """Remembers which folders Hydra is about to make, so that a refused command leaves none of them behind."""

    created: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "run" in list(config):
            run = "???" if OmegaConf.is_missing(config, "run") else config.run
            if not Path(str(run)).is_dir():
                # Hydra swallows any other exception of a callback
                raise SystemExit(f"error: run={run} is no folder; give the output folder of scoresde-train: run=….")
        self._check(config.hydra.run.dir)
        self._remember(Path(str(config.hydra.run.dir)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._check(config.hydra.sweep.dir)
        self._remember(Path(str(config.hydra.sweep.dir)))

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        note = Path(str(config.hydra.sweep.dir), "multirun.yaml")  # Hydra's own, with everything that was typed
        if in_sweep() and note.is_file():
            text = note.read_text(encoding="utf-8")
            if (clean := redacted_text(text)) != text:
                note.write_text(clean, encoding="utf-8")

    @staticmethod
    def _check(folder: Any) -> None:
        if not str(folder or "").strip():
            raise SystemExit("error: out= is empty; give the folder to write to: out=…, or leave it away.")

    @staticmethod
    def _remember(folder: Path) -> None:
        OutputFolder.created = [path for path in (folder, *folder.parents) if not path.exists()]

    @staticmethod
    def remove_created() -> None:
        """Removes the folders made for this command, if nothing but Hydra's own note is in them."""
        for path in OutputFolder.created:
            with contextlib.suppress(OSError):
                if {entry.name for entry in path.iterdir()} == {"multirun.yaml"}:
                    (path / "multirun.yaml").unlink()
                path.rmdir()  # fails, as it should, where there is anything else
        OutputFolder.created = []


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turns what goes wrong while objects are built and inputs read into a `Refusal`."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, OmegaConfBaseException) as error:
        raise Refusal(explain(error)) from error


def output_folder() -> Path:
    """The folder of this job."""
    return Path(HydraConfig.get().runtime.output_dir)


def choice(group: str) -> str:
    """The option chosen of a config group."""
    return str(HydraConfig.get().runtime.choices[group])


def in_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


def explain(error: BaseException, command: str = "") -> str:
    """What went wrong in `command`, and the nearest thing that would have been right."""
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or [])
        if group == "experiment":
            owners = _owners()
            options = [name for name in options if owners.get(name, command).split()[0] == command]
        known = f" Options of {group}: {', '.join(options)}." if options else ""
        return f"There is no {group}={option}.{nearest(option, options)}{known}"
    if isinstance(error, OverrideParseException):
        return f"The override {error.override!r} cannot be read: {error.message.splitlines()[0]}."
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


def _owners() -> dict[str, str]:
    """The command that each experiment of ours is for, whole, as the first line of its file has it."""
    found = {}
    for path in Path(config_dir(), "experiment").glob("*.yaml"):
        mark, _, line = path.read_text(encoding="utf-8").partition("\n")[0].partition(" @run ")
        if mark == "#":
            found[path.stem] = " ".join(line.partition("#")[0].split())
    return found


def _of_another_command(command: str) -> str:
    """What to say where an experiment is named that is another command's; else empty."""
    for word in sys.argv[1:]:
        key, _, names = word.lstrip("+").partition("=")
        for name in names.split(",") if key == "experiment" else ():
            line = _owners().get(name, command)
            if (owner := line.split()[0]) != command:
                return f"experiment={name} is for {owner}, not {command}: {line}"
    return ""


def _no_configuration(error: Exception) -> str:
    """What to say where Hydra may not write, is given no option of a group, or files name each other; else empty."""
    if isinstance(error, PermissionError):
        return f"{error}. Choose a folder that may be written: out=…."
    if isinstance(error, RecursionError):
        return "The configuration names itself without end: look at the defaults lists and interpolations."
    if "Config group override must be" not in str(error):
        return ""
    for word in sys.argv[1:]:
        group, _, value = word.lstrip("+~").partition("=")
        options = sorted(path.stem for path in Path(config_dir(), group).glob("*.yaml")) if group else []
        if options and value not in options:
            return f"{word}: {group} takes the name of one of its options: {', '.join(options)}."
    return str(error)


def _unknown_key(key: str, parent: Any) -> str:
    """The nearest sibling first, then the nearest key farther down."""
    prefix, _, last = key.rpartition(".")
    siblings = [str(name) for name in parent if name not in ("hydra", "_target_")]
    below = {path.rpartition(".")[2]: path for path in _paths(parent, prefix)}
    if found := closest(last, siblings, 0.6):
        return f"There is no key {key!r}. Did you mean {'.'.join(filter(None, (prefix, found)))!r}?"
    if found := closest(last, below, 0.7):
        return f"There is no key {key!r}. Did you mean {below[found]!r}?"
    return f"There is no key {key!r}; {prefix or 'the configuration'} has {', '.join(siblings)}."


def _paths(node: Any, prefix: str = "") -> Iterator[str]:
    for name in node:
        if name == "hydra" and not prefix:
            continue
        path = f"{prefix}.{name}" if prefix else str(name)
        yield path
        child = None if OmegaConf.is_missing(node, name) else node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            yield from _paths(child, path)


def allowed(cfg: DictConfig) -> list[str]:
    """`allow_targets` of the command line."""
    names = OmegaConf.to_container(cfg.allow_targets)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"allow_targets is a list of dotted names: allow_targets=[my_package.MyNet]; got {names!r}.")
    if names and not any(word.lstrip("+").startswith("allow_targets=") for word in HydraConfig.get().overrides.task):
        raise ConfigError(
            f"allow_targets is taken from the command line alone, not from a file: 'allow_targets=[{','.join(names)}]'."
        )
    return [str(name) for name in names]


def build_samplers(cfg: DictConfig, allow: Sequence[str]) -> dict[str, Sampler]:
    """The chosen sampler under its option's name, then those of `samplers`.

    Raises:
        ConfigError: one that cannot be built.
    """
    if not OmegaConf.is_dict(cfg.samplers):
        raise ConfigError(f"samplers is a mapping, extended by +sampler@samplers.ode=ode; got {cfg.samplers!r}.")
    samplers = {choice("sampler"): build(cfg.sampler, allow)}
    return samplers | {str(name): build(node, allow) for name, node in cfg.samplers.items() if name not in samplers}
