"""scoresde-import: a run folder of a network that another project trained."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from .. import __version__
from ..config import ConfigError, build, config_dir, nearest
from ..interop.folder import codec_of, write
from ..interop.imported import Imported
from ..interop.read import FORMATS, read
from ..runs.checkpoint import CheckpointError
from ..runs.lock import Locked

_KEYS = ("out", "args", "format", "data", "overwrite")
_EPILOG = """examples:
  scoresde-import edm-cifar10-32x32-uncond-vp.pkl out=runs/edm
  scoresde-import checkpoint_24.pth args=config.json out=runs/ncsnpp        score_sde, its configuration as JSON
  scoresde-import 256x256_diffusion.pt args=flags.json out=runs/adm         guided-diffusion, its flags
  scoresde-import DiT-XL-2-256x256.pt format=dit out=runs/dit               or format=sit
  scoresde-import hdit.safetensors out=runs/hdit                            k-diffusion, its configuration inside
  scoresde-import ddpm-folder out=runs/ddpm                                 diffusers, a folder of save_pretrained
  scoresde-import stable-diffusion out=runs/sd                              diffusers, a whole pipeline for sentences
  scoresde-import net.pkl out=runs/edm data=image_folder data.path=photos data.size=32
then scoresde-sample run=runs/edm budget=20, and every other command; docs/interop.md"""


def main() -> None:
    """Entry point of `scoresde-import`."""
    parser = argparse.ArgumentParser(
        prog="scoresde-import",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="the file that the other project wrote; nothing in it is executed")
    parser.add_argument("keys", nargs="*", metavar="key=value", help=f"out, a new folder; {', '.join(_KEYS[1:])}")
    parser.add_argument("--version", action="version", version=f"scoresde {__version__}")
    chosen = parser.parse_args()
    try:
        options = options_of(chosen.keys)
        imported = read(chosen.source, args=arguments(options.get("args")), format=options.get("format"))
        print(imported.summary(), flush=True)
        node = data_node(options.get("data"), imported)
        dataset = None if node is None else build(node, key="data")
        folder, command = Path(options["out"]), shlex.join(["scoresde-import", *sys.argv[1:]])
        overwrite = options.get("overwrite", False)
        said = write(imported, folder, dataset=dataset, data=node, command=command, overwrite=overwrite)
    except (ValueError, TypeError, OSError, ImportError, CheckpointError, Locked) as error:
        sys.exit(f"error: {error}")
    print(f"{'checked':<10} {said}\nscoresde-sample run={folder} budget=20")


def options_of(words: list[str]) -> dict[str, Any]:
    """The keys of the command line as a mapping.

    Raises:
        ConfigError: a key that there is not, or no `out`.
    """
    for word in words:
        name = word.partition("=")[0].partition(".")[0]
        if "=" not in word or name not in _KEYS:
            raise ConfigError(f"{word} is no key=value.{nearest(name, _KEYS)} The keys are {', '.join(_KEYS)}.")
    plain = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    try:
        tree: Any = OmegaConf.to_container(
            OmegaConf.from_dotlist([word for word in words if not word.startswith("data=")]), resolve=False
        )
    except OmegaConfBaseException as error:
        raise ConfigError(f"{' '.join(words)} cannot be read: {error}") from error
    if "data" in plain or "data" in tree:
        tree["data"] = {"name": plain.get("data"), "keys": tree.get("data") or {}}
    if not isinstance(tree.get("out"), str):
        raise ConfigError("out=… is the folder to write, as in out=runs/imported.")
    if tree.get("format") not in (None, *FORMATS):
        raise ConfigError(f"format is one of {', '.join(FORMATS)}; got {tree['format']}.")
    return tree


def arguments(given: Any) -> Mapping[str, Any] | None:
    """What the file does not say: a JSON file, or keys of the command line, args.image_size=64.

    Raises:
        ConfigError: it is neither.
        OSError: the file cannot be read.
    """
    if given is None or isinstance(given, dict):
        return given
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"args={given} is a JSON file of arguments; it cannot be read: {error}.") from error
    if not isinstance(found, dict):
        raise ConfigError(f"args={given} holds a {type(found).__name__}; expected a mapping of names to values.")
    return found


def data_node(given: Any, imported: Imported) -> dict[str, Any] | None:
    """The node that data=arrays data.path=… stands for, coded as the network was trained; None without data.

    Raises:
        ConfigError: there is no such kind of data, or no such key.
    """
    if given is None:
        return None
    folder, name = Path(config_dir(), "data"), given["name"]
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise ConfigError(f"data is one of {', '.join(known)}; got {name}.")
    node: Any = OmegaConf.to_container(OmegaConf.load(folder / f"{name}.yaml"))
    for key in given["keys"]:
        if key not in node:
            raise ConfigError(f"data={name} has no key {key!r}.{nearest(key, node)}")
    below: Any = codec_of(imported).pixels
    codec = {"_target_": "scoresde.codecs.Scaling", **dataclasses.asdict(below)}
    return {**node, **given["keys"], "codec": codec}


if __name__ == "__main__":
    main()
