"""`--help` says of each key what it means: every key of every option in conf/ has half a line, from one source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from commands import command

from scoresde.cli.help import _beside, described, leaves
from scoresde.config import config_dir

CONF = Path(config_dir())
OPTIONS = sorted(path for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment")
COMMANDS = sorted(CONF.glob("*.yaml"))


def wordless(path: Path) -> list[str]:
    tree = yaml.safe_load(path.read_text("utf-8")) or {}
    said, bases = _beside(path, ()), [name for name in tree.get("defaults", ()) if isinstance(name, str)]
    for base in {*bases} - {"_self_"}:
        tree = yaml.safe_load(path.with_name(f"{base}.yaml").read_text("utf-8")) | tree
    tree = {name: node for name, node in tree.items() if name not in ("defaults", "hydra")}
    return [
        ".".join(where)
        for where, value, target in leaves(tree)
        if not isinstance(value, dict) or not value
        if where[-1] not in ("_partial_",) and not (said.get(where) or described(target).get(where[-1]))
    ]


@pytest.mark.parametrize("path", [*COMMANDS, *OPTIONS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_has_half_a_line(path: Path) -> None:
    assert wordless(path) == []


def test_help_shows_the_words_of_the_chosen_options(tmp_path: Path) -> None:
    """Of the option's file, of its target's docstring, of what an argument is handed on to; values as typed."""
    done = command("train", "--help", "sde=ve", "network=mlp", "+sampler@samplers.ode=ode", cwd=tmp_path)
    assert done.code == 0, done.err
    lines = [re.split(r" +# ", line, maxsplit=1) for line in done.out.splitlines()]
    words = {line[0].strip(): line[1] for line in lines if len(line) == 2}
    assert words["sigma_max: 50.0"].startswith("about the largest distance")  # conf/sde/ve.yaml
    assert words["depth: 3"] == described("scoresde.nn.MLP")["depth"] != ""
    assert words["embedding_scale: 1.0"] == described("scoresde.nn.MLP")["embedding_scale"] != ""
    assert (
        words["backend: native"] == "or torchdiffeq, scipy: one step size for the batch"
    )  # of the sampler beside the first
    assert words["out: runs/${now:%Y-%m-%d_%H-%M-%S}"] == "folder of the run" and "multipliers" not in done.out
    assert words["_target_: scoresde.VESDE"] and list(tmp_path.iterdir()) == []


def test_a_comment_belongs_to_its_own_key(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# head\na: 1  # one\nb:\n  a: 2\n  c: x#y  # see\n'd': 3\n")
    assert _beside(tmp_path / "a.yaml", ("top",)) == {("top", "a"): "one", ("top", "b", "c"): "see"}
    assert described("os.system") == {}
