"""Forty ways to mistype a command: each ends before training, names the key and the cure, and leaves no folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import PLAIN, TINY, command

QUICK = (*TINY, *PLAIN, "trainer.images=128", "evaluate_at_end=false")

OVERRIDES = {
    # misspelt: the nearest name
    "trainer.imges=5": "'trainer.imges'. Did you mean 'trainer.images'?",
    "optm.lr=1": "'optm'. Did you mean 'optim'?",
    "network.dpeth=3": "'network.dpeth'. Did you mean 'network.depth'?",
    "likelihood.rtl=1e-3": "'likelihood.rtl'. Did you mean 'likelihood.solver.rtol'?",
    "+foo=1": "There is no key 'foo'. There are",
    "+dta=arrays": "There is no key 'dta'. Did you mean 'data'?",
    "+guidance=cfg": "There is no key 'guidance'.",
    "dta=arrays": "There is no key 'dta'. Did you mean 'data'?",
    "likelihood=exact likelihood.solver.rtol=1e-3": "likelihood=exact_tolerance and likelihood=hutchinson have it",
    "sed=1": "'sed'. Did you mean 'seed'?",
    "sampelr=ddim": "'sampelr'. Did you mean 'sampler'?",
    "+sampler.stesp=4": "sampler.stesp: scoresde.Sampler has no parameter 'stesp'. Did you mean 'step'?",
    "+loss.times.t_mn=0.1": "loss.times.t_mn: .* Did you mean 't_min'?",
    "++trainer.imgs=3": "trainer.imgs: .* Did you mean 'images'?",
    "sde=vpp": "no sde=vpp. Did you mean 'vp'?",
    "experiment=demmo": "no experiment=demmo. Did you mean 'demo'?",
    "+sampler@samplers.heun=huen": "no sampler=huen. Did you mean 'heun'?",
    "network._target_=scoresde.nn.MPL": "network._target_=scoresde.nn.MPL .* Did you mean 'scoresde.nn.MLP'?",
    # another type: what the key takes
    "trainer.images=many": "trainer.images is a whole number; got 'many'",
    "trainer.batch_size=2.5": "trainer.batch_size is a whole number; got 2.5",
    "network.width=wide": "network.width is a whole number; got 'wide'",
    "seed=1.5": "seed is a whole number from 0 to 2^31 - 1; got 1.5",
    "threads=two": "threads is a whole number of at least 1, or null; got 'two'",
    "conditional=maybe": "conditional is true or false; got 'maybe'",
    "optim.lr=fast": "optim.lr is a number or .*; got 'fast'",
    "sampler.steps=three": "sampler.steps is a whole number or null; got 'three'",
    "evaluation.points=some": "evaluation.points is a whole number .*; got 'some'",
    "denoiser.scale_input=2": "denoiser.scale_input is true or false; got 2",
    "sampler.grid=uniform": "sampler.grid is a mapping with _target_.*; got 'uniform'",
    "loss.weighting=1": "loss.weighting is a mapping with _target_ or null; got 1",
    "trainer=3": "trainer=3: trainer takes the name of one of its options: default",
    "optim.lr=nan": "optim.lr is nan",
    "trainer.images=1e999": "trainer.images is a whole number; got inf",
    "kernels=fast": "kernels.use is 'fast'; it takes",
    "kernels=require": "kernels are required, and cpu cannot have them: .* Try kernels=auto",
    # out of range
    "optim.lr=-1": "optim: Invalid learning rate: -1",
    "trainer.batch_size=-1": "trainer: batch_size is a whole number of at least 1; got -1",
    "sampler.steps=-3": "sampler: steps is a whole number of at least 1; got -3",
    "data.train=-5": "data: train is a whole number of at least 1; got -5",
    "device=cuda:99": "device=cuda:99 cannot be used here.* Try device=auto",
    "out=": "out= is empty",
    # contradictions
    "sde.beta_min=30": "sde: Expected 0 < beta_min <= beta_max; got beta_min=30, beta_max=20",
    "data.train=10": "10 samples, fewer than trainer.batch_size=64.* Set trainer.batch_size to at most 10",
    "evaluation.points=33": "evaluation.points is between 1 and the 32 points",
    "resume=auto overwrite=true": "give one of the two",
    "data=arrays data.path=x": "data.train.*data=8gaussians.* have it",
    # not there
    "data.test=???": "data.test has no value yet; give it on the command line: data.test=",
    "optim.lr=${nope}": "optim.lr: Interpolation key 'nope' not found",
    "optim.lr=${optim.lr}": "optim.lr: Recursive interpolation",
    "optim.lr=${oc.env:NOT_THERE}": "optim.lr: .*'NOT_THERE' not found",
    "optim.lr=${nonsense:1}": "optim.lr: Unsupported interpolation type nonsense",
    "trainer.images=[1": "'trainer.images=[1' cannot be read.* quote it: 'trainer.images=\"[1\"'",
    "network.width=a=ü": "quote it: 'network.width=\"a=ü\"'",
    "network.width=a,b": "a sweep, with -m; a list, 'network.width=[a,b]'; or text",
    "out=~/x": "Write the folder out: out=$HOME/x",
    "hello": "'hello' is not of the form key=value",
}


def refused(cwd: Path, *arguments: str) -> str:
    """The one line that it ends with."""
    before = {path.name for path in cwd.iterdir()}
    done = command("train", *arguments, cwd=cwd)
    lines = done.err.strip().splitlines()
    assert done.code == 1 and "Traceback" not in done.err, done.err
    assert {path.name for path in cwd.iterdir()} == before
    assert "Training" not in done.out and lines[-1].startswith("error: "), done.err
    return lines[-1]


@pytest.mark.parametrize("override", OVERRIDES)
def test_a_wrong_override_is_told(override: str, tmp_path: Path) -> None:
    """The words are those of the message, `.*` for what lies between."""
    words = OVERRIDES[override].split(".*")
    line = refused(tmp_path, *QUICK, *override.split(" "))
    at = [line.find(word.strip()) for word in words]
    assert -1 not in at and at == sorted(at), line


def test_forty_are_tried() -> None:
    assert len(OVERRIDES) + len(FILES) >= 40


def test_a_sweep_of_another_command_is_refused_in_a_line(tmp_path: Path) -> None:
    """Without Hydra's line of all overrides above it, and without the folder of the first job."""
    done = command("likelihood", "-m", "run=nowhere", "n=1,2", "out=made", cwd=tmp_path)
    assert done.code == 1 and "Error executing" not in done.err and "Traceback" not in done.err, done.err
    assert done.err.strip().splitlines()[-1].startswith("error: ") and not (tmp_path / "made").exists()


BOMB = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]", *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
)
FILES = {
    "key twice": ("seed: 1\nseed: 2\n", "duplicate.yaml: the key 'seed' is there twice"),
    "key twice, below": ("a:\n  - b: 1\n    b: 2\n", "the key 'b' is there twice"),
    "alias bomb": (BOMB, "stand for more than 10,000 values"),
    "alias of itself": ("a: &a [*a]\n", "an alias stands for what it is in"),
    "nested without end": ("a: " + "[" * 5000 + "]" * 5000, "nested too deep"),
    "Python object": ("a: !!python/object/apply:os.system ['touch canary']\n", "asks for a Python object"),
    "other tag": ("a: !mine 3\n", "the tag !mine is not plain YAML"),
    "tab": ("seed:\n\t1\n", "cannot start any token, line 3"),
    "bracket": ("seed: [1\n", "line"),
    "list": ("- 1\n- 2\n", "options are lines of the form key: value"),
    "text": ("hello\n", "options are lines of the form key: value"),
    "not UTF-8": ("seed: \udcff\n", "can't decode byte 0xff"),
    "misspelt key": ("trainr:\n  images: 5\n", "There is no key 'trainr'. Did you mean 'trainer'?"),
    "text that reads as a number": ("out: 2024_05_01\n", "out: 2024_05_01 reads as a number; quote it"),
    "search path": ("hydra:\n  searchpath: [pkg://evil]\n", "searchpath is taken from the command line alone"),
    "interpolation loop": ("sigma_data: ${denoiser.sigma_data}\n", "sigma_data: Recursive interpolation"),
    "unknown key": ("trainer:\n  imges: 5\n", "trainer.imges: .* Did you mean 'images'?"),
    "unknown group": ("defaults:\n  - override /sdee: vp\n", "There is no group 'sdee'. Did you mean 'sde'?"),
    "defaults of itself": ("defaults:\n  - duplicate\n", "names itself without end"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_wrong_file_is_told(kind: str, tmp_path: Path) -> None:
    text, message = FILES[kind]
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "duplicate.yaml").write_bytes(
        f"# @package _global_\n{text}".encode(errors="surrogateescape")
    )
    line = refused(tmp_path, "--config-dir=mine", *QUICK, "experiment=duplicate")
    assert all(word.strip() in line for word in message.split(".*")), line


def test_a_right_file_is_taken(tmp_path: Path) -> None:
    """Aliases that are no bomb, a merge key, an empty file and other folders are no mistake."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "empty.yaml").touch()
    (tmp_path / "mine" / "experiment" / "right.yaml").write_text(
        "# @package _global_\nown: &own\n  seed: 3\nother:\n  <<: *own\nseed: 3\n"
    )
    done = command("train", "--config-dir", "mine", *QUICK, "experiment=right", "out=run", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "seed: 3" in (tmp_path / "run" / "config.yaml").read_text()
