"""The data set type, and its readers: .npz files, saved Hugging Face data sets, image folders, sets on the Hub.

Pillow, datasets and flwr_datasets are imported only where a reader needs them.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedsparse.errors import UserError

Array = NDArray[Any]
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")
_LABEL_COLUMNS = ("label", "labels", "y", "target", "fine_label")
_CLIENT_COLUMNS = ("client", "client_id", "writer_id", "user", "user_id", "subject")


@dataclass(frozen=True, eq=False)
class Dataset:
    """All examples of a set, before they are divided over clients and scaled.

    x: float32 (n, features), (n, channels, time) or (n, channels, height, width); or int64 tokens (n, T) where
    ``vocabulary`` is above 0. NaN = missing. y: int64 (n,) in 0..classes-1.
    client: int64 (n,) in 0..len(client_names)-1, or None where the set has no natural clients.
    part: uint8 (n,), 0 = train, 1 = test, or None where the set has no such parts.
    """

    name: str
    x: Array
    y: Array
    client: Array | None
    client_names: tuple[str, ...]
    part: Array | None
    classes: int
    vocabulary: int
    default_model: str

    def __post_init__(self) -> None:
        for key, column in (("y", self.y), ("client", self.client), ("part", self.part)):
            if column is not None and column.shape != (len(self.x),):
                raise UserError(f"{self.name}: {key} has shape {column.shape}, but x has {len(self.x)} examples")
        if not len(self.y):
            raise UserError(f"{self.name}: no examples")
        self._check_range("y", self.y, self.classes)
        if self.part is not None:
            self._check_range("part", self.part, 2)
        if self.client is not None:
            self._check_range("client", self.client, len(self.client_names))
        if self.vocabulary:
            self._check_range("x", self.x, self.vocabulary)

    def __len__(self) -> int:
        return len(self.y)

    def _check_range(self, key: str, values: Array, count: int) -> None:
        low, high = values.min(initial=0), values.max(initial=0)
        if low < 0 or high >= count:
            raise UserError(f"{self.name}: {key} must lie in 0..{count - 1}, got {low if low < 0 else high}")


def make_dataset(
    name: str,
    x: Array,
    y: Array,
    *,
    client: Array | None = None,
    part: Array | None = None,
    class_names: Sequence[str] = (),
    client_names: Sequence[str] = (),
    vocabulary: int = 0,
    default_model: str = "",
) -> Dataset:
    """A data set from raw arrays.

    x: uint8 images (n, H, W) or (n, H, W, C), which become (n, C, H, W) in [0, 1]; any other numbers (n, ...), which
    become float32; tokens (n, T) with ``vocabulary`` > 0. y: integers (n,); without ``class_names`` there are
    max(y) + 1 classes. client: any integers (n,); without ``client_names`` they are numbered in order.
    Raises UserError where an array does not fit.
    """
    y = _integers(name, "y", y)
    if client is not None:
        client = _integers(name, "client", client)
        if not len(client_names):
            ids, client = np.unique(client, return_inverse=True)
            client_names = [str(i) for i in ids]
    inputs = _integers(name, "x", x) if vocabulary else _numbers(name, x)
    return Dataset(
        name=name,
        x=inputs,
        y=y,
        client=client,
        client_names=tuple(str(n) for n in client_names) if client is not None else (),
        part=None if part is None else _integers(name, "part", part),
        classes=len(class_names) or int(y.max(initial=0)) + 1,
        vocabulary=vocabulary,
        default_model=default_model or _default_model(inputs, vocabulary),
    )


def _integers(name: str, key: str, values: Array) -> Array:
    if values.dtype.kind not in "iub":
        raise UserError(f"{name}: {key} must be integers, got {values.dtype}")
    return values.astype(np.int64, copy=False)


def _numbers(name: str, x: Array) -> Array:
    if x.dtype.kind not in "iubf":
        raise UserError(f"{name}: x must be numbers, got {x.dtype}")
    if x.dtype == np.uint8 and x.ndim in (3, 4):
        return _channels_first(x)
    if x.ndim not in (2, 3, 4):
        raise UserError(f"{name}: x must have 2 to 4 dimensions, got shape {x.shape}")
    x = np.ascontiguousarray(x, dtype=np.float32)
    if np.isinf(x).any():
        raise UserError(f"{name}: x has infinite values")
    return x


def _channels_first(x: Array) -> Array:
    """(n, H, W) or (n, H, W, C) bytes to (n, C, H, W) floats in [0, 1]."""
    x = x[:, None] if x.ndim == 3 else x.transpose(0, 3, 1, 2)
    scaled = np.ascontiguousarray(x, dtype=np.float32)
    scaled /= 255
    return scaled


def _default_model(x: Array, vocabulary: int) -> str:
    if vocabulary:
        return "charlstm"
    if x.ndim == 3:
        return "cnn1d"
    if x.ndim == 4 and min(x.shape[2:]) >= 28:
        return "leafcnn1" if x.shape[1] == 1 else "lenet"
    return "mlp"


def read_npz(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file, none of them pickled. Raises UserError for any other file."""
    try:
        # Opened here, since np.load leaves a broken zip file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {path} as an .npz file without pickled objects: {_one_line(error)}") from error


def from_npz(path: Path, name: str = "", default_model: str = "") -> Dataset:
    """A data set from an .npz file: x, y, optional client, part, class_names, client_names, vocabulary.

    With ``vocabulary`` (a number above 0) x holds tokens. The other rules are those of ``make_dataset``.
    """
    arrays = read_npz(path)
    name = name or str(path)
    for key in ("x", "y"):
        if key not in arrays:
            raise UserError(f"{path}: the array {key!r} is missing (found: {', '.join(arrays) or 'none'})")
    return make_dataset(
        name,
        arrays["x"],
        arrays["y"],
        client=arrays.get("client"),
        part=arrays.get("part"),
        class_names=arrays.get("class_names", np.array([], str)).tolist(),
        client_names=arrays.get("client_names", np.array([], str)).tolist(),
        vocabulary=int(arrays.get("vocabulary", np.array(0))),
        default_model=default_model,
    )


def from_folder(path: Path) -> Dataset:
    """A folder: a Hugging Face data set written by ``save_to_disk``, or images in one folder a class."""
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _from_saved(path)
    return _from_images(path)


def _from_saved(path: Path) -> Dataset:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the saved data set {path}: {_one_line(error)}") from error
    return _from_hugging_face(str(path), dict(saved) if isinstance(saved, DatasetDict) else {"train": saved})


def from_hub(name: str) -> Dataset:
    """The splits "train" and, where there is one, "test" of a set on the Hugging Face Hub. Needs a network."""
    if not name:
        raise UserError("data set 'hf:' lacks a name, for example hf:ylecun/mnist")
    from flwr_datasets import FederatedDataset

    try:
        hub = FederatedDataset(dataset=name, partitioners={"train": 1}, shuffle=False)
        splits = {"train": hub.load_split("train")}
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load data set 'hf:{name}': {_one_line(error)}") from error
    with contextlib.suppress(ValueError):  # without a test split the set is divided by seed
        splits["test"] = hub.load_split("test")
    return _from_hugging_face(f"hf:{name}", splits)


def _from_hugging_face(name: str, splits: dict[str, Any]) -> Dataset:
    """From Hugging Face data sets named train and test; their columns are found by type and name."""
    splits = {key: splits[key] for key in ("train", "test") if key in splits}
    if not splits:
        raise UserError(f"{name}: no split named train or test")
    first = next(iter(splits.values()))
    label = _label_column(name, first.features)
    client = next((c for c in _CLIENT_COLUMNS if c in first.column_names and c != label), None)
    x = _concatenate(name, [_input_column(name, s, (label, client)) for s in splits.values()])
    y, class_names = _encode([v for s in splits.values() for v in s[label]], first.features[label])
    ids, client_names = _encode([v for s in splits.values() for v in s[client]], None) if client else (None, [])
    sizes = [len(s) for s in splits.values()]
    parts = np.repeat([int(key == "test") for key in splits], sizes) if len(splits) == 2 else None
    return make_dataset(name, x, y, client=ids, part=parts, class_names=class_names, client_names=client_names)


def _label_column(name: str, features: Any) -> str:
    for column, kind in features.items():
        if type(kind).__name__ == "ClassLabel":
            return str(column)
    for column in _LABEL_COLUMNS:
        if column in features:
            return column
    raise UserError(f"{name}: no label column: none is a ClassLabel or named {', '.join(_LABEL_COLUMNS)}")


def _encode(values: list[Any], kind: Any) -> tuple[Array, list[str]]:
    """Labels or client names as 0..K-1, with their names. Class labels keep their numbers."""
    names = getattr(kind, "names", None)
    if names:
        return np.array(values, dtype=np.int64), [str(n) for n in names]
    found, codes = np.unique(np.array(values), return_inverse=True)
    return codes.astype(np.int64), [str(v) for v in found]


def _input_column(name: str, split: Any, others: tuple[str | None, ...]) -> Array:
    """The inputs: the image column, else the column of lists, else all columns of numbers side by side."""
    columns = [c for c in split.column_names if c not in others]
    for column in columns:
        if type(split.features[column]).__name__ == "Image":
            return _stack_images(name, split[column])
    for column in columns:
        if type(split.features[column]).__name__ != "Value":
            return _stack(name, column, split[column])
    numeric = [c for c in columns if _is_number(split, c)]
    if not numeric:
        raise UserError(f"{name}: no column of images, lists or numbers to learn from (columns: {', '.join(columns)})")
    return np.stack([np.array(split[c], dtype=np.float32) for c in numeric], axis=1)  # (n, columns)


def _is_number(split: Any, column: str) -> bool:
    return str(split.features[column].dtype).startswith(("int", "uint", "float", "bool"))


def _stack(name: str, column: str, values: Iterable[Any]) -> Array:
    try:
        return np.array(list(values), dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: column {column!r} does not hold numbers of one shape") from error


def _concatenate(name: str, parts: list[Array]) -> Array:
    if any(p.shape[1:] != parts[0].shape[1:] for p in parts):
        raise UserError(f"{name}: train and test inputs differ in shape: {[p.shape[1:] for p in parts]}")
    return np.concatenate(parts)


def _from_images(path: Path) -> Dataset:
    """One sub-folder a class, in the order of their names; all images of one size."""
    folders = sorted(f for f in path.iterdir() if f.is_dir())
    files = [(k, f) for k, folder in enumerate(folders) for f in sorted(folder.iterdir()) if _is_image(f)]
    if not files:
        raise UserError(f"data set folder {path} holds neither a saved Hugging Face data set nor folders of images")
    pillow = import_pillow(str(path))
    images = []
    for _, file in files:
        try:
            with pillow.open(file) as image:
                images.append(image.copy())
        except OSError as error:
            raise UserError(f"cannot read image {file}: {_one_line(error)}") from error
    labels = np.array([k for k, _ in files])
    return make_dataset(str(path), _stack_images(str(path), images), labels, class_names=[f.name for f in folders])


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _IMAGE_SUFFIXES


def _stack_images(name: str, images: Iterable[Any]) -> Array:
    """Pillow images as uint8 (n, H, W) where all are grey, else (n, H, W, 3)."""
    images = list(images)
    mode = "L" if all(i.mode in ("1", "L") for i in images) else "RGB"
    sizes = sorted({i.size for i in images})
    if len(sizes) > 1:
        raise UserError(f"{name}: images must have one size, found {sizes[0]} and {sizes[-1]} (width, height)")
    return np.stack([np.asarray(i.convert(mode)) for i in images])


def import_pillow(name: str) -> Any:
    """Pillow's Image module, or a UserError that says who needs it."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"data set {name} needs Pillow to read its images: pip install pillow") from error
    return Image


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
