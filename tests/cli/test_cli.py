"""The commands: refusals that cost nothing, and runs that come back bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import PLAIN, TINY, Done, command, process, rows, same, tree, weights
from forgery import forge
from offline import closed_runs, offline_runs
from omegaconf import OmegaConf

from scoresde.config import config_dir


@pytest.mark.parametrize("multirun", [(), ("-m",)], ids=["run", "sweep"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.imges=5", "There is no key 'trainer.imges'. Did you mean 'trainer.images'?"),
        ("sdee=vp", "Did you mean 'sde'?"),
        ("sde=vpp", "There is no sde=vpp. Did you mean 'vp'?"),
        ("sampler=ancestrall", "Did you mean 'ancestral'?"),
        ("imagess=5", "Did you mean 'trainer.images'?"),
        ("sampler.step.bonud=1", "Did you mean 'sampler.step.bound'?"),
        ("experiment=demmo", "Did you mean 'demo'?"),
        ("trainer.images=[1", "cannot be read"),
    ],
)
def test_a_typing_error_is_answered_with_the_right_word(tmp_path: Path, multirun, override: str, words: str) -> None:
    """One line on stderr, exit code 1, and no folder; a sweep is refused before its first job."""
    done = command("train", *multirun, override, *TINY[3:], cwd=tmp_path)
    assert done.code == 1
    assert done.err.startswith("error: ") and words in done.err and len(done.err.strip().splitlines()) == 1
    assert done.out == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "experiment", "line"),
    [
        ("sample", "digits_vp", "for scoresde-train, not scoresde-sample: scoresde-train experiment=digits_vp"),
        ("sample", "mnist_deblur,demo", "for scoresde-train, not scoresde-sample: scoresde-train experiment=demo"),
        ("likelihood", "demo", "for scoresde-train, not scoresde-likelihood: scoresde-train experiment=demo"),
        (
            "train",
            "mnist_inpaint",
            "for scoresde-sample, not scoresde-train: scoresde-sample experiment=mnist_inpaint run=runs/mnist_classes",
        ),
    ],
)
def test_an_experiment_of_another_command_is_told_with_that_command(tmp_path: Path, name, experiment, line) -> None:
    done = command(name, f"experiment={experiment}", "run=run", cwd=tmp_path)
    assert done.code == 1 and done.err == f"error: experiment={experiment.split(',')[-1]} is {line}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "other"), [("sample", "digits_vp"), ("train", "mnist_deblur")])
def test_a_command_lists_its_own_experiments_and_those_of_the_user(tmp_path: Path, name: str, other: str) -> None:
    """All of ours, by the first lines of their files, go to one of two lists."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_text("# @package _global_\nseed: 1\n")
    done = command(name, "--config-dir=mine", "experiment=nosuchthing", "run=run", cwd=tmp_path)
    listed = done.err.strip().rpartition("Options of experiment: ")[2].strip(".").split(", ")
    ours = [path.stem for path in Path(config_dir(), "experiment").glob("*.yaml")
            if path.read_text().startswith(f"# @run scoresde-{name}\t")]  # fmt: skip
    assert done.code == 1 and sorted(listed) == sorted([*ours, "own"]) and other not in listed, done.err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+network.widht=3", "Did you mean 'width'?"),
        ("trainer.images=0", "trainer: images is a whole number of at least 1; got 0"),
        ("evaluation.objective=fid", "bits_per_dim or loss; got 'fid'"),
        ("evaluation.points=33", "between 1 and the 32 points"),
        ("data.test=???", "data.test has no value yet; give it on the command line: data.test="),
        ("seed=-1", "seed is a whole number from 0"),
        ("threads=0", "threads is a whole number of at least 1"),
        ("device=gpu", "device=gpu cannot be used here"),
        ("resume=yes", "resume is auto or false"),
        ("overwrite=1", "overwrite is true or false"),
        ("conditional=true", "needs labels"),
        ("network.embedding=none", "network: "),
        ("sampler.steps=0", "steps is a whole number of at least 1"),
        ("data.train=10", "fewer than trainer.batch_size=64"),
        ("network._target_=os.system", "network._target_=os.system is not a name that a configuration may call"),
        ("logger._target_=logging.os.system", "is not a name that a configuration may call"),
    ],
)
def test_what_cannot_be_built_is_refused_before_a_file_is_written(tmp_path: Path, override: str, words: str) -> None:
    done = command("train", *TINY, *PLAIN, override, cwd=tmp_path)
    last = done.err.splitlines()[-1]  # after Hydra's own line with the overrides
    assert done.code == 1 and last.startswith("error: ") and words in last, done.err
    assert "Traceback" not in done.err and list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, ...], Done]:
    """A run with everything, in an empty folder: (its folder, its command, what it printed)."""
    cwd = tmp_path_factory.mktemp("empty")
    arguments = (
        *TINY, "evaluation.pictures=true", "sampler=ddim", "sampler.steps=4", "+sampler@samplers.heun=heun",
        "samplers.heun.steps=3", "trainer.evaluate_every=320", "trainer.sample_every=320", "out=runs/mine",
        "logger.finish_timeout=600",
    )  # fmt: skip
    done = command("train", *arguments, cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "runs" / "mine", arguments, done


@pytest.fixture
def copy(finished: tuple[Path, tuple[str, ...], Done], tmp_path: Path) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """The same run to do harm to: (where to type the command, the command)."""
    shutil.copytree(finished[0].parents[1], tmp_path / "cwd", symlinks=True)
    yield tmp_path / "cwd", finished[1]


def test_a_run_ends_with_its_results_listed(finished: tuple[Path, tuple[str, ...], Done]) -> None:
    folder, arguments, done = finished
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "config.yaml", "metrics.jsonl", "checkpoints", "wandb", "progress", "samples.png", "samples-heun.png",
        "trajectory.png", "trajectory-heun.png", "loss.png", "samples.npz", "summary.json", "summary.md",
        "excerpt.safetensors", "samplers.json",
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "progress").iterdir())] == ["step-00000005.png", "step-00000010.png"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-00000009", "step-00000010"]
    assert (folder / "config.yaml").read_text().splitlines()[0] == f"# scoresde: scoresde-train {' '.join(arguments)}"
    arrays, summary = np.load(folder / "samples.npz"), json.loads((folder / "summary.json").read_text())
    assert arrays["ddim"].shape == arrays["heun"].shape == (4, 2) and arrays["seeds"].tolist() == [0, 1, 2, 3]
    # DDIM makes 4 calls, Heun 2 a step; each ends with a denoising one
    assert {s["sampler"]: s["nfe"] for s in summary["samplers"]} == {"ddim": 5, "heun": 7}
    score = f"{summary['bits_per_dim']['mean']:.4f} ± {summary['bits_per_dim']['stderr']:.4f}"
    for line in (["ddim", "5"], ["heun", "7"]):
        assert any(text.split()[:2] == line for text in done.out.splitlines())
    assert done.out.count(score) == 1  # which no sampler changes
    assert "Results in" in done.out and all(f"mine/{name}" in done.out for name in ("samples.png", "metrics.jsonl"))


def test_a_finished_run_is_refused_and_nothing_changes(copy: tuple[Path, tuple[str, ...]]) -> None:
    cwd, arguments = copy
    before = tree(cwd)
    done = command("train", *arguments, cwd=cwd)
    assert done.code == 1 and all(word in done.err for word in ("holds a run", "resume=auto", "overwrite=true"))
    for override, words in [
        ("optim.lr=1e-2", "was made with optim.lr=0.001, and this command says optim.lr=0.01"),
        ("overwrite=true", "give one of the two"),
    ]:
        done = command("train", *arguments, "resume=auto", override, cwd=cwd)
        assert done.code == 1 and words in done.err
    assert tree(cwd) == before


def test_resuming_a_finished_run_trains_nothing_and_repeats_its_report(copy: tuple[Path, tuple[str, ...]]) -> None:
    cwd, arguments = copy
    folder = cwd / "runs" / "mine"
    before, logged = tree(folder / "checkpoints"), rows(folder)
    summary = json.loads((folder / "summary.json").read_text())["bits_per_dim"]["mean"]
    done = command("train", *arguments, "resume=auto", cwd=cwd)
    assert done.code == 0 and "at step 10" in done.out
    assert tree(folder / "checkpoints") == before and rows(folder) == logged
    assert json.loads((folder / "summary.json").read_text())["bits_per_dim"]["mean"] == summary
    first, second = offline_runs(folder)
    assert first.id == second.id and second.exit_code == 0


def test_overwriting_keeps_what_no_run_made(copy: tuple[Path, tuple[str, ...]]) -> None:
    cwd, arguments = copy
    folder = cwd / "runs" / "mine"
    before, logged = weights(folder), rows(folder)
    own = {"notes.txt", "figures/mine.png", "checkpoints/keep.bin", "progress/mine.png"}
    for name in own:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    (folder / "samples-old.png").touch()  # as another sampler's picture is called
    done = command("train", *arguments, "overwrite=true", cwd=cwd)
    assert done.code == 0, done.err
    assert all((folder / name).read_text() == "mine" for name in own) and not (folder / "samples-old.png").exists()
    assert same(weights(folder), before) and rows(folder) == logged


@pytest.mark.parametrize("damaged", [1, 2], ids=["newest", "all"])
def test_damaged_checkpoints_are_passed_over_or_refused(copy: tuple[Path, tuple[str, ...]], damaged: int) -> None:
    cwd, arguments = copy
    folder = cwd / "runs" / "mine"
    expected, logged = weights(folder), rows(folder)
    for path in sorted((folder / "checkpoints").iterdir())[-damaged:]:
        (path / "ema.safetensors").write_bytes(b"cut")
    before = tree(cwd)
    done = command("train", *arguments, "resume=auto", cwd=cwd)
    if damaged == 2:
        assert done.code == 1 and "No checkpoint" in done.err and "overwrite=true" in done.err and tree(cwd) == before
    else:
        assert done.code == 0 and "at step 9" in done.out
        assert same(weights(folder), expected) and rows(folder) == logged


def test_a_folder_of_someone_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("a: 1\n")
    for more in ((), ("overwrite=true",), ("resume=auto",)):
        done = command("train", *TINY, *PLAIN, "out=theirs", *more, cwd=tmp_path)
        assert done.code == 1 and "config.yaml, which no run of scoresde made" in done.err
    assert tree(tmp_path / "theirs").keys() == {"config.yaml"}


def test_killed_and_repeated_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL after the first checkpoint; the same command again: weights, average, moments and rows as without."""
    arguments = (*TINY, "sampler=ddim", "sampler.steps=4", "trainer.images=51200", "trainer.log_every=640",
                 "trainer.checkpoint_every=6400", "trainer.evaluate_every=12800", "resume=auto",
                 "logger.finish_timeout=600")  # fmt: skip
    run = process("train", *arguments, "out=killed", cwd=tmp_path)
    while run.poll() is None and not list(tmp_path.glob("killed/checkpoints/step-*")):
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert run.returncode == -signal.SIGKILL and not (tmp_path / "killed" / "summary.json").exists()
    done = command("train", *arguments, "out=killed", cwd=tmp_path)
    assert done.code == 0 and "Resuming" in done.out, done.err
    assert command("train", *arguments, "out=whole", cwd=tmp_path).code == 0
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    samples = [np.load(tmp_path / name / "samples.npz")["ddim"] for name in ("killed", "whole")]
    assert np.array_equal(*samples)
    first, second = closed_runs(tmp_path / "killed", 2)
    # the view outlives the training that was killed, and closes its log as that of a failed run, which may be the later
    assert first.id == second.id and {first.exit_code, second.exit_code} == {0, 1}


@pytest.fixture
def trained(finished: tuple[Path, tuple[str, ...], Done]) -> Path:
    return finished[0]


def test_sampling_again_elsewhere_gives_the_same_samples(trained: Path, tmp_path: Path) -> None:
    """From the checkpoint alone, in another folder, in other batches: the run's own samples, up to round-off."""
    own = np.load(trained / "samples.npz")
    done = command(
        "sample", f"run={trained}", "sampler=ddim", "sampler.steps=4", "n=4", "batch_size=3", "out=again",
        "+sampler@samplers.heun=heun", "samplers.heun.steps=3", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    made = np.load(tmp_path / "again" / "samples.npz")
    for name in ("ddim", "heun"):
        np.testing.assert_allclose(made[name], own[name], rtol=0, atol=1e-4)
    assert (tmp_path / "again" / "samples-heun.png").exists() and "again/samples.npz" in done.out
    done = command(
        "sample", f"run={trained}", "sampler=ddim", "sampler.steps=4", "seeds=[3,1]", "pictures=false", "out=two",
        cwd=tmp_path,
    )  # fmt: skip
    np.testing.assert_allclose(np.load(tmp_path / "two" / "samples.npz")["ddim"], own["ddim"][[3, 1]], atol=1e-4)
    before = tree(tmp_path)
    assert command("sample", f"run={trained}", "out=two", cwd=tmp_path).code == 1 and tree(tmp_path) == before


def test_likelihood_and_evaluation_elsewhere_give_the_same_numbers(trained: Path, tmp_path: Path) -> None:
    """The same points, seed and tolerances: the run's own bits/dim; its raw weights have others."""
    own = json.loads((trained / "summary.json").read_text())
    settings = (f"run={trained}", "likelihood.solver.rtol=1e-3", "likelihood.solver.atol=1e-3")
    assert command("likelihood", *settings, "n=4", "likelihood.batch_size=3", "out=a", cwd=tmp_path).code == 0
    assert command("likelihood", *settings, "n=4", "weights=weights", "out=b", cwd=tmp_path).code == 0
    first, raw = (json.loads((tmp_path / name / "likelihood.json").read_text()) for name in "ab")
    values = np.load(tmp_path / "a" / "bits_per_dim.npz")
    assert first["mean"] == pytest.approx(own["bits_per_dim"]["mean"], abs=1e-5)
    assert first["mean"] == pytest.approx(values["bits_per_dim"].mean()) and values["index"].tolist() == [0, 8, 16, 24]
    assert abs(raw["mean"] - first["mean"]) > 1e-4
    done = command(
        "evaluate", *settings, "evaluation.points=4", "evaluation.samples=4", "sampler=ddim", "sampler.steps=4",
        "evaluation.pictures=false", "out=c", cwd=tmp_path,
    )  # fmt: skip
    assert done.code == 0, done.err
    again = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert again["bits_per_dim"]["mean"] == own["bits_per_dim"]["mean"] and again["loss"] == own["loss"]
    assert np.array_equal(np.load(tmp_path / "c" / "samples.npz")["ddim"], np.load(trained / "samples.npz")["ddim"])


@pytest.mark.parametrize("name", ["sample", "likelihood", "evaluate"])
def test_a_run_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for given, words in ((("run=nowhere",), "run=nowhere is no folder"), ((), "run=???"),
                         (("run=empty",), "holds no whole checkpoint")):  # fmt: skip
        done = command(name, *given, cwd=tmp_path)
        assert done.code == 1 and words in done.err, done.err
    assert tree(tmp_path) == {"empty": ""}


def test_a_checkpoint_cannot_call_what_it_likes(trained: Path, tmp_path: Path) -> None:
    """A configuration with a foreign target and leave for it, its manifest made to fit: leave is the user's alone."""
    shutil.copytree(trained, tmp_path / "evil", symlinks=True)
    (tmp_path / "evil" / "excerpt.safetensors").unlink()  # with it, the data are not built at all
    path = tmp_path / "evil" / "checkpoints" / "step-00000010"
    config = json.loads((path / "config.json").read_text())
    text = json.dumps(
        {**config, "data": {"_target_": "os.system", "command": "touch trapped"}, "allow_targets": ["os.system"]}
    )
    forge(path, "config.json", text.encode())
    for name in ("sample", "likelihood", "evaluate"):
        done = command(name, "run=evil", "out=o", cwd=tmp_path)
        assert done.code == 1 and "data._target_=os.system is not a name" in done.err
    assert {entry.name for entry in tmp_path.iterdir()} == {"evil"}


def test_a_network_of_ones_own_is_named_again_where_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a folder of one's own options; the run's checkpoint alone gives no leave to import it."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_mlp.py").write_text("from scoresde.nn import MLP\nclass Own(MLP):\n    pass\n")
    (tmp_path / "options" / "network").mkdir(parents=True)
    (tmp_path / "options" / "network" / "own.yaml").write_text("_target_: own_mlp.Own\n_partial_: true\nwidth: 8\n")
    options = [argument for argument in TINY if not argument.startswith("network")]
    train = ("--config-dir=options", *options, *PLAIN, "network=own", "evaluate_at_end=false", "out=own")
    done = command("train", *train, cwd=tmp_path)
    assert done.code == 1 and "'allow_targets=[own_mlp.Own]'" in done.err and not (tmp_path / "own").exists()
    assert command("train", *train, "allow_targets=[own_mlp.Own]", cwd=tmp_path).code == 0
    done = command("likelihood", "run=own", "n=2", "out=a", cwd=tmp_path)
    assert done.code == 1 and "'allow_targets=[own_mlp.Own]'" in done.err and not (tmp_path / "a").exists()
    done = command("likelihood", "run=own", "n=2", "out=a", "allow_targets=[own_mlp.Own]", cwd=tmp_path)
    assert done.code == 0 and json.loads((tmp_path / "a" / "likelihood.json").read_text())["points"] == 2


def test_help_and_configuration_are_printed_and_nothing_is_written(tmp_path: Path) -> None:
    """In a process, as `python -m` starts it; and the configuration is YAML that can be read back."""
    run = process("train", "--help", cwd=tmp_path)
    out, err = run.communicate()
    assert run.returncode == 0 and err == ""
    assert (
        "scoresde-train -m sde=vp,subvp,ve seed=0,1" in out
        and "sde: cosine, ddpm, ddpm_cosine, edm, flow, subvp, table, ve, vp" in out
    )
    wrong = process("train", "trainer.imges=5", cwd=tmp_path)
    out, err = wrong.communicate()
    assert (wrong.returncode, out) == (1, "")
    assert err == "error: There is no key 'trainer.imges'. Did you mean 'trainer.images'?\n"
    for name, more in (("train", ("sde=ve",)), ("sample", ("run=x",)), ("likelihood", ("run=x",))):
        done = command(name, "--cfg", "job", *more, cwd=tmp_path)
        printed = OmegaConf.create(done.out)
        assert done.code == 0 and "hydra" not in printed and printed.seed == 0
        assert name != "train" or printed.sde._target_ == "scoresde.VESDE"
    assert list(tmp_path.iterdir()) == []
