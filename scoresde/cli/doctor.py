"""scoresde-doctor, or `python -m scoresde`: what this installation is made of, and whether it trains and samples.

Modules that need torch are loaded one after another, so that what is missing is told and does not end the page.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module, metadata
from pathlib import Path
from textwrap import fill

from .. import __version__
from ..config import config_dir
from ..runs.redact import guard

_EXTRAS = ("data", "plot", "sweep")


class Ailment(Exception):
    """What is broken, and what cures it."""


def main() -> None:
    """Entry point of `scoresde-doctor`; exits with 1 if anything is broken."""
    parser = argparse.ArgumentParser(prog="scoresde-doctor", description="Versions, device, kernels and a trial step.")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    output = guard()
    parser.parse_args()
    broken = [name for name, look in _LOOKS.items() if not _shown(name, look)]
    print(f"broken: {', '.join(broken)}" if broken else "all is well")
    output.flush()
    sys.exit(bool(broken) or output.lost)


def _shown(name: str, look: Callable[[], str]) -> bool:
    """Prints what a look finds, a paragraph, and returns whether it is sound."""
    try:
        found, sound = look(), True
    except Ailment as error:
        found, sound = f"BROKEN. {error}", False
    except Exception as error:  # whatever it is, it belongs on the page
        found, sound = f"BROKEN. {type(error).__name__}: {error}", False
    print(fill(f"{name:9} {found}", 110, subsequent_indent=" " * 10, break_on_hyphens=False), flush=True)
    return sound


def _versions() -> str:
    python = ".".join(map(str, sys.version_info[:3]))
    return f"{__version__} in {Path(__file__).parents[1]}, Python {python} in {sys.executable}"


def _packages() -> str:
    found, wrong, cures = [], [], []
    for text, _, problem, version in _requirements(""):
        found.append(version)
        wrong += [problem] if problem else []
        cures += [f"'{text}'"] if problem else []
    if wrong:
        raise Ailment(f"{'; '.join(wrong)}. Run: {sys.executable} -m pip install {' '.join(cures)}")
    return ", ".join(found)


def _extras() -> str:
    """What is missing here is missed by some commands only."""
    rows = [(extra, *row) for extra in _EXTRAS for row in _requirements(extra)]
    found = [version for _, _, _, problem, version in rows if not problem]
    missing = [f"{name} (pip install 'scoresde[{extra}]')" for extra, _, name, problem, _ in rows if problem]
    return "; ".join([", ".join(found), *(["without " + ", ".join(missing)] if missing else [])])


def _requirements(extra: str) -> Iterator[tuple[str, str, str, str]]:
    """(requirement, name, what is wrong or "", name and version) of what the package needs, or what an extra adds."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("scoresde") or []
    except metadata.PackageNotFoundError as error:
        cure = f"Run: {sys.executable} -m pip install -e . in its checkout"
        raise Ailment(f"scoresde is not installed, so what it needs is not known. {cure}") from error
    for line in lines:
        wanted = Requirement(line)
        if (wanted.marker is None) if not extra else (wanted.marker and wanted.marker.evaluate({"extra": extra})):
            text, problem, version = f"{wanted.name}{wanted.specifier}", "", ""
            try:
                version = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                problem = f"{wanted.name} is missing"
            if version and not wanted.specifier.contains(version, prereleases=True):
                problem = f"{wanted.name} is {version}, and scoresde needs {wanted.specifier}"
            yield text, wanted.name, problem, f"{wanted.name} {version}"


def _device() -> str:
    torch, load = import_module("torch"), import_module("scoresde.runs.load")
    device = load.choose_device("auto")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU that torch can use"
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} CPUs"
    return f"{device}: {name}; {threads}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"


def _kernels() -> str:
    switch, load = import_module("scoresde.noise.switch"), import_module("scoresde.runs.load")
    device, mode = load.choose_device("auto"), switch.mode()
    if (reason := switch.why_not(device)) and mode == "require":
        raise Ailment(f"{device} cannot have the kernels that SCORESDE_KERNELS=require asks for: {reason}. Unset it.")
    used = "off" if mode == "off" else "in use" if reason is None else f"not in use: {reason}"
    try:
        cache = import_module("scoresde.kernels.cubin").folder()
    except (ImportError, OSError) as error:
        cache = f"none ({error})"
    return f"SCORESDE_KERNELS={mode}, {used}; cache {cache}"


def _conf() -> str:
    return config_dir()


def _step() -> str:
    """A tiny network learns, samples and is measured; each is asked whether it did."""
    torch, S = import_module("torch"), import_module("scoresde")
    device, start = import_module("scoresde.runs.load").choose_device("auto"), time.monotonic()
    x0 = S.Rng(0).normal((64, 2)).to(device)
    network = S.nn.MLP((2,), width=16, depth=1).to(device)
    model = S.Preconditioned(network, S.VPSDE(), S.EDM()).to(device)
    loss, optimizer = S.DenoisingLoss(model), torch.optim.SGD(network.parameters(), lr=1e-3)
    before = loss(x0, rng=S.Rng(1)).mean()
    before.backward()
    optimizer.step()
    with torch.no_grad():
        change = float(loss(x0, rng=S.Rng(1)).mean() - before)  # with the same noise and times
    if not change < 0:
        raise Ailment(f"a step of training changed the loss by {change:.3g}, and should have lowered it")
    x = S.sample(model, (8, 2), budget=5, rng=S.Rng(2))
    nats = S.log_likelihood(model, x, S.Budget(8), divergence=S.Exact()).log_prob
    if not bool(x.isfinite().all() and nats.isfinite().all()):
        raise Ailment("samples or their likelihoods are not finite")
    return f"trained, sampled and measured a tiny network on {device} in {time.monotonic() - start:.1f} s"


_LOOKS: dict[str, Callable[[], str]] = {
    "scoresde": _versions,
    "packages": _packages,
    "extras": _extras,
    "device": _device,
    "kernels": _kernels,
    "conf": _conf,
    "one step": _step,
}


if __name__ == "__main__":
    main()
