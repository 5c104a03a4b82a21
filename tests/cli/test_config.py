"""The configuration tree: every option builds, every key is real, and nothing else can be called from it."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Unpack, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from scipy.io import wavfile
from torch import nn

from scoresde import (
    DDIM,
    DDPM,
    SDE,
    VPSDE,
    Contrastive,
    Denoiser,
    Eps,
    FittedGrid,
    FlowMap,
    KarrasGrid,
    LogSNRGrid,
    Mask,
    NoisyClassifier,
    Observation,
    Preconditioned,
    Sampler,
    Step,
    VariationalAutoencoder,
    codecs,
)
from scoresde.cli._hydra import read
from scoresde.cli.plan import assemble
from scoresde.codecs import Scaling
from scoresde.config import ConfigError, build, build_network, config_dir, parameters, targets
from scoresde.data import Augmentation, Captions, Dataset, Embedding, Split
from scoresde.diffusion.parameterization import Parameterization
from scoresde.diffusion.split import Split as TwoHeads
from scoresde.evaluate import Features
from scoresde.evaluate.edits import Edit
from scoresde.evaluate.likelihood import Likelihood
from scoresde.evaluate.report import Evaluation
from scoresde.losses import FlowMapLoss, Loss
from scoresde.nn import MLP, Autoencoder, Classifier, Embedder, TextEncoder, TextTransformer
from scoresde.runs.kept import keep
from scoresde.runs.load import build_denoiser
from scoresde.runs.logger import Logger
from scoresde.train.ema import Average
from scoresde.train.trainer import Trainer
from scoresde.train.world import Alone

CONF = Path(config_dir())
EMPTY = (
    "problem/none.yaml",
    "edit/none.yaml",
    "augment/none.yaml",
    "codec/own.yaml",
    "grid/own.yaml",
    "captions/none.yaml",
    "text/none.yaml",
)  # nothing in them
OPTIONS = sorted(
    (path.parent.name, path.stem)
    for path in CONF.glob("*/*.yaml")
    if path.parent.name not in ("experiment", "metrics", "features")  # the last two are built in a test of their own
    and str(path.relative_to(CONF)) not in EMPTY
)
EXPERIMENTS = sorted(path.stem for path in CONF.glob("experiment/*.yaml"))


def composed(*overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture
def on_the_command_line() -> Iterator[Callable[..., DictConfig]]:
    """Composes as the command does, with what Hydra itself was told at hand."""

    def start(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            started = [*overrides, "hydra.runtime.output_dir=out"]
            HydraConfig.instance().set_config(compose("train", started, return_hydra_config=True))
        return composed(*overrides)

    yield start
    HydraConfig.instance().cfg = None


def tiny_denoiser() -> Preconditioned:
    return Preconditioned(MLP((2,), width=8, depth=1), VPSDE(), Eps())


def tiny_map() -> Preconditioned:
    return Preconditioned(MLP((2,), width=8, depth=1, told=["end"]), VPSDE(), Eps(), told=["end"])


def tiny_classifier() -> NoisyClassifier:
    return NoisyClassifier(Classifier((2,), classes=3, width=8, depth=1), VPSDE())


def seen() -> Observation:
    return Observation(torch.zeros(2), Mask(torch.tensor([1, 0])), 0.1)


# group -> (class of what it builds, what only a run knows)
GROUPS: dict[str, tuple[Any, Callable[[], dict[str, Any]]]] = {
    "sde": (SDE, dict),
    "parameterization": (Parameterization, dict),
    "network": (nn.Module, lambda: {"event_shape": (1, 8, 8), "classes": 3}),
    "denoiser": (
        (Denoiser, NoisyClassifier, VariationalAutoencoder, Contrastive),
        lambda: {"network": tiny_denoiser().network, "sde": VPSDE(), "parameterization": Eps()} | {"event_shape": (2,)},
    ),
    "loss": (
        Loss,
        lambda: {
            "denoiser": tiny_denoiser(),
            "classifier": tiny_classifier(),
            "autoencoder": VariationalAutoencoder(Autoencoder((1, 8, 8), width=8), VPSDE()),
            "embedder": Contrastive(Embedder((1, 8, 8), text=TextTransformer(5), width=8), VPSDE()),
        },
    ),
    "sampler": (Sampler, dict),
    "data": (Dataset, dict),
    "augment": (Augmentation, dict),
    "codec": (Dataset, dict),
    "optim": (torch.optim.Optimizer, lambda: {"params": [nn.Parameter(torch.zeros(2))]}),
    "ema": (Average, lambda: {"module": nn.Linear(2, 2)}),
    "logger": (Logger, dict),
    "trainer": (Trainer, dict),
    "likelihood": (Likelihood, dict),
    "grid": (object, dict),
    "guidance": (
        Denoiser,
        lambda: {"denoiser": tiny_denoiser(), "guide": tiny_denoiser(), "log_prob": tiny_classifier()},
    ),
    "posterior": ((Denoiser, Step), lambda: {"denoiser": tiny_denoiser(), "step": DDIM(), "observation": seen()}),
    "problem": (Observation, lambda: {"y": None}),
    "edit": (Edit, dict),
    "captions": (Captions, dict),
    "text": (TextEncoder, lambda: {"vocabulary": 5}),
}
FLOW_MAPS = ("trajectory", "semigroup", "mean_flow", "consistency")
INSIDE = {"captions": "data", "text": "network"}  # groups whose node is a part of another's
OF_SAMPLES = ("guidance", "posterior", "problem", "edit")  # groups that scoresde-train has not


def points_of(n: int) -> Dataset:
    """Samples that any codec takes: signals of channels, and points with their centre at 0."""
    raw = torch.randn(40, n, 8, generator=torch.Generator().manual_seed(0))
    split = Split(raw - raw.mean(1, keepdim=True))
    return Dataset("points", split, split, Scaling.identity())


def wanted(node: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Denoisers, losses, guides, and methods around a denoiser or around a step, are told what they ask for."""
    if not {"observation", "guide", "classifier", "parameterization"} & set(facts):
        return facts
    return {name: value for name, value in facts.items() if name in parameters(node["_target_"])[0]}


def test_every_group_is_known() -> None:
    """A new folder in conf/ needs a line above, and so is built below."""
    assert {group for group, _ in OPTIONS} == set(GROUPS)


def coder(folder: Path, base: Scaling, shape: tuple[int, ...], **bins: int) -> Path:
    """A folder that keeps an autoencoder, as that of a model of its latents does."""
    node = {"_target_": "scoresde.nn.Autoencoder", "event_shape": list(shape), "width": 8, "latent": 3, **bins}
    codec = codecs.Autoencoder(base, build(node), node=json.dumps(node))
    split = Split(torch.zeros(2, *shape, dtype=base.raw_dtype))
    folder.mkdir()
    keep(folder, Dataset("none", split, split, codec))
    return folder


def reader(folder: Path, base: Scaling, shape: tuple[int, ...]) -> Path:
    """A folder that keeps an embedder, as that of a model of its embeddings does."""
    text = {"_target_": "scoresde.nn.TextTransformer", "vocabulary": 5, "width": 8, "depth": 1, "heads": 2}
    node = {"_target_": "scoresde.nn.Embedder", "event_shape": list(shape), "width": 8, "text": text}
    split = Split(torch.zeros(2, *shape, dtype=base.raw_dtype))
    folder.mkdir()
    keep(folder, Dataset("none", split, split, base, embedder=Embedding(base, build(node), json.dumps(node))))
    return folder


def files(folder: Path) -> dict[str, list[str]]:
    """What the options that need a file are given."""
    from PIL import Image

    FittedGrid([-8.0, 0.0, 9.0]).save(folder / "grid.json")
    np.save(folder / "x.npy", np.linspace(-1, 1, 60, dtype=np.float32).reshape(30, 2))
    (folder / "images").mkdir()
    for i in range(20):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(folder / "images" / f"{i}.png")
    pixels = np.random.default_rng(0).integers(0, 256, (1000, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        shape = b"".join(size.to_bytes(4, "big") for size in pixels.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(bytes([0, 0, 8, 3]) + shape + pixels.tobytes())
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + shape[:4] + bytes(range(10)) * 100)
    (folder / "videos").mkdir()
    frames = [Image.fromarray(np.full((4, 4), 9 * i, np.uint8)) for i in range(8)]
    for i in range(10):
        frames[0].save(folder / "videos" / f"{i}.gif", save_all=True, append_images=frames[1:])
    paths = {"video": folder / "videos", "arrays": folder / "x.npy", "image_folder": folder / "images", "mnist": folder}
    np.savez(folder / "water.npz", positions=np.random.default_rng(0).normal(size=(640, 3, 3)), numbers=[8, 1, 1])
    paths |= {"molecules": folder / "water.npz", "ethanol": folder / "water.npz"}
    given = {option: [f"data.path={path}"] for option, path in paths.items()}
    (folder / "t.csv").write_text("a,b\n" + "".join(f"{i / 7},{i * i}\n" for i in range(60)))
    for i in range(80):
        (folder / "classes" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), i, np.uint8)).save(folder / "classes" / f"{i % 2}" / f"{i}.png")
    given["images"] = [f"data.path={folder / 'classes'}"]
    given["table"] = [f"data.path={folder / 't.csv'}"]
    for i in range(40):
        (folder / "sounds" / f"{i % 2}").mkdir(parents=True, exist_ok=True)
        wavfile.write(folder / "sounds" / f"{i % 2}" / f"{i}.wav", 8000, np.arange(4096, dtype=np.int16) * i)
    given["sound"] = [f"data.path={folder / 'sounds'}", "data.length=4096"]
    given["spoken_digits"] = [*given["sound"], "evaluation.points=2"]
    np.savez(folder / "images.npz", x=np.resize(pixels, (700, 32, 32, 3)))
    photographs = ("cifar_vp", "cifar_autoencoder", "cifar_low", "cifar_details", "cifar_upsampled")
    given |= {option: [f"data.path={folder / 'images.npz'}"] for option in photographs}
    np.save(folder / "clips.npy", pixels.flatten()[: 200 * 2048].reshape(200, 1, 8, 16, 16))
    given["moving_digits"] = [f"data.path={folder / 'clips.npy'}"]
    given["fitted"] = [f"grid.path={folder / 'grid.json'}"]
    given["sde/table"] = ["sde.alpha_bar=[0.9,0.5,0.1]"]
    given["energy"] = ["guidance.energy={_target_: scoresde.UniformGrid}"]  # something that can be called
    edits = ("sdedit", "interpolation", "attribute", "words", "variations", "embedding_interpolation")
    given |= {option: ["edit.input=test:0-1"] for option in edits}
    (folder / "words.txt").write_text("a b\n" * 30)
    given["file"] = [f"data.captions.path={folder / 'words.txt'}"]
    np.savez(folder / "scenes.npz", raw=pixels.flatten()[: 700 * 1024].reshape(700, 1, 32, 32))
    (folder / "scenes.txt").write_text("a 3 above a 7\n" * 700)
    given["scenes"] = [f"data.{of}path={folder}/scenes.{kind}" for of, kind in (("", "npz"), ("captions.", "txt"))]
    np.savez(folder / "things.npz", raw=pixels.flatten()[: 700 * 256].reshape(700, 1, 16, 16))
    things = f"codec.run={reader(folder / 'things', Scaling(levels=256), (1, 16, 16))}"
    captions = f"data.captions.path={folder}/scenes.txt"
    for run, words in {"embedder": [captions], "prior": [captions, things], "decoder": [things]}.items():
        given[f"unclip_{run}"] = [f"data.path={folder}/things.npz", *words]
    points = [f"codec.run={reader(folder / 'points', Scaling.identity(), (3, 8))}"]
    given |= {"codec/embeddings": points, "codec/with_embedding": points}
    given["attribute"] += ["edit.having=test:0", "edit.lacking=[test:1]"]
    given["codec/autoencoder"] = [f"codec.run={coder(folder / 'coder', Scaling.identity(), (3, 8))}"]
    pictures = coder(folder / "pictures", Scaling(levels=256), (1, 28, 28), levels=256)
    given |= {option: [*given["mnist"], f"codec.run={pictures}"] for option in ("mnist_latent", "mnist_latent_dit")}
    pictures = coder(folder / "photographs", Scaling(levels=256), (3, 32, 32), levels=256)
    more = [*given["cifar_vp"], f"codec.run={pictures}", "evaluation.points=8"]
    given |= dict.fromkeys(("cifar_latent", "cifar_latent_dit"), more)
    return given | {"arrays": [*given["arrays"], "data.raw_low=-1", "data.raw_high=1"]}


def encoder_of_others(folder: Path) -> Path:
    """A text encoder with random weights, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(folder / "t5")
    return folder / "t5"


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=str)
def test_every_option_builds(group: str, option: str, tmp_path: Path) -> None:
    kind, runtime = GROUPS[group]
    given = files(tmp_path)
    if option == "frozen":
        given["frozen"] = [f"network.text.path={encoder_of_others(tmp_path)}"]
    more = (
        given.get(f"{group}/{option}", given.get(option, []))
        if group in ("data", "grid", "guidance", "edit", "sde", "codec", "captions", "text")
        else []
    )
    if group in OF_SAMPLES:
        cfg = composed(f"{group}={option}", "run=somewhere", *more, name="sample")
    else:
        cfg = composed(f"{group}={option}", *more)
    node = cfg[INSIDE[group]][group] if group in INSIDE else cfg[group]
    facts = wanted(node, runtime())
    if option in FLOW_MAPS and group == "loss":
        facts = {"denoiser": tiny_map(), "teacher": tiny_denoiser()}
    if option == "egnn":
        facts["event_shape"] = (8, 3)
    if (group, option) in (("network", "autoencoder"), ("network", "embedder")):
        del facts["classes"]
    if (group, option) == ("network", "embedder"):
        facts["text"] = TextTransformer(5)
    if option == "hybrid":
        facts["denoiser"] = TwoHeads(tiny_denoiser().network, DDPM(), Eps())
    data = [points_of(3)] if group == "codec" else []
    built = build(node, (), *data, **facts)
    assert isinstance(built, kind)
    if group == "grid":
        times = built(VPSDE(), 5)
        assert times.shape == (6,) and bool((times.diff() < 0).all())
    if group == "network":
        x = torch.randn(2, *facts["event_shape"])
        if option == "classifier":  # of two samples, logits of three classes
            assert built(x, torch.zeros(2)).shape == (2, 3)
        elif option == "autoencoder":
            assert built.decode(built.encode(x)[0]).shape == x.shape
        elif option == "embedder":
            assert built.image(x).shape == built.words(torch.tensor([[1, 2], [3, -1]])).shape == (2, 32)
        else:
            assert built(x, torch.zeros(2), torch.tensor([0, 2])).shape == x.shape


def nodes(tree: Any, at: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `_target_`, and where it is."""
    if isinstance(tree, Mapping):
        if "_target_" in tree:
            yield at, tree
        for name, value in tree.items():
            yield from nodes(value, f"{at}.{name}")
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from nodes(value, f"{at}[{index}]")


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_is_a_parameter_of_its_target(path: Path) -> None:
    """Read from the files and the signatures themselves, apart from `build`'s own check."""
    tree = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(tree, dict)
    tree.pop("hydra", None)  # Hydra's own callbacks
    for at, node in nodes(tree):
        if node["_target_"] == "???":  # the user's own
            continue
        module, _, name = node["_target_"].rpartition(".")
        made = getattr(importlib.import_module(module), name)
        names = set(inspect.signature(made).parameters)
        for kind in get_type_hints(made.__init__).values():
            if get_origin(kind) is Unpack:  # **kwargs whose names are listed
                names |= get_args(kind)[0].__annotations__.keys()
        assert set(node) - {"_target_", "_partial_"} <= names, at
        assert node["_target_"] in targets()


@pytest.mark.parametrize("name", ["sample", "likelihood", "evaluate"])
def test_the_other_mains_build_every_option_of_their_groups(name: str, tmp_path: Path) -> None:
    """Options that refer to a key which only train.yaml has would fail here."""
    entries = OmegaConf.load(CONF / f"{name}.yaml").defaults
    groups = {str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry} & set(GROUPS)
    assert groups
    given = files(tmp_path)
    for group, option in OPTIONS:
        if group in groups:
            kind, runtime = GROUPS[group]
            more = (
                given.get(f"{group}/{option}", given.get(option, []))
                if group in ("data", "grid", "guidance", "edit", "sde")
                else []
            )
            node = composed(f"{group}={option}", "run=somewhere", *more, name=name)[group]
            assert isinstance(build(node, **wanted(node, runtime())), kind)


METRICS = sorted(path.stem for path in CONF.glob("metrics/*.yaml"))


@pytest.mark.parametrize("option", METRICS)
def test_every_set_of_metrics_measures(option: str) -> None:
    """Each entry is a function of samples, held-out and training points, and returns numbers with these settings."""
    nodes, numbers = composed(f"metrics={option}", "run=somewhere", name="evaluate").metrics, {}
    sets = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n)) for n in (40, 41, 42)]
    for name, node in nodes.items():
        node = {**node, "steps": 2} if name == "c2st" else node
        result = build({**node, "_partial_": True}, key=f"metrics.{name}")(*sets)
        numbers |= result if isinstance(result, dict) else {name: result}
    common = {"kernel", "precision", "recall", "density", "coverage", "memorised", "copies"}
    expected = {"none": set(), "default": common, "images": common | {"frechet"}}
    assert numbers.keys() == expected.get(option, common | {"frechet", "sliced", "c2st"})


def test_every_kind_of_features_builds(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Flatten()), tmp_path / "flat.pt")
    flat = "features.network._target_=torch.nn.Flatten"
    for option, more in (("pixels", []), ("module", [flat]), ("torchscript", [f"features.path={tmp_path}/flat.pt"])):
        node = composed(f"features={option}", *more, "run=somewhere", name="evaluate").features
        assert isinstance(build(node, ["torch.nn.Flatten"], key="features"), Features)
    assert {path.stem for path in CONF.glob("features/*.yaml")} == {"pixels", "module", "torchscript"}


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_evaluation_has_the_keys_of_its_class(name: str) -> None:
    tree = OmegaConf.load(CONF / f"{name}.yaml").evaluation
    assert set(tree) <= set(inspect.signature(Evaluation).parameters)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_says_how_to_run_it_and_builds(experiment: str, tmp_path: Path, on_the_command_line) -> None:
    """Everything a run needs, by the function that runs it: data, network, denoiser, loss, samplers, likelihood; or
    all that restores samples with one."""
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    command, named = text.splitlines()[0].split("\t")[:2]
    assert named == f"experiment={experiment}"
    if command == "# @run scoresde-sample":
        cfg = composed(named, "run=somewhere", name="sample")
        facts: dict[str, Any] = {"denoiser": tiny_denoiser(), "step": DDIM(), "observation": seen()}
        assert build(cfg.problem, y=None, operator=Mask(torch.ones(2))).linear
        assert isinstance(build(cfg.posterior, **wanted(cfg.posterior, facts)), (Denoiser, Step))
        assert isinstance(build(cfg.sampler), Sampler) and cfg.input.startswith("test:")
        assert (cfg.mask is None) == (cfg.problem.operator["_target_"] != "scoresde.Mask")
        return
    if command == "# @run scoresde-distil":
        cfg = composed(named, "run=somewhere", name="distil")
        loss = build(cfg.loss, [], tiny_map(), key="loss", teacher=tiny_denoiser())
        assert isinstance(loss, FlowMapLoss) and isinstance(build(cfg.sampler).step, FlowMap) and build(cfg.trainer)
        return
    assert command == "# @run scoresde-train"
    given = files(tmp_path)
    needed = [more for option, more in given.items() if f"override /data: {option}" in text]
    more = given.get(experiment, needed[0] if needed else [])
    plan = assemble(read(on_the_command_line(named, *more)), Alone())
    assert plan.samplers and all(isinstance(sampler, Sampler) for sampler in plan.samplers.values())
    assert sum(p.numel() for p in plan.training.loss.parameters()) > 0


def test_what_is_chosen_once_reaches_every_user() -> None:
    """`grid` is the sampler's, `sigma_data` that of the input scaling, the parameterisation and the weighting."""
    cfg = composed("sampler=heun", "grid=karras", "grid.rho=3", "parameterization=edm", "loss=edm", "sigma_data=0.25")
    grid = build(cfg.sampler).grid
    assert isinstance(grid, KarrasGrid) and grid.rho == 3
    assert isinstance(build(composed("sampler=ddim", "grid=log_snr").sampler).grid, LogSNRGrid)
    config = OmegaConf.to_container(composed("data=8gaussians", "network=mlp", "sigma_data=0.25"), resolve=True)
    assert isinstance(config, dict)
    assert build_denoiser(config, build(config["data"]), []).sigma_data == 0.25
    assert (
        build(cfg.parameterization).sigma_data == build(cfg.loss, denoiser=tiny_denoiser()).weighting.sigma_data == 0.25
    )


def test_runtime_objects_are_passed_not_copied() -> None:
    denoiser = tiny_denoiser()
    assert build(composed("loss=simple").loss, denoiser=denoiser).denoiser is denoiser


@pytest.mark.parametrize(
    ("override", "node", "message"),
    [
        (
            "+network.widht=3",
            "network",
            "network.widht: scoresde.nn.UNet has no parameter 'widht'. Did you mean 'width'?",
        ),
        ("sampler=pc +sampler.step.corrector.srn=1", "sampler", "sampler.step.corrector.srn: .* Did you mean 'snr'?"),
        ("+loss.times.tmin=0.1", "loss", "loss.times.tmin: .* Did you mean 't_min'?"),
        ("+trainer.image=5", "trainer", "trainer.image: .* Did you mean 'images'?"),
        ("+optim.learn=1", "optim", "optim.learn: torch.optim.AdamW has no parameter 'learn'.* It takes .*lr"),
        ("data=arrays", "data", "data.path has no value yet; give it on the command line: data.path="),
        ("sde._target_=scoresde.VPSED", "sde", "sde._target_=scoresde.VPSED .* Did you mean 'scoresde.VPSDE'?"),
        ("sde.beta_max=-1", "sde", "^sde: .*beta_m"),
        ("sampler=pc sampler.step.corrector.snr=-1", "sampler", "^sampler.step.corrector: .*snr"),
        ("network.embedding=none", "network", "^network: .*embedding.*'none'"),
        ("trainer.images=many", "trainer", "^trainer.images is a whole number; got 'many'"),
        ("network.width=8.5", "network", "^network.width is a whole number; got 8.5"),
        ("optim.lr=fast", "optim", "^optim.lr is a number or .*; got 'fast'"),
        (
            "sampler=pc sampler.step.corrector=3",
            "sampler",
            "^sampler.step.corrector is a mapping with _target_.*; got 3",
        ),
        ("sde.beta_max=nan", "sde", "^sde.beta_max is nan"),
    ],
    ids=str,
)
def test_mistakes_are_named_with_their_key_and_cure(override: str, node: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        cfg = composed(*override.split())[node]
        build(cfg, **wanted(cfg, GROUPS[node][1]()))


def test_a_wrong_key_in_a_list_is_found() -> None:
    tree = {"_target_": "torch.optim.Adam", "params": [{"x": [{"_target_": "scoresde.nn.MLP", "widht": 1}]}]}
    with pytest.raises(ConfigError, match=r"optim\.params\[0\]\.x\[0\]\.widht: .*Did you mean 'width'\?"):
        build(tree, key="optim")


@pytest.mark.parametrize("node", [{"width": 3}, None, 3, [], {}], ids=str)
def test_what_is_no_node_is_refused(node: Any) -> None:
    with pytest.raises(ConfigError, match="network has no _target_"):
        build(node, key="network")


FORBIDDEN = (
    "os.system", "logging.os.system", "builtins.eval", "builtins.exec", "subprocess.Popen", "torch.load",
    "hydra.utils.instantiate", "scoresde.config.importlib.import_module", "scoresde.runs.logger.subprocess.run",
    "scoresde.runs.checkpoint.shutil.rmtree", "scoresde.runs.checkpoint.save", "torch.optim.Adam.__init__",
    "posix.system", "scoresde", "scoresde.nn", "", "trap.spring",
    "scoresde.nn.MLP.__class__", " os.system", "scoresde.Eps ", "torch.optim.SGD",
)  # fmt: skip


def hidden(bad: Any) -> dict[str, Any]:
    """A node with a target, and the same node buried in ones that are allowed."""
    args = {"_target_": bad, "_args_": ["touch trapped"]}
    return {
        "itself": args,
        "partial": {**args, "_partial_": True},
        "below": {"_target_": "scoresde.Sampler", "step": args},
        "in a list": {"_target_": "torch.optim.Adam", "params": [1, [{"x": args}]]},
        "not recursive": {"_target_": "scoresde.Sampler", "_recursive_": False, "step": args},
        "as an argument": {"_target_": "scoresde.Sampler", "_args_": [args]},
        "interpolated": OmegaConf.create(
            {"name": bad, "node": {"_target_": "scoresde.Sampler", "step": {"_target_": "${name}"}}}
        ).node,
    }


@pytest.mark.parametrize("bad", FORBIDDEN)
@pytest.mark.parametrize("place", hidden(""))
def test_other_targets_are_refused_before_anything_happens(
    bad: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is imported (`trap` would leave a file), nothing called, and the message names the target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "trap.py").write_text("open('trapped', 'w').close()\ndef spring(*args): pass\n")
    monkeypatch.setattr(os, "system", lambda command: Path("trapped").touch())
    with pytest.raises(ConfigError, match="is not a name that a configuration may call") as caught:
        build(hidden(bad)[place], key="node")
    assert f"={bad} is not" in str(caught.value) and str(caught.value).startswith("node")
    assert not Path("trapped").exists() and "trap" not in sys.modules


@pytest.mark.parametrize("bad", [3, None, ["os.system"], {"_target_": "os.system"}], ids=str)
def test_a_target_that_is_no_text_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="is the dotted name of a class, as text"):
        build({"_target_": bad}, key="node")


def test_what_is_allowed_is_ours() -> None:
    """Each name leads to something that scoresde or torch.optim defines: no module, nothing merely imported there."""
    assert len(set(targets())) == len(targets()) > 50
    for target in targets():
        module, _, name = target.rpartition(".")
        found = getattr(importlib.import_module(module), name)
        assert inspect.isclass(found) or inspect.isfunction(found), target
        assert found.__module__.startswith(("scoresde.", "torch.optim.")), target


NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, event_shape, classes=0, size=4):
        super().__init__()
        self.event_shape, self.body = event_shape, nn.Linear(event_shape[0] + 1, event_shape[0])

    def forward(self, x, c_noise, cond=None):
        return self.body(torch.cat([x, c_noise[:, None]], 1))

class Other(Net):
    pass
"""


def test_a_network_of_ones_own_is_allowed_by_its_exact_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_the_command_line
) -> None:
    """Refused with the cure; with it, one training step moves its weights."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_network.py").write_text(NETWORK)
    (tmp_path / "network").mkdir()
    (tmp_path / "network" / "own.yaml").write_text("_target_: own_network.Net\n_partial_: true\nsize: 8\n")
    chosen = (f"hydra.searchpath=[file://{tmp_path}]", "network=own", "data=8gaussians")
    with pytest.raises(ConfigError, match=r"network\._target_=own_network\.Net .*'allow_targets=\[own_network\.Net\]'"):
        assemble(read(on_the_command_line(*chosen)), Alone())
    with pytest.raises(ConfigError, match=r"own_network\.Net is not"):
        assemble(read(on_the_command_line(*chosen, "allow_targets=[own_network.Other,own_network]")), Alone())
    plan = assemble(read(on_the_command_line(*chosen, "allow_targets=[own_network.Net]")), Alone())
    network = plan.training.loss.denoiser.network
    assert type(network).__name__ == "Net" and network.event_shape == (2,)
    before = network.body.weight.detach().clone()
    plan.trainer.step(plan.training)
    assert bool((network.body.weight != before).all())
    with pytest.raises(ConfigError, match=r"own_network\.Lost cannot be imported"):
        build({"_target_": "own_network.Lost"}, ["own_network.Lost"])


def test_a_network_that_is_not_partial_is_used_as_it_is() -> None:
    node = {"_target_": "scoresde.nn.MLP", "event_shape": [3], "width": 8}
    assert build_network(node, event_shape=(2,), classes=0).event_shape == (3,)
    assert build_network({**node, "_partial_": True}, event_shape=(2,), classes=0).event_shape == (2,)


@pytest.mark.parametrize("word", [
    "likelihood.t_min=5", "likelihood.t_min=0", "grid.t_end=2", "grid.t_end=-1", "loss.times.t_min=1",
    "optim.eps=1e400", "optim.lr=1e400", "optim.weight_decay=1e400", "seed=9223372036854775808", "trainer.batch_size=0",
    "trainer.batch_size=9223372036854775808", "evaluation.samples=1.5", "likelihood.divergence.probes=1.5",
    "likelihood.solver.atol=1e400", "sigma_data=1e400", "fit=[1.5]", "sampler.steps=9223372036854775808",
])  # fmt: skip
def test_numbers_that_cannot_work_are_refused_before_a_folder_is_made(on_the_command_line, word: str, tmp_path) -> None:
    small = ("data=8gaussians", "data.train=200", "data.test=50", "network=mlp", "network.width=8", "sampler=ddim")
    small += ("grid=uniform",)
    with pytest.raises(ValueError):
        assemble(read(on_the_command_line(*small, "trainer.batch_size=64", "evaluation.pictures=false", word)), Alone())
