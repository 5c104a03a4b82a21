"""Jobs over many batches: any number of processes, killed and repeated, give the bits of one that was left alone."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PLAIN, TINY, command, tree
from oracles import mixture

import scoresde
from scoresde import VPSDE, AdaptiveODE, Langevin, PredictorCorrector, ReverseDiffusion, Sampler
from scoresde.codecs import Scaling
from scoresde.data import Dataset, Split
from scoresde.evaluate.evaluation import Drawing, Samples
from scoresde.evaluate.likelihood import BitsPerDim, OdeLikelihood
from scoresde.evaluate.shards import Job, ShardError, Shards, ranks
from scoresde.likelihood.tolerance import Tolerance

SETTINGS = {"model": {"name": "mixture", "step": 3}}
SAMPLERS = {
    "pc": Sampler(PredictorCorrector(ReverseDiffusion(), Langevin()), steps=10),
    "ode": Sampler(AdaptiveODE(rtol=1e-3, atol=1e-3), steps=1),
}


def samples(name: str = "pc", n: int = 11) -> Job[Samples]:
    """Six batches of 2, the last of 1."""
    drawing = Drawing((2,), range(7, 7 + n), batch_size=2, frames=3, watched=8)
    return drawing.job(mixture(VPSDE(), (2,)), SAMPLERS[name])


def bits() -> Job[BitsPerDim]:
    raw = torch.randint(16, (5, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    dataset = Dataset("grey", Split(raw), Split(raw), Scaling(levels=16))
    return OdeLikelihood(solver=Tolerance(1e-3, 1e-3), batch_size=2).job(mixture(VPSDE(), (1, 2, 2)), dataset, seed=1)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*/*.safetensors")}


def equal(a: Samples, b: Samples) -> bool:
    return torch.equal(a.x, b.x) and torch.equal(a.frames, b.frames) and (a.times, a.evaluations) == (
        b.times, b.evaluations,
    )  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("name", SAMPLERS)
def test_any_number_of_ranks_gives_the_same_samples(name: str, world: int, tmp_path: Path) -> None:
    """Bit for bit; rank r writes batches r, r + world, … and nothing else."""
    job = samples(name)
    for rank in reversed(range(world)):
        before = names(tmp_path)
        Shards(tmp_path, SETTINGS, rank, world).work(job)
        assert names(tmp_path) - before == {f"{index:06d}.safetensors" for index in range(rank, 6, world)}
    assert equal(Shards(tmp_path, SETTINGS, 0, world).result(job), job.run())


@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_ranks_gives_the_same_likelihood(world: int, tmp_path: Path) -> None:
    """`evaluations` is of batches that each solve to their own end, so it is the batches that are compared."""
    job = bits()
    for rank in range(world):
        Shards(tmp_path, rank=rank, world=world).work(job)
    shards = Shards(tmp_path, world=world)
    there, alone = shards.result(job), job.run()
    assert torch.equal(there.values, alone.values)
    assert torch.equal(there.errors, alone.errors)
    assert there.record | {"seconds": 0} == alone.record | {"seconds": 0}
    shards.clear()
    assert not tmp_path.exists()


def worker(folder: str, hold: str) -> None:
    """What the processes below do: this rank's share, which stands still in batch `hold`."""
    job = samples()

    def batch(index: int) -> Iterator[dict[str, torch.Tensor]]:
        if index == int(hold):
            time.sleep(600)
        yield from job.batch(index)

    shards = Shards(Path(folder), SETTINGS, *ranks())
    shards.work(dataclasses.replace(job, batch=batch))


def test_a_rank_that_is_killed_is_named_and_what_it_did_stays_done(tmp_path: Path) -> None:
    """SIGKILL to rank 1 of 2 in its second batch. Rank 0 does not hang; repeated, the bits are those of a whole run."""
    environment = {
        **os.environ, "RANK": "1", "WORLD_SIZE": "2",
        "PYTHONPATH": os.pathsep.join([str(Path(scoresde.__file__).parents[1]), str(Path(__file__).parents[1])]),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    process = subprocess.Popen([sys.executable, __file__, str(tmp_path), "3"], env=environment)
    while process.poll() is None and not names(tmp_path):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (own,) = tmp_path.glob("*/000001.safetensors")
    left = own.with_name(".000003.safetensors.1-99")
    left.write_bytes(b"cut")  # as a write that was interrupted leaves it
    job, whole, written = samples(), samples().run(), own.stat().st_mtime_ns
    with pytest.raises(ShardError, match=r"of 2 ranks, rank 1 owes batches 3, 5, and wrote nothing .* for 0\.3 s"):
        Shards(tmp_path, SETTINGS, 0, 2, timeout=0.3).result(job)
    assert names(tmp_path) == {f"00000{index}.safetensors" for index in (0, 1, 2, 4)}
    Shards(tmp_path, SETTINGS, 1, 2).work(job)
    assert equal(Shards(tmp_path, SETTINGS, 0, 2).result(job), whole)
    assert own.stat().st_mtime_ns == written


def test_batches_that_are_there_are_not_made_again(tmp_path: Path, caplog) -> None:
    job = samples()

    def batch(index: int) -> Iterator[dict[str, torch.Tensor]]:
        assert index >= 4, "done already"
        yield from job.batch(index)

    def stop(index: int) -> Iterator[dict[str, torch.Tensor]]:
        if index == 4:
            raise KeyboardInterrupt
        yield from job.batch(index)

    with pytest.raises(KeyboardInterrupt):
        Shards(tmp_path, SETTINGS).work(dataclasses.replace(job, batch=stop))
    with caplog.at_level(logging.INFO):
        result = Shards(tmp_path, SETTINGS).result(dataclasses.replace(job, batch=batch))
    assert "samples: 4 of 6 batches are there already" in caplog.text
    assert equal(result, job.run())


def test_batches_of_other_settings_are_refused(tmp_path: Path) -> None:
    """Whether they were there before, or come from a rank that was started with others."""
    late = Shards(tmp_path, {"model": {"name": "mixture", "step": 4}}, 1, 2)
    Shards(tmp_path, SETTINGS, 0, 2).work(samples())
    before = tree(tmp_path)
    words = r"made with model\.step=3, and this asks for model\.step=4; they are not mixed"
    with pytest.raises(ValueError, match=words):
        Shards(tmp_path, {"model": {"name": "mixture", "step": 4}})
    with pytest.raises(ValueError, match=words):
        late.work(samples())
    with pytest.raises(
        ValueError, match=r"made with model=\{'name': 'mixture', 'step': 3\}, and this asks for model=None"
    ):
        Shards(tmp_path)
    assert {name for name in tree(tmp_path) if not name.startswith(".")} == set(before)


def flip(path: Path) -> None:
    """Turns one bit of the last number of a safetensors file, whose header stays right."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, None])
def test_damaged_settings_are_named_with_the_cure(tmp_path: Path, content: bytes | None) -> None:
    Shards(tmp_path, SETTINGS).work(samples(n=2))
    path = tmp_path / "settings.json"
    path.write_bytes(content) if content is not None else pipe(path)
    with pytest.raises(ValueError, match=rf"{path} is damaged.*Remove {tmp_path}"):
        Shards(tmp_path, SETTINGS)


def test_a_batch_that_is_not_what_it_should_be_is_made_again(tmp_path: Path, caplog) -> None:
    """Cut short, of another place, or of a job with other seeds: never merged, and said."""
    shards, whole = Shards(tmp_path, SETTINGS), samples().run()
    shards.work(samples(n=9))  # of five batches
    assert equal(shards.result(samples()), whole)
    assert caplog.text.count("is damaged or was made with other settings, and is made again") == 5
    first, second = tmp_path / "samples/000000.safetensors", tmp_path / "samples/000001.safetensors"
    for harm in (lambda: first.write_bytes(first.read_bytes()[:-1]), lambda: first.write_bytes(second.read_bytes()),
                 lambda: first.write_bytes(b""), first.unlink, lambda: flip(first), lambda: pipe(first)):  # fmt: skip
        harm()
        assert equal(shards.result(samples()), whole)


def test_arguments_out_of_range_are_refused(tmp_path: Path, monkeypatch) -> None:
    for rank, world in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match=f"rank={rank} of world={world}"):
            Shards(tmp_path, rank=rank, world=world)
    for timeout in (0, -1.0, math.nan, True, "long"):
        with pytest.raises(ValueError, match="timeout is a number of seconds > 0"):
            Shards(tmp_path, timeout=timeout)
    assert ranks() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "four")
    with pytest.raises(ValueError, match="got 3, four"):
        ranks()


def test_progress_is_shown_by_rank_0_alone(tmp_path: Path, monkeypatch) -> None:
    """A bar of all steps of its own batches, with the rate and the time left."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for rank in (0, 1):
        monkeypatch.setattr("sys.stderr", Terminal())
        Shards(tmp_path, SETTINGS, rank, 2).work(samples())
        assert ("/39 [" in sys.stderr.getvalue()) == ("it/s" in sys.stderr.getvalue()) == (rank == 0)  # 3 × (10 + 3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("run")
    assert command("train", *TINY, *PLAIN, "evaluate_at_end=false", "out=run", cwd=cwd).code == 0
    return cwd / "run"


def test_the_commands_work_under_torchrun(trained: Path, tmp_path: Path) -> None:
    """Two processes, no `out`: one folder, one table, the samples of one process; and the command knows it is done."""
    arguments = (f"run={trained}", "sampler=ddim", "sampler.steps=4", "n=7", "batch_size=2", "pictures=false",
                 "threads=1", "timeout=300")  # fmt: skip
    alone = command("sample", *arguments, "out=alone", cwd=tmp_path)
    assert alone.code == 0, alone.err
    launch = ("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scoresde.cli.sample")
    done = subprocess.run(
        [sys.executable, "-m", *launch, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(scoresde.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (trained / "sample").iterdir()
    assert {path.name for path in folder.iterdir()} == {"samples.npz", "summary.json"}
    assert done.stdout.count("network calls") == 1 and str(folder) in done.stdout
    assert np.array_equal(*(np.load(path / "samples.npz")["ddim"] for path in (folder, tmp_path / "alone")))
    again = command("sample", *arguments, cwd=tmp_path)
    assert again.code == 1 and f"{folder} holds the results of a command already" in again.err


@pytest.mark.parametrize("name", ["likelihood", "evaluate"])
def test_each_command_is_shared_and_resumed(name: str, trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Rank 1, then a rank 0 that is stopped, then rank 0: the numbers of one process that was left alone."""
    arguments = {
        "likelihood": (f"run={trained}", "n=7", "likelihood.batch_size=2", "likelihood.solver.rtol=1e-3", "threads=1"),
        "evaluate": (f"run={trained}", "sampler=ddim", "sampler.steps=4", "evaluation.points=5", "likelihood=budget",
                     "evaluation.samples=5", "likelihood.solver.calls=8", "likelihood.batch_size=2",
                     "evaluation.batch_size=2", "evaluation.pictures=false", "threads=1"),
    }[name]  # fmt: skip
    result, arrays = (
        ("likelihood.json", "bits_per_dim.npz") if name == "likelihood" else ("summary.json", "samples.npz")
    )
    assert command(name, *arguments, "out=alone", cwd=tmp_path).code == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    done = command(name, *arguments, "out=two", cwd=tmp_path)
    assert done.code == 0 and done.out == "", done.err
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"batches"}
    monkeypatch.setenv("RANK", "0")

    def interrupted(self: Shards, job: Job[object], index: int, batch: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Shards, "_save", interrupted)
        done = command(name, *arguments, "out=two", cwd=tmp_path)
        assert done.code == 130 and "the same command goes on from here" in done.err
    done = command(name, *arguments, "seed=1", "out=two", cwd=tmp_path)
    assert done.code == 1 and "made with seed=0, and this asks for seed=1" in done.err
    done = command(name, *arguments, "out=two", cwd=tmp_path)
    assert done.code == 0 and not (tmp_path / "two/batches").exists(), done.err
    monkeypatch.setenv("RANK", "1")  # one that comes too late has nothing to do
    assert command(name, *arguments, "out=two", cwd=tmp_path).code == 0 and not (tmp_path / "two/batches").exists()
    one, two = (json.loads((tmp_path / out / result).read_text()) for out in ("alone", "two"))
    one, two = (record.get("bits_per_dim", record) for record in (one, two))
    assert one | {"seconds": 0} == two | {"seconds": 0} and one["estimator"] == "bpd/ode"
    (key,) = {"bits_per_dim", "ddim"} & set(np.load(tmp_path / "two" / arrays))
    assert np.array_equal(*(np.load(tmp_path / out / arrays)[key] for out in ("alone", "two")))


if __name__ == "__main__":
    torch.set_num_threads(1)
    worker(*sys.argv[1:])
