r"""Scenes of one or two MNIST digits on 32 × 32 pixels, and a sentence for each; and captions for CIFAR-10's labels.

    python benchmarks/scene_data.py /folder/with/the/four/idx/files data/scenes
    python benchmarks/scene_data.py /folder/with/the/four/idx/files data/things --single
    python benchmarks/scene_data.py /folder/with/images.npz data/cifar_captions

Writes train, test and held_out, an .npz (raw, uint8) and a .txt of captions each. A sentence follows the grammar

    scene  = thing " above " thing | thing " left of " thing | thing " and " thing | thing " in the " corner
    thing  = "a " ["small " | "large "] ["slanted "] digit
    corner = "top left" | "top right" | "bottom left" | "bottom right"

Ten of the hundred ordered pairs of digits, d and (3 d + 1) mod 10, are in `held_out` alone, in either order where they
stand beside "and". Digits of test and held_out are those of MNIST's test split.

With --single a scene is one thing in the middle of 16 × 16 pixels, and there is no held_out.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from scoresde.data import Idx

SIDE = 32
SIZES = {"": 14, "small ": 12, "large ": 16}
SINGLE_SIDE = 16
SINGLE_SIZES = {"": 13, "small ": 10, "large ": 16}
CORNERS = [f"{row} {column}" for row in ("top", "bottom") for column in ("left", "right")]
RELATIONS = (" above ", " left of ", " and ", " in the ")
CLASSES = ("airplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def held_out(first: int, second: int) -> bool:
    """Whether training never sees this pair."""
    return second == (3 * first + 1) % 10


def drawn(digit: Tensor, size: int, slanted: bool) -> Tensor:
    """The middle 20 × 20 pixels of a digit (28, 28) at size × size, (size, size), sheared by 0.45 if slanted."""
    shear = 0.45 if slanted else 0.0
    scale = 10 / 14 * (1 + shear / 2)  # so that what is sheared stays inside
    theta = torch.tensor([[[scale, shear * scale, 0.0], [0.0, scale, 0.0]]])
    grid = F.affine_grid(theta, [1, 1, size, size], align_corners=False)
    return F.grid_sample(digit[None, None], grid, align_corners=False, padding_mode="zeros")[0, 0]


def scene(digits: Tensor, labels: Tensor, rng: np.random.Generator, *, unseen: bool) -> tuple[np.ndarray, str]:
    """Pixels (1, 32, 32) uint8 and the sentence; with one of the pairs that training never sees, or with another."""
    while True:
        relation = RELATIONS[int(rng.integers(3 if unseen else 4))]
        chosen = rng.integers(len(digits), size=2)
        first, second = labels[chosen].tolist()
        pair = held_out(first, second) or (relation == " and " and held_out(second, first))
        if relation == " in the " or pair == unseen:
            break
    words, things = [], []
    for index in chosen:
        size, slant = rng.choice(list(SIZES)), rng.random() < 0.25
        words.append(f"a {size}{'slanted ' if slant else ''}{int(labels[index])}")
        things.append(drawn(digits[index], SIZES[str(size)], bool(slant)))
    pixels, half = torch.zeros(SIDE, SIDE), SIDE // 2
    if relation == " in the ":
        corner = int(rng.integers(4))
        halves, words[1] = [(corner // 2, corner % 2)], CORNERS[corner]
    else:
        down = relation == " above " or (relation == " and " and rng.random() < 0.5)
        order = (1, 0) if relation == " and " and rng.random() < 0.5 else (0, 1)
        halves = [(k, -1) if down else (-1, k) for k in order]
    for thing, places in zip(things, halves, strict=False):
        size = len(thing)
        ends = [(0, SIDE - size) if k < 0 else (half * k, half * (k + 1) - size) for k in places]
        top, left = (int(rng.integers(low, high + 1)) for low, high in ends)
        pixels[top : top + size, left : left + size] = thing
    return pixels.round().clamp(0, 255).byte().numpy()[None], relation.join(words)


def single(digits: Tensor, labels: Tensor, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Pixels (1, 16, 16) uint8 of one thing in the middle, and its words."""
    index, size, slant = int(rng.integers(len(digits))), str(rng.choice(list(SINGLE_SIZES))), rng.random() < 0.25
    side = SINGLE_SIZES[size]
    top = (SINGLE_SIDE - side) // 2
    pixels = torch.zeros(SINGLE_SIDE, SINGLE_SIDE)
    pixels[top : top + side, top : top + side] = drawn(digits[index], side, bool(slant))
    words = f"a {size}{'slanted ' if slant else ''}{int(labels[index])}"
    return pixels.round().clamp(0, 255).byte().numpy()[None], words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", type=int, default=60_000)
    parser.add_argument("--test", type=int, default=2_000)
    parser.add_argument("--single", action="store_true")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.source.is_file():
        with np.load(given.source) as arrays:
            names = [CLASSES[label] for label in arrays["y"]]
        sentences = [f"a photo of {'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names]
        (given.out / "captions.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")
        return
    mnist = Idx(str(given.source))
    counts = {"train": given.train, "test": given.test} | ({} if given.single else {"held_out": given.test})
    for seed, (name, count) in enumerate(counts.items()):
        split = mnist.train if name == "train" else mnist.test
        digits, rng = split.raw[:, 0].float(), np.random.default_rng(seed)
        how = single if given.single else functools.partial(scene, unseen=name == "held_out")
        made = [how(digits, split.labels, rng) for _ in range(count)]
        np.savez(given.out / f"{name}.npz", raw=np.stack([pixels for pixels, _ in made]))
        (given.out / f"{name}.txt").write_text("".join(f"{words}\n" for _, words in made), encoding="utf-8")


if __name__ == "__main__":
    main()
