"""What is installed, and from where: every file is listed with its hash, and known bad versions cannot come in.

`make` installs from requirements/*.txt alone: no dependency, build tool or anything else that pip would look up.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import scoresde

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCKS = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))

# name -> versions that must never be installed: why
KNOWN_BAD = {
    "lightning": ("2.6.2", "2.6.3"),  # ran a credential stealer on import (GHSA-w37p-236h-pfx3)
    "pytorch-lightning": ("2.6.2", "2.6.3"),  # the same
    # no block list before 1.3.4; passed by aliases such as logging.os.system until 1.3.6 (GHSA-37p2-j732-x8pj)
    "hydra-core": ("1.0.0", "1.1.2", "1.2.0", "1.3.0", "1.3.2", "1.3.3", "1.3.4", "1.3.5", "1.3.6", "1.3.7"),
    "torch": ("1.13.1", "2.5.1", "2.6.0", "2.9.1", "2.10.0"),  # torch.load(weights_only=True) ran code before 2.10
}


def entries(name: str) -> list[tuple[Requirement, list[str]]]:
    """(requirement, hashes) of each line of a lock; comments aside there is nothing else in it."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    lines = [
        line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]
    found = []
    for line in lines:
        requirement, *hashes = re.split(r"\s+--hash=sha256:", line.strip())
        found.append((Requirement(requirement), hashes))
    return found


def pinned(name: str) -> dict[str, set[str]]:
    """name -> versions; two where they depend on the Python."""
    found: dict[str, set[str]] = {}
    for requirement, _ in entries(name):
        found.setdefault(canonicalize_name(requirement.name), set()).add(str(requirement.specifier).removeprefix("=="))
    return found


def declared(extra: str) -> list[Requirement]:
    """What an extra asks for, those that it names included."""
    own = [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]
    nested = [found for one in own if one.name == "scoresde" for name in one.extras for found in declared(name)]
    return [one for one in own if one.name != "scoresde"] + nested


def test_there_is_a_lock_for_all_that_make_installs() -> None:
    assert LOCKS == ["build.txt", "dev.txt", "test.txt", "torch-cpu.txt", "torch-cuda.txt"]


@pytest.mark.parametrize("name", LOCKS)
def test_every_line_is_one_version_with_its_hashes(name: str) -> None:
    """No option, URL, file or range: pip's --require-hashes refuses those, and none would say what comes in."""
    assert entries(name)
    for requirement, hashes in entries(name):
        assert re.fullmatch(r"==[0-9][0-9a-z.+]*", str(requirement.specifier)), requirement
        assert requirement.url is None and not requirement.extras
        assert hashes and all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in hashes), requirement
        assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize("name", LOCKS)
def test_no_known_bad_version_is_listed(name: str) -> None:
    for package, versions in pinned(name).items():
        assert not versions & set(KNOWN_BAD.get(package, ())), package


@pytest.mark.parametrize("package", ["hydra-core", "torch"])
def test_no_known_bad_version_is_allowed(package: str) -> None:
    """By pyproject.toml, so for those who install without the locks."""
    (own,) = [Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == package]
    assert not [version for version in KNOWN_BAD[package] if version in own.specifier]
    assert not set(KNOWN_BAD) & {Requirement(t).name for t in PROJECT["dependencies"]} - {"hydra-core", "torch"}


@pytest.mark.parametrize("extra", ["test", "dev"])
def test_the_lock_holds_what_the_project_asks_for(extra: str) -> None:
    """In versions that it allows; torch is in files of its own."""
    locked = pinned(f"{extra}.txt") | pinned("torch-cpu.txt")
    for requirement in [*map(Requirement, PROJECT["dependencies"]), *declared(extra)]:
        versions = locked[canonicalize_name(requirement.name)]
        assert versions and all(requirement.specifier.contains(version) for version in versions), requirement


def test_the_locks_agree() -> None:
    """One version of each, whichever files are installed over each other; torch's two differ in the build alone."""
    everything: dict[str, set[frozenset[str]]] = {}
    for name in LOCKS:
        for package, versions in pinned(name).items():
            plain = frozenset(Version(version).public for version in versions)
            everything.setdefault(package, set()).add(plain)
    assert {package: found for package, found in everything.items() if len(found) > 1} == {}
    assert set(pinned("test.txt")) <= set(pinned("dev.txt"))


def test_the_lock_is_closed() -> None:
    """Installed with --no-deps, so nothing may be missing: each dependency of what is listed is listed."""
    locked = {**pinned("dev.txt"), **pinned("torch-cpu.txt"), **pinned("build.txt")}
    asked, seen = [], set()
    for package, versions in locked.items():
        try:
            needs = metadata.requires(package) or []
        except metadata.PackageNotFoundError:  # for another platform, or of an environment without linters
            continue
        if metadata.version(package) in versions:
            seen.add(package)
            asked += [
                (package, need)
                for need in map(Requirement, needs)
                if not need.marker or need.marker.evaluate({"extra": ""})
            ]
    assert len(seen) > 60
    assert [(by, str(need)) for by, need in asked if canonicalize_name(need.name) not in locked] == []


def test_make_installs_nothing_else() -> None:
    """pip is called with hashes required, or without any index."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    calls = [line for line in text.splitlines() if "pip install" in line or "$(PIP)" in line]
    assert len(calls) == 4  # the two names, the package itself, and a comment
    for line in calls:
        if not line.startswith(("PIP :=", "#")):
            assert "--no-deps --no-build-isolation" in line and ("--require-hashes" in line or "--no-index" in line), (
                line
            )
    assert set(re.findall(r"\$\(LOCKED\)/(\S+)\.txt", text)) == {"build", "torch-$(TORCH)", "test", "dev"}
    assert "pip install" not in (ROOT / ".ci" / "run").read_text().replace(
        "pip install --quiet --disable-pip-version-check --no-deps", ""
    )


def test_actions_are_named_by_commit_and_may_only_read() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    uses = re.findall(r"uses:\s*(.+)", text)
    assert uses and all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v\d+\.\d+\.\d+", line) for line in uses), uses
    assert re.findall(r"permissions:\n((?:  .+\n)+)", text) == ["  contents: read\n"]
    assert not re.search(r"pull_request_target|secrets\.|write", text)


def test_two_imports_at_once_need_no_network_and_no_compiler(tmp_path: Path) -> None:
    """Side by side, without PATH, with sockets that raise and the lock of a killed build in torch's extension cache."""
    code = """
import sys
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib.")):
        raise RuntimeError(f"{event} {args}")
sys.addaudithook(watch)
import scoresde, scoresde.config, scoresde.train, scoresde.data, scoresde.metrics, scoresde.nn
print("ready", flush=True)
sys.stdin.read()  # until the other is here as well
print(scoresde.VPSDE().t_max)
"""
    cache = tmp_path / "extensions" / "scoresde"
    cache.mkdir(parents=True)
    (cache / "lock").touch()
    environment = {"PATH": "", "PYTHONPATH": str(Path(scoresde.__file__).parents[1]), "HOME": str(tmp_path),
                   "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions"), "PYTHONDONTWRITEBYTECODE": "1",
                   "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}  # fmt: skip
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for one in both:
        assert one.stdout is not None and one.stdout.readline() == "ready\n", one.communicate()[1]
    for one in both:
        out, err = one.communicate()
        assert (one.returncode, out, err) == (0, "1.0\n", "")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lock"]
