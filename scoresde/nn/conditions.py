"""The conditions of a network, read and checked: labels, vectors, images, token sequences and texts."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from ..checks import sizes, whole
from ..diffusion.conditions import PADDING, Cond, checked_told, chosen, each, named, nothing, override

_WHOLE = ("label", "text")  # kinds that are integers


class TextEncoder(nn.Module, abc.ABC):
    """Reads a text: (ids (B, L) ≥ 0, there (B, L) bool) -> (each token (B, L, width), the whole (B, width)).

    What it returns where a token is not there is not looked at, nor is the summary of a text without any token.

    Attributes:
        vocabulary: ids are below it; None where that is not known.
        width: see above.
    """

    vocabulary: int | None
    width: int

    @abc.abstractmethod
    def forward(self, ids: Tensor, there: Tensor) -> tuple[Tensor, Tensor]: ...


class Kinds(TypedDict, total=False):
    """The arguments of `Conditions`, as networks hand them on."""

    classes: int
    cond_dim: int
    cond_image: Sequence[int]
    cond_tokens: int
    cond_dropout: float
    cond_augment: int
    told: Sequence[str]
    cond_noise: float | None
    text: TextEncoder | None


class Conditions(nn.Module):
    r"""Reads `cond`: a tensor where the network has one kind of condition, or a mapping of any of its kinds,

        "label"    (B,) integers in 0 … classes − 1, or `classes` for none
        "vector"   (B, cond_dim) floats
        "image"    (B, *cond_image) floats
        "tokens"   (B, L, cond_tokens) floats, any L; rows of NaN are padding
        "text"     (B, L) integers, tokens of a sentence, any L; -1 is padding
        "augment"  (B, cond_augment) floats, what was done to the sample; it says no more than 0 where it is left out
        "end"      (B,) c_noise of where a flow map goes; it stays where it is where it is left out
        "scale"    (B,) ¼ log of the guidance scale that a flow map was distilled at; 0 where it is left out
        "level"    (B,) floats, s of the noise in the image with `cond_noise`; 0, none, where it is left out

    A sample is without a condition where its floats are all NaN, where its label is `classes`, where its text is all
    padding, and where the kind is left out: the network has learned a null for each kind. With `cond_dropout` p, a
    forward in training mode makes the whole condition of each sample null with probability p (Ho & Salimans 2022,
    alg. 1); it draws from torch's global generator, as `nn.Dropout` does, and evaluation mode draws nothing.

    With `cond_noise` the image is a low resolution of the sample, as a stage of a cascade is told it. It is never
    dropped, and is its own null. In training mode it becomes √(1 − s²) image + s ε with s uniform in
    [0, cond_noise], and the network is told s: it learns not to trust all of what a stage before it drew (Ho et al.
    2021, *Cascaded diffusion models*, sec. 4.2; Saharia et al. 2022, sec. 2.4). What is told a "level" is left as it
    is: it has its noise.

    Args:
        classes: number of labels K ≥ 0; 0 for none.
        cond_dim: size of the vector ≥ 0; 0 for none.
        cond_image: shape (C, *sizes) of the image, one to three sizes; () for none.
        cond_tokens: size of one token ≥ 0; 0 for none.
        cond_dropout: probability in [0, 1) that training drops the condition of a sample, for guidance.
        cond_augment: size of what tells of augmentation ≥ 0, which is never dropped; 0 for none.
        told: which of "end" and "scale" there are, numbers that are never dropped.
        cond_noise: the most noise of an image that is a low resolution, in [0, 1]; None for other images.
        text: the encoder of a text; None for none. It is left to `Conditioning`.

    Raises:
        ValueError: at construction for arguments out of range; in forward for a condition that the network was not
            built for, of the wrong shape, or (on the CPU, outside torch.compile) labels out of range, or floats of
            which only some are NaN.
    """

    def __init__(
        self,
        classes: int = 0,
        cond_dim: int = 0,
        cond_image: Sequence[int] = (),
        cond_tokens: int = 0,
        cond_dropout: float = 0.0,
        cond_augment: int = 0,
        cond_noise: float | None = None,
        told: Sequence[str] = (),
        text: TextEncoder | None = None,
    ):
        super().__init__()
        counts = {"classes": classes, "cond_dim": cond_dim, "cond_tokens": cond_tokens, "cond_augment": cond_augment}
        classes, cond_dim, cond_tokens, cond_augment = (
            whole(count, name, 0, otherwise="0 for none") for name, count in counts.items()
        )
        image = sizes(cond_image, "cond_image")
        if image and not 2 <= len(image) <= 4:
            raise ValueError(f"cond_image is (C, L), (C, H, W) or (C, D, H, W), or () for none; got {image}.")
        if not 0 <= cond_dropout < 1:
            raise ValueError(f"cond_dropout is a probability in [0, 1); got {cond_dropout}.")
        self.classes, self.dropout = classes, float(cond_dropout)
        self.vocabulary = None if text is None else text.vocabulary
        self.shapes: dict[str, tuple[int, ...]] = {}  # of one sample; −1 is any length
        if classes:
            self.shapes["label"] = ()
        if cond_dim:
            self.shapes["vector"] = (cond_dim,)
        if image:
            self.shapes["image"] = image
        if cond_tokens:
            self.shapes["tokens"] = (-1, cond_tokens)
        if text is not None:
            if cond_tokens:
                raise ValueError("A text is read as tokens, so there can be no others: take cond_tokens=0.")
            self.shapes["text"] = (-1,)
        kept = set() if cond_noise is None else {"image"}
        if cond_dropout and not self.shapes.keys() - kept:
            raise ValueError(
                f"cond_dropout={cond_dropout} has no condition to drop: "
                "set classes, cond_dim, cond_image, cond_tokens or text; or cond_dropout=0, where nothing is told."
            )
        if cond_augment:
            self.shapes["augment"] = (cond_augment,)
        if cond_noise is not None and not (image and 0 <= cond_noise <= 1):
            raise ValueError(
                f"cond_noise is a share in [0, 1] of noise in an image, for cond_image=[C,H,W]; got {cond_noise} with "
                f"cond_image={list(image)}."
            )
        self.noise = float(cond_noise or 0)
        self.told = (*checked_told(told), *(("level",) if self.noise else ()))
        self.shapes |= dict.fromkeys(self.told, ())
        self.besides = {"augment", *self.told}  # what is no condition of the caller's, and never dropped
        self.kept = {*self.told, *kept}  # what is its own null

    def forward(self, cond: Cond, like: Tensor) -> dict[str, Tensor]:
        """The kinds given, by name, for a batch `like` (B, *): labels and texts int64, floats in its dtype."""
        given = {name: self._checked(name, value, like.shape[0]) for name, value in self._parts(cond).items()}
        given = {
            name: value.long() if name in _WHOLE else value if name in self.told else value.to(like.dtype)
            for name, value in given.items()
        }
        if given and self.training and self.dropout:
            keep = torch.rand(like.shape[0], device=like.device) >= self.dropout
            given |= {
                name: chosen(keep, value, nothing(value, self.classes))
                for name, value in given.items()
                if name not in self.besides | self.kept
            }
        if self.training and self.noise and "image" in given and "level" not in given:
            return given | noised(given["image"], self.noise * torch.rand_like(given["image"].flatten(1)[:, 0]))
        return given

    def null(self, cond: Cond) -> Cond:
        """The null condition: one entry like those of `cond` that says nothing. None of None. What is told stays."""
        parts = self._parts(cond)
        for name, value in parts.items():
            if name not in _WHOLE and not value.is_floating_point():
                raise ValueError(f"The condition {name!r} is floating-point; got {value.dtype}.")
        stays = {name: value for name, value in parts.items() if name in self.kept}
        return override(each(lambda value: nothing(value, self.classes), cond), stays or None)

    def _parts(self, cond: Cond) -> dict[str, Tensor]:
        if cond is None:
            return {}
        names, parts = [name for name in self.shapes if name not in self.besides], named(cond, "")
        if "end" in parts and "end" not in self.told:
            raise ValueError("This network is told one noise level only; build it with told=['end'] for a flow map.")
        if not names and ("" in parts or not self.shapes):
            raise ValueError(
                "This network is unconditional: leave cond out, or build it with classes, cond_dim, cond_image, "
                "cond_tokens or text."
            )
        if len(names) == 1 and "" in parts:
            parts[names[0]] = parts.pop("")
        if "" in parts:
            many, shown = ("two", "three", "four", "five")[len(names) - 2], ", ".join(f'"{name}": …' for name in names)
            raise ValueError(f"This network has {many} conditions: pass cond={{{shown}}}.")
        if unknown := sorted(parts.keys() - set(self.shapes)):
            raise ValueError(f"This network's conditions are {names}; got also {unknown}.")
        return parts

    def _checked(self, name: str, value: Tensor, batch: int) -> Tensor:
        if name == "label":
            return self._checked_labels(value, batch)
        if name == "text":
            return self._checked_text(value, batch)
        expected = (batch, *self.shapes[name])
        fits = value.ndim == len(expected) and all(n in (-1, m) for n, m in zip(expected, value.shape, strict=True))
        if not fits or not value.is_floating_point():
            shown = str(expected).replace("-1", "L")
            raise ValueError(
                f"The condition {name!r} is floating-point of shape {shown}; "
                f"got {value.dtype} of shape {tuple(value.shape)}."
            )
        if _readable(value) and name not in self.told:
            # an entry, or of a sequence a token, is NaN as a whole or not at all
            gaps = value.isnan().flatten(2 if name == "tokens" else 1)
            if bool((gaps.any(-1) & ~gaps.all(-1)).any()):
                raise ValueError(
                    f"Some numbers of one {'token' if name == 'tokens' else name} are NaN and others are not. All of "
                    "them are NaN where there is none; for gaps inside, fill them and add a mask to the condition."
                )
        return value

    def _checked_labels(self, label: Tensor, batch: int) -> Tensor:
        if label.shape != (batch,) or label.is_floating_point() or label.dtype == torch.bool:
            raise ValueError(
                f"Labels are integers of shape ({batch},); got {label.dtype} of shape {tuple(label.shape)}."
            )
        # On an accelerator the embedding's own device assertion guards.
        if _readable(label):
            low, high = int(label.min()), int(label.max())
            if low < 0 or high > self.classes:
                raise ValueError(
                    f"Labels are in 0 … {self.classes - 1}, or {self.classes} for none; got {low} to {high}."
                )
        return label

    def _checked_text(self, ids: Tensor, batch: int) -> Tensor:
        if ids.ndim != 2 or len(ids) != batch or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"A text is integers of shape ({batch}, L), the numbers of its tokens; got {ids.dtype} of shape "
                f"{tuple(ids.shape)}."
            )
        if self.vocabulary is not None and _readable(ids):
            low, high = int(ids.min()), int(ids.max())
            if low < PADDING or high >= self.vocabulary:
                raise ValueError(
                    f"Tokens are in 0 … {self.vocabulary - 1}, or {PADDING} behind the end; got {low} to {high}."
                )
        return ids


def noised(image: Tensor, level: Tensor, eps: Tensor | None = None) -> dict[str, Tensor]:
    """√(1 − s²) image + s ε of images (B, *) at levels s (B,), and the levels, as parts of a condition."""
    eps = torch.randn_like(image) if eps is None else eps
    s = level.reshape(-1, *[1] * (image.ndim - 1))
    return {"image": (1 - s**2).sqrt() * image + s * eps, "level": level}


def _readable(value: Tensor) -> bool:
    """Whether its numbers can be looked at without waiting for a device or breaking a compiled graph."""
    return not torch.compiler.is_compiling() and value.device.type == "cpu" and value.numel() > 0
