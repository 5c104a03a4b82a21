"""The command line is taken as it is meant, and what is printed of it can be pasted."""

from __future__ import annotations

import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from scoresde.cli.typed import in_shell, problem_in_words, quoted, typed

NAMES = (
    *(
        "2024_05_01",
        "1e3",
        "true",
        ".5",
        "inf",
        "lr=0.1",
        "=",
        "größe",
        "图",
        "a#b",
        "photos (1)",
        "a'b",
        'a"b',
        "a\nb",
    ),
    *("a;b", "a[1]", "x$y", " a ", "a\\b c=d", "null", "a&b"),
)


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_the_name_that_was_typed(name: str) -> None:
    for key in ("out", "run"):
        (word,) = typed([f"{key}={name}"])
        assert OverridesParser.create().parse_override(word).value() == name
        assert shlex.split(quoted(key, name)) == [word] or word == f"{key}={name}" or "\n" in name


def test_words_that_say_what_they_are_stay() -> None:
    words = ["out=runs/mine", "out='2024'", "guide=null", "mask=null", "data.label_key=null", "seed=007", "out=007"]
    words += ["out=runs/${seed}", "run=[a,b]", r"out=a\,b", "out=a,b", "optim.lr=1e-3", "--cfg", "job", "out="]
    assert typed(words) == words
    assert typed(["-m", "run=2024,b", "seed=0,1"]) == ["-m", 'run="2024","b"', "seed=0,1"]


OLD = {
    "likelihood.rtol=1e-2 likelihood.atol=1e-3": "likelihood.solver.rtol=1e-2 likelihood.solver.atol=1e-3",
    "likelihood=exact likelihood.rtol=1e-2": "likelihood=exact_tolerance likelihood.solver.rtol=1e-2",
    "likelihood.budget=40": "likelihood=budget likelihood.solver.calls=40",
    "likelihood.budget=null seed=1": "seed=1",
    "likelihood=exact likelihood.budget=10,20": "likelihood=exact likelihood.solver.calls=10,20",
    "likelihood=hutchinson likelihood.budget=8 likelihood.rtol=1": "likelihood=budget likelihood.solver.calls=8",
}


@pytest.mark.parametrize("words", OLD)
def test_keys_of_older_versions_are_taken_with_a_word(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert typed(words.split()) == OLD[words].split()
    assert "Keys of an older version are taken as: " in capsys.readouterr().err
    assert typed(OLD[words].split()) == OLD[words].split() and not capsys.readouterr().err


def test_a_command_can_be_pasted() -> None:
    """The shell reads back every word, from one line."""
    words = ["plain", *(f"note={name}" for name in NAMES), "a\x1b[1m\\'\r\tb", ""]
    line = in_shell(*words)
    assert "\n" not in line and line.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == words


def test_words_that_cannot_be_taken_are_told() -> None:
    assert "out=$HOME/x" in problem_in_words(["out=~/x"])
    assert "out=\\udcff is no text here: set PYTHONUTF8=1" in problem_in_words(["out=\udcff"])
    assert not problem_in_words(["out=größe", "~sampler.grid", "data.path=a~b"])
