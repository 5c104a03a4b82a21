"""The command line before Hydra reads it, and as it can be typed again: text stays text, old keys are understood."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from ..config import config_dir
from ..runs.redact import redacted_text

# Last parts of keys whose value is text, whatever it reads like; `null` is a name for the first two alone.
_TEXT = (
    *("out", "run", "versus", "experiment", "guide", "mask", "input", "path", "test_path", "key", "label_key"),
    *("project", "entity", "group", "name", "notes", "job_type"),
)
_NEVER_NULL = ("out", "run")
# Whole keys of the same kind: sentences.
_SENTENCES = ("cond.text", "edit.before.text", "negative")
# Keys of older versions.
_MOVED = {f"likelihood.{name}": f"likelihood.solver.{name}" for name in ("rtol", "atol", "backend", "method")}
_CALLS = "likelihood.budget"


def typed(words: Sequence[str]) -> list[str]:
    """The command line, without the command, as Hydra has to be given it for what is meant."""
    sweep = any(word in ("-m", "--multirun") for word in words)
    return [_as_text(word, sweep) for word in _of_today(_with_codec_of_run(words))]


def _with_codec_of_run(words: Sequence[str]) -> list[str]:
    """`codec=runs/autoencoder`, a folder, as `codec=autoencoder codec.run=runs/autoencoder`."""
    found: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        names_run = key == "codec" and ("/" in value or (Path(value).is_dir() and not _leaf("codec", value)))
        found += ["codec=autoencoder", f"codec.run={value}"] if names_run else [word]
    return found


def _leaf(group: str, name: str) -> bool:
    return Path(config_dir(), group, f"{name}.yaml").is_file()


def problem_in_words(words: Sequence[str]) -> str:
    """Why a word of the command line cannot be taken; empty if all can."""
    for word in words:
        key, equals, value = word.partition("=")
        if not word.isascii() and word != word.encode(errors="replace").decode():
            shown = word.encode(errors="backslashreplace").decode()
            return f"{shown} is no text here: set PYTHONUTF8=1 if it is UTF-8, else choose another name."
        if equals and is_text(key) and value.startswith("~"):
            return f"{word}: the shell leaves ~ as it is there. Write the folder out: {key}=$HOME{value[1:]}."
    return ""


def quoted(key: str, value: str) -> str:
    """An override with its value as text, as it is typed in a shell."""
    return in_shell(f"{key}={QuotedString(value, Quote.double).with_quotes()}")


def in_shell(*words: str) -> str:
    """Words as they are typed in a shell, on one line."""
    return " ".join(shlex.quote(word) if word.isprintable() else f"$'{_escaped(word)}'" for word in words)


def _escaped(word: str) -> str:
    slashed = word.replace("\\", "\\\\").replace("'", "\\'")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in slashed)


def words_of(hydra: Any, folder: Path, *, sweep: bool) -> list[str]:
    """The command that Hydra was given, without secrets; of a job of a sweep, that which runs it alone."""
    given: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    words = given["task"]
    if sweep:
        words = [word for word in words if not word.startswith(("out=", "resume="))] + [f"out={folder}"]
    else:
        words += [word for word in given["hydra"] if not word.startswith("hydra.mode=")]
    dirs = [
        f"--config-dir={source.path}" for source in hydra.runtime.config_sources if source.provider == "command-line"
    ]
    return [redacted_text(word) for word in [hydra.job.name, *dirs, *words]]


def of_flow_map(sampler: dict[str, Any], words: Sequence[str], chosen: str) -> tuple[dict[str, Any], str]:
    """The sampler of a flow map and its name: one step, or sampler.steps of them, where the command names no other."""
    typed = [word.lstrip("+").partition("=")[0] for word in words]
    if "sampler" in typed:
        return sampler, chosen
    own = {"_target_": "scoresde.Sampler", "step": {"_target_": "scoresde.FlowMap"}, "denoise": False}
    return {**own, "grid": sampler["grid"], "steps": sampler["steps"] if "sampler.steps" in typed else 1}, "flow_map"


def is_text(key: str) -> bool:
    """Whether the value of a key is text, whatever it reads like."""
    key = key.lstrip("+")
    return key in _SENTENCES or key.rpartition(".")[2] in _TEXT


def _as_text(word: str, sweep: bool) -> str:
    """`out=2024_05_01` and `out=lr=0.1` as `out="2024_05_01"` and `out="lr=0.1"`."""
    key, _, value = word.partition("=")
    if not is_text(key) or value[:1] in ("", "'", '"', "[", "{"):
        return word
    parts = [part.strip() for part in value.split(",")] if sweep else [value]
    try:
        override = OverridesParser.create().parse_override(word)
        several = override.is_sweep_override()
        read = list(override.sweep_iterator()) if several else [override.value()]
        several = several and (sweep or key.lstrip("+") not in _SENTENCES)  # whose commas are their own
        null = read == [None] and key not in _NEVER_NULL
        if null or read == parts or (several and not sweep) or ("\\" in value and isinstance(read[0], str)):
            return word
    except (HydraException, ValueError):
        pass
    return f"{key}={','.join(QuotedString(part, Quote.double).with_quotes() for part in parts)}"


def _of_today(words: list[str]) -> list[str]:
    """With keys of older versions under their present names; what they meant is plain, and it is said."""
    given = dict((word.partition("=")[::2]) for word in words)
    if not given.keys() & {*_MOVED, _CALLS}:
        return words
    calls = given.get(_CALLS, "null") != "null"  # which went before a tolerance
    # these leaves now have a solver of the other kind
    before, now = ("hutchinson", "budget") if calls else ("exact", "exact_tolerance")
    found = [] if "likelihood" in given or not calls else ["likelihood=budget"]
    for word in words:
        key, _, value = word.partition("=")
        if key == _CALLS:
            found += [f"likelihood.solver.calls={value}"] if calls else []
        elif key in _MOVED:
            found += [] if calls else [f"{_MOVED[key]}={value}"]
        else:
            found.append(f"likelihood={now}" if word == f"likelihood={before}" else word)
    said = " ".join(word for word in found if word not in words)
    print(f"Keys of an older version are taken as: {said or 'the default'}", file=sys.stderr)
    return found
