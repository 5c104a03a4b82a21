"""Videos of a folder: what is read of each, and what is refused before it is unpacked."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scoresde.codecs import Scaling
from scoresde.data import VideoFolder
from scoresde.data.readers.video import read_video

rng = np.random.default_rng(0)


def gif(path: Path, frames: np.ndarray) -> np.ndarray:
    """A GIF of frames (T, H, W) or (T, H, W, 3), each of at most 256 colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first, *others = (Image.fromarray(frame) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=100)
    return frames


def mp4(path: Path, frames: np.ndarray, codec: str = "mpeg4") -> None:
    import av

    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode())


def test_gifs_are_read_by_class_with_stride(tmp_path: Path) -> None:
    kept = {}
    for k, name in enumerate(("left", "right")):
        for i in range(3):
            frames = gif(tmp_path / name / f"{i}.gif", rng.integers(0, 256, (7, 6, 8), dtype=np.uint8))
            kept[frames[[0, 2, 4]].tobytes()] = k
    data = VideoFolder(str(tmp_path), frames=3, stride=2, test_fraction=0.34)
    assert data.event_shape == (1, 3, 6, 8) and data.class_names == ("left", "right") and len(data.train) == 4
    assert data.train.labels is not None and data.test.labels is not None
    for split in (data.train, data.test):
        for clip, label in zip(split.raw, split.labels, strict=True):
            assert kept[clip.numpy().tobytes()] == int(label)
    assert VideoFolder(str(tmp_path), frames=7, grey=False, size=4, test_fraction=0.34).event_shape == (3, 7, 4, 4)
    assert len(VideoFolder(str(tmp_path), frames=7, codec=Scaling(levels=256)).test) == 6
    colours = rng.integers(0, 4, (7, 6, 8, 3), dtype=np.uint8) * 85  # 64 colours
    gif(tmp_path / "left" / "colours.gif", colours)
    assert VideoFolder(str(tmp_path), frames=2, test_fraction=0.34).event_shape == (3, 2, 6, 8)
    assert np.array_equal(read_video(tmp_path / "left" / "colours.gif", 7).permute(1, 2, 3, 0), colours)
    grey = VideoFolder(str(tmp_path), frames=2, grey=True, test_fraction=0.34)
    expected = np.stack([np.asarray(Image.fromarray(frame).convert("L")) for frame in colours[:2]])
    assert any(np.array_equal(clip[0], expected) for clip in torch.cat([grey.train.raw, grey.test.raw]))


def test_other_videos_are_read_by_ffmpeg(tmp_path: Path) -> None:
    """A ramp that moves, and is not much altered by a lossy codec."""
    ramp = (np.arange(32)[None, None, :, None] * 4 + np.arange(6)[:, None, None, None] * 20).repeat(16, 1).repeat(3, 3)
    mp4(tmp_path / "a.mp4", ramp.astype(np.uint8))
    found = read_video(tmp_path / "a.mp4", 3, stride=2)
    assert found.shape == (3, 3, 16, 32) and found.dtype == torch.uint8
    error = found.permute(1, 2, 3, 0).numpy().astype(int) - ramp[[0, 2, 4]]
    assert np.abs(error).mean() < 4  # of 255: the codec's own
    with pytest.raises(ValueError, match=r"a\.mp4: expected at least 9 frames, 9 with stride=1, found 6"):
        read_video(tmp_path / "a.mp4", 9)


def test_bad_videos_are_refused_by_name(tmp_path: Path) -> None:
    def refused(words: str, **options: int) -> None:
        with pytest.raises((ValueError, OSError), match=words):
            VideoFolder(str(tmp_path), **{"frames": 3, "test_fraction": 0.5, **options})

    refused("found none")
    good = gif(tmp_path / "a.gif", rng.integers(0, 256, (3, 6, 8), dtype=np.uint8))
    gif(tmp_path / "b.gif", rng.integers(0, 256, (3, 6, 6), dtype=np.uint8))
    refused(r"b\.gif: expected 8 × 6 pixels as in a\.gif, found 6 × 6\. Give size=")
    assert VideoFolder(str(tmp_path), frames=3, size=4, test_fraction=0.5).event_shape == (1, 3, 4, 4)
    gif(tmp_path / "b.gif", good[:2])
    refused(r"b\.gif: expected at least 3 frames, 3 with stride=1, found 2")
    refused("frames is a whole number", frames=0)
    content, bad = (tmp_path / "a.gif").read_bytes(), tmp_path / "b.gif"
    for other in (content[: len(content) // 2], b"x" * 100, b""):
        bad.write_bytes(other)
        refused(r"b\.gif.*(damaged or other|0 bytes|expected at least 3 frames)")
    bad.unlink()
    os.mkfifo(bad)
    refused(r"b\.gif: expected a file, found a pipe")
    bad.unlink()
    for name, other in (("b.mp4", content), ("b.mkv", b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"), ("b.avi", b"\0" * 999)):
        (tmp_path / name).write_bytes(other)
        refused(rf"{name}: expected a video, found a damaged or other file")
        (tmp_path / name).unlink()


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """Headers that promise 65,535 × 65,535 pixels, of the first frame or of a later one; nothing so large is made."""
    gif(tmp_path / "a.gif", rng.integers(0, 256, (3, 6, 8), dtype=np.uint8))
    content = bytearray((tmp_path / "a.gif").read_bytes())
    content[6:10] = b"\x00\x40\x00\x40"  # 16,384 × 16,384: 6 GB in three frames
    (tmp_path / "a.gif").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.gif: expected (a video|frames of at most 268,435,456 bytes)"):
        read_video(tmp_path / "a.gif", 3)
    content[6:10] = b"\x08\x00\x06\x00"
    last = content.rindex(b"\x2c\x00\x00\x00\x00")  # the place and size of the last frame
    content[last + 5 : last + 9] = b"\x00\x30\x00\x30"  # 12,288 × 12,288
    (tmp_path / "a.gif").write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"a\.gif: expected (a video|frames of at most 268,435,456 bytes)"):
        read_video(tmp_path / "a.gif", 3)
