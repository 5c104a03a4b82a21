"""Hostile files and configurations: nothing runs, nothing is believed, and the refusal is one of ours.

Every file below could have been made by someone who knows the format: its manifest fits, so what refuses it is not the
checksum. Each attack would leave the file `CANARY` if any of it ran.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import pickle
import pkgutil
import shutil
import sys
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import PLAIN, TINY, command, tree
from forgery import fingerprint, forge, sign
from hydra._internal.target_policy import DEFAULT_BLOCKLISTED_MODULES
from omegaconf import OmegaConf
from safetensors.torch import save as to_bytes

import scoresde
from scoresde.config import ConfigError, build
from scoresde.evaluate.shards import Job, Shards
from scoresde.runs import bundle
from scoresde.runs.checkpoint import CheckpointError, best, latest, load, save
from scoresde.runs.load import load_run

CANARY = "canary"
SHELL = f"touch {CANARY}"
RECORDS: dict[str, Any] = {"config": {"seed": 0}, "counters": {"step": 7}}


@pytest.fixture(autouse=True)
def _canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Whatever runs, runs here; and whatever it was, it left no canary."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob(CANARY)), "hostile code has run"


class Reduced:
    """Unpickling this calls `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


OPEN = f"open({CANARY!r}, 'w').close()"
PICKLES: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: pickle.dumps(Reduced(os.system, SHELL)),
    "eval": lambda: pickle.dumps(Reduced(eval, OPEN)),
    "exec": lambda: pickle.dumps(Reduced(exec, OPEN)),
    "exec, protocol 0": lambda: pickle.dumps(Reduced(exec, OPEN), protocol=0),
    "torch zip": lambda: saved_by_torch(),
    "torch legacy": lambda: saved_by_torch(legacy=True),
}


def saved_by_torch(legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save({"w": Reduced(os.system, SHELL)}, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    """An archive that a careless loader would unpack outside, with two members of one name."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "first")
        archive.writestr("data.pkl", pickle.dumps(Reduced(os.system, SHELL)))
        archive.writestr("bomb", bytes(10**6), compress_type=zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def tarred(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def tensors(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header, or one that lies about the header's length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: int, end: int, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


PAYLOADS: dict[str, Callable[[], bytes]] = {
    **{f"pickle: {name}": make for name, make in PICKLES.items()},
    "zip with ../": lambda: zipped(f"../{CANARY}"),
    "zip with an absolute name": lambda: zipped(f"/tmp/{CANARY}"),
    "tar with ../": lambda: tarred(f"../../{CANARY}"),
    "header of 4 GB": lambda: tensors({}, length=4 << 30),
    "header of 2^64 - 1": lambda: tensors({}, length=2**64 - 1),
    "header of 99 MB that is not there": lambda: tensors({}, length=99_000_000),
    "tensor of 4 GB that is not there": lambda: tensors({"w": entry(0, 4 << 30, (1 << 30,))}, bytes(4)),
    "shape that overflows": lambda: tensors({"w": entry(0, 4, (2**62, 4))}, bytes(4)),
    "negative shape": lambda: tensors({"w": entry(0, 4, (-1,))}, bytes(4)),
    "offsets backwards": lambda: tensors({"w": entry(4, 0)}, bytes(4)),
    "overlapping tensors": lambda: tensors({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "same bytes twice": lambda: tensors({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)),
    "hole": lambda: tensors({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12)),
    "polyglot: bytes after the end": lambda: tensors({"a": entry(0, 4)}, bytes(4) + zipped("x")),
    "unknown dtype": lambda: tensors({"a": entry(0, 4, dtype="PICKLE")}, bytes(4)),
    "duplicate tensor": lambda: tensors(
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
    ),
    "header nested 10,000 deep": lambda: tensors(b"[" * 10_000 + b"]" * 10_000),
    "header that is a list": lambda: tensors([1]),
    "nothing": lambda: b"",
}  # fmt: skip

DEEP = "[" * 100_000 + "]" * 100_000
RECORD_TEXTS = {
    "nested 100,000 deep": DEEP,
    "key twice": '{"_target_": "scoresde.VPSDE", "_target_": "os.system"}',
    "key twice, below": '{"a": [{"b": 1, "b": 2}]}',
    "number of 10,000 digits": "1" * 10_000,
    "YAML tag": f"!!python/object/apply:os.system ['{SHELL}']",
    "two values": "{} {}",
    "not UTF-8": "\udcff",
    "32 MB of nothing": " " * (32 << 20) + "{}",
}
FIT: dict[str, Any] = {"step": 7}


def whole(folder: Path) -> Path:
    return save(folder, 7, {"weights": {"w": torch.arange(3.0)}}, RECORDS)


def refused(path: Path) -> CheckpointError:
    """Loading it and looking for the newest both pass it over; memory stays below twice what is on the disk."""
    size = sum(os.lstat(file).st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink())
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            load(path)
        # 1 MB for what imports and tracebacks take
        assert tracemalloc.get_traced_memory()[1] < 2 * size + 2**20
    finally:
        tracemalloc.stop()
    assert path.name in str(caught.value)
    assert len(str(caught.value)) < 2000, "a message is to be read"
    assert latest(path.parent) is None
    return caught.value


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_in_a_tensor_file_is_taken(payload: str, tmp_path: Path) -> None:
    path = whole(tmp_path / "checkpoints")
    forge(path, "weights.safetensors", PAYLOADS[payload]())
    assert "weights.safetensors" in str(refused(path))


@pytest.mark.parametrize("payload", RECORD_TEXTS)
def test_no_hostile_record_is_taken(payload: str, tmp_path: Path) -> None:
    path = whole(tmp_path / "checkpoints")
    forge(path, "config.json", RECORD_TEXTS[payload].encode(errors="surrogateescape"))
    assert "config.json" in str(refused(path))


@pytest.mark.parametrize("name", ["weights.pt", "weights.pkl", "weights.bin", "weights.ckpt", "weights.npz", "code.py"])
def test_no_other_kind_of_file_is_opened(name: str, tmp_path: Path) -> None:
    path = whole(tmp_path / "checkpoints")
    forge(path, name, PICKLES["os.system"]())
    assert name in str(refused(path))


OUTSIDE: dict[str, Callable[[Path], str]] = {
    "..": lambda outside: "../../outside.json",
    "absolute": lambda outside: str(outside),
    "dot": lambda outside: "./config.json",
    "through a folder": lambda outside: "sub/../config.json",
    "empty": lambda outside: "",
    "only a suffix": lambda outside: ".json",
    "parent": lambda outside: "..",
    "NUL": lambda outside: "config\0.json",
    "newline": lambda outside: "config\n.json",
    "very long": lambda outside: "x" * 100_000 + ".json",
    "the manifest itself": lambda outside: "manifest.json",
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_file_outside_the_folder_is_opened(name: str, tmp_path: Path) -> None:
    """The file that is named exists and fits; a name that is no plain file name is enough."""
    path, outside = whole(tmp_path / "checkpoints"), tmp_path / "outside.json"
    outside.write_text("{}")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][OUTSIDE[name](outside)] = fingerprint(b"{}")
    sign(path, manifest)
    refused(path)


@pytest.mark.parametrize("member", ["weights.safetensors", "config.json", "manifest.json"])
@pytest.mark.parametrize("kind", ["link", "dangling link", "link to /dev/zero", "pipe", "folder"])
def test_only_regular_files_are_opened(member: str, kind: str, tmp_path: Path) -> None:
    """A link may lead anywhere, and a pipe or /dev/zero would keep the reader for ever."""
    path = whole(tmp_path / "checkpoints")
    (path / member).rename(tmp_path / "moved")
    if kind == "pipe":
        os.mkfifo(path / member)
    elif kind == "folder":
        (path / member).mkdir()
    else:
        to = {"link": tmp_path / "moved", "dangling link": tmp_path / "lost", "link to /dev/zero": "/dev/zero"}[kind]
        (path / member).symlink_to(to)
    assert member in str(refused(path))


GOOD = fingerprint(b"{}")
# Manifests of a folder that is otherwise whole, as text or as what becomes text.
MANIFESTS: dict[str, Any] = {
        "list": [1], "null": None, "text": '"x"', "number": 7, "empty": {}, "no files": {"step": 7},
        "files as a list": {**FIT, "files": []}, "files as pairs": {**FIT, "files": [["a.json", GOOD]]},
        "files as text": {**FIT, "files": "a.json"}, "files null": {**FIT, "files": None},
        "step NaN": '{"step": NaN, "files": {}}', "step infinite": '{"step": Infinity, "files": {}}',
        "step 1e999": '{"step": 1e999, "files": {}}', "step as text": {"step": "7", "files": {}},
        "step with a fraction": {"step": 7.9, "files": {}}, "step whole but a float": {"step": 7.0, "files": {}},
        "step true": {"step": True, "files": {}}, "step negative": {"step": -7, "files": {}},
        "step of 10,000 digits": '{"step": 1' + "0" * 10_000 + ', "files": {}}',
        "another step": {"step": 8, "files": {}},
        "step null": {"step": None, "files": {}}, "step twice": '{"step": 8, "step": 7, "files": {}}',
        "files twice": '{"step": 7, "files": {"lost.json": {}}, "files": {}}',
        "file twice": '{"step": 7, "files": {"a.json": {}, "a.json": ' + json.dumps(GOOD) + "}}",
        "MD5 instead": {**FIT, "files": {"a.json": {"bytes": 2, "md5": hashlib.md5(b"{}").hexdigest()}}},
        "MD5 as SHA-256": {**FIT, "files": {"a.json": {**GOOD, "sha256": hashlib.md5(b"{}").hexdigest()}}},
        "SHA-512 as SHA-256": {**FIT, "files": {"a.json": {**GOOD, "sha256": hashlib.sha512(b"{}").hexdigest()}}},
        "upper case": {**FIT, "files": {"a.json": {**GOOD, "sha256": GOOD["sha256"].upper()}}},
        "no hash": {**FIT, "files": {"a.json": {"bytes": 2}}}, "hash null": {**FIT, "files": {"a.json": None}},
        "hash empty": {**FIT, "files": {"a.json": {**GOOD, "sha256": ""}}},
        "bytes as text": {**FIT, "files": {"a.json": {**GOOD, "bytes": "2"}}},
        "hash as a list": {**FIT, "files": {"a.json": [GOOD]}},
        "nested 100,000 deep": DEEP, "nested below": '{"step": 7, "files": {"a.json": ' + DEEP + "}}",
        "32 MB of nothing": " " * (32 << 20) + "{}", "YAML": "step: 7\nfiles: {}\n", "nothing": "",
    }  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_no_hostile_manifest_is_taken(kind: str, tmp_path: Path) -> None:
    path, manifest = whole(tmp_path / "checkpoints"), MANIFESTS[kind]
    (path / "a.json").write_text("{}")
    (path / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    refused(path)


@pytest.mark.parametrize("score", ["NaN", "Infinity", "1e999", "1" + "0" * 400, '"x"', "[1]", "{}", "true", DEEP])
def test_no_hostile_score_makes_a_best_one(score: str, tmp_path: Path) -> None:
    """Neither where the best is looked for, nor where a save decides what to keep; a true score is found."""
    path = whole(tmp_path)
    manifest = json.loads((path / "manifest.json").read_text())
    text = json.dumps(manifest).replace('"score": null', f'"score": {score}')
    assert text != json.dumps(manifest)
    (path / "manifest.json").write_text(text)
    assert best(tmp_path) is None
    save(tmp_path, 8, {"weights": {"w": torch.zeros(1)}}, RECORDS, keep_last=1, keep_best=1, score=0.5)
    save(tmp_path, 9, {"weights": {"w": torch.zeros(1)}}, RECORDS, keep_last=1, keep_best=1, score=0.7)
    found = best(tmp_path)
    assert found is not None and found.step == 8


def test_a_large_file_of_another_size_is_not_read(tmp_path: Path) -> None:
    """A sparse terabyte costs nothing: its size alone shows that it is not what was written."""
    path = whole(tmp_path / "checkpoints")
    os.truncate(path / "weights.safetensors", 2**40)
    assert "weights.safetensors" in str(refused(path))


def test_what_lies_beside_is_left_alone(tmp_path: Path) -> None:
    """Files that no manifest names, and folders that are no checkpoint, are as if they were not there."""
    path = whole(tmp_path / "run" / "checkpoints")
    before = load(path)
    for folder in (path, path.parent, tmp_path / "run"):
        for name in ("data.pkl", "pytorch_model.bin", "__init__.py", "hubconf.py", "conftest.py", "config.yaml"):
            (folder / name).write_bytes(PICKLES["os.system"]())
    (tmp_path / "run" / "config.yaml").write_text(f"a: !!python/object/apply:os.system ['{SHELL}']\n")
    for name in ("step-9", "step-00000009.pt", "step-0000000٩", " step-00000009", "step-00000009\n"):
        (path.parent / name).mkdir()
    found = latest(path.parent)
    assert found is not None and found.path == path and found.records == before.records
    assert found.tensors["weights"]["w"].tolist() == [0, 1, 2]


# --- configurations -------------------------------------------------------------------------------------------------

OTHERS = (
    "builtins.eval", "builtins.exec", "builtins.__import__", "builtins.getattr", "builtins.compile", "builtins.open",
    "os.system", "logging.os.system", "posix.system", "posix._exit", "nt.system", "os.popen", "os.execv", "pty.spawn",
    "subprocess.Popen", "subprocess.run", "shutil.rmtree", "importlib.import_module", "importlib.reload",
    "runpy.run_path", "ctypes.CDLL", "pickle.loads", "pickle.load", "_pickle.loads", "marshal.loads", "shelve.open",
    "dill.loads", "joblib.load", "numpy.load", "torch.load", "torch.jit.load", "torch.hub.load",
    "torch.package.PackageImporter",
    "torch.serialization.load", "torch.utils.cpp_extension.load", "torch.ops.load_library", "yaml.unsafe_load",
    "functools.partial", "functools.reduce", "operator.methodcaller", "operator.attrgetter", "types.FunctionType",
    "hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method", "hydra.utils.get_class",
    "hydra._internal.instantiate._instantiate2.instantiate", "omegaconf.OmegaConf.load",
    "scoresde.config.build", "scoresde.config.build_network", "scoresde.config.importlib.import_module",
    "scoresde.runs.checkpoint.save", "scoresde.evaluate.shards.Shards", "scoresde.cli.train.main", "code.interact",
    "torch.optim.Adam.__init__", "scoresde.VPSDE.__class__", "scoresde.VPSDE.__init__.__globals__", "scoresde.nn",
    "Scoresde.VPSDE", "scoresde.vpsde", "scoresde..VPSDE", ".scoresde.VPSDE", "scoresde.VPSDE.", "scoresde.VPSDE\0",
    "scoresde.VPSDE\n", " scoresde.VPSDE", "ſcoresde.VPSDE", "trap.spring", "",
)  # fmt: skip


def through_our_modules() -> list[str]:
    """Every module that one of ours has imported under a name of its own: `scoresde.config.importlib` and so on."""
    found = []
    for info in pkgutil.walk_packages(scoresde.__path__, "scoresde."):
        module = importlib.import_module(info.name)
        found += [f"{info.name}.{name}" for name, value in vars(module).items() if isinstance(value, ModuleType)]
    return [f"{name}.system" for name in found]


def hiding(bad: Any) -> dict[str, Any]:
    """A node with the target `bad`, plain and in every place where it could be overlooked."""
    node = {"_target_": bad, "_args_": [SHELL]}
    text = f"{{_target_: '{bad}', _args_: ['{SHELL}']}}"
    sampler = {"_target_": "scoresde.Sampler"}
    return {
        "itself": node,
        "partial": {**node, "_partial_": True},
        "below": {**sampler, "step": node},
        "below, not recursive": {**sampler, "step": node, "_recursive_": False},
        "in lists": {**sampler, "step": [1, [{"a": [node]}]]},
        "in a tuple": {**sampler, "step": (1, node)},
        "positional": {**sampler, "_args_": [node]},
        "below a mapping without a target": {**sampler, "step": {"a": {"b": node}}},
        "as a runtime default": {**sampler, "step": {"_target_": "scoresde.DDIM", "_partial_": True, "eta": node}},
        "OmegaConf": OmegaConf.create({**sampler, "step": node}),
        "OmegaConf inside": {**sampler, "step": OmegaConf.create(node)},
        "OmegaConf list inside": {**sampler, "step": OmegaConf.create([node])},
        "interpolated name": OmegaConf.create({"x": bad, "n": {**sampler, "step": {"_target_": "${x}"}}}).n,
        "interpolated node": OmegaConf.create({"x": node, "n": {**sampler, "step": "${x}"}}).n,
        "oc.create": {**sampler, "step": f"${{oc.create:{text}}}"},
        "oc.decode": {**sampler, "step": "${oc.decode:'" + text.replace("'", "\\'") + "'}"},
        "oc.create, escaped": OmegaConf.create({**sampler, "step": f"\\${{oc.create:{text}}}"}),
        "oc.create as a name": {**sampler, "_target_": "${oc.create:" + str(bad) + "}"},
    }


def attempt(node: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build(node, key="some.node")
    return caught.value


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module `trap` whose import leaves the canary, and an os.system that does."""
    (tmp_path / "trap.py").write_text(f"{OPEN}\ndef spring(*args): {OPEN}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(os, "system", lambda command: Path(CANARY).touch())


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("place", hiding(""))
def test_nothing_but_what_is_published_can_be_called(place: str) -> None:
    """Hydra's own block list, its aliases, what our modules import, look-alikes; nothing is imported for them."""
    targets = sorted({*DEFAULT_BLOCKLISTED_MODULES, *OTHERS, *through_our_modules()})
    assert len(targets) > 150
    if place != "itself":  # where the target is looked for does not depend on which one it is
        targets = ["builtins.eval", "functools.partial", "logging.os.system", "scoresde.config.build", "trap.spring"]
    before = set(sys.modules)
    for target in targets:
        error = attempt(hiding(target)[place])
        assert str(error).startswith("some.node")
        assert target in str(error) or place in ("OmegaConf inside", "OmegaConf list inside")  # no containers at all
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"_convert_": "weird"}, r"some\.node\._convert_ is one of none"),
        ({"_recursive_": 3}, "_recursive_"),
        ({"_partial_": "yes"}, "_partial_"),
        ({"_args_": {"a": 1}}, "_args_"),
        ({"_target_whitelist_": ["*"]}, r"some\.node\._target_whitelist_"),
        ({"_target_policy_": "off"}, r"some\.node\._target_policy_"),
        ({"allow_targets": ["os.system"]}, r"some\.node\.allow_targets"),
        ({"allow": ["os.system"]}, r"some\.node\.allow"),
        ({"__class__": "x"}, "__class__"),
        ({"steps": os}, r"some\.node\.steps is a module"),
        ({"steps": os.system}, r"some\.node\.steps is a builtin_function"),
        ({"steps": "${oc.env:HOME}"}, r"some\.node\.steps=\$\{oc\.env:HOME\} is not a value yet"),
        ({"steps": "???"}, r"some\.node\.steps=\?\?\? is not a value yet"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_keys_that_steer_the_building_are_refused_or_checked(keys: dict[str, Any], words: str) -> None:
    node = {"_target_": "scoresde.Sampler", "step": {"_target_": "scoresde.DDIM"}, "steps": 3}
    assert build(node).steps == 3
    with pytest.raises(ConfigError, match=words):
        build({**node, **keys}, key="some.node")


def test_a_configuration_nested_without_end_is_refused() -> None:
    for depth in (60, 100_000):
        node: Any = {"_target_": "scoresde.DDIM"}
        for _ in range(depth):
            node = [node]
        with pytest.raises(ConfigError, match=r"some\.node.*nested more than 50 deep"):
            build({"_target_": "scoresde.Sampler", "step": node}, key="some.node")


# --- through the commands -------------------------------------------------------------------------------------------


ONE_STEP = (*TINY, *PLAIN, "evaluate_at_end=false", "trainer.images=64")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("trained")
    done = command("train", *ONE_STEP, "out=run", cwd=cwd)
    assert done.code == 0, done.err
    return cwd / "run"


def with_record(trained: Path, folder: Path, name: str, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of the run whose one checkpoint holds another record."""
    shutil.copytree(trained, folder)
    (path,) = (folder / "checkpoints").glob("step-*")
    forge(path, f"{name}.json", json.dumps(change(json.loads((path / f"{name}.json").read_text()))).encode())
    return folder


EVIL = {"_target_": "os.system", "_args_": [SHELL]}
CONFIGS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "target": lambda c: {**c, "data": EVIL},
    "target with leave for it": lambda c: {**c, "data": EVIL, "allow_targets": ["os.system"]},
    "target below": lambda c: {**c, "sde": {**c["sde"], "beta_min": EVIL}},
    "network": lambda c: {**c, "network": {**EVIL, "_partial_": True}},
    "denoiser": lambda c: {**c, "denoiser": {**c["denoiser"], "noise_input": EVIL}},
    "oc.create": lambda c: {**c, "sde": {**c["sde"], "beta_min": "${oc.create:{_target_: os.system, command: x}}"}},
    "environment": lambda c: {**c, "data": {**c["data"], "train": "${oc.env:HOME}"}},
    "import path": lambda c: {**c, "network": {"_target_": "trap.spring", "_partial_": True}},
    "unpickled": lambda c: {**c, "data": {"_target_": "torch.load", "f": "x"}},
    "Hydra": lambda c: {**c, "hydra": {"callbacks": {"x": EVIL}}, "data": EVIL},
    "deep": lambda c: {**c, "sde": {**c["sde"], "beta_min": json.loads("[" * 500 + "]" * 500)}},
    "missing": lambda c: {},
    "list": lambda c: [c],
    "text": lambda c: "os.system",
    "null": lambda c: None,
    "denoiser null": lambda c: {**c, "denoiser": None},
    "no network": lambda c: {k: v for k, v in c.items() if k != "network"},
    "conditional as text": lambda c: {**c, "conditional": "yes"},
}


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_configuration_in_a_checkpoint_can_call_nothing(kind: str, trained: Path, tmp_path: Path) -> None:
    run = with_record(trained, tmp_path / "evil", "config", CONFIGS[kind])
    with pytest.raises((ConfigError, CheckpointError)):
        load_run(run).whole_data()  # data are built where they are asked for, and never by `load_run` itself


@pytest.mark.usefixtures("trap")
def test_neither_can_the_codec_in_an_excerpt(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "evil")
    tensors, record = bundle.read(trained / "excerpt.safetensors")
    for codec in (EVIL, {"_target_": "trap.spring"}, None, {**record["codec"], "low": EVIL}):
        bundle.write(tmp_path / "evil" / "excerpt.safetensors", tensors, {**record, "codec": codec})
        with pytest.raises(CheckpointError, match="holds no excerpt of data"):
            load_run(tmp_path / "evil")


RECORDS_OF_A_RUN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "counters null": ("counters", lambda c: None),
    "counters a list": ("counters", lambda c: [c]),
    "no counters": ("counters", lambda c: {}),
    "step infinite": ("counters", lambda c: {**c, "step": float("inf")}),
    "step as a list": ("counters", lambda c: {**c, "step": [1]}),
    "order null": ("order", lambda c: None),
    "order empty": ("order", lambda c: {}),
    "order as text": ("order", lambda c: {**c, "seed": {"_target_": "os.system"}}),
    "config a list": ("config", lambda c: [c]),
    "config deep": ("config", lambda c: {**c, "sde": json.loads("[" * 900 + "]" * 900)}),
}


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("kind", RECORDS_OF_A_RUN)
def test_training_does_not_go_on_from_hostile_records(kind: str, trained: Path, tmp_path: Path) -> None:
    run = with_record(trained, tmp_path / "run", *RECORDS_OF_A_RUN[kind])
    before = tree(run)
    done = command("train", *ONE_STEP, "out=run", "resume=auto", cwd=tmp_path)
    last = done.err.strip().splitlines()[-1]
    assert done.code == 1 and last.startswith("error: ") and "Traceback" not in done.err, done.err
    assert tree(run) == before


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize("name", ["sample", "likelihood", "evaluate"])
def test_the_commands_refuse_it_in_one_line_and_leave_no_folder(name: str, trained: Path, tmp_path: Path) -> None:
    for number, kind in enumerate(("oc.create", "list", "missing")):
        with_record(trained, tmp_path / str(number), "config", CONFIGS[kind])
        done = command(name, f"run={number}", "out=made", cwd=tmp_path)
        last = done.err.strip().splitlines()[-1]
        assert done.code == 1 and last.startswith("error: ") and "Traceback" not in done.err, done.err
        assert not (tmp_path / "made").exists()


@pytest.mark.usefixtures("trap")
@pytest.mark.parametrize(
    "override",
    [
        "sde._target_=os.system",
        "+sde.x._target_=os.system",
        "+sampler.step.x={_target_:trap.spring}",
        "+trainer.x=[{_target_:posix._exit}]",
        "logger._target_=functools.partial",
        'sde.beta_min="${oc.create:{_target_: trap.spring}}"',
        "loss._target_=hydra.utils.instantiate",
        "ema._target_=builtins.getattr",
        "optim._target_=logging.os.system",
        "data._target_=scoresde.cli.train.main",
        "likelihood._target_=scoresde.runs.checkpoint.shutil.rmtree",
    ],
)  # fmt: skip
def test_no_override_can_call_anything_else(override: str, tmp_path: Path) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    done = command("train", *TINY, *PLAIN, override, "out=made", cwd=tmp_path)
    last = done.err.strip().splitlines()[-1]
    assert done.code == 1 and last.startswith("error: ") and "is not a name that a configuration may call" in last, last
    assert {path.name for path in tmp_path.iterdir()} == before


def test_leave_is_given_on_the_command_line_alone(tmp_path: Path) -> None:
    """An experiment from elsewhere cannot give it to itself."""
    (tmp_path / "theirs" / "experiment").mkdir(parents=True)
    (tmp_path / "theirs" / "experiment" / "evil.yaml").write_text(
        f"# @package _global_\nallow_targets: [os.system]\nnetwork:\n  _target_: os.system\n  command: {SHELL}\n"
    )
    done = command("train", "--config-dir=theirs", *TINY, *PLAIN, "experiment=evil", "out=made", cwd=tmp_path)
    assert done.code == 1 and "allow_targets is taken from the command line alone" in done.err
    assert not (tmp_path / "made").exists()


def job(merge: Callable[[list[Any]], Any] = list) -> Job[Any]:
    def batch(index: int) -> Any:
        yield {"x": torch.full((2,), float(index))}

    return Job("job", 2, 1, batch, merge)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_payload_in_a_batch_is_taken(payload: str, tmp_path: Path) -> None:
    """It is made again instead, and the result is what it would have been."""
    shards = Shards(tmp_path / "batches", {"a": 1})
    shards.work(job())
    (tmp_path / "batches" / "job" / "000001.safetensors").write_bytes(PAYLOADS[payload]())
    again = Shards(tmp_path / "batches", {"a": 1}).result(job())
    assert [batch["x"].tolist() for batch in again] == [[0, 0], [1, 1]]


def test_a_whole_batch_of_another_job_is_not_taken(tmp_path: Path) -> None:
    shards = Shards(tmp_path / "batches", {"a": 1})
    shards.work(job())
    for metadata in (None, {}, {"settings": "x"}):
        path = tmp_path / "batches" / "job" / "000001.safetensors"
        path.write_bytes(to_bytes({"x": torch.tensor([9.0, 9.0])}, metadata))
        again = Shards(tmp_path / "batches", {"a": 1}).result(job())
        assert [batch["x"].tolist() for batch in again] == [[0, 0], [1, 1]]
