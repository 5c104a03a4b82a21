import gzip
import json
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from scoresde.codecs import Scaling
from scoresde.data import (
    Arrays,
    Dataset,
    Digits,
    EpochOrder,
    Idx,
    ImageFolder,
    Split,
    suggest_sigma_max,
)
from scoresde.likelihood.ode import bits_per_dim
from scoresde.noise.rng import Rng
from scoresde.runs.kept import read_data

SHARED = Path(os.environ.get("SCORESDE_DATA", Path(__file__).parents[3] / "shared" / "data"))


def shared(name):
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; set SCORESDE_DATA to the folder that holds {name}")
    return str(path)


# Scaling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low, high", [(-1, 1), (0, 1), (-3.0, 7.0)])
@pytest.mark.parametrize("levels", [2, 17, 256, 1024])
def test_uniform_noise_costs_log2_levels_bits_whatever_the_model_range(levels, low, high):
    scaling, shape = Scaling(low, high, levels=levels), (3, 4, 4)
    log_prob = torch.tensor(-math.prod(shape) * math.log(high - low), dtype=torch.float64)  # x uniform on the range
    raw = torch.zeros(1, *shape, dtype=torch.uint8)
    bits = float(bits_per_dim(log_prob, shape, log_volume=scaling.log_volume(raw, scaling.encode(raw))))
    assert bits == pytest.approx(math.log2(levels), abs=1e-12)


@pytest.mark.parametrize("scaling", [Scaling(-2, 3, raw_low=-0.5, raw_high=4), Scaling.identity()])
def test_log_volume_of_a_continuous_scaling_is_log_det_of_its_jacobian(scaling):
    raw = torch.rand(1, 6, dtype=torch.float64) * 4
    jacobian = torch.autograd.functional.jacobian(lambda value: scaling.encode(value), raw)[0, :, 0]
    found = float(scaling.log_volume(raw, scaling.encode(raw)))
    assert found == pytest.approx(float(torch.linalg.slogdet(jacobian).logabsdet), abs=1e-12)


def test_identity_changes_nothing():
    x = torch.tensor([[-70.0, 1e-7], [3.0, 9e9]])
    scaling = Scaling.identity()
    assert torch.equal(scaling.encode(x), x) and torch.equal(scaling.decode(x), x)
    assert scaling.log_volume(x, x).tolist() == [0, 0]


@pytest.mark.parametrize("levels", [2, 17, 256, 4096])
def test_decode_inverts_encode_at_bin_centres_and_under_dequantisation(levels):
    scaling = Scaling(levels=levels)
    raw = torch.arange(levels).to(scaling.raw_dtype)[None]
    assert (
        torch.equal(scaling.decode(scaling.encode(raw)), raw) and scaling.decode(scaling.encode(raw)).dtype == raw.dtype
    )
    many = raw.expand(200, -1)
    x = scaling.encode(many, rng=Rng(0))
    # rounding to float32 moves x by up to 2^-24, that is levels · 2^-25 bins, so that share of all values may cross
    wrong = int((scaling.decode(x) != many).sum())
    assert wrong <= 4 * many.numel() * levels * 2**-24
    assert x.min() >= -1 and x.max() <= 1


def test_dequantised_values_fill_their_bins_uniformly():
    scaling, n = Scaling(levels=17), 20_000
    raw = torch.full((n, 1), 5, dtype=torch.uint8)
    u = (scaling.encode(raw, rng=Rng(1)).double() + 1) * 17 / 2 - 5
    distance = (u.flatten().sort().values - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov–Smirnov, significance 0.001
    assert float(scaling.encode(raw)[0, 0]) == pytest.approx(-1 + 2 * 5.5 / 17, abs=1e-7)


def test_per_sample_seeds_make_dequantisation_independent_of_the_batch():
    scaling, raw = Scaling(levels=256), torch.randint(256, (4, 1, 3, 3), dtype=torch.uint8)
    batch = scaling.encode(raw, rng=Rng(seeds=[3, 1, 4, 5]))
    assert torch.equal(batch[2:3], scaling.encode(raw[2:3], rng=Rng(seeds=[4])))


def test_samples_outside_the_range_decode_to_the_nearest_raw_value():
    x = torch.tensor([-5.0, -1.0, 1.0, 5.0])
    assert Scaling(levels=17).decode(x).tolist() == [0, 0, 16, 16]
    assert Scaling(raw_low=2, raw_high=4).decode(x).tolist() == [2, 2, 4, 4]
    assert Scaling(raw_low=2, raw_high=4, bounded=False).decode(x).tolist() == [-2, 2, 4, 8]


@pytest.mark.parametrize(
    "scaling, raw, error, words",
    [
        (Scaling(levels=256), torch.tensor([0.0, 255.0]), TypeError, ["float32", "max 255", "256 levels"]),
        (Scaling(levels=17), torch.tensor([0, 255], dtype=torch.uint8), ValueError, ["0 … 255", "0 … 16"]),
        (Scaling(levels=17), torch.tensor([-1, 3]), ValueError, ["-1 … 3", "0 … 16"]),
        (Scaling(levels=2), torch.tensor([True]), TypeError, ["bool"]),
        (Scaling(), torch.tensor([0, 1]), TypeError, ["int64", "levels"]),
        (Scaling(), torch.tensor([-1.0, 1.0]), ValueError, ["-1 … 1", "raw_low=0"]),
        (Scaling(), torch.tensor([0.0, math.nan]), ValueError, ["1 NaN"]),
        (Scaling.identity(), torch.tensor([math.inf]), ValueError, ["infinite"]),
    ],
)
def test_raw_values_that_do_not_fit_are_refused_by_name(scaling, raw, error, words):
    with pytest.raises(error) as caught:
        scaling.encode(raw)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("keywords", [{"low": 1, "high": 1}, {"raw_high": -1}, {"levels": 1}, {"levels": 2.5}])
def test_an_empty_range_is_refused(keywords):
    with pytest.raises(ValueError, match="got"):
        Scaling(**keywords)


def test_decode_refuses_nan_and_integers():
    with pytest.raises(ValueError, match="1 NaN"):
        Scaling(levels=4).decode(torch.tensor([0.0, math.nan]))
    with pytest.raises(TypeError, match="int64"):
        Scaling(levels=4).decode(torch.tensor([0]))


# Dataset ------------------------------------------------------------------------------------------------------------

RAW = torch.randint(17, (6, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def test_a_dataset_encodes_and_decodes_by_its_scaling():
    data = Dataset("made", Split(RAW, LABELS), Split(RAW[:2], LABELS[:2]), Scaling(levels=17), 3)
    assert data.event_shape == (1, 4, 4) and len(data.train) == 6
    assert torch.equal(data.encode(RAW, Rng(3)), data.scaling.encode(RAW, rng=Rng(3)))
    assert torch.equal(data.decode(data.encode(RAW)), RAW)


@pytest.mark.parametrize(
    "train, test, scaling, classes, error, words",
    [
        (Split(RAW[:0]), Split(RAW), Scaling(levels=17), 0, ValueError, ["train", "(0, 1, 4, 4)"]),
        (Split(RAW), Split(RAW[:0]), Scaling(levels=17), 0, ValueError, ["test", "(0, 1, 4, 4)"]),
        (Split(RAW[:, 0, 0, 0]), Split(RAW), Scaling(levels=17), 0, ValueError, ["(6,)"]),
        (Split(RAW), Split(RAW[..., :3]), Scaling(levels=17), 0, ValueError, ["(1, 4, 4)", "(1, 4, 3)"]),
        (Split(RAW), Split(RAW + 9), Scaling(levels=17), 0, ValueError, ["test", "0 … 16"]),
        (Split(RAW.double()), Split(RAW.double()), Scaling(raw_high=16), 0, TypeError, ["float64", ".float()"]),
        (Split(RAW / 0), Split(RAW / 16), Scaling(), 0, ValueError, ["train", "NaN"]),
        (Split(RAW, LABELS), Split(RAW), Scaling(levels=17), 3, ValueError, ["test", "no labels"]),
        (Split(RAW, LABELS), Split(RAW, LABELS), Scaling(levels=17), 0, ValueError, ["classes=0"]),
        (Split(RAW, LABELS), Split(RAW, LABELS), Scaling(levels=17), 2, ValueError, ["0 … 2", "0 … 1"]),
        (Split(RAW, LABELS - 1), Split(RAW, LABELS), Scaling(levels=17), 3, ValueError, ["-1 … 1"]),
        (Split(RAW, LABELS[:5]), Split(RAW, LABELS), Scaling(levels=17), 3, ValueError, ["(5,)", "(6,)"]),
        (Split(RAW, LABELS.int()), Split(RAW, LABELS), Scaling(levels=17), 3, TypeError, ["int32", "int64"]),
    ],
)
def test_a_bad_dataset_is_refused_at_construction(train, test, scaling, classes, error, words):
    with pytest.raises(error) as caught:
        Dataset("made", train, test, scaling, classes)
    assert all(word in str(caught.value) for word in ["made", *words]), caught.value


def test_digits_are_split_once_and_for_all_and_by_class():
    data, again = Digits(), Digits()
    assert data.event_shape == (1, 8, 8) and (len(data.train), len(data.test)) == (1438, 359)
    assert data.train.raw.dtype == torch.uint8 and int(data.train.raw.max()) == 16
    assert torch.equal(data.test.raw, again.test.raw) and not torch.equal(data.test.raw, Digits(seed=1).test.raw)
    total = (data.train.labels.bincount() + data.test.labels.bincount()).double()
    # each class of ~180 is cut by rounding, so its share is within half a sample of the fraction
    assert ((data.test.labels.bincount() - 0.2 * total).abs() <= 0.5).all()
    from sklearn.datasets import load_digits

    everything = torch.cat([data.train.raw, data.test.raw]).flatten(1).numpy()
    source = load_digits().data.astype(np.uint8)
    assert sorted(row.tobytes() for row in everything) == sorted(row.tobytes() for row in source)
    with pytest.raises(ValueError, match="test_fraction"):
        Digits(test_fraction=1.0)


# Order --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("n, batch", [(23, 4), (24, 4), (4, 4), (5, 1)])
def test_each_epoch_visits_every_sample_at_most_once_and_all_without_drop_last(n, batch, drop_last):
    order = EpochOrder(n, batch, seed=3, drop_last=drop_last)
    per_epoch = n // batch if drop_last else -(-n // batch)
    epochs = []
    for epoch in range(3):
        batches = []
        for _ in range(per_epoch):
            batches.append(order.next())
            assert order.epoch == epoch
        assert all(len(b) == batch for b in batches[: n // batch])
        seen = torch.cat(batches)
        assert len(seen.unique()) == len(seen) == (n // batch * batch if drop_last else n)
        epochs.append(seen)
    assert n < 5 or not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("drop_last", [True, False])
def test_resuming_at_any_step_continues_the_same_order(drop_last):
    def make(seed=7):
        return EpochOrder(23, 4, seed, drop_last)

    whole = make()
    indices = [whole.next() for _ in range(20)]
    for stop in range(20):
        first = make()
        for _ in range(stop):
            first.next()
        state = json.loads(json.dumps(first.state_dict()))
        second = make()
        second.load_state_dict(state)
        assert all(torch.equal(second.next(), expected) for expected in indices[stop:])
    assert not torch.equal(make(8).next(), indices[0])


def test_another_batch_size_continues_where_the_samples_stopped():
    first, second = EpochOrder(20, 4, 0), EpochOrder(20, 8, 0)
    seen = [first.next(), first.next(), first.next()]
    second.load_state_dict(first.state_dict())
    assert len(torch.cat([*seen, second.next()]).unique()) == 20


def test_order_refuses_a_batch_that_cannot_be_filled_and_a_foreign_state():
    with pytest.raises(ValueError, match=r"3 samples, fewer than trainer.batch_size=8.*at most 3"):
        EpochOrder(3, 8, 0)
    with pytest.raises(ValueError, match="n=23 samples with seed=0"):
        EpochOrder(22, 4, 0).load_state_dict(EpochOrder(23, 4, 0).state_dict())
    with pytest.raises(ValueError, match="position"):
        EpochOrder(3, 1, 0).load_state_dict({"epoch": 0, "position": 9, "n": 3, "seed": 0})


# IDX ----------------------------------------------------------------------------------------------------------------


def idx_bytes(values):
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 7), ("t10k", 3)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(rng.integers(0, 256, (n, 5, 4))))
        labels = gzip.compress(idx_bytes(np.arange(n)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(labels)
    return tmp_path


def test_idx_reads_what_was_written_raw_or_gzip(idx_folder):
    data = Idx(str(idx_folder))
    assert data.event_shape == (1, 5, 4) and data.classes == 7 and data.test.labels.tolist() == [0, 1, 2]
    values = np.random.default_rng(0).integers(0, 256, (7, 5, 4))
    assert torch.equal(data.train.raw[:, 0].long(), torch.from_numpy(values))
    assert Idx(str(idx_folder), labels=False).train.labels is None


GOOD = idx_bytes(np.zeros((7, 5, 4)))


@pytest.mark.parametrize(
    "content, words",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ["Git-LFS", "git lfs pull"]),
        (b"", ["0 bytes"]),
        (b"\x89PNG\r\n", ["not an IDX file", "00 00 08 03", "89 50 4e 47"]),
        (b"\x00\x00\x0d\x03" + GOOD[4:], ["0x08", "0x0d (float32)"]),
        (b"\x00\x00\x08\x01" + GOOD[4:], ["3 dimensions", "found 1"]),
        (GOOD[:9], ["12 bytes of sizes", "found 5"]),
        (GOOD[:-1], ["truncated", "(7, 5, 4)", "140", "139"]),
        (GOOD + b"\x00", ["too long", "140"]),
        (gzip.compress(GOOD)[:-9], ["gzip", "truncated"]),
        (gzip.compress(np.random.default_rng(0).bytes(200))[:60] + b"x" * 40, ["train-images"]),
        (idx_bytes(np.zeros((0, 5, 4))), ["(0, 5, 4)"]),
        (idx_bytes(np.zeros((6, 5, 4))), ["7 labels, expected 6"]),
    ],
    ids=[
        "pointer", "empty", "picture", "float32", "one dimension", "no sizes", "cut", "too long", "cut gzip",
        "damaged gzip", "no images", "labels without images",
    ],
)  # fmt: skip
def test_a_bad_idx_file_is_refused_with_path_expected_and_found(idx_folder, content, words):
    (idx_folder / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        Idx(str(idx_folder))
    assert all(word in str(caught.value) for word in [str(idx_folder), *words]), caught.value


def test_missing_idx_files_are_named(idx_folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Idx(str(idx_folder / "nowhere"))
    (idx_folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="expected t10k-images-idx3-ubyte"):
        Idx(str(idx_folder))
    with pytest.raises(ValueError, match="expected a folder, found a file"):
        Idx(str(idx_folder / "train-images-idx3-ubyte"))


def test_mnist():
    data = Idx(shared("mnist"))
    assert (len(data.train), len(data.test), data.event_shape, data.classes) == (60_000, 10_000, (1, 28, 28), 10)
    # known of MNIST: mean 0.1307 and standard deviation 0.3081 of the training pixels in [0, 1]
    pixels = data.train.raw.double() / 255
    assert float(pixels.mean()) == pytest.approx(0.1307, abs=5e-5)
    assert float(pixels.std()) == pytest.approx(0.3081, abs=5e-5)


# Arrays -------------------------------------------------------------------------------------------------------------


def save(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


BYTES = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
FLOATS = np.random.default_rng(2).uniform(-2, 2, (20, 5))


def test_arrays_turn_channels_and_keep_every_sample_once(tmp_path):
    path = save(tmp_path / "images.npz", x=BYTES, y=np.arange(20) % 2)
    data = Arrays(path, key="x", label_key="y", channels_last=True, test_fraction=0.2)
    assert data.event_shape == (3, 8, 8) and data.classes == 2 and (len(data.train), len(data.test)) == (16, 4)
    found = {image.numpy().transpose(1, 2, 0).tobytes() for image in torch.cat([data.train.raw, data.test.raw])}
    assert found == {image.tobytes() for image in BYTES}
    assert torch.equal(data.test.labels.bincount(), torch.tensor([2, 2]))


def test_arrays_read_floats_in_their_range_and_a_test_file(tmp_path):
    np.save(tmp_path / "a.npy", FLOATS)
    np.save(tmp_path / "b.npy", FLOATS[:3].astype(">f4"))
    data = Arrays(str(tmp_path / "a.npy"), test_path=str(tmp_path / "b.npy"), raw_low=-2, raw_high=2)
    assert torch.equal(data.train.raw, torch.from_numpy(FLOATS).float()) and len(data.test) == 3
    assert torch.allclose(data.encode(data.train.raw), data.train.raw / 2, atol=1e-6)


def test_arrays_read_other_integers_with_levels_and_images_without_a_channel(tmp_path):
    path = save(tmp_path / "deep.npz", x=BYTES[..., 0].astype(np.uint16) * 257)
    data = Arrays(path, levels=65536, add_channel=True)
    assert data.event_shape == (1, 8, 8) and torch.equal(data.decode(data.encode(data.test.raw)).long(), data.test.raw)


@pytest.mark.parametrize(
    "shape, asked",
    [((28, 28), True), ((5, 40), True), ((40, 5), True), ((5, 41), False), ((4, 8), False), ((1, 100), False),
     ((100, 3), False), ((3, 8, 8), False), ((12,), False)],
)  # fmt: skip
def test_what_may_be_pictures_or_signals_is_asked(tmp_path, shape, asked):
    """An old run's configuration, which has no answer, is not asked."""
    path = save(tmp_path / "x.npz", x=np.random.default_rng(0).integers(0, 256, (10, *shape), np.uint8))
    if asked:
        with pytest.raises(ValueError, match=rf"or signals of {shape[0]} channels.*add_channel.*signals=True"):
            Arrays(path)
        assert Arrays(path, add_channel=True).event_shape == (1, *shape)
        node = {"_target_": "scoresde.data.Arrays", "path": path, "add_channel": False}
        assert read_data(tmp_path, {"data": node}).event_shape == shape
        assert Arrays(path, codec=Scaling(levels=256)).event_shape == shape  # a run knows what it is
    assert Arrays(path, signals=True).event_shape == Arrays(path, signals=asked).event_shape == shape


HALF = BYTES // 16  # 0 … 15 declared as 256 levels


@pytest.mark.parametrize(
    "arrays, keywords, error, words",
    [
        ({"x": BYTES, "y": BYTES}, {}, ValueError, ["x, y", "key="]),
        ({"x": BYTES}, {"key": "z", "channels_last": True}, ValueError, ["'z'", "found x"]),
        ({"x": BYTES}, {}, ValueError, ["(8, 8, 3)", "channels_last=True"]),
        ({"x": BYTES.transpose(0, 3, 1, 2)}, {"channels_last": True}, ValueError, ["(3, 8, 8)", "already"]),
        ({"x": BYTES.astype(np.int64)}, {"channels_last": True}, ValueError, ["levels", "0 … 255"]),
        ({"x": BYTES.astype(np.float32)}, {"channels_last": True}, ValueError, ["raw_low", "0 … 255"]),
        ({"x": BYTES.astype(np.float32)}, {"channels_last": True, "levels": 256}, TypeError, ["levels=256"]),
        (
            {"x": BYTES.astype(np.float32)},
            {"channels_last": True, "raw_low": 0, "raw_high": 1},
            ValueError,
            ["0 … 255", "raw_high=1"],
        ),
        ({"x": BYTES / 255}, {"channels_last": True, "raw_low": -1, "raw_high": 1}, ValueError, ["one half"]),
        ({"x": HALF}, {"channels_last": True}, ValueError, ["0 … 15", "0 … 255", "levels"]),
        ({"x": BYTES}, {"channels_last": True, "raw_low": 0, "raw_high": 1}, ValueError, ["levels"]),
        ({"x": FLOATS * np.nan}, {"raw_low": 0, "raw_high": 1}, ValueError, ["100 NaN", "of 100"]),
        ({"x": FLOATS[0]}, {"raw_low": -2, "raw_high": 2}, ValueError, ["(N, *event)", "(5,)"]),
        ({"x": FLOATS[:0]}, {"raw_low": -2, "raw_high": 2}, ValueError, ["(0, 5)"]),
        ({"x": FLOATS > 0}, {}, TypeError, ["bool", "levels=2"]),
        ({"x": FLOATS * 1j}, {}, TypeError, ["complex128"]),
        ({"x": np.array([[None, 1]])}, {}, TypeError, ["object"]),
        (
            {"x": BYTES, "y": np.arange(19)},
            {"key": "x", "label_key": "y", "channels_last": True},
            ValueError,
            ["(20,)"],
        ),
        (
            {"x": BYTES, "y": np.zeros(20)},
            {"key": "x", "label_key": "y", "channels_last": True},
            ValueError,
            ["float64"],
        ),
        (
            {"x": BYTES, "y": np.arange(20) - 1},
            {"key": "x", "label_key": "y", "channels_last": True},
            ValueError,
            ["-1"],
        ),
        ({"x": BYTES}, {"channels_last": True, "test_fraction": 0.01}, ValueError, ["20 samples", "0 to test"]),
    ],
)
def test_bad_arrays_are_refused(tmp_path, arrays, keywords, error, words):
    path = save(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error) as caught:
        Arrays(path, **keywords)
    named = [] if "test_fraction" in keywords else [path]
    assert all(word in str(caught.value) for word in [*named, *words]), caught.value


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda content: content[: len(content) // 2], ["damaged"]),
        (lambda content: content[:300] + bytes(200) + content[500:], ["damaged"]),
        (lambda content: b"nothing of the kind", ["damaged"]),
        (lambda content: b"", ["0 bytes"]),
        (lambda content: b"version https://git-lfs.github.com/spec/v1\n", ["git lfs pull"]),
    ],
)
def test_a_damaged_array_file_is_refused(tmp_path, damage, words):
    path = tmp_path / "images.npz"
    np.savez_compressed(path, x=BYTES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError) as caught:
        Arrays(str(path), channels_last=True)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_cifar10():
    path = shared("cifar10_4000/images.npz")
    data = Arrays(path, key="x", label_key="y", channels_last=True)
    assert data.event_shape == (3, 32, 32) and data.classes == 10 and len(data.train) + len(data.test) == 4000
    with pytest.raises(ValueError, match="channels_last=True"):
        Arrays(path, key="x", label_key="y")
    # known of CIFAR-10: channel means 0.491, 0.482, 0.447 (of all 50,000; an image's mean spreads by about 0.12)
    means = data.train.raw.double().mean((0, 2, 3)) / 255
    assert (means - torch.tensor([0.4914, 0.4822, 0.4465])).abs().max() < 4 * 0.13 / math.sqrt(3600)


# Image folders ------------------------------------------------------------------------------------------------------


def picture(path, mode="RGB", size=(6, 4), value=0):
    from PIL import Image

    path.parent.mkdir(exist_ok=True)
    rng = np.random.default_rng(value)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels, mode=None).save(path)
    return pixels


def test_image_folder_reads_pixels_and_labels_from_sub_folders(tmp_path):
    pixels = {}
    for k, name in enumerate(("cat", "dog")):
        for i in range(5):
            image = picture(tmp_path / name / f"{i}.png", value=10 * k + i)
            pixels[image.transpose(2, 0, 1).tobytes()] = k
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("not an image")
    data = ImageFolder(str(tmp_path), test_fraction=0.2)
    assert data.event_shape == (3, 4, 6) and data.classes == 2 and (len(data.train), len(data.test)) == (8, 2)
    for split in (data.train, data.test):
        for image, label in zip(split.raw, split.labels, strict=True):
            assert pixels[image.numpy().tobytes()] == int(label)


def test_image_folder_cuts_the_central_square_and_makes_grey(tmp_path):
    for i in range(4):
        pixels = picture(tmp_path / f"{i}.png", "L", size=(7, 5), value=i)
    data = ImageFolder(str(tmp_path), size=5, grey=True, test_fraction=0.25)
    everything = torch.cat([data.train.raw, data.test.raw])
    assert data.event_shape == (1, 5, 5) and data.train.labels is None and data.classes == 0
    assert any(torch.equal(image[0], torch.from_numpy(pixels[:, 1:6].copy())) for image in everything)


def test_bad_image_folders_are_refused(tmp_path):
    def refused(*words, **keywords):
        with pytest.raises(ValueError) as caught:
            ImageFolder(str(tmp_path), test_fraction=0.5, **keywords)
        assert all(word in str(caught.value) for word in words), caught.value

    refused(str(tmp_path), "found none")
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", size=(6, 5))
    refused("b.png", "6 × 4 pixels as in a.png", "6 × 5", "size=")
    assert ImageFolder(str(tmp_path), size=4, test_fraction=0.5).event_shape == (3, 4, 4)
    picture(tmp_path / "b.png", "L")
    refused("b.png", "RGB", "mode L", "grey=True")
    picture(tmp_path / "b.png", "RGBA")
    refused("b.png", "RGBA with transparency")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    refused("b.png", "damaged")
    (tmp_path / "b.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused("b.png", "git lfs pull")
    (tmp_path / "b.png").unlink()
    refused("1 samples", "both must be at least 1")
    picture(tmp_path / "class" / "c.png")
    refused("in the folder itself", "class/")
    with pytest.raises(ValueError, match="got 0"):
        ImageFolder(str(tmp_path), size=0)


# sigma_max ----------------------------------------------------------------------------------------------------------


def test_sigma_max_is_the_diameter_of_the_data():
    corners = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [0.5, 0.5, 0.5], [0.0, 1.0, 0.0]])
    assert suggest_sigma_max(corners) == pytest.approx(3.0, abs=1e-12)
    # on the unit sphere in high dimension two points are √2 apart, up to √(1/D)
    x = Rng(0).normal((300, 1, 40, 40), dtype=torch.float64)
    x = x / x.flatten(1).norm(dim=1)[:, None, None, None]
    assert suggest_sigma_max(x, sample=200, rng=Rng(1)) == pytest.approx(math.sqrt(2), abs=5 / 40)
    assert suggest_sigma_max(x, sample=50, rng=Rng(1)) <= suggest_sigma_max(x, sample=300, rng=Rng(1))


@pytest.mark.parametrize(
    "data, error, words",
    [
        (torch.zeros(5, 2), ValueError, "equal"),
        (torch.zeros(1, 2), ValueError, "N ≥ 2"),
        (torch.tensor([[0.0], [math.nan]]), ValueError, "NaN"),
        (torch.zeros(5, 2, dtype=torch.uint8), TypeError, "encode"),
    ],
)
def test_sigma_max_refuses_what_has_no_diameter(data, error, words):
    with pytest.raises(error, match=words):
        suggest_sigma_max(data)
