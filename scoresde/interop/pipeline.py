"""Pipelines of diffusers (Apache 2.0) that draw pictures of sentences: Stable Diffusion 1, 2, XL and 3.

diffusers and transformers read the files and run the networks: they know every variant. What is ours is the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs import Autoencoder, Scaling
from ..config import build
from ..data.text import Saved, Text, joined
from .diffusers_folder import json_of, process_nodes
from .imported import Arguments, Imported
from .pickles import ForeignFileError
from .pipeline_model import CLASSES, class_of

KINDS = CLASSES["diffusers"][:2]
_STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
_T5_LENGTH = 256  # tokens that the pipelines of Stable Diffusion 3 give T5
_MOST = 256  # layers of anything
_SPAN = (-1 - 1 / 255, 1 + 1 / 255)  # bins of 8-bit pictures whose centres are k/127.5 − 1, as diffusers scales them
_LICENCE = "diffusers' code: Apache 2.0; that of the weights is in their own card"


def holds(path: Path) -> bool:
    """Whether a folder is of such a pipeline, or of its network alone."""
    homes = (path / "unet", path / "transformer", path)
    home = next((home for home in homes if (home / "config.json").is_file()), None)
    return home is not None and json_of(home / "config.json").get("_class_name") in KINDS


def read(path: Path, args: Mapping[str, Any] | None = None) -> Imported:
    """The networks of a pipeline that `save_pretrained` wrote.

    Args:
        path: the folder.
        args: `sample_size`, the side of latents, where it is not to be the U-Net's own; `scale`, see `KL`; others
            overrule the scheduler's configuration.

    Raises:
        ForeignFileError: a part is missing, damaged, or of another class than those that are known.
        ImportError: diffusers or transformers is missing.
    """
    if not (path / "model_index.json").is_file():
        raise ForeignFileError(
            f"{path} has no model_index.json: a network that is told sentences is read with the rest of its pipeline, "
            "the text encoder, its tokenizer, the autoencoder and the scheduler: pipe.save_pretrained(folder)."
        )
    index, own = json_of(path / "model_index.json"), dict(args or {})
    home = path / ("unet" if (path / "unet").is_dir() else "transformer")
    kind, config = _part(home, KINDS)
    size, scale = own.pop("sample_size", config.get("sample_size")), own.pop("scale", None)
    told = {**json_of(path / "scheduler" / "scheduler_config.json"), **own}
    sides = Arguments({"sample_size": size}, home).size("sample_size")
    latent, pixels, codec = _codec(path / "vae", sides, scale)
    if config.get("in_channels") != latent[0]:
        raise ForeignFileError(
            f"{home}: the network takes {config.get('in_channels')} channels, and latents have {latent[0]}: one that "
            "is told a picture or a mask besides (inpainting, editing, upscaling) is not read."
        )
    text, node, weights = _text(path, index, kind, config)
    weights |= {f"inner.{name}": value for name, value in loaded(home, kind, config).state_dict().items()}
    return Imported(
        path=path,
        format=f"diffusers pipeline, {kind}",
        licence=_LICENCE,
        network={
            "_target_": "scoresde.interop.TextToImage",
            "_partial_": True,
            "_convert_": "all",
            "kind": kind,
            "config": config,
            "pixels": list(pixels),
            "text": node,
        },
        weights=weights,
        event_shape=latent,
        span=None,
        codec=codec,
        text=text,
        **process_nodes(told),
    )


def _part(home: Path, kinds: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """(class, configuration) of a part of a pipeline.

    Raises:
        ForeignFileError: it is missing, of none of these classes, or larger than anything that is in use.
    """
    if not (home / "config.json").is_file():
        raise ForeignFileError(
            f"{home.parent} has no {home.name}/config.json, without which there is no picture: save the whole pipeline."
        )
    config = json_of(home / "config.json")
    kind = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
    if kind not in kinds:
        raise ForeignFileError(f"{home} is expected to hold one of {', '.join(kinds)}; found {kind!s:.80}.")
    for name, value in config.items():
        counts = value if isinstance(value, list) else [value]
        if "layers" in name and not all(type(n) is not int or 0 < n <= _MOST for n in counts):
            raise ForeignFileError(f"{home}: {name} is 1 to {_MOST}; found {value!s:.80}.")
    alien = ("architectures", "dtype", "torch_dtype", "transformers_version", "auto_map", "quantization_config")
    left = ("_", "attn_implementation", *alien)
    return kind, {name: value for name, value in config.items() if not name.startswith(left)}


def loaded(home: Path, kind: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """A part of a pipeline with its weights, in float32, as its own package reads them.

    Raises:
        ForeignFileError: there are no safetensors, or they are not those of the configuration.
    """
    library = "diffusers" if kind in CLASSES["diffusers"] else "transformers"
    stem, made = _STEMS[library], class_of(kind)
    files = sorted(home.glob(f"{stem}*.safetensors"))
    if not files:
        found = ", ".join(sorted(each.name for each in home.iterdir())[:6])
        raise ForeignFileError(
            f"{home} has no {stem}.safetensors; it has {found!s:.200}. Pickles (.bin) are not opened: "
            "save_pretrained(…, safe_serialization=True) writes the other."
        )
    plain = any((home / name).is_file() for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"))
    variant = None if plain else files[0].name.removeprefix(f"{stem}.").split(".")[0].split("-")[0]
    how: dict[str, Any] = {"dtype" if library == "transformers" else "torch_dtype": torch.float32, "variant": variant}
    how |= {"low_cpu_mem_usage": False} if library == "diffusers" else {}
    try:
        with torch.device("meta"):  # sizes without memory, whatever a configuration claims
            own = dict(config) if library == "diffusers" else made.config_class(**config)
            empty = made.from_config(own) if library == "diffusers" else made(own)
        wanted, there = sum(each.numel() for each in empty.parameters()), sum(map(_numbers, files))
        if wanted > there:
            raise ValueError(f"its configuration wants {wanted:,} numbers, and the files have {there:,}")
        how |= {"config": own} if library == "transformers" else {}  # what is in the file asks for more than a network
        model, info = made.from_pretrained(
            home, use_safetensors=True, local_files_only=True, output_loading_info=True, **how
        )
        if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
            raise ValueError(f"the files do not have {wrong[0]!s:.100}, which its configuration wants")
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, AttributeError, OverflowError) as error:
        raise ForeignFileError(f"{home} is no whole {kind}: {error!s:.400}") from error
    return model.eval()  # type: ignore[no-any-return]


def _numbers(path: Path) -> int:
    """How many numbers a safetensors file holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no whole safetensors file, {error!s:.200}") from error


def _codec(home: Path, side: int, scale: float | None) -> tuple[tuple[int, ...], tuple[int, ...], Autoencoder]:
    """The shape of latents, the size of pictures, and the codec between them."""
    kind, config = _part(home, ("AutoencoderKL",))
    model: Any = loaded(home, kind, config)
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    factor, channels = 2 ** (len(config["block_out_channels"]) - 1), config["latent_channels"]
    latent, pixels = (channels, side, side), (factor * side, factor * side)
    node = {
        "_target_": "scoresde.interop.KL",
        "_convert_": "all",
        "config": config,
        "event_shape": [config["in_channels"], *pixels],
        "latent_shape": list(latent),
        "low": _SPAN[0],
        "high": _SPAN[1],
        "scale": scale,
    }
    network = build(node, key="vae")
    network.inner.load_state_dict(model.state_dict())
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
    std = config.get("latents_std") or [1.0] * channels
    own = tuple(each / config["scaling_factor"] for each in std)
    codec = Autoencoder(Scaling(*_SPAN, levels=256), network, tuple(mean), own, json.dumps(node, sort_keys=True))
    return latent, pixels, codec


def _text(path: Path, index: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> tuple[Text, Any, Any]:
    """How sentences are read, the node of what reads them, and its weights."""
    joint = config.get("joint_attention_dim", 0) if kind == KINDS[1] else 0
    added = config.get("addition_embed_type")
    for name, known in (("addition_embed_type", (None, "text_time")), ("class_embed_type", (None,))):
        if config.get(name) not in known:
            raise ForeignFileError(f"{path}: {name}={config[name]!s:.80} is told what no sentence says, and not read.")
    if config.get("encoder_hid_dim_type") or config.get("num_class_embeds"):
        raise ForeignFileError(f"{path}: its network is told pictures or classes besides, and is not read.")
    names = sorted(name for name, part in index.items() if name.startswith("text_encoder") and part and part[1])
    if not names:
        raise ForeignFileError(f"{path} has no text_encoder, and its network is told sentences: save it with one.")
    encoders, weights, starts = list[dict[str, Any]](), dict[str, Tensor](), dict[Text, int]()
    for number, name in enumerate(names):
        kind, own = _part(path / name, CLASSES["transformers"])
        text, pad = _tokenizer(path / name.replace("text_encoder", "tokenizer"), kind, own)
        start = starts.setdefault(text, sum(each.tokenizer.size for each in starts))
        facts = {"start": start, "size": text.tokenizer.size, "length": text.length, "pad": pad}
        encoders.append({"kind": kind, "config": own, "empty": text.tokenizer.encode(""), **facts})
        found = loaded(path / name, kind, own).state_dict()
        weights |= {f"text.encoders.{number}.{key}": value for key, value in found.items()}
    node = {"_target_": "scoresde.interop.Sentences", "_partial_": True, "_convert_": "all", "encoders": encoders}
    node |= {"last": not (joint or added), "joint": joint, "rest": _T5_LENGTH if joint else 0}
    node |= {"zeros": bool(added and index.get("force_zeros_for_empty_prompt", True))}
    return joined(tuple(starts)), node, weights


def _tokenizer(home: Path, kind: str, config: Mapping[str, Any]) -> tuple[Text, int]:
    """How sentences become tokens for an encoder, and the token behind their end.

    Raises:
        ForeignFileError: it cannot be read, or knows more tokens than the encoder.
    """
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(home, local_files_only=True, use_fast=True)
        tokenizer = Saved.of(found.backend_tokenizer)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise ForeignFileError(f"{home} holds no tokenizer that can be read: {error!s:.300}") from error
    if tokenizer.size > config.get("vocab_size", tokenizer.size):
        raise ForeignFileError(f"{home} has {tokenizer.size} tokens, and its encoder knows {config['vocab_size']}.")
    most = min(found.model_max_length, config.get("max_position_embeddings", 77))
    return Text(tokenizer, _T5_LENGTH if kind == "T5EncoderModel" else most), found.pad_token_id
