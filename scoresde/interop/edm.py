"""EDM's network pickles (NVlabs/edm): four wrappers around SongUNet and DhariwalUNet.

The pickle holds the source of its classes, which EDM's own loader executes; here it is not even kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from .imported import Arguments, Imported, Node, Tensors, with_outlet_negated
from .pickles import ForeignFileError
from .unets import Layout, Names, Place, geometric, rows_of_qkv, swapped_halves, unet_weights, with_none

LICENCE = "EDM's code and published weights: CC BY-NC-SA 4.0, not for commercial use"
_NAMES = Names(
    block={"norm1": "norm0", "conv1": "conv0", "film": "affine", "norm2": "norm1", "conv2": "conv1", "skip": "skip"},
    attention={"norm": "norm2", "qkv": "qkv", "proj": "proj"},
)
_IDLE = ("augment_dim", "use_fp16", "model_type", "label_dropout")  # no argument of these changes an output
_DEEPEST = 16


def read(path: Path, content: Any) -> Imported:
    """The network of a pickle.

    Args:
        path: of the file.
        content: what `torch_files.load` made of it.

    Raises:
        ForeignFileError: it is none of these, or has what is not known here.
    """
    wrapper = content.get("ema")
    if not isinstance(wrapper, dict) or "class_name" not in wrapper:
        raise ForeignFileError(
            f"{path}: expected the key 'ema' of a network pickle; it has {', '.join(content)!s:.80}."
        )
    kind, inner = wrapper["class_name"], wrapper.get("_modules", {}).get("model", {})
    if kind not in _WRAPPERS or inner.get("class_name") not in _NETWORKS:
        names = f"{kind!s:.60} around {inner.get('class_name')!s:.60}"
        raise ForeignFileError(
            f"{path}: expected {', '.join(_WRAPPERS)} around {' or '.join(_NETWORKS)}; found {names}."
        )
    named = flattened(wrapper, path)
    tensors = Tensors({n.removeprefix("model."): v for n, v in named.items() if n.startswith("model.")}, path)
    given = arguments_of(wrapper)
    for theirs in _OF_WRAPPER:
        given.pop(theirs, None)
    channels = given.pop("img_channels", None)
    outputs = 2 if kind == "iDDPMPrecond" else 1
    given |= {"in_channels": channels, "out_channels": outputs * channels if type(channels) is int else None}
    network, weights, shape = build_network(inner["class_name"], given, tensors)
    network |= {"outputs": 2} if outputs == 2 else {}
    facts = Arguments(wrapper, path)
    changed = _WRAPPERS[kind](facts, named, weights)
    classes = network.pop("classes")
    if classes:
        network["cond_dropout"] = Arguments(given, path).number("label_dropout", 0.0)
    return Imported(
        path=path,
        format=f"EDM network pickle, {kind} around {inner['class_name']}",
        licence=LICENCE,
        network=network,
        event_shape=shape,
        classes=classes,
        outputs=outputs,
        unknown=("names of the classes",) if classes else (),
        **{"weights": weights, **changed},
    )


def flattened(module: Any, path: Path) -> dict[str, Tensor]:
    """The parameters and buffers of a module and of those in it, by name.

    Raises:
        ForeignFileError: modules without end, or two tensors of one name.
    """
    pairs = _flattened(module, path, "", 0)
    if len(found := dict(pairs)) < len(pairs):
        raise ForeignFileError(f"{path}: two of its tensors have the same name.")
    return found


def _flattened(module: Any, path: Path, prefix: str, depth: int) -> list[tuple[str, Tensor]]:
    if depth > _DEEPEST:
        raise ForeignFileError(f"{path}: its modules are nested more than {_DEEPEST} deep.")
    found = []
    for group in ("_parameters", "_buffers"):
        found += [(prefix + name, v) for name, v in (module.get(group) or {}).items() if isinstance(v, Tensor)]
    for name, inner in (module.get("_modules") or {}).items():
        if isinstance(inner, dict):
            found += _flattened(inner, path, f"{prefix}{name}.", depth + 1)
        if len(found) > 100_000:
            raise ForeignFileError(f"{path}: it has more than 100,000 tensors, which no published network has.")
    return found


def build_network(
    kind: str, given: Mapping[str, Any], tensors: Tensors
) -> tuple[Node, dict[str, Tensor], tuple[int, ...]]:
    """(node, weights, event shape) of a bare SongUNet or DhariwalUNet.

    Args:
        kind: the class.
        given: its constructor's arguments, `img_resolution` and `in_channels` among them.
        tensors: its parameters and buffers.

    Raises:
        ForeignFileError: arguments that are not known here, or tensors that do not fit them.
    """
    args = Arguments(given, tensors.path)
    side, channels = args.size("img_resolution"), args.whole("in_channels")
    args.whole("out_channels")
    node, layout, heads = _NETWORKS[kind](args, side)
    args.done(*_IDLE)

    def attention(place: Place, start: str) -> dict[str, Tensor]:
        found = tensors.layers({ours: f"{start}.{theirs}" for ours, theirs in _NAMES.attention.items()})
        return {n: rows_of_qkv(v, heads[place.level], "hcw") if n.startswith("qkv") else v for n, v in found.items()}

    weights = unet_weights(layout, tensors, _NAMES, lambda place: name_of(place, layout.sides, kind), attention)
    weights |= _embedding(kind, node, tensors)
    tensors.drop(".resample_filter", "map_augment.weight")
    tensors.done()
    return node, weights, (channels, side, side)


def name_of(place: Place, sides: Sequence[int], kind: str = "SongUNet") -> str:
    """The beginning of the names of a layer's tensors."""
    at = f"{sides[place.level]}x{sides[place.level]}"
    if place.part in ("norm", "outlet"):
        last = "norm" if place.part == "norm" else "conv"
        return f"dec.{at}_aux_{last}" if kind == "SongUNet" else f"out_{last}"
    return {
        "inlet": f"enc.{at}_conv",
        "down": f"enc.{at}_down",
        "pyramid": f"enc.{at}_aux_residual",
        "encoder": f"enc.{at}_block{place.number}",
        "middle": f"dec.{at}_in{place.number}",
        "up": f"dec.{at}_up",
        "decoder": f"dec.{at}_block{place.number}",
    }[place.part]


def arguments_of(wrapper: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a wrapper was made with."""
    given = dict(wrapper.get("_init_kwargs") or {})
    names = ("img_resolution", "img_channels", "label_dim")
    return given | dict(zip(names, wrapper.get("_init_args") or (), strict=False))


def _song(args: Arguments, side: int) -> tuple[Node, Layout, list[int]]:
    width, mults = args.whole("model_channels", 128), args.wholes("channel_mult", (1, 2, 2, 2))
    blocks = args.whole("num_blocks", 4)
    fourier = args.only("embedding_type", "positional", "positional", "fourier") == "fourier"
    residual = args.only("encoder_type", "standard", "standard", "residual") == "residual"
    args.only("decoder_type", "standard", "standard")
    fir = args.only("resample_filter", [1, 1], [1, 1], [1, 3, 3, 1]) == [1, 3, 3, 1]
    sides = [side >> level for level in range(len(mults))]
    attended = [each in args.wholes("attn_resolutions", (16,)) for each in sides]
    layout = Layout(sides, blocks, attended, pyramid=residual)
    node = layout.node(width, mults) | {
        "embedding": "fourier" if fourier else "sinusoidal",
        "embedding_width": width * args.whole("channel_mult_emb", 4),
        "waves": width * args.whole("channel_mult_noise", 1),
        **({"fir": True, "fir_zeros": True} if fir else {}),
        **({"progressive_input": "residual", "pyramid_conv_first": True} if residual else {}),
        "scale_shift": False,
        "resample_skip": True,
        "dropout": args.number("dropout", 0.1),
        "classes": args.whole("label_dim", 0, 0),
    }
    return node, layout, [1] * len(mults)


def _dhariwal(args: Arguments, side: int) -> tuple[Node, Layout, list[int]]:
    width, mults = args.whole("model_channels", 192), args.wholes("channel_mult", (1, 2, 3, 4))
    blocks, sides = args.whole("num_blocks", 3), [side >> level for level in range(len(mults))]
    heads = [width * mult // 64 for mult in mults]  # a level under 64 channels has none
    wanted = args.wholes("attn_resolutions", (32, 16, 8))
    attended = [each in wanted and count > 0 for each, count in zip(sides, heads, strict=True)]
    middle = heads[-1] > 0
    counts = {count for count, has in zip(heads, attended, strict=True) if has} | ({heads[-1]} if middle else set())
    widths = [width * mult for mult in mults]
    layout = Layout(sides, blocks, attended, attend_all=True, middle=middle)
    node = layout.node(widths[0], [each // widths[0] for each in widths]) | {
        **({"heads": max(counts, default=1)} if len(counts) < 2 else {"head_width": 64}),
        "embedding": "sinusoidal",
        "embedding_scale": 0.01,
        "embedding_width": width * args.whole("channel_mult_emb", 4),
        "waves": width,
        "residual_scaling": False,
        "eps": 1e-5,
        "late": True,
        "dropout": args.number("dropout", 0.1),
        "classes": args.whole("label_dim", 0, 0),
    }
    if any(each % widths[0] for each in widths):
        raise ForeignFileError(f"{args.path}: channel_mult={mults} are no multiples of the first.")
    return node, layout, heads


def _embedding(kind: str, node: Node, tensors: Tensors) -> dict[str, Tensor]:
    """Waves, the layers behind them, and the table of labels: SongUNet adds its own to the waves, ours comes later."""
    song, classes = kind == "SongUNet", node["classes"]
    inner = tensors.take("map_layer0.weight")
    found = {
        "inner.weight": swapped_halves(inner) if song else inner,
        "inner.bias": tensors.take("map_layer0.bias"),
        "outer.weight": tensors.take("map_layer1.weight"),
        "outer.bias": tensors.take("map_layer1.bias"),
    }
    if node["embedding"] == "fourier":
        found["waves.omega"] = (2 * math.pi * tensors.take("map_noise.freqs").double()).float()
    else:
        found["waves.omega"] = geometric(node["waves"] // 2, last=song)
    if classes:
        rows = tensors.take("map_label.weight").double().T
        table = with_none(rows)
        if song:
            table = (table * math.sqrt(classes) + tensors.take("map_label.bias").double()) @ inner.double().T
        found["label.weight"] = table.float()
    return {f"conditioning.{name}": value for name, value in found.items()}


_NETWORKS = {"SongUNet": _song, "DhariwalUNet": _dhariwal}


def _edm(facts: Arguments, named: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Any]:
    sigma_data = facts.number("sigma_data", 0.5)
    return {
        "sde": {"_target_": "scoresde.EDMSDE", "sigma_min": 0.002, "sigma_max": 80.0},
        "parameterization": {"_target_": "scoresde.EDM", "sigma_data": sigma_data},
        "sigma_data": sigma_data,
        "scale_input": True,
    }


def _vp(facts: Arguments, named: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Any]:
    low, rise = facts.number("beta_min", 0.1), facts.number("beta_d", 19.9)
    start = facts.number("epsilon_t", 1e-5)
    return {
        "sde": {"_target_": "scoresde.VPSDE", "beta_min": low, "beta_max": low + rise, "t_min": start},
        "parameterization": {"_target_": "scoresde.Eps"},
        "noise_input": _time(facts.whole("M", 1000) - 1.0),
    }


def _ve(facts: Arguments, named: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Any]:
    low, high = facts.number("sigma_min", 0.02), facts.number("sigma_max", 100.0)
    return {
        "sde": {"_target_": "scoresde.VESDE", "sigma_min": low, "sigma_max": high},
        "parameterization": {"_target_": "scoresde.Eps"},
        "noise_input": {"_target_": "scoresde.LogNoiseInput", "scale": 1.0, "offset": -math.log(2)},
        "weights": with_outlet_negated(weights),  # the network says −ε
    }


def _iddpm(facts: Arguments, named: Mapping[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Any]:
    levels = named.get("u")
    if levels is None or levels.ndim != 1:
        raise ForeignFileError(f"{facts.path} has no table 'u' of noise levels.")
    sigmas = [level for level in reversed(levels.double().tolist()) if level > 0]
    return {
        "sde": {"_target_": "scoresde.TableSDE", "alpha_bar": [1 / (1 + level**2) for level in sigmas]},
        "parameterization": {"_target_": "scoresde.Eps"},
        "noise_input": {"_target_": "scoresde.NearestStepInput"},
    }


def _time(scale: float) -> Node:
    return {"_target_": "scoresde.TimeInput", "scale": scale, "offset": 0.0}


_WRAPPERS = {"EDMPrecond": _edm, "VPPrecond": _vp, "VEPrecond": _ve, "iDDPMPrecond": _iddpm}
# Arguments of the wrappers, whose values are attributes too, and which are none of the network.
_OF_WRAPPER = ("sigma_min", "sigma_max", "sigma_data", "beta_d", "beta_min", "M", "epsilon_t", "C_1", "C_2")
