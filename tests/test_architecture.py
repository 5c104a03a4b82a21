"""The house rules, read from the source: imports point down, optional packages stay apart, import is free."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import scoresde

PACKAGE = Path(scoresde.__file__).parent

# The house, from the ground up: a file imports from its own folder and from lower floors.
FLOORS = (
    ("checks",),
    ("noise",),
    ("ops",),  # what every fused op means
    ("kernels",),  # those ops in CUDA: nothing imports it, `noise.switch` loads it by name at the first tensor on a GPU
    ("diffusion",),
    ("ode", "nn", "guidance"),
    ("likelihood", "sampling"),
    ("inverse", "losses"),
    ("codecs",),
    ("metrics",),
    ("data",),
    ("config",),
    ("runs",),
    ("train",),
    ("evaluate",),
    ("interop",),
    ("sweep",),
    ("cli",),
    ("public", "__main__"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}

# Packages that a plain `import scoresde` must not need, and the only modules that may name them.
DOORS = {
    "hydra": ("config", "cli", "sweep"),
    "omegaconf": ("config", "cli", "runs.folder", "sweep"),
    "yaml": ("runs.files", "cli.own_options", "cli.help"),
    "wandb": ("runs.wandb_view",),
    "matplotlib": ("evaluate.figures", "evaluate.columns", "evaluate.sound", "sweep.curves"),
    "rich": ("runs.listing",),
    "tqdm": ("runs.progress", "train.progress"),
    "safetensors": (
        "runs.bundle",
        "runs.checkpoint",
        "runs.posthoc",
        "evaluate.shards",
        "evaluate.features",
        "interop.diffusers_folder",
        "interop.pipeline",
        "interop.k_diffusion",
        "interop.to_diffusers",
    ),
    "PIL": ("data.readers.pictures", "data.readers.video", "evaluate.strips"),
    "sklearn": ("data.digits", "diffusion.corrected", "metrics.c2st"),
    "pandas": ("data.readers.columns",),
    "pyarrow": ("data.readers.columns",),
    "torchdiffeq": ("ode",),
    "torchsde": ("sampling.torch_sde",),
    "scipy": (
        "ode",
        "metrics",
        "losses.coupling",
        "sampling.fit",
        "data.readers.hdf5",
        "data.readers.sound",
        "evaluate.sound",
    ),
    "datasets": ("data.readers.arrow",),
    "tokenizers": ("data.text",),
    "transformers": ("nn.text", "interop.pipeline", "interop.pipeline_model"),
    "h5py": ("data.readers.hdf5",),
    "diffusers": ("interop.diffusers", "interop.diffusers_model", "interop.pipeline_model"),
    "onnx": ("interop.program",),
    "onnxscript": ("interop.program",),
    "huggingface_hub": ("interop.export",),
}

FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """(dotted name, whether it is one of ours) of everything that module `name` imports, anywhere in the file."""
    path = MODULES[name]
    package = ["scoresde", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, alias.name.split(".")[0] == "scoresde") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield str(node.module), str(node.module).split(".")[0] == "scoresde"
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            path_to = ".".join([*base, node.module] if node.module else base)
            for alias in node.names:  # a file of that folder, or a name in that file
                one = f"{path_to}.{alias.name}"
                yield (one if not node.module or one.removeprefix("scoresde.") in MODULES else path_to), True


def resolved(dotted: str) -> str | None:
    """The file of ours that a dotted name is, or is in; None where it is the package itself."""
    parts = dotted.split(".")[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts) or None


def test_no_file_reaches_itself_through_its_imports() -> None:
    """No circle between files, imports inside functions included; a package's face (`__init__`) only gathers."""
    arrows = {
        name: {
            found
            for imported, ours in imports(name)
            if ours and (found := resolved(imported)) and MODULES[found].name != "__init__.py"
        }
        for name in MODULES
    }
    order = TopologicalSorter(arrows)
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' → '.join(error.args[1])}")


def floor(name: str) -> int:
    """The floor of a file, or of the folder that it is in."""
    parts = name.split(".")
    return next(FLOOR[".".join(parts[:k])] for k in range(len(parts), 0, -1) if ".".join(parts[:k]) in FLOOR)


def test_every_module_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES if name != "__init__"} == {name.split(".")[0] for name in FLOOR}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_point_down(name: str) -> None:
    own = name.split(".")[0]
    for imported, ours in imports(name):
        if not ours:
            continue
        other = imported.removeprefix("scoresde.")
        if other == "__version__":
            continue
        folder = other.split(".")[0]
        below = folder == own or floor(other) < floor(name)
        assert below, f"{name} (floor {floor(name)}) imports {imported}"


def test_nothing_imports_the_kernels() -> None:
    """The folder can be deleted: only `noise.switch` names it, and loads it by that name (test_without_kernels.py)."""
    for name in MODULES:
        if name.split(".")[0] != "kernels":
            assert not [found for found, ours in imports(name) if ours and found.split(".")[1:2] == ["kernels"]], name


@pytest.mark.parametrize("name", MODULES)
def test_optional_packages_stay_behind_their_door(name: str) -> None:
    for imported, _ in imports(name):
        allowed = DOORS.get(imported.split(".")[0])
        assert allowed is None or any(name == door or name.startswith(f"{door}.") for door in allowed), (
            f"{name} imports {imported}; only {allowed} may"
        )


def test_modules_stay_readable() -> None:
    """At most 350 lines a file and 60 a function, docstrings included: what is longer is asking to be two."""
    for name, path in MODULES.items():
        source = path.read_text(encoding="utf-8")
        assert source.count("\n") <= 350, f"{name} has {source.count(chr(10))} lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = int(node.end_lineno or 0) - node.lineno + 1
                assert lines <= 60, f"{name}.{node.name} has {lines} lines"


def test_few_files_are_loose_and_little_is_laid_out_by_hand() -> None:
    """A file belongs into a folder; the formatter lays out everything but tables."""
    loose = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(loose) <= 6, loose
    by_hand = [
        f"{name}: {line}"
        for name, path in MODULES.items()
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"# fmt: (skip|off)", line)
    ]
    assert len(by_hand) <= 5, by_hand


def test_types_are_not_asked_of_our_own_objects() -> None:
    """`isinstance` on a class of ours would be a registry in disguise: vary by wrapping."""
    ours = {
        node.name
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
                asked = {part.id for part in ast.walk(node.args[1]) if isinstance(part, ast.Name)}
                assert not asked & ours, f"{name}:{node.lineno} asks for {asked & ours}"


def test_import_has_no_side_effects() -> None:
    """No socket, file, process, seed, thread count, default dtype or heavy package comes with `import scoresde`."""
    code = """
import random, sys
import numpy, torch
before = torch.get_rng_state().clone(), numpy.random.get_state()[1].copy(), random.getstate()
settings = lambda: (torch.get_num_threads(), torch.get_default_dtype(), torch.backends.cudnn.benchmark,
                    torch.is_grad_enabled(), torch.get_float32_matmul_precision())
threads, loaded = settings(), set(sys.modules)
seen = []
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "ctypes.dlopen")):
        seen.append((event, args))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        seen.append((event, args))
sys.addaudithook(watch)
sys.dont_write_bytecode = True
import scoresde
scoresde.VPSDE  # the first name brings all others
assert not seen, seen
assert torch.equal(before[0], torch.get_rng_state())
assert (before[1] == numpy.random.get_state()[1]).all() and before[2] == random.getstate()
assert threads == settings()
heavy = {"hydra", "omegaconf", "wandb", "matplotlib", "sklearn", "PIL", "scipy", "torchdiffeq", "torchsde",
         "safetensors", "tqdm"}
new = {name.split(".")[0] for name in set(sys.modules) - loaded}
assert not new & heavy, new & heavy
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_are_documented() -> None:
    """Each has a docstring, and a line of `__all__`, in order and once."""
    assert len(set(scoresde.__all__)) == len(scoresde.__all__)
    for name in scoresde.__all__:
        found = getattr(scoresde, name)
        assert not isinstance(found, type) or (found.__doc__ or "").strip(), name
