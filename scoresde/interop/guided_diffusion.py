"""guided-diffusion's state dicts (openai/guided-diffusion): ADM, whose arguments are flags of its command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .imported import Arguments, Imported, Node, Tensors
from .pickles import ForeignFileError
from .unets import Layout, Names, Place, geometric, rows_of_qkv, unet_weights, with_none

LICENCE = "guided-diffusion's code and published weights: MIT"
_NAMES = Names(
    block={
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "film": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "skip": "skip_connection",
    },
    attention={"norm": "norm", "qkv": "qkv", "proj": "proj_out"},
)
_MULTS: dict[int, list[Any]] = {
    512: [0.5, 1, 1, 2, 2, 4, 4],
    256: [1, 1, 2, 2, 4, 4],
    128: [1, 1, 2, 3, 4],
    64: [1, 2, 3, 4],
}
# Flags that change no output of the network that is used.
_IDLE = (
    *("use_checkpoint", "use_fp16", "use_kl", "rescale_learned_sigmas", "timestep_respacing", "out_channels", "dims"),
    "num_heads_upsample",
)


def read(path: Path, content: Mapping[str, Any], args: Mapping[str, Any] | None) -> Imported:
    """The network of a state dict.

    Args:
        path: of the file.
        content: what `torch_files.load` made of it.
        args: the flags of guided-diffusion, `image_size`, `num_channels` …, or the arguments of its `UNetModel`, with
            the flags of the diffusion, `diffusion_steps`, `noise_schedule`, `rescale_timesteps`, beside them.

    Raises:
        ForeignFileError: they are missing or of another network, or the tensors do not fit them.
    """
    if not args:
        raise ForeignFileError(
            f"{path} does not say what its network is: give the flags that it was trained with as JSON, image_size, "
            "num_channels, num_res_blocks, attention_resolutions, learn_sigma, … : args=flags.json."
        )
    flags, tensors = Arguments(args, path), Tensors(content, path)
    side, channels = flags.size("image_size"), flags.whole("in_channels", 3)
    node, layout, heads = _network(flags, side)
    order = "whc" if flags.only("use_new_attention_order", False, True, False) else "hwc"
    weights = _weights(tensors, layout, heads, order)
    classes = 0
    if "label_emb.weight" in tensors:
        rows = tensors.take("label_emb.weight")
        classes, node["cond_dropout"] = len(rows), 0.0
        weights["conditioning.label.weight"] = with_none(rows)
    weights["conditioning.waves.omega"] = geometric(node["waves"] // 2, last=False)
    tensors.done()
    if flags.get("num_classes", None) not in (None, classes) or (flags.get("class_cond", False) and not classes):
        raise ForeignFileError(f"{path} has {classes} classes, which is not what the flags say.")
    learned, outputs = bool(flags.get("learn_sigma", False)), len(weights["outlet.bias"])
    if outputs != (1 + learned) * channels:
        raise ForeignFileError(f"{path}: the network says {outputs} channels of {channels}, learn_sigma={learned}.")
    node |= {"outputs": 2} if learned else {}
    changed = _process(flags)
    flags.done(*_IDLE)
    return Imported(
        path=path,
        format="guided-diffusion state dict, UNetModel",
        licence=LICENCE,
        network=node,
        weights=weights,
        event_shape=(channels, side, side),
        classes=classes,
        outputs=1 + learned,
        unknown=("names of the classes",) if classes else (),
        **changed,
    )


def _process(flags: Arguments) -> dict[str, Any]:
    steps = flags.whole("diffusion_steps", flags.whole("steps", 1000), 2)
    schedule = flags.only("noise_schedule", "linear", "linear", "cosine")
    rescaled = flags.only("rescale_timesteps", False, True, False)
    ends = {"beta_start": 0.1 / steps, "beta_end": 20.0 / steps}  # 1e-4 and 0.02 for 1,000 steps
    scale = 1000.0 if rescaled else float(steps)
    x0 = flags.only("predict_xstart", False, True, False)
    return {
        "sde": {"_target_": "scoresde.DDPM", "betas": schedule, "steps": steps, **ends},
        "parameterization": {"_target_": "scoresde.X0" if x0 else "scoresde.Eps"},
        "noise_input": {"_target_": "scoresde.TimeInput", "scale": scale, "offset": -scale / steps},
    }


def _network(flags: Arguments, side: int) -> tuple[Node, Layout, list[int]]:
    by_flags = "model_channels" not in flags.given  # which have other defaults than the class
    width = flags.whole("num_channels", 128) if by_flags else flags.whole("model_channels")
    mults = _numbers(flags, "channel_mult", _MULTS.get(side, []) if by_flags else [1, 2, 4, 8])
    blocks = flags.whole("num_res_blocks", 2 if by_flags else None)
    wanted = _numbers(flags, "attention_resolutions", [16, 8] if by_flags else [])
    if isinstance(flags.given.get("attention_resolutions", "" if by_flags else []), str):
        wanted = [side // each for each in wanted]  # flags say resolutions, the class factors
    count, each = flags.whole("num_heads", 4 if by_flags else 1), flags.get("num_head_channels", -1)
    if flags.get("num_heads_upsample", -1) not in (-1, count) and each == -1:
        raise ForeignFileError(f"{flags.path}: num_heads_upsample other than num_heads is not known here.")
    updown = flags.only("resblock_updown", False, True, False)
    flags.only("conv_resample", True, True)
    widths = [int(width * mult) for mult in mults]
    if not widths or any(size % widths[0] for size in widths) or min(widths) < 1:
        raise ForeignFileError(f"{flags.path}: channel_mult={mults!s:.80} are no multiples of the first.")
    sides = [side >> level for level in range(len(mults))]
    attended = [1 << level in wanted for level in range(len(mults))]
    heads = [count if each == -1 else max(1, size // each) for size in widths]
    layout = Layout(sides, blocks, attended, attend_all=True, resample="block" if updown else "conv")
    node = layout.node(widths[0], [size // widths[0] for size in widths]) | {
        **({"heads": count} if each == -1 else {"head_width": each}),
        "embedding": "sinusoidal",
        "embedding_scale": 0.01,
        "embedding_width": 4 * width,
        "waves": width,
        "residual_scaling": False,
        **({} if updown else {"resnet_resample": False, "strided": True}),
        **({} if flags.only("use_scale_shift_norm", by_flags, True, False) else {"scale_shift": False}),
        "eps": 1e-5,
        "group_channels": 1,
        "late": True,
        "dropout": flags.number("dropout", 0.0),
    }
    return node, layout, heads


def _numbers(flags: Arguments, name: str, usual: list[Any]) -> list[Any]:
    """A list of numbers, or text with commas as flags have it."""
    value = flags.get(name, None)
    if value in (None, ""):
        value = usual
    words = value.split(",") if isinstance(value, str) else value
    try:
        found = [float(word) for word in words]
    except (TypeError, ValueError) as error:
        raise ForeignFileError(f"{flags.path}: {name} is a list of numbers; got {value!s:.80}.") from error
    if len(found) > 16 or any(not 0 < number < 1 << 16 for number in found):
        raise ForeignFileError(f"{flags.path}: {name}={value!s:.80} are no sizes of a network.")
    return [int(number) if number == int(number) else number for number in found]


def _weights(tensors: Tensors, layout: Layout, heads: list[int], order: str) -> dict[str, Tensor]:
    counts = {"input_blocks": 0, "output_blocks": -1}

    def theirs(place: Place) -> str:
        attends, conv = place.kind == "attention", place.kind == "conv"
        if place.part in ("norm", "outlet"):
            return "out.0" if place.part == "norm" else "out.2"
        if place.part == "middle":
            return f"middle_block.{1 if attends else 2 * place.number}"
        if place.part == "up":  # the last of what its level, the one below, has last
            return f"output_blocks.{counts['output_blocks']}.{1 + layout.attended[place.level + 1]}{'.conv' * conv}"
        group = "output_blocks" if place.part == "decoder" else "input_blocks"
        counts[group] += place.part != "inlet" and not attends
        return f"{group}.{counts[group]}.{int(attends)}{'.op' * (conv and place.part == 'down')}"

    def attention(place: Place, start: str) -> dict[str, Tensor]:
        found = {}
        for name, value in tensors.layers({o: f"{start}.{t}" for o, t in _NAMES.attention.items()}).items():
            value = value[..., None] if value.ndim == 3 else value  # a convolution along one line there
            found[name] = rows_of_qkv(value, heads[place.level], order) if name.startswith("qkv") else value
        return found

    embedding = tensors.layers({"conditioning.inner": "time_embed.0", "conditioning.outer": "time_embed.2"})
    return unet_weights(layout, tensors, _NAMES, theirs, attention) | embedding
