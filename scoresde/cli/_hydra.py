"""Hydra around a command: how a task is started, what it reads of its configuration, and where it writes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import hydra._internal.hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.main import main as hydra_main
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from .. import __version__
from ..config import ConfigError, Refusal, build, config_dir, parameters, renamed, resolved, targets
from ..data.rows import DataLost
from ..evaluate.shards import ShardError, Shards, ranks
from ..ode import SolverError
from ..runs import lock
from ..runs.checkpoint import CheckpointError
from ..runs.load import set_threads
from ..runs.logger import Logger, RunFacts, run_id
from ..runs.publish import publish
from ..runs.redact import guard, redacted, redacted_text
from ..runs.run import Run
from ..sampling import Sampler
from ..sweep.sweep import launching
from ..train.trainer import TrainingDiverged
from ..train.world import ProcessLost
from ._errors import explain, of_another_command
from .foreign import CheckedLoader
from .help import keys
from .own_options import problem_in_options
from .typed import of_flow_map, problem_in_words, typed, words_of

_show_warning = warnings.showwarning
# Errors whose message says what to do.
_EXPLAINED = (Refusal, SolverError, CheckpointError, ProcessLost, ShardError, TrainingDiverged, DataLost)
# Options of Hydra's that print, and do nothing else.
_PRINTING = ("--help", "-h", "--hydra-help", "--cfg", "-c", "--info", "-i", "--version")
# Keys of scoresde-sample, -likelihood and -evaluate on which no batch depends.
_FREE = ("run", "out", "versus", "logger", "device", "threads", "kernels", "pictures", "allow_targets", "timeout")


def launch(task: Callable[[DictConfig], Any], name: str) -> None:
    """Composes the configuration `name` with the command line and runs `task`; exits with 1 on any error.

    An error that the user can mend is explained in a few lines. HYDRA_FULL_ERROR=1 shows the whole trace.
    """
    if "--version" in sys.argv[1:]:  # Hydra's own would print Hydra's
        print(f"scoresde {__version__}")
        return
    OmegaConf.register_new_resolver("command", name_of_command, replace=True)
    OmegaConf.register_new_resolver("sweep_of", folder_of_sweep, replace=True)
    OmegaConf.register_new_resolver("keys", keys, replace=True)
    output = guard()  # Hydra logs and prints the overrides of every job
    words = sys.argv[1:]
    if problem := problem_in_words(words) or problem_in_options(words) or of_another_command(f"scoresde-{name}"):
        sys.exit(f"error: {problem}")
    sys.argv[1:] = typed(words)
    full = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra raises instead of printing
    hydra._internal.hydra.ConfigLoaderImpl = CheckedLoader  # type: ignore[misc]  # Hydra has no hook that early

    if name not in ("train", "distil"):  # which takes the lock on all ranks' behalf, when everything is built
        task = alone(task, "fit samplers to a copy of the folder: run=…" if name == "fit" else "choose another: out=…")
    try:
        try:
            launching(hydra_main(version_base="1.3", config_path=config_dir(), config_name=name)(_past_hydra(task)))
        finally:
            output.flush()
            if output.lost and any(word.startswith(_PRINTING) for word in words):
                sys.exit(1)
    except KeyboardInterrupt:
        how = "with resume=auto continues from the last checkpoint" if name == "train" else "goes on from here"
        print(f"stopped; the same command {how}", file=sys.stderr)
        sys.exit(130)
    except _PastHydra as past:
        _end(past.error, name, full)
    except Exception as error:
        _end(error, name, full)


class _PastHydra(BaseException):
    """Carries an error of a command past Hydra, which would print all overrides above it."""

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error


def _past_hydra(task: Callable[[DictConfig], Any]) -> Callable[[DictConfig], Any]:
    @functools.wraps(task)
    def run(cfg: DictConfig) -> Any:
        try:
            return task(cfg)
        except Exception as error:
            if HydraConfig.get().runtime.choices["hydra/launcher"] != "basic":  # others know no other errors
                raise
            raise _PastHydra(error) from None

    return run


def _end(error: Exception, name: str, full: bool) -> NoReturn:
    OutputFolder.remove_created()
    explained = str(error) if isinstance(error, _EXPLAINED) else explain(error, f"scoresde-{name}")
    if full or not explained:
        raise error
    print(f"error: {explained}", file=sys.stderr)
    sys.exit(1)


def alone(task: Callable[[DictConfig], Any], instead: str) -> Callable[[DictConfig], Any]:
    """The task, which one process at a time does in its folder; the ranks of `torchrun` are one, held by rank 0."""

    @functools.wraps(task)
    def locked(cfg: DictConfig) -> Any:
        with contextlib.ExitStack() as stack:
            if ranks()[0] == 0:
                with refusing():
                    stack.enter_context(lock.hold(Path(HydraConfig.get().runtime.output_dir), instead))
            return task(cfg)

    return locked


def name_of_command(run: str) -> str:
    """`step-00000010-3fa9c2e1`: the newest checkpoint of `run`, and a hash of the command line.

    Every process of `torchrun` finds the same name, and so does the same command typed again.
    """
    steps = [path.name for path in Path(run, "checkpoints").glob("step-*")]
    return f"{max(steps, default='step')}-{_digest()}"


def _digest() -> str:
    return hashlib.sha256("\0".join(sys.argv[1:]).encode()).hexdigest()[:8]


def folder_of_sweep(command: str) -> str:
    """Where `-m` puts the folders of its jobs, which may be of several runs: `out` if it is typed."""
    given = [word.partition("=")[2].strip("'\"") for word in sys.argv[1:] if word.lstrip("+").startswith("out=")]
    return given[-1] if given else f"multirun/{command}-{_digest()}"


class OutputFolder(Callback):
    """Remembers which folders Hydra is about to make, so that a refused command leaves none of them behind."""

    created: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        if "run" in list(config):
            run = "???" if OmegaConf.is_missing(config, "run") else config.run
            if not Path(str(run)).is_dir():
                # Hydra swallows any other exception of a callback
                raise SystemExit(f"error: run={run} is no folder; give the output folder of scoresde-train: run=….")
        self._remember(config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._remember(config.hydra.sweep.dir)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        # Hydra's own, with everything that was typed
        notes = [Path(str(config.hydra.sweep.dir), "multirun.yaml")] if in_sweep() else []
        if config.hydra.output_subdir is not None:
            notes += Path(config.hydra.runtime.output_dir, config.hydra.output_subdir).glob("*.yaml")
        for note in filter(Path.is_file, notes):
            publish(note, redacted_text(note.read_text(encoding="utf-8")))

    @staticmethod
    def _remember(folder: Any) -> None:
        if not str(folder or "").strip():
            raise SystemExit("error: out= is empty; give the folder to write to: out=…, or leave it away.")
        path = Path(str(folder))
        OutputFolder.created = [path for path in (path, *path.parents) if not path.exists()]

    @staticmethod
    def remove_created() -> None:
        """Removes the folders made for this command, if nothing but Hydra's own note is in them."""
        for path in OutputFolder.created:
            for job in path.glob("*/"):
                with contextlib.suppress(OSError):
                    job.rmdir()
            with contextlib.suppress(OSError):
                if {entry.name for entry in path.iterdir()} == {"multirun.yaml"}:
                    (path / "multirun.yaml").unlink()
                path.rmdir()  # fails, as it should, where there is anything else
        OutputFolder.created = []


def _note(message: Warning | str, category: type[Warning], filename: str, *where: Any) -> None:
    """A warning of ours among what the command prints, once; any other as Python shows it."""
    if Path(filename).is_relative_to(Path(__file__).parents[1]):
        _say_once(f"Note: {message}")
    else:
        _show_warning(message, category, filename, *where)


@functools.cache
def _say_once(text: str) -> None:
    if ranks()[0] == 0:
        print(text, flush=True)


@contextlib.contextmanager
def refusing() -> Iterator[None]:
    """Turns what goes wrong while objects are built and inputs read into a `Refusal`."""
    try:
        yield
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, OmegaConfBaseException) as error:
        raise Refusal(explain(error) if isinstance(error, OmegaConfBaseException) else str(error)) from error


def in_sweep() -> bool:
    return HydraConfig.get().mode == RunMode.MULTIRUN


@dataclass(frozen=True)
class Command:
    """A command line, read: below this, nothing sees a configuration of Hydra.

    Attributes:
        options: values by key.
        allow: further names that a configuration may build from.
        folder: to write to.
        typed: the overrides of the command line.
        words: the whole command without secrets; of a job of a sweep, that which runs it alone.
    """

    options: dict[str, Any]
    allow: list[str]
    folder: Path
    typed: list[str]
    words: list[str]

    def build(self, key: str, **runtime: Any) -> Any:
        """The object that a key describes; see `config.build`."""
        return build(self.options[key], self.allow, key=key, **runtime)

    def samplers(self, told: Sequence[str] = ()) -> dict[str, Sampler]:
        """The chosen sampler under its option's name, then those of `samplers`; a flow map has steps of its own.

        Raises:
            ConfigError: one that cannot be built.
        """
        others = self.options["samplers"]
        if not isinstance(others, dict):
            raise ConfigError(f"samplers is a mapping, extended by +sampler@samplers.ode=ode; got {others!r}.")
        chosen = str(HydraConfig.get().runtime.choices["sampler"])
        if "end" in told:
            self.options["sampler"], chosen = of_flow_map(self.options["sampler"], self.typed, chosen)
        built = {name: build(node, self.allow, key=f"samplers.{name}") for name, node in others.items()}
        return {chosen: self.build("sampler")} | {name: sampler for name, sampler in built.items() if name != chosen}

    def is_due(self, result: str) -> bool:
        """Whether there is anything to do: False for a rank that comes when the others have finished.

        Args:
            result: the file that is written last.

        Raises:
            ValueError: on rank 0, if the folder holds finished results, or anything but batches.
        """
        folder, finished, rank = self.folder, (self.folder / result).exists(), ranks()[0]
        if rank:
            return not finished
        other = "choose another folder: out=…."
        if finished:
            raise ValueError(f"{folder} holds the results of a command already. To repeat it, {other}")
        there = {path.name for path in folder.iterdir()} - {lock.NAME} if folder.exists() else set()
        if there and "batches" not in there:
            raise ValueError(f"{folder} is not empty, and nothing in it is overwritten: {other}")
        return True

    @contextlib.contextmanager
    def logging(self, logger: Logger) -> Iterator[None]:
        """What is logged within is of a run of its own, in the folder of this command."""
        config = {name: value for name, value in self.options.items() if name != "logger"}
        hydra, failed = HydraConfig.get(), True
        sweep = Path(str(hydra.sweep.dir)).name if in_sweep() else None
        what = RunFacts(
            self.folder, run_id(config, self.folder), redacted(config), sweep, work=str(hydra.job.config_name)
        )
        logger.start(what)
        try:
            yield
            failed = False
        finally:
            logger.close(failed)

    def shards(self, run: Run, **digests: str) -> Shards:
        """This process's share of the work, whose batches depend on the options, the run, and files of these digests.

        Raises:
            ValueError: batches of another command are in the folder.
        """
        facts = {name: value for name, value in self.options.items() if name not in _FREE} | digests
        facts |= {"step": run.step, "checkpoint": run.digest}
        return Shards(self.folder / "batches", redacted(facts), *ranks(), timeout=self.options["timeout"])


def drop_leftovers(cfg: DictConfig, typed: Sequence[str]) -> None:
    """Where the command line replaces a target, `network._target_=mine.Net`, the keys of the old one go, but what was
    typed; for a target of ours, those that it does not have."""
    words = [word.lstrip("+").partition("=")[0] for word in typed]
    for key in (word.removesuffix("._target_") for word in words if word.endswith("._target_")):
        node = OmegaConf.select(cfg, key)
        if not OmegaConf.is_dict(node):
            continue
        kept = {word.removeprefix(f"{key}.").partition(".")[0] for word in words if word.startswith(f"{key}.")}
        if (target := renamed({"_target_": node.get("_target_")})["_target_"]) in targets():
            kept |= set(parameters(target)[0])
        with open_dict(node):
            for name in [str(name) for name in node if name not in kept | {"_partial_"}]:
                del node[name]


def read(cfg: DictConfig) -> Command:
    """The command that Hydra composed, with its number of threads set.

    Raises:
        ConfigError: a value is missing, or `allow_targets` is no list of names or stands in a file.
        ValueError: a number of threads that cannot be.
    """
    hydra = HydraConfig.get()
    # as they were typed: an interpolation among them is of `cfg`, not of Hydra's own configuration
    words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    drop_leftovers(cfg, words)
    options = resolved(cfg)
    names = options["allow_targets"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"allow_targets is a list of dotted names: allow_targets=[my_package.MyNet]; got {names!r}.")
    if names and not any(word.lstrip("+").startswith("allow_targets=") for word in words):
        typed = f"'allow_targets=[{','.join(names)}]'"
        raise ConfigError(f"allow_targets is taken from the command line alone, not from a file: {typed}.")
    set_threads(options["threads"])
    warnings.showwarning = _note  # type: ignore[assignment]
    folder = Path(hydra.runtime.output_dir)
    return Command(options, names, folder, words, words_of(hydra, folder, sweep=in_sweep()))
