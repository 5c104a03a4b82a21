"""Folders of sound: right values of every kind of WAV, and clean refusals of what is damaged."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import command
from scipy.io import wavfile
from scipy.signal import resample_poly

from scoresde.codecs import Scaling
from scoresde.data import SoundFolder
from scoresde.data.readers.sound import read_header

RATE = 8000


def noise(frames: int, seed: int = 0, channels: int = 1) -> np.ndarray:
    """int16 (frames,) or (frames, channels)."""
    values = np.random.default_rng(seed).integers(-32768, 32768, (frames, channels)).astype(np.int16)
    return values[:, 0] if channels == 1 else values


def folder_of(where: Path, sounds: dict[str, np.ndarray], rate: int = RATE) -> Path:
    for name, values in sounds.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(where / name, rate, values)
    return where


def classes(where: Path, frames: int = 128, **more: np.ndarray) -> Path:
    """Ten recordings of cats and ten of dogs."""
    files = {f"{name}/{k}.wav": noise(frames, k + 10 * at) for at, name in enumerate(("cat", "dog")) for k in range(10)}
    return folder_of(where, files | {f"{name}/x.wav": values for name, values in more.items()})


def wav_of(form: bytes, data: bytes, *, between: bytes = b"") -> bytes:
    """A WAV file of a format chunk and a data chunk."""
    chunks = [(b"fmt ", form), *([(b"LIST", between)] if between else []), (b"data", data)]
    body = b"".join(name + struct.pack("<I", len(part)) + part + b"\0" * (len(part) % 2) for name, part in chunks)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body


def form_of(kind: int = 1, channels: int = 1, rate: int = RATE, bits: int = 16) -> bytes:
    block = channels * bits // 8
    return struct.pack("<HHIIHH", kind, channels, rate, rate * block, block, bits)


def test_sixteen_bits_stay_integers_and_come_back(tmp_path: Path) -> None:
    data = SoundFolder(str(classes(tmp_path / "pets")), length=128, bands=16)
    assert (data.class_names, data.classes, data.rate) == (("cat", "dog"), 2, RATE)
    assert data.train.raw.dtype == torch.int16 and data.raw_shape == (1, 128) and data.event_shape == (16, 8)
    everything = torch.cat([data.train.raw, data.test.raw])
    expected = {(at, noise(128, k + 10 * at).tobytes()) for at in range(2) for k in range(10)}
    labels = torch.cat([split.labels for split in (data.train, data.test) if split.labels is not None])
    assert {(int(y), x.numpy().tobytes()) for x, y in zip(everything, labels, strict=True)} == expected
    assert torch.equal(data.decode(data.encode(everything)), everything)


def test_the_waveform_itself_has_a_volume_of_one_over_the_bins(tmp_path: Path) -> None:
    data = SoundFolder(str(classes(tmp_path / "pets")), length=128, bands=0)
    assert data.codec == Scaling(levels=65536, offset=-32768) and data.event_shape == (1, 128)
    x = data.encode(data.test.raw)
    assert data.codec.log_volume(data.test.raw, x).tolist() == pytest.approx([128 * np.log(2 / 65536)] * len(x))


@pytest.mark.parametrize(
    "stored", ["uint8", "int16", "int24", "int32", "float32", "float64", "extensible 16", "extensible 24"]
)
def test_every_kind_of_numbers_is_read_as_it_was_meant(tmp_path: Path, stored: str) -> None:
    values = noise(64, channels=2)
    bits = int(stored.lstrip("abcdefghijklmnopqrstuvwxyz "))
    wide = values.astype(np.int64) * 2 ** max(bits - 16, 0)
    if stored == "uint8":
        data, expected = (values // 256 + 128).astype("u1").tobytes(), (values // 256 + 128).astype("u1")
    elif "float" in stored:
        data, expected = (values / 32768).astype(f"<f{bits // 8}").tobytes(), values / 32768
    else:
        data = b"".join(int(v).to_bytes(bits // 8, "little", signed=True) for v in wide.ravel())
        expected = values if bits == 16 else values / 32768
    form = form_of(3 if "float" in stored else 1, 2, RATE, bits)
    if stored.startswith("extensible"):
        guid = b"\1\0\0\0\0\0\x10\0\x80\0\0\xaa\0\x38\x9b\x71"
        form = struct.pack("<H", 0xFFFE) + form[2:] + struct.pack("<HHI", 22, bits, 3) + guid
    (tmp_path / "x.wav").write_bytes(wav_of(form, data, between=b"odd"))
    found = read_header(tmp_path / "x.wav").read(1000)
    assert found.dtype == (np.uint8 if bits == 8 else np.int16 if bits == 16 else np.float32)
    assert np.array_equal(found, expected.T.astype(found.dtype))


def test_other_rates_are_resampled_as_whole_recordings_are(tmp_path: Path) -> None:
    long = (noise(6000, 3) / 2).astype(np.int16)
    folder = folder_of(tmp_path / "a", {"a.wav": long, "b.wav": noise(6000, 4)}, 11025)
    folder_of(folder, {"c.wav": noise(200, 5)}, RATE)
    with pytest.raises(ValueError, match=r"c\.wav: expected 11025 Hz as in a\.wav, found 8000\. Give rate=11025"):
        SoundFolder(str(folder), length=64)
    data = SoundFolder(str(folder), length=128, rate=RATE, bands=0, test_fraction=0.4)
    assert data.notes == "Of 3 recordings 2 are resampled from 11025 to 8000 Hz, 3 are cut at 128 frames."
    whole = resample_poly(long / np.float32(32768), 320, 441)[:128].astype(np.float32)
    raw = torch.cat([data.train.raw, data.test.raw])
    assert raw.dtype == torch.float32 and data.rate == RATE
    # the part that is read reaches beyond the filter, so that the same numbers are added up
    assert min(float((x[0] - torch.from_numpy(whole)).abs().max()) for x in raw) < 1e-6


def test_channels_are_kept_or_mixed(tmp_path: Path) -> None:
    stereo = noise(64, 1, channels=2)
    folder = folder_of(tmp_path / "a", {"a.wav": stereo, "b.wav": stereo[::-1].copy()})
    assert SoundFolder(str(folder), length=64, bands=0, test_fraction=0.5).raw_shape == (2, 64)
    mixed = SoundFolder(str(folder), length=64, bands=0, channels=1, test_fraction=0.5)
    found = torch.cat([mixed.train.raw, mixed.test.raw])
    mean = torch.from_numpy(stereo.astype(np.float32).mean(1) / 32768)
    assert mixed.raw_shape == (1, 64) and any(torch.allclose(x[0], mean, atol=1e-7) for x in found)
    folder_of(folder, {"c.wav": noise(64)})
    with pytest.raises(ValueError, match=r"c\.wav: expected 2 channels as in a\.wav, found 1\. Give channels=1"):
        SoundFolder(str(folder), length=64)


def test_short_recordings_are_refused_or_padded(tmp_path: Path) -> None:
    folder = classes(tmp_path / "pets", cat=noise(100))
    with pytest.raises(ValueError, match=r"cat/x\.wav: expected 128 frames at 8000 Hz, found 100\..*pad=true"):
        SoundFolder(str(folder), length=128, bands=16)
    data = SoundFolder(str(folder), length=128, bands=16, pad=True)
    padded = torch.from_numpy(np.pad(noise(100), (0, 28)))
    assert any(torch.equal(x[0], padded) for x in torch.cat([data.train.raw, data.test.raw]))


def test_folders_for_training_and_testing_are_the_splits(tmp_path: Path) -> None:
    classes(tmp_path / "train"), classes(tmp_path / "test")
    data = SoundFolder(str(tmp_path), length=128, bands=16)
    assert (len(data.train), len(data.test)) == (20, 20) and data.class_names == ("cat", "dog")
    assert len(data.checksums) == 40 and "test/cat/0.wav" in data.checksums


BAD = {
    "other": (b"OggS" + bytes(60), "expected a WAV file.*found one that begins with b'OggS"),
    "mu-law": (wav_of(form_of(7, bits=8), bytes(64)), "uncompressed sound.*found MULAW of 8 bits.*ffmpeg"),
    "adpcm": (wav_of(form_of(2, bits=4), bytes(64)), "found ADPCM of 4 bits"),
    "unknown": (wav_of(form_of(0x7777), bytes(64)), "found format 0x7777"),
    "cut": (wav_of(form_of(), bytes(4000))[:2000], "expected 4,044 bytes.*found 2,000. It is cut off"),
    "claims": (
        wav_of(form_of(), bytes(64)).replace(b"data" + struct.pack("<I", 64), b"data" + b"\xff" * 4),
        "b'data' of 4,294,967,295 bytes at byte 36, where 64 are left",
    ),
    "empty": (wav_of(form_of(), b""), r"expected sound, found none \(0 frames\)"),
    "nan": (wav_of(form_of(3, bits=32), np.float32([0, np.nan] * 64).tobytes()), "found values up to nan"),
    "wide": (wav_of(form_of(3, bits=32), np.float32([30000] * 64).tobytes()), "found values up to 3e.04. Divide"),
    "rate 0": (wav_of(form_of(rate=0), bytes(256)), "at 0 Hz"),
    "rate": (wav_of(form_of(rate=2_000_000_000 // 4), bytes(256)), "1 to 768,000 Hz, found .* at 500000000 Hz"),
    "no channel": (wav_of(form_of(channels=0), bytes(256)), "found 0 channels"),
    "half a frame": (wav_of(form_of(channels=2), bytes(258)), "258 bytes"),
    "no data": (wav_of(form_of(), bytes(256)).replace(b"data", b"date"), "no b'data'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_sound_is_refused(tmp_path: Path, name: str) -> None:
    content, said = BAD[name]
    (tmp_path / "x.wav").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.wav.*" + said):
        SoundFolder(str(tmp_path), length=32, rate=16000, bands=0)


def test_pipes_and_other_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(ValueError, match="a pipe or a device"):
        SoundFolder(str(tmp_path), length=32)
    (tmp_path / "x.wav").rename(tmp_path / "x.midi")
    with pytest.raises(ValueError, match=r"expected WAV files \(.wav, .wave\) in it"):
        SoundFolder(str(tmp_path), length=32)


def test_kinds_of_numbers_are_not_mixed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "a", {"a.wav": noise(64), "b.wav": np.zeros(64, np.float32)})
    with pytest.raises(ValueError, match=r"b\.wav: expected integers of 16 bits as in a\.wav, found floats of 32 bits"):
        SoundFolder(str(folder), length=64)


def test_damaged_files_are_refused_or_read_right(tmp_path: Path) -> None:
    """Every flip of one bit of the header, every place to cut, and bytes of chance: the values are those that were
    written, or there is a ValueError."""
    good = wav_of(form_of(), noise(200).tobytes(), between=b"INFOISFT\4\0\0\0abc\0")
    path, chance = tmp_path / "x.wav", random.Random(0)
    header = len(good) - 400
    bad = [good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :] for at in range(header) for bit in range(8)]
    bad += [good[:size] for size in range(1, len(good), 9)]
    for _ in range(150):
        content = bytearray(good)
        for _ in range(chance.randint(2, 5)):
            content[chance.randrange(header)] = chance.randrange(256)
        bad.append(bytes(content))
    read = 0
    for content in bad:
        path.write_bytes(content)
        try:
            wav = read_header(path)
            found = wav.read(1000)
        except ValueError as error:
            assert str(path) in str(error)
            continue
        read += 1
        assert (wav.rate, found.tobytes()) == (RATE, noise(200).tobytes())
    assert 0 < read < len(bad) / 4  # flips inside what is skipped do no harm


def test_a_run_writes_sound_and_keeps_its_rate(tmp_path: Path) -> None:
    folder, other = classes(tmp_path / "pets"), folder_of(tmp_path / "other", {"cat/a.wav": noise(128)}, 11025)
    words = (
        "data=sound", f"data.path={folder}", "data.length=128", "data.bands=16", "network=unet1d", "network.width=8",
        "conditional=true", "trainer.images=16", "trainer.batch_size=16", "evaluate_at_end=false", "logger=jsonl",
        "threads=1",
    )  # fmt: skip
    done = command("train", *words, "out=run", cwd=tmp_path)
    assert done.code == 0, done.err
    folder.rename(tmp_path / "gone")
    done = command("sample", "run=run", "n=3", "sampler.steps=2", "out=drawn", cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "drawn" / "spectrograms.png").is_file()
    with np.load(tmp_path / "drawn" / "samples.npz") as arrays:
        expected = arrays["multistep"]
    for k, name in enumerate(("000-cat", "001-dog", "002-cat")):
        wav = read_header(tmp_path / "drawn" / "samples" / f"{name}.wav")
        assert wav.rate == RATE and np.array_equal(wav.read(1000), expected[k])
    data = ("data=sound", f"data.path={other}", "data.length=128")
    done = command("likelihood", "run=run", *data, "out=likelihood", cwd=tmp_path)
    assert (
        done.code == 1 and "other is sound at 11025 Hz" in done.err and "trained at 8000 Hz: data.rate=8000" in done.err
    )
