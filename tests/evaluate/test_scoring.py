"""Samplers scored: on which features, in which order, with what refused before anything is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scoresde import DDIM, VPSDE, Budget, GaussianMixtureDenoiser, LogSNRGrid, Rng, Sampler
from scoresde.codecs import Scaling
from scoresde.data import Dataset, Split
from scoresde.evaluate import Features, OdeLikelihood
from scoresde.evaluate.calibration import noise_levels
from scoresde.evaluate.evaluation import Samples
from scoresde.evaluate.report import Evaluation, Report
from scoresde.evaluate.scoring import TRAINING, Scoring, check_rank, ranked
from scoresde.evaluate.shards import Shards
from scoresde.evaluate.table import columns_of, markdown, printed, shown, verdict
from scoresde.metrics import Score, kernel_score, memorisation, precision_recall
from scoresde.runs.logger import Logger


def toy(train: int = 120, test: int = 60, std: float = 1.0) -> Dataset:
    split = lambda n, seed: Split(std * Rng(seed).normal((n, 2)))  # noqa: E731
    return Dataset("toy", split(train, 0), split(test, 1), Scaling.identity())


def grey(n: int = 50) -> Dataset:
    raw = Rng(0).integers(16, (n, 1, 4, 4)).to(torch.uint8)
    return Dataset("grey", Split(raw), Split(raw.flip(0)), Scaling(levels=16))


class Half(nn.Module):
    """Means of both halves of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[..., :2].mean((1, 2, 3)), x[..., 2:].mean((1, 2, 3))], 1) * self.scale


# Features -----------------------------------------------------------------------------------------------------------


def test_pixels_are_the_values_rounded_as_the_data_are() -> None:
    dataset = grey()
    x = dataset.encode(dataset.train.raw, Rng(0))  # with noise in every bin
    assert torch.equal(Features()(x, dataset), dataset.encode(dataset.train.raw))
    assert Features().name == "pixels"


def test_features_come_from_a_module_its_weights_and_torchscript(tmp_path: Path) -> None:
    dataset, other = grey(), Half()
    nn.init.constant_(other.scale, 3.0)
    save_file(other.state_dict(), tmp_path / "half.safetensors")
    torch.jit.save(torch.jit.script(other), tmp_path / "half.pt")
    x = dataset.encode(dataset.train.raw)
    for features, kind in (
        (Features(other, batch_size=7), "Half"),
        (Features(Half(), path=tmp_path / "half.safetensors"), r"Half of half.safetensors (SHA-256 "),
        (Features(path=str(tmp_path / "half.pt")), "TorchScript of half.pt (SHA-256 "),
    ):
        torch.testing.assert_close(features(x, dataset), other(x).detach())
        assert features.name.startswith(kind)


def test_features_that_cannot_be_had_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"nothing")
    save_file({"scale": torch.ones(3)}, tmp_path / "w.safetensors")
    for wrong, words in (
        ({"path": tmp_path / "no.pt"}, r"features.path=.*is no file"),
        ({"path": tmp_path / "bad.pt"}, "bad.pt cannot be read"),
        ({"path": tmp_path / "w.safetensors"}, "go with features.network._target_"),
        ({"network": Half(), "path": tmp_path / "bad.pt"}, "any other file is TorchScript"),
        ({"network": Half(), "path": tmp_path / "w.safetensors"}, r"(?s)w.safetensors cannot be read: .*size mismatch"),
        ({"batch_size": 0}, "features.batch_size is a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Features(**wrong)
    dataset = grey()
    with pytest.raises(ValueError, match=r"Linear does not take samples of shape \(1, 4, 4\)"):
        Features(nn.Linear(3, 3))(dataset.encode(dataset.train.raw), dataset)
    with pytest.raises(ValueError, match=r"Identity returned features of shape \(50, 1, 4, 4\)"):
        Features(nn.Identity())(dataset.encode(dataset.train.raw), dataset)


# Scoring ------------------------------------------------------------------------------------------------------------


def spread(made: Tensor, held_out: Tensor, train: Tensor) -> float:
    """A metric of a user's."""
    return float(made.std() - held_out.std())


def many(made: Tensor, held_out: Tensor, train: Tensor) -> float:
    if len(made) < 100:
        raise ValueError("fewer than 100")
    return 0.0


def test_each_sampler_and_the_training_data_get_every_number() -> None:
    dataset = toy()
    good, bad = Rng(5).normal((60, 2)), 3 * Rng(5).normal((60, 2))
    metrics = {"kernel": kernel_score, "spread": spread, "near": precision_recall, "seen": memorisation}
    scoring = Scoring(metrics).tried(dataset, 60)
    assert scoring.names == ("kernel", "spread", "precision", "recall", "memorised", "copies") and not scoring.skipped
    scores = scoring.of({"good": good, "bad": bad, "copied": dataset.train.raw[:60]}, dataset)
    assert list(scores) == ["good", "bad", "copied", TRAINING]
    assert all(tuple(row) == scoring.names for row in scores.values())
    assert abs(scores["good"]["spread"].value) < 4 * scores["good"]["spread"].stderr
    assert scores["bad"]["spread"].value > 4 * scores["bad"]["spread"].stderr
    for row in ("copied", TRAINING):
        assert scores[row]["memorised"].value == pytest.approx(1) and scores[row]["copies"].value > 0.9
    assert scores["good"]["copies"].value < 0.1
    assert ranked(scores, None)[0] in ("good", "copied") and ranked(scores, None)[2:] == ["bad", TRAINING]
    assert ranked(scores, "-spread")[0] == "bad" and ranked(scores, "spread")[2:] == ["bad", TRAINING]
    assert scoring.protocol(dataset, 60)["features"] == "pixels"


def test_too_few_are_refused_before_anything_is_drawn_or_said() -> None:
    for wrong, samples, words in (
        ({"spread": spread}, 39, r"spread on evaluation.samples=39 and 60 .*at least 40 of either.*'~metrics.spread'"),
        ({"many": many}, 99, r"metrics.many on evaluation.samples=99 and 60 held-out points, .*: fewer than 100"),
        ({"a": lambda *_: "much"}, 99, r"metrics.a on .*it returned 'much'; expected a number"),
        ({"a": lambda *_: {"x": 1.0}, "b": lambda *_: {"x": 1.0}}, 99, "two of them return a number called 'x'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            Scoring(wrong).tried(toy(), samples)
    some = Scoring({"many": many, "spread": spread}, optional=True).tried(toy(), 50)
    assert list(some.metrics) == ["spread"] and "metrics.many on evaluation.samples=50" in some.skipped[0]
    assert Scoring({"spread": spread}, optional=True).tried(toy(test=20), 50).metrics == {}
    with pytest.raises(ValueError, match=r"evaluation\.rank_by=-fid is none of the numbers that are measured: kernel"):
        check_rank("-fid", ["kernel"])


# Noise levels -------------------------------------------------------------------------------------------------------


def test_the_loss_at_each_level_is_that_of_the_exact_denoiser() -> None:
    """Gaussian data of variance v: E ‖ε̂ − ε‖²/D = α²v/(α²v + σ²), on either split, within its error."""
    denoiser = GaussianMixtureDenoiser(torch.zeros(1, 2), 0.5, torch.ones(1), VPSDE())
    levels = noise_levels(denoiser, toy(2000, 2000, std=math.sqrt(0.5)), 5, batch_size=300)
    assert [level.t for level in levels] == sorted((level.t for level in levels), reverse=True)
    assert (levels[0].t, levels[-1].t) == (denoiser.sde.t_max, denoiser.sde.t_min)
    for level in levels:
        alpha, sigma = denoiser.sde.marginal(torch.tensor(level.t, dtype=torch.float64))
        expected = float(0.5 * alpha**2 / (0.5 * alpha**2 + sigma**2))
        assert level.noise == pytest.approx(float(sigma / alpha))
        for found in (level.held_out, level.training):
            assert abs(found.value - expected) < 4 * found.stderr + 1e-6 and found.stderr < 0.1 * expected + 1e-6
        assert level.gap.stderr == pytest.approx(math.hypot(level.held_out.stderr, level.training.stderr))


# The table ----------------------------------------------------------------------------------------------------------


def made(name: str, calls: float) -> Samples:
    return Samples(torch.zeros(50, 2), None, torch.zeros(1, 1, 2), [1.0], calls, calls / 10)


SCORES: Mapping[str, Mapping[str, Score]] = {
    "slow": {"kernel": Score(0.3, 0.1, (0.2, 0.4)), "recall": Score(0.5, 0.0)},
    "fast": {"kernel": Score(0.1, 0.1, (0.0, 0.2)), "recall": Score(0.9, 0.0123)},
    TRAINING: {"kernel": Score(0.0, 1e-9), "recall": Score(0.8, math.nan)},
}


def test_the_table_is_sorted_and_compares_in_pairs() -> None:
    """Both change alike from group to group, so the difference of 0.2 has no error: each alone has one of 0.1."""
    drawn = {"slow": made("slow", 100), "fast": made("fast", 20)}
    table = columns_of(drawn, SCORES, None)
    assert list(table) == ["sampler", "network calls", "seconds for 50", "kernel", "kernel − fast", "recall"]
    assert list(zip(*table.values(), strict=True)) == [
        ("fast", "20", "2.0", "0.10 ± 0.10", "", "0.900 ± 0.012"),
        ("slow", "100", "10.0", "0.30 ± 0.10", "0.2000 ± 0.0000", "0.5000 ± 0.0000"),
        (TRAINING, "", "", "0.00e+00 ± 1.0e-09", "", "0.8"),
    ]
    assert verdict(drawn, SCORES, None) == "By kernel, fast is better than slow by more than two standard errors."
    assert list(columns_of(drawn, SCORES, "-recall"))[3:] == ["recall", "recall − fast", "kernel"]
    near = {**SCORES, "slow": {"kernel": Score(0.3, 0.1)}}
    assert verdict(drawn, near, None).startswith("By kernel, fast is not told apart from slow: draw more")
    assert verdict({"slow": drawn["slow"]}, SCORES, None) == verdict(drawn, {"slow": {}, "fast": {}}, None) == ""
    assert columns_of(drawn, {"slow": {}, "fast": {}}, None)["sampler"] == ["slow", "fast"]
    assert markdown({"a": ["1"], "b": ["2"]}) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert shown(None) == "–" and shown(Score(-1234.5678, 56.7)) == "-1235 ± 57"


def test_a_wide_table_is_printed_in_parts_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = {"sampler": ["pc"], "calls": ["1"], "seconds": ["2"], **{f"n{k}": [f"{k}.5"] for k in range(6)}}
    assert len(printed(columns).splitlines()) == 3
    for width, expected in (
        (33, [["calls", "seconds", "n0", "n1"], ["n2", "n3", "n4", "n5"]]),
        (5, [[name] for name in list(columns)[1:]]),
    ):
        monkeypatch.setattr("scoresde.evaluate.table.window", lambda width=width: width)
        parts = printed(columns).split("\n\n")
        assert [part.split()[1 : 1 + len(names)] for part, names in zip(parts, expected, strict=True)] == expected
        assert width == 5 or max(len(line) for part in parts for line in part.splitlines()) <= width


class Kept(Logger):
    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def table(self, key: str, columns: Any, rows: Any) -> None:
        self.kept[key] = [columns, rows]

    def summary(self, values: Mapping[str, Any]) -> None:
        self.kept |= values

    def image(self, key: str, path: Path, *, step: int, images: int) -> None:
        assert path.is_file()
        self.kept[key] = (step, images)


def test_a_report_scores_an_exact_model_and_says_so_everywhere(tmp_path: Path, capsys) -> None:
    """Two samplers of an exact model: 16 steps are as good as the data, two are not, and every place says so."""
    denoiser, dataset = GaussianMixtureDenoiser(torch.zeros(1, 2), 1.0, torch.ones(1), VPSDE()), toy()
    few, many = (Sampler(DDIM(), LogSNRGrid(), steps=steps, denoise=False) for steps in (2, 16))
    samplers = {"few": few, "many": many}
    evaluation = Evaluation(points=4, samples=60, pictures=True, levels=3)
    scoring = Scoring({"kernel": kernel_score, "spread": spread}).tried(dataset, 60)
    likelihood = OdeLikelihood(solver=Budget(16))
    report = Report(denoiser, dataset, False, samplers, likelihood, evaluation, 0, scoring)
    measured = report.measure(Shards(tmp_path / "batches"))
    assert measured is not None
    logger = Kept()
    summary = report.write(*measured, tmp_path, {"folder": "f", "step": 7}, logger)
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert {"scores.png", "noise.png", "samples.png", "samples-many.png"} <= {path.name for path in tmp_path.iterdir()}
    kernel = {row: numbers["kernel"] for row, numbers in summary["scores"].items()}
    assert list(kernel) == ["few", "many", TRAINING] and len(kernel["few"]["left_out"]) == 20
    assert list(summary["scores"]["few"]) == ["sliced-W2", "kernel", "spread"]
    assert summary["samplers"][0]["sliced_w2"] == summary["scores"]["few"]["sliced-W2"]["value"]
    assert summary["best"] == "many" and "minus_best" not in summary["scores"]["many"]["kernel"]
    assert abs(kernel["many"]["value"]) < 4 * kernel["many"]["stderr"]
    assert summary["protocol"]["held_out"] == 60 and len(summary["noise_levels"]) == 3
    text, out = (tmp_path / "summary.md").read_text(), capsys.readouterr().out
    for shown_in in (text, out):
        assert shown_in.count("bits/dim of the model") == 1 and "sliced-W2 − many" in shown_in
        assert "Scores on pixels" in shown_in and "held out − training" in shown_in and "(training data)" in shown_in
    columns, rows = logger.kept["eval/summary"]
    assert columns[0] == "sampler" and [row[0] for row in rows] == ["many", "few", TRAINING]
    assert logger.kept["eval/scores"] == logger.kept["eval/noise"] == (7, 0)
    assert logger.kept["scores/kernel"]["few"] == kernel["few"]["value"] and logger.kept["w2"].keys() >= {"few", "many"}
