"""Data sets by name: scikit-learn's digits, and the files of the data folder (``FEDSPARSE_DATA`` or ../shared/data)."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedsparse.data.formats import (
    Array,
    Dataset,
    from_folder,
    from_hub,
    from_npz,
    import_pillow,
    make_dataset,
    read_npz,
)
from fedsparse.errors import UserError, unknown

_WINDOW = 80  # characters of input, as in LEAF's Shakespeare task (Caldas et al. 2018)
_CHOLESTEROL = 4  # column of heart_disease.npz


def dataset_names() -> tuple[str, ...]:
    """The sets that ``load_dataset`` knows by name."""
    return tuple(_LOADERS)


def load_dataset(name: str) -> Dataset:
    """A data set by name or by place.

    name: one of ``dataset_names()``; the path of an .npz file (keys x, y, optional client, part, class_names,
    client_names); the path of a folder (a saved Hugging Face data set, or images in one folder a class);
    or "hf:NAME" for a set on the Hugging Face Hub.
    Raises UserError for an unknown name and for a file that is absent or malformed.
    """
    if name in _LOADERS:
        return _LOADERS[name](name)
    if name.startswith("hf:"):
        return from_hub(name.removeprefix("hf:"))
    path = Path(name).expanduser()
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_npz(path)
    if path.suffix == ".npz" or os.sep in name:
        raise UserError(f"no data set file or folder {name!r}")
    raise unknown("data set", name, dataset_names())


def _data_file(file: str) -> Path:
    """Where a file of the data folder lies. Raises UserError naming the places looked at."""
    given = os.environ.get("FEDSPARSE_DATA")
    beside = [Path.cwd().parent, Path(__file__).resolve().parents[3]]
    folders = [Path(given).expanduser()] if given else [p / "shared" / "data" for p in beside]
    for folder in folders:
        if (folder / file).is_file():
            return folder / file
    places = " or ".join(dict.fromkeys(str(f) for f in folders))
    source = "FEDSPARSE_DATA" if given else "FEDSPARSE_DATA is not set; ../shared/data"
    raise UserError(f"data file {file} is not in {places} ({source})")


def _digits(name: str) -> Dataset:
    # The packaged file directly: importing sklearn.datasets takes longer than a whole first round.
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise UserError("data set 'digits' needs scikit-learn: pip install scikit-learn")
    table = np.loadtxt(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    x = table[:, :-1].reshape(-1, 1, 8, 8)
    return make_dataset(name, x, table[:, -1].astype(np.int64), default_model="mlp")


def _mnist(name: str) -> Dataset:
    return from_npz(_data_file("mnist_writers.npz"), name, "leafcnn1")


def _femnist(name: str) -> Dataset:
    return from_npz(_data_file("femnist_digits.npz"), name, "leafcnn1")


def _wisdm(name: str) -> Dataset:
    return from_npz(_data_file("wisdm.npz"), name, "mlp")


def _dsa(name: str) -> Dataset:
    return from_npz(_data_file("dsa_torso.npz"), name, "cnn1d")


def _heart(name: str) -> Dataset:
    data = from_npz(_data_file("heart_disease.npz"), name, "mlp")
    cholesterol = data.x[:, _CHOLESTEROL]
    cholesterol[cholesterol == 0] = np.nan  # nobody has none: the hospitals wrote 0 for missing
    return data


def _shakespeare(name: str) -> Dataset:
    arrays = read_npz(_data_file("shakespeare_roles.npz"))
    symbols, text = np.unique(arrays["text"], return_inverse=True)
    offset = arrays["offset"]
    starts = [_windows(int(a), int(b)) for a, b in itertools.pairwise(offset)]
    rows = np.concatenate(starts)[:, None] + np.arange(_WINDOW + 1)  # (n, 81)
    window = text.astype(np.int64)[rows]
    return make_dataset(
        name,
        np.ascontiguousarray(window[:, :-1]),
        np.ascontiguousarray(window[:, -1]),
        client=np.repeat(np.arange(len(starts)), [len(s) for s in starts]),
        client_names=arrays["client_names"].tolist(),
        class_names=[chr(s) for s in symbols],
        vocabulary=len(symbols),
        default_model="charlstm",
    )


def _windows(start: int, stop: int) -> Array:
    """Where a role's windows begin. Window and next character are 81 characters: no example holds another's answer."""
    return start + (_WINDOW + 1) * np.arange((stop - start) // (_WINDOW + 1))


def _cifar10(name: str) -> Dataset:
    path = _data_file("cifar10.npz")
    pillow = import_pillow(name)
    arrays = read_npz(path)
    grid, offset, jpeg = int(arrays["grid"]), arrays["offset"], arrays["jpeg"]
    tiles = []
    for a, b in itertools.pairwise(offset):
        with pillow.open(io.BytesIO(jpeg[a:b].tobytes())) as image:
            mosaic = np.asarray(image).reshape(grid, 32, grid, 32, 3)
        tiles.append(mosaic.transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3))
    return make_dataset(name, np.concatenate(tiles), arrays["y"], part=arrays["part"], default_model="lenet")


def _cifar10_small(name: str) -> Dataset:
    return from_npz(_data_file("cifar10_small.npz"), name, "lenet")


_LOADERS: dict[str, Callable[[str], Dataset]] = {
    "digits": _digits,
    "mnist": _mnist,
    "femnist": _femnist,
    "wisdm": _wisdm,
    "dsa": _dsa,
    "heart": _heart,
    "shakespeare": _shakespeare,
    "cifar10": _cifar10,
    "cifar10_small": _cifar10_small,
}
