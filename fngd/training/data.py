"""Image data sets for `python -m fngd compare`, read from their standard files; nothing is downloaded.

| name            | files looked for below `--data-dir`                                  | images          |
| --------------- | -------------------------------------------------------------------- | --------------- |
| `digits`        | none: scikit-learn's bundled digits, four fifths for training        | 1 × 8 × 8       |
| `cifar10`       | `cifar-10-batches-py/data_batch_1` … `_5`, `test_batch` (pickles)    | 3 × 32 × 32     |
| `cifar100`      | `cifar-100-python/train`, `test` (pickles; the 100 fine labels)      | 3 × 32 × 32     |
| `fashion-mnist` | `FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]` | 1 × 28 × 28     |
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

CLASSES = {"digits": 10, "cifar10": 10, "cifar100": 100, "fashion-mnist": 10}
"""Labels of each data set."""


class DataError(ValueError):
    """A data set is missing or broken; the message says what was looked for, and where."""


@dataclass(frozen=True)
class Split:
    """Images, normalised per channel by the training set's mean and standard deviation, and labels."""

    images: Float[Tensor, "samples channels height width"]
    labels: Int[Tensor, " samples"]

    def to(self, device: torch.device | str) -> Split:
        """Returns the same on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """A training and a test split."""

    train: Split
    test: Split
    classes: int = 10

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1]

    @property
    def size(self) -> int:
        """Height, and width, of an image in pixels."""
        return self.train.images.shape[2]


def load(name: str, data_dir: str | Path | None = None, *, train_size: int | None = None) -> Dataset:
    """Returns a data set with normalised images.

    Arguments:
        name: one of `DATASETS`.
        data_dir: the folder in which its files lie; not used for digits.
        train_size: how many training images to keep, the first ones; default all.

    Raises:
        DataError: a file is missing or broken, or there are fewer than train_size training images.
        ValueError: an unknown name.

    >>> load("digits").train.images.shape
    torch.Size([1437, 1, 8, 8])
    """
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; choose one of {list(DATASETS)}")
    train_images, train_labels, test_images, test_labels = DATASETS[name](data_dir)
    if train_size is not None:
        if not 1 <= train_size <= len(train_images):
            raise DataError(f"asked for {train_size} training images; {name} has 1 … {len(train_images)}")
        train_images, train_labels = train_images[:train_size], train_labels[:train_size]
    train, test = (torch.from_numpy(images.astype(np.float32)) for images in (train_images, test_images))
    std, mean = torch.std_mean(train, dim=(0, 2, 3), keepdim=True)
    for images in (train, test):
        images.sub_(mean).div_(std.clamp_min(1e-6))
    return Dataset(
        Split(train, torch.from_numpy(train_labels.astype(np.int64))),
        Split(test, torch.from_numpy(test_labels.astype(np.int64))),
        CLASSES[name],
    )


def say_if_larger(batch_size: int, dataset: Dataset) -> None:
    """Says on standard error where a batch is to hold more images than there are."""
    there = len(dataset.train.labels)
    if batch_size > there:
        words = f"--batch-size {batch_size}: there are {there} training images, and each batch holds all of them"
        print(words, file=sys.stderr)


def augment(
    images: Float[Tensor, "batch channels size size"], generator: torch.Generator
) -> Float[Tensor, "batch channels size size"]:
    """Returns each image shifted by up to 4 pixels (zeros enter) and flipped with probability ½."""
    batch, _, size, _ = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    shifts = torch.randint(9, (2, batch, 1), generator=generator)
    flips = torch.rand(batch, 1, generator=generator) < 0.5
    steps = torch.arange(size)
    rows = shifts[0] + steps
    columns = shifts[1] + torch.where(flips, size - 1 - steps, steps)
    index = torch.arange(batch)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def _digits(_: str | Path | None) -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from error
    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))  # one fixed split for everyone
    images, labels = bunch.images[order, None].astype(np.float32), bunch.target[order]
    train = len(labels) * 4 // 5
    return images[:train], labels[:train], images[train:], labels[train:]


def _cifar10(data_dir: str | Path | None) -> Arrays:
    folder = _folder(data_dir, "cifar10", "cifar-10-batches-py")
    train = [_cifar_batch(folder / f"data_batch_{number}", "cifar10") for number in range(1, 6)]
    images, labels = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return images, labels, *_cifar_batch(folder / "test_batch", "cifar10")


def _cifar100(data_dir: str | Path | None) -> Arrays:
    folder = _folder(data_dir, "cifar100", "cifar-100-python")
    return *_cifar_batch(folder / "train", "cifar100"), *_cifar_batch(folder / "test", "cifar100")


def _cifar_batch(path: Path, name: str) -> tuple[UInt8[np.ndarray, "n 3 32 32"], Int[np.ndarray, " n"]]:
    title, key = ("CIFAR-10 batch", "labels") if name == "cifar10" else ("CIFAR-100 file", "fine_labels")
    with _open(path) as file:
        try:
            content = _NumpyUnpickler(file, encoding="latin1").load()
        except Exception as error:  # a broken pickle can raise anything
            raise DataError(f"{path} is no {title}: {type(error).__name__}: {error}") from error
    try:
        # Python 2 wrote text keys; files repacked with Python 3 often have bytes.
        content = {word.decode() if isinstance(word, bytes) else word: value for word, value in content.items()}
        images = np.asarray(content["data"], dtype=np.uint8).reshape(-1, 3, 32, 32)
        labels = np.asarray(content[key], dtype=np.int64)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is no {title}, a dict with 'data' [n, 3072] and '{key}' [n]: {error!r}") from error
    _check_pair(path, images, path, labels, CLASSES[name])
    return images, labels


class _NumpyUnpickler(pickle.Unpickler):
    """Loads numpy arrays and plain containers, and refuses anything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        core = module.removeprefix("numpy.").replace("_core", "core")
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if core == "core.multiarray" and name == "_reconstruct":
            return np.ndarray.__reduce__(np.empty(0))[0]  # the function itself, wherever this numpy keeps it
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a data file")


def _latin1(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


def _fashion_mnist(data_dir: str | Path | None) -> Arrays:
    folder = _folder(data_dir, "fashion-mnist", "FashionMNIST/raw")
    arrays: list[np.ndarray] = []
    for part in ("train", "t10k"):
        image_path, label_path = folder / f"{part}-images-idx3-ubyte", folder / f"{part}-labels-idx1-ubyte"
        images, labels = _idx(image_path, 3), _idx(label_path, 1)
        _check_pair(image_path, images, label_path, labels, CLASSES["fashion-mnist"])
        arrays += [images[:, None], labels.astype(np.int64)]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _idx(path: Path, dimensions: int) -> UInt8[np.ndarray, "..."]:
    """An IDX array: two zero bytes, type 8 (uint8), the rank, the sizes (big-endian), the data."""
    with _open(path) as file:
        try:
            content = file.read()
        except (OSError, EOFError) as error:
            raise DataError(f"{path} cannot be read: {error}") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes([0, 0, 8, dimensions]):
        begin = content[:4].hex(" ") or "nothing"
        raise DataError(f"{path} is no IDX file of {dimensions} dimensions: it begins with {begin}")
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4))
    if len(content) - header != math.prod(shape):
        held = len(content) - header
        raise DataError(f"{path} announces {shape} = {math.prod(shape)} bytes, but holds {held}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _check_pair(image_path: Path, images: np.ndarray, label_path: Path, labels: np.ndarray, classes: int) -> None:
    if len(images) != len(labels) or not len(labels) or labels.min() < 0 or labels.max() >= classes:
        where = str(image_path) if image_path == label_path else f"{image_path} and {label_path}"
        raise DataError(
            f"{where}: {len(images)} images and {len(labels)} labels; there must be as many of each, at least "
            f"one, with labels 0 … {classes - 1}"
        )


def _folder(data_dir: str | Path | None, name: str, inside: str) -> Path:
    if data_dir is None:
        raise DataError(f"{name} needs --data-dir, the folder that contains {inside}")
    folder = Path(data_dir) / inside
    if not folder.is_dir():
        found = sorted(path.name for path in Path(data_dir).iterdir())[:8] if Path(data_dir).is_dir() else None
        what = "which does not exist" if found is None else f"which contains {found or 'nothing'}"
        raise DataError(
            f"looked for the folder {inside} in {Path(data_dir)}, {what}. Give the folder above it as --data-dir"
        )
    return folder


def _open(path: Path) -> io.BufferedIOBase:
    zipped = path.with_name(path.name + ".gz")
    if path.is_file():
        return path.open("rb")
    if zipped.is_file():
        return gzip.open(zipped, "rb")
    raise DataError(f"looked for the file {path} (or {zipped.name}), which does not exist")


DATASETS: dict[str, Callable[[str | Path | None], Arrays]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "fashion-mnist": _fashion_mnist,
}
