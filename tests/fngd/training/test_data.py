"""Data sets in their standard layouts: what is read, and what is said when it is not there."""

from __future__ import annotations

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fngd.training.data import DataError, augment, load


def write_cifar(folder: Path, text: type = str, count: int = 4) -> None:
    inside = folder / "cifar-10-batches-py"
    inside.mkdir(parents=True)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    for number, name in enumerate(names):
        pixels = np.full((count, 3072), number * 10, np.uint8)
        pixels[:, :1024] += np.arange(1024, dtype=np.uint8) % 7
        key = (lambda word: word) if text is str else (lambda word: word.encode())
        content = {key("data"): pixels, key("labels"): [number % 10] * count, key("filenames"): ["x"] * count}
        (inside / name).write_bytes(pickle.dumps(content, protocol=2))


def write_cifar100(folder: Path) -> Path:
    inside = folder / "cifar-100-python"
    inside.mkdir(parents=True)
    for name, count in (("train", 6), ("test", 3)):
        pixels = np.tile(np.arange(3072, dtype=np.uint16).astype(np.uint8), (count, 1))
        fine = [99 - number for number in range(count)]
        content = {"data": pixels, "fine_labels": fine, "coarse_labels": [0] * count, "filenames": ["x"] * count}
        (inside / name).write_bytes(pickle.dumps(content, protocol=2))
    return inside


def test_cifar100_has_its_fine_labels(tmp_path: Path) -> None:
    inside = write_cifar100(tmp_path)
    found = load("cifar100", tmp_path)
    assert found.classes == 100
    assert load("digits").classes == 10
    assert found.train.images.shape == (6, 3, 32, 32)
    assert found.test.labels.tolist() == [99, 98, 97]
    content = {"data": np.zeros((1, 3072), np.uint8), "labels": [0]}
    (inside / "test").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=r"is no CIFAR-100 file, a dict with 'data' .* and 'fine_labels'"):
        load("cifar100", tmp_path)
    (inside / "test").unlink()
    with pytest.raises(DataError, match=r"looked for the file .*test"):
        load("cifar100", tmp_path)
    with pytest.raises(DataError, match="looked for the folder cifar-100-python"):
        load("cifar100", tmp_path / "cifar-100-python")


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion(folder: Path, zipped: bool = False) -> Path:
    inside = folder / "FashionMNIST" / "raw"
    inside.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("t10k", 3)):
        images = random.integers(0, 255, (count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8)
        for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", labels)):
            if zipped:
                (inside / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (inside / name).write_bytes(idx(array))
    return inside


def test_digits_are_normalised_and_always_the_same() -> None:
    first, second = load("digits"), load("digits")
    assert first.train.images.shape == (1437, 1, 8, 8)
    assert first.test.images.shape == (360, 1, 8, 8)
    assert (first.size, first.channels) == (8, 1)
    assert torch.equal(first.test.images, second.test.images)
    assert first.train.images.mean().abs() < 1e-5
    assert (first.train.images.std() - 1).abs() < 1e-3
    assert first.train.labels.bincount().min() > 100
    assert len(load("digits", train_size=50).train.labels) == 50


@pytest.mark.parametrize("text", [str, bytes])
def test_cifar10(tmp_path: Path, text: type) -> None:
    write_cifar(tmp_path, text)
    dataset = load("cifar10", tmp_path)
    assert dataset.train.images.shape == (20, 3, 32, 32)
    assert dataset.test.images.shape == (4, 3, 32, 32)
    assert dataset.train.labels.tolist() == [label for label in range(5) for _ in range(4)]
    means = dataset.train.images.mean((0, 2, 3))
    torch.testing.assert_close(means, torch.zeros(3), atol=1e-4, rtol=0)
    # channels first, rows before columns
    red = dataset.train.images[0, 0]
    assert red[0, 1] > red[0, 0]
    assert torch.equal(red.flatten().unique(), red[0].unique())


@pytest.mark.parametrize("zipped", [False, True])
def test_fashion_mnist(tmp_path: Path, zipped: bool) -> None:
    write_fashion(tmp_path, zipped)
    dataset = load("fashion-mnist", tmp_path)
    assert dataset.train.images.shape == (6, 1, 28, 28)
    assert dataset.test.labels.tolist() == [0, 1, 2]


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("evil"),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(pickle.dumps({"data": Evil(), "labels": [1]}))
    with pytest.raises(DataError, match=r"data_batch_3 is no CIFAR-10 batch.*does not belong in a data file"):
        load("cifar10", tmp_path)
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["cifar10", "fashion-mnist"])
def test_a_missing_folder_says_what_was_looked_for_where(tmp_path: Path, name: str) -> None:
    inside = {"cifar10": "cifar-10-batches-py", "fashion-mnist": "FashionMNIST/raw"}[name]
    with pytest.raises(DataError, match=f"{name} needs --data-dir, the folder that contains {inside}"):
        load(name)
    with pytest.raises(DataError, match=f"looked for the folder {inside} in .*nowhere, which does not exist"):
        load(name, tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"which contains \['other'\]\. Give the folder above it"):
        load(name, tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(DataError, match=r"looked for the file .*test_batch \(or test_batch.gz\), which does not exist"):
        load("cifar10", tmp_path)
    for content in (b"no pickle", pickle.dumps([1, 2]), pickle.dumps({"data": np.zeros((2, 5))})):
        (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
        with pytest.raises(DataError, match="test_batch is no CIFAR-10 batch"):
            load("cifar10", tmp_path)
    wrong = {"data": np.zeros((2, 3072), np.uint8), "labels": [1]}
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(wrong))
    with pytest.raises(DataError, match="test_batch: 2 images and 1 labels"):
        load("cifar10", tmp_path)

    inside = write_fashion(tmp_path)
    path = inside / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    for content, message in (
        (whole[:-5], "announces .* bytes, but holds"),
        (b"\x00\x00\x09\x03" + whole[4:], "is no IDX file of 3 dimensions: it begins with 00 00 09 03"),
        (b"", "begins with nothing"),
        (idx(np.zeros((2, 28, 28), np.uint8)), "2 images and 6 labels"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            load("fashion-mnist", tmp_path)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="cannot be read"):
        load("fashion-mnist", tmp_path)


def test_sizes_and_names() -> None:
    with pytest.raises(DataError, match="asked for 5000 training images; digits has 1 … 1437"):
        load("digits", train_size=5000)
    with pytest.raises(ValueError, match="'mnist' is unknown; choose one of"):
        load("mnist")


def test_augmentation_shifts_and_flips() -> None:
    image = torch.arange(1.0, 65.0).view(1, 1, 8, 8)
    images = augment(image.expand(200, 2, 8, 8), torch.Generator().manual_seed(0))
    assert images.shape == (200, 2, 8, 8)
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4))[0, 0]
    windows = [padded[r : r + 8, c : c + 8] for r in range(9) for c in range(9)]
    allowed = {tuple(w.flatten().tolist()) for w in windows + [w.flip(1) for w in windows]}
    seen = {tuple(result[0].flatten().tolist()) for result in images}
    assert seen <= allowed
    assert len(seen) > 60
    assert torch.equal(images[:, 0], images[:, 1]), "all channels move together"
