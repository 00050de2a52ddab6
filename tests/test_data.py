"""Data sets, partitions, splits and scaling."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsparse.data import Dataset, FederatedData, PartitionConfig, dataset_names, federate, load_dataset
from fedsparse.data.formats import Array, make_dataset
from fedsparse.data.partition import split_sizes
from fedsparse.errors import UserError
from fedsparse.seeding import numpy_rng, seed_of

SCHEMES = ("iid", "dirichlet", "pathological", "natural")
REAL_FILES = {  # file, input shape, classes, vocabulary, examples, natural clients
    "mnist": ("mnist_writers.npz", (1, 28, 28), 10, 0, 70000, 836),
    "femnist": ("femnist_digits.npz", (1, 28, 28), 10, 0, 14854, 150),
    "wisdm": ("wisdm.npz", (43,), 6, 0, 5418, 36),
    "dsa": ("dsa_torso.npz", (6, 125), 19, 0, 9120, 8),
    "heart": ("heart_disease.npz", (13,), 2, 0, 920, 4),
    "shakespeare": ("shakespeare_roles.npz", (80,), 79, 79, None, 789),
    "cifar10_small": ("cifar10_small.npz", (3, 32, 32), 10, 0, 6000, 0),
    "cifar10": ("cifar10.npz", (3, 32, 32), 10, 0, 60000, 0),
}


def data_file(file: str) -> Path:
    given_folder = os.environ.get("FEDSPARSE_DATA")
    folder = Path(given_folder) if given_folder else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / file).is_file():
        pytest.skip(f"{file} is not in {folder}; set FEDSPARSE_DATA to the folder that holds it")
    return folder / file


def numbered(n: int, classes: int, clients: int = 0, part: bool = False) -> Dataset:
    """n examples of one token each, the row number: tokens are not scaled, so that every row can be told."""
    rng = np.random.default_rng(0)
    return make_dataset(
        "numbered",
        np.arange(n)[:, None],
        np.arange(n) % classes,
        client=np.sort(rng.integers(clients, size=n)) if clients else None,
        client_names=[f"user {i}" for i in range(clients)],
        part=rng.random(n) < 0.3 if part else None,
        vocabulary=n,
    )


def rows_of(data: FederatedData) -> list[list[list[int]]]:
    """The row numbers of each client's train, validation and test split."""
    return [[s.x[:, 0].tolist() for s in (c.train, c.validation, c.test)] for c in data.clients]


def all_rows(parts: Iterable[list[int]]) -> list[int]:
    return sorted(chain.from_iterable(parts))


def bits(data: FederatedData) -> list[bytes]:
    splits = [s for c in data.clients for s in (c.train, c.validation, c.test)]
    return [t.numpy().tobytes() for s in splits for t in (s.x, s.y)]


# Partitions


@settings(max_examples=25)
@given(
    scheme=st.sampled_from(SCHEMES),
    clients=st.integers(1, 8),
    n=st.integers(200, 300),
    classes=st.integers(2, 5),
    seed=st.integers(0, 2**31),
)
def test_partition_is_disjoint_complete_and_deterministic(
    scheme: str, clients: int, n: int, classes: int, seed: int
) -> None:
    dataset = numbered(n, classes, clients=clients)
    config = PartitionConfig(scheme, clients, 5.0, classes_per_client=2, min_train=3, min_test=2)
    data = federate(dataset, config, seed)
    rows = rows_of(data)
    assert len(data.clients) == clients
    used = all_rows(chain.from_iterable(rows))
    classes_used = np.unique(dataset.y[used])
    assert used == np.flatnonzero(np.isin(dataset.y, classes_used)).tolist()  # all rows once, of the classes in use
    assert len(classes_used) == classes or (scheme == "pathological" and "will NOT be used" in data.notes[0])
    for client, parts in zip(data.clients, rows, strict=True):
        assert len(client.train) >= 3
        assert len(client.test) >= 2
        assert tuple(map(len, parts)) == split_sizes(sum(map(len, parts)), 3, 2)
    assert bits(data) == bits(federate(dataset, config, seed))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_labels_stay_with_their_examples(scheme: str) -> None:
    dataset = numbered(300, 3, clients=4)
    data = federate(dataset, PartitionConfig(scheme, 4, 5.0), 5)
    for client, parts in zip(data.clients, rows_of(data), strict=True):
        for split, rows in zip((client.train, client.validation, client.test), parts, strict=True):
            assert split.y.tolist() == dataset.y[rows].tolist()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_another_partition(scheme: str) -> None:
    dataset = numbered(400, 4, clients=4)
    config = PartitionConfig(scheme, 4, 5.0)
    first, second = (federate(dataset, config, seed) for seed in (0, 1))
    assert bits(first) != bits(second)


@pytest.mark.parametrize("classes_per_client", [1, 2, 5])
def test_pathological_clients_have_at_most_k_classes(classes_per_client: int) -> None:
    data = federate(load_dataset("digits"), PartitionConfig("pathological", 10, 1.0, classes_per_client), 3)
    for client in data.clients:
        labels = torch.cat([client.train.y, client.validation.y, client.test.y])
        assert len(labels.unique()) <= classes_per_client


def test_pathological_partition_names_unused_classes() -> None:
    data = federate(numbered(300, 5), PartitionConfig("pathological", 2, classes_per_client=2), 0)
    assert any("will NOT be used" in note for note in data.notes)


def test_lower_alpha_means_more_label_skew() -> None:
    digits = load_dataset("digits")

    def largest_share(alpha: float) -> float:
        clients = federate(digits, PartitionConfig("dirichlet", 5, alpha, min_train=5), 0).clients
        return float(np.mean([np.bincount(c.train.y).max() / len(c.train) for c in clients]))

    assert largest_share(0.2) > largest_share(1.0) > largest_share(100.0)


def flower_rows(partitioner: object, columns: dict[str, Array], clients: int) -> list[list[int]]:
    import datasets

    partitioner.dataset = datasets.Dataset.from_dict(columns)  # type: ignore[attr-defined]
    return [list(partitioner.load_partition(i)["row"]) for i in range(clients)]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("clients", "alpha", "seed"), [(1, 0.5, 0), (7, 0.3, 1), (10, 1.0, 2), (30, 10.0, 3)])
def test_dirichlet_and_iid_give_flowers_own_partitions(clients: int, alpha: float, seed: int) -> None:
    from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner

    dataset = numbered(700, 6)
    order = numpy_rng(seed, "partition", "shuffle").permutation(700)
    columns = {"label": dataset.y[order], "row": order}
    drawn = DirichletPartitioner(clients, "label", alpha, 0, False, False, seed_of(seed, "partition", 0))
    config = PartitionConfig("dirichlet", clients, alpha, min_train=1, retries=1)
    for partitioner, scheme in ((drawn, "dirichlet"), (IidPartitioner(clients), "iid")):
        expected = flower_rows(partitioner, columns, clients)
        assert min(map(len, expected)) >= 2, "choose other parameters: this draw would be refused"
        rows = rows_of(federate(dataset, replace(config, scheme=scheme), seed))
        assert [all_rows(c) for c in rows] == [sorted(e) for e in expected]


def test_natural_gives_flowers_own_partition() -> None:
    from flwr_datasets.partitioner import NaturalIdPartitioner

    dataset = numbered(300, 3, clients=5)
    assert dataset.client is not None
    expected = flower_rows(NaturalIdPartitioner("client"), {"client": dataset.client, "row": np.arange(300)}, 5)
    rows = rows_of(federate(dataset, PartitionConfig("natural"), 0))
    assert sorted(all_rows(c) for c in rows) == sorted(expected)


def test_auto_is_natural_where_there_are_clients_else_dirichlet() -> None:
    natural, drawn = numbered(300, 3, clients=4), numbered(300, 3)
    assert bits(federate(natural, PartitionConfig(), 0)) == bits(federate(natural, PartitionConfig("natural"), 0))
    config = PartitionConfig(alpha=10.0)
    assert bits(federate(drawn, config, 0)) == bits(federate(drawn, replace(config, scheme="dirichlet"), 0))
    assert len(federate(drawn, config, 0).clients) == 10


def test_clients_takes_the_first_natural_clients_and_max_clients_the_first_kept() -> None:
    x = np.arange(90)[:, None]
    dataset = make_dataset("users", x, x[:, 0] % 2, client=np.repeat([4, 5, 6, 7], [5, 30, 30, 25]))
    assert [c.name for c in federate(dataset, PartitionConfig(clients=2), 0).clients] == ["5"]
    data = federate(dataset, PartitionConfig(max_clients=2), 0)
    assert [c.name for c in data.clients] == ["5", "6"]
    assert data.notes == (
        "1 client dropped for fewer than 10 training or no test examples: 4",
        "2 clients with fewer than 30 test examples: 5, 6",
    )


def test_a_note_names_ten_clients_and_counts_the_others() -> None:
    x = np.arange(13 * 5 + 60)[:, None]
    dataset = make_dataset("users", x, x[:, 0] % 2, client=np.repeat(np.arange(14), [5] * 13 + [60]))
    (note,) = federate(dataset, PartitionConfig(min_test=1), 0).notes
    names = ", ".join(map(str, range(10)))
    assert note == f"13 clients dropped for fewer than 10 training or no test examples: {names} and 3 more"


# Splits


@given(n=st.integers(0, 500), min_train=st.integers(1, 60), min_test=st.integers(0, 60))
def test_split_sizes(n: int, min_train: int, min_test: int) -> None:
    train, validation, test = split_sizes(n, min_train, min_test)
    assert train + validation + test == n
    assert min(train, validation, test) >= 0
    assert test >= 1 or n < 2
    if test > max(1, n // 5):  # raised, never at the cost of a training part smaller than the test part
        assert test == min_test <= train
        assert train >= min_train
    else:
        assert abs(train - 0.6 * n) <= 2


def test_small_test_sets_are_raised_where_a_client_has_enough() -> None:
    assert split_sizes(100, 10, 30) == (53, 17, 30)
    assert split_sizes(70, 10, 30) == (30, 10, 30)
    assert split_sizes(60, 10, 30) == (36, 12, 12)  # not enough: named in the notes
    assert split_sizes(1000, 10, 30) == (600, 200, 200)


def test_given_parts_stay_and_validation_is_the_last_quarter_of_each_class() -> None:
    n = 96
    client, y, part = np.arange(n) // 48, np.arange(n) % 48 // 16, (np.arange(n) % 16 >= 12).astype(np.uint8)
    dataset = make_dataset("parts", np.arange(n)[:, None], y, client=client, part=part, vocabulary=n)
    rows = rows_of(federate(dataset, PartitionConfig(min_test=1), 0))
    for k, (train, validation, test) in enumerate(rows):
        blocks = [range(start, start + 16) for start in range(48 * k, 48 * k + 48, 16)]
        assert train == [r for b in blocks for r in b[:9]]
        assert validation == [r for b in blocks for r in b[9:12]]
        assert test == [r for b in blocks for r in b[12:]]


def test_given_parts_with_disjoint_clients_are_split_by_seed() -> None:
    client = np.repeat(np.arange(4), 100)
    dataset = make_dataset("writers", np.arange(400)[:, None], client % 2, client=client, part=(client >= 2))
    data = federate(dataset, PartitionConfig("natural"), 0)
    assert [len(c.test) for c in data.clients] == [30] * 4
    assert "no client is in both" in data.notes[0]


def test_given_parts_are_pooled_where_the_clients_are_not_natural() -> None:
    dataset = numbered(300, 3, clients=3, part=True)
    data = federate(dataset, PartitionConfig("iid", 3), 0)
    assert all_rows(chain.from_iterable(rows_of(data))) == list(range(300))
    assert [len(c.test) for c in data.clients] == [30] * 3


def test_splits_are_views_of_one_tensor_in_order() -> None:
    data = federate(load_dataset("digits"), PartitionConfig(), 0)
    splits = [s for c in data.clients for s in (c.train, c.validation, c.test)]
    for tensors in ([s.x for s in splits], [s.y for s in splits]):
        assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
        for before, after in pairwise(tensors):
            assert after.storage_offset() == before.storage_offset() + before.numel()


# Scaling


def pooled(data: FederatedData, part: str) -> Array:
    return np.concatenate([getattr(c, part).x.numpy() for c in data.clients])


def test_statistics_come_from_training_rows_only() -> None:
    """Test rows are moved far away: were they in the statistics, training would not have mean 0 and deviation 1."""
    x, part = np.random.default_rng(0).normal(size=(200, 2)), np.arange(200) % 4 == 0
    x[part] += 1000
    dataset = make_dataset("far", x, np.zeros(200, int), client=np.arange(200) // 50, part=part)
    data = federate(dataset, PartitionConfig(), 0)
    train, validation, test = (pooled(data, p) for p in ("train", "validation", "test"))
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.std(0), 1, atol=1e-5)
    assert test.mean(0).min() > 500
    assert np.abs(validation.mean(0)).max() > 1e-3  # validation is no part of them either


@pytest.mark.parametrize("shape", [(3,), (3, 10), (3, 4, 5)])
def test_scaling_matches_an_oracle(shape: tuple[int, ...]) -> None:
    """One class; of each client's 60 examples 15 are given as test, the last 11 of the other 45 are validation."""
    rng = np.random.default_rng(0)
    x = rng.normal(5, 3, size=(120, *shape)).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    client, part = np.arange(120) // 60, np.arange(120) % 4 == 0
    data = federate(make_dataset("noise", x, np.zeros(120, int), client=client, part=part), PartitionConfig(), 0)
    training = [r for k in (0, 1) for r in [r for r in range(60 * k, 60 * k + 60) if r % 4][:-11]]
    axes = (0, *range(2, x.ndim))
    seen = x[training].astype(np.float64)
    expected = (seen - np.nanmean(seen, axes, keepdims=True)) / np.nanstd(seen, axes, keepdims=True)
    np.testing.assert_allclose(pooled(data, "train"), np.nan_to_num(expected), atol=1e-5)


def test_constant_and_missing_columns_become_zero() -> None:
    x = np.ones((60, 3), np.float32) * [1e6, 0.1, np.nan]
    data = federate(make_dataset("flat", x, np.arange(60) % 2), PartitionConfig("iid", 2, min_test=1), 0)
    for part in ("train", "validation", "test"):
        assert np.array_equal(pooled(data, part), np.zeros_like(pooled(data, part)))


def test_scaling_leaves_the_data_set_as_it_was() -> None:
    x = np.random.default_rng(0).normal(size=(100, 2))
    dataset = make_dataset("noise", x, np.arange(100) % 2)
    before = dataset.x.copy()
    federate(dataset, PartitionConfig("iid", 2), 0)
    assert np.array_equal(dataset.x, before)


# Errors


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scheme", "dirichlt", r"unknown partition.scheme 'dirichlt'; did you mean 'dirichlet'"),
        ("alpha", 0.0, r"partition.alpha must be above 0 and finite, got 0.0"),
        ("alpha", float("nan"), r"partition.alpha must be above 0 and finite, got nan"),
        ("clients", -1, r"partition.clients must be at least 0, got -1"),
        ("classes_per_client", 0, r"partition.classes_per_client must be at least 1, got 0"),
        ("min_train", 0, r"partition.min_train must be at least 1, got 0"),
        ("min_test", -1, r"partition.min_test must be at least 0, got -1"),
        ("max_clients", -2, r"partition.max_clients must be at least 0, got -2"),
        ("retries", 0, r"partition.retries must be at least 1, got 0"),
    ],
)
def test_partition_config_is_checked(field: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PartitionConfig(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PartitionConfig("iid", 101), "partition.clients is 101, more than the 100 examples of numbered"),
        (PartitionConfig("iid", 50), "cannot make an iid partition of numbered .* 50 clients .* after 1 try"),
        (PartitionConfig("dirichlet", 5, 0.01, retries=3), "dirichlet partition .* after 3 tries: .* partition.alpha"),
        (PartitionConfig("pathological", 2, classes_per_client=5), "classes_per_client must be at most 4, .* got 5"),
        (PartitionConfig("natural"), "numbered has no natural clients"),
    ],
)
def test_partitions_that_cannot_be_made(config: PartitionConfig, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        federate(numbered(100, 4), config, 0)
    assert "\n" not in str(caught.value)


def test_pathological_class_with_too_few_examples() -> None:
    y = np.array([0] * 97 + [1] * 3)
    with pytest.raises(UserError, match=r"after 2 tries \(Label: 1 is needed .*\): lower"):
        federate(make_dataset("rare", y[:, None], y), PartitionConfig("pathological", 5, retries=2, min_train=1), 0)


def test_natural_partitions_that_cannot_be_made() -> None:
    dataset = numbered(100, 2, clients=4)
    with pytest.raises(UserError, match=r"partition.clients is 5, but numbered has 4 natural clients"):
        federate(dataset, PartitionConfig(clients=5), 0)
    with pytest.raises(UserError, match="no client of numbered has 90 training examples"):
        federate(dataset, PartitionConfig(min_train=90), 0)


@pytest.mark.parametrize("scheme", ["iid", "dirichlet", "natural"])
@pytest.mark.parametrize("part", [False, True])
def test_the_server_keeps_a_balanced_hold_out_that_no_client_has(scheme: str, part: bool) -> None:
    dataset = numbered(600, 3, clients=4, part=part)
    config = PartitionConfig(scheme, 4, alpha=5.0, holdout=7, min_train=5)
    data, plain = (federate(dataset, c, 1) for c in (config, replace(config, holdout=0)))
    assert data.server is not None and plain.server is None
    assert torch.bincount(data.server.y).tolist() == [7, 7, 7]
    held = data.server.x[:, 0].tolist()
    rows = all_rows(chain(*rows_of(data), [held]))
    assert rows == list(range(600))  # each row once
    assert dataset.part is None or not dataset.part[held].any()
    assert bits(data) == bits(federate(dataset, config, 1))


def test_a_hold_out_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UserError, match="partition.holdout is 60, but class 0 of .* has 30 training examples"):
        federate(numbered(90, 3), PartitionConfig("iid", 3, holdout=60), 0)
    with pytest.raises(
        UserError, match=r"for 3 clients .*; partition.holdout = 28 keeps 84 of 90 examples at the server"
    ):
        federate(numbered(90, 3), PartitionConfig("iid", 3, holdout=28), 0)


# Another data set at the server


def columns(seed: int, n: int = 240, shift: float = 0.0) -> dict[str, Array]:
    """Rows of three columns of different size, some missing, with three classes."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 3)) * [1, 10, 100] + [5, 0, shift]).astype(np.float32)
    x[rng.random(x.shape) < 0.1] = np.nan
    return {"x": x, "y": np.arange(n) % 3}


def saved(path: Path, **arrays: Array) -> str:
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize("holdout", [0, 7])
@pytest.mark.parametrize("part", [False, True])
def test_public_examples_are_the_servers_and_the_clients_lose_nothing(holdout: int, part: bool, tmp_path: Path) -> None:
    dataset, other = make_dataset("own", **columns(1)), columns(2, 300, shift=50)
    if part:
        other["part"] = (np.arange(300) >= 200).astype(np.uint8)
    config = PartitionConfig("iid", 4, holdout=holdout, public=saved(tmp_path / "public.npz", **other))
    data, plain = federate(dataset, config, 3), federate(dataset, PartitionConfig("iid", 4), 3)
    assert bits(data) == bits(plain)
    assert data.server is not None and len(data.server) == (3 * holdout or (200 if part else 300))
    if holdout:
        assert torch.bincount(data.server.y).tolist() == [holdout] * 3
    # scaled by the clients' training statistics; whose rows these are is told by a data set of row numbers
    tags = make_dataset("own", np.arange(240)[:, None], dataset.y, vocabulary=240)
    train = torch.cat([c.train.x[:, 0] for c in federate(tags, PartitionConfig("iid", 4), 3).clients])
    seen = dataset.x[train.numpy()].astype(float)
    expected = np.nan_to_num((other["x"] - np.nanmean(seen, axis=0)) / np.nanstd(seen, axis=0))
    rows = [int(np.abs(expected - x).sum(1).argmin()) for x in data.server.x.numpy()]
    assert len(set(rows)) == len(rows) and (not part or max(rows) < 200)
    assert holdout or rows == list(range(len(rows)))
    assert np.allclose(data.server.x, expected[rows], atol=1e-4)
    assert data.server.y.tolist() == other["y"][rows].tolist()


def test_public_tokens_are_not_scaled(tmp_path: Path) -> None:
    public = saved(tmp_path / "p.npz", x=np.arange(60)[::-1, None] % 90, y=np.arange(60) % 3, vocabulary=np.array(90))
    data = federate(numbered(90, 3), PartitionConfig("iid", 3, public=public), 0)
    assert data.server is not None and data.server.x[:, 0].tolist() == list(range(59, -1, -1))
    assert all_rows(chain(*rows_of(data))) == list(range(90))


@pytest.mark.parametrize(
    ("arrays", "holdout", "message"),
    [
        ({"x": np.zeros((9, 4), np.float32)}, 0, r"input shape of .*p.npz: \(4,\), where own has \(3,\)"),
        (
            {"x": np.zeros((9, 3), int), "vocabulary": np.array(5)},
            0,
            "kind of input of .*: tokens of 5, where own has num",
        ),
        ({"y": np.arange(9) % 2}, 0, "classes of .*: 2, where own has 3"),
        ({"y": np.arange(9) % 4}, 0, "classes of .*: 4, where own has 3"),
        ({"part": np.ones(9, np.uint8)}, 0, "p.npz has no training examples"),
        ({}, 4, "partition.holdout is 4, but class 0 of .*p.npz has 3 training examples"),
        (columns(1), 0, "p.npz is the clients' own data set; set partition.holdout alone"),
    ],
)
def test_public_data_that_do_not_fit_are_refused(
    arrays: dict[str, Array], holdout: int, message: str, tmp_path: Path
) -> None:
    plain = {"x": columns(2, 9)["x"], "y": np.arange(9) % 3}
    config = PartitionConfig("iid", 4, holdout=holdout, public=saved(tmp_path / "p.npz", **{**plain, **arrays}))
    with pytest.raises(UserError, match=message) as found:
        federate(make_dataset("own", **columns(1)), config, 0)
    assert "\n" not in str(found.value)


def test_a_public_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    own = make_dataset("own", **columns(1))
    with pytest.raises(UserError, match="partition.public: unknown data set 'digit'; did you mean 'digits'"):
        federate(own, PartitionConfig("iid", 4, public="digit"), 0)
    with pytest.raises(UserError, match="partition.public: no data set file or folder '.*nowhere.npz'"):
        federate(own, PartitionConfig("iid", 4, public=str(tmp_path / "nowhere.npz")), 0)


def test_named_sets_as_public_ones() -> None:
    data_file("mnist_writers.npz"), data_file("femnist_digits.npz")
    with pytest.raises(UserError, match=r"input shape of mnist: \(1, 28, 28\), where digits has \(1, 8, 8\)"):
        federate(load_dataset("digits"), PartitionConfig(public="mnist"), 0)
    with pytest.raises(UserError, match="digits is the clients' own data set"):
        federate(load_dataset("digits"), PartitionConfig(public="digits"), 0)
    data = federate(load_dataset("femnist"), PartitionConfig(clients=3, holdout=2, public="mnist"), 0)
    assert data.server is not None and data.server.x.shape == (20, 1, 28, 28)
    assert torch.bincount(data.server.y).tolist() == [2] * 10


def test_unknown_data_sets() -> None:
    with pytest.raises(UserError, match=r"unknown data set 'digit'; did you mean 'digits'"):
        load_dataset("digit")
    with pytest.raises(UserError, match=r"no data set file or folder 'nowhere/x.npz'"):
        load_dataset("nowhere/x.npz")
    with pytest.raises(UserError, match="lacks a name"):
        load_dataset("hf:")


def test_absent_files_name_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSPARSE_DATA", str(tmp_path))
    for name, (file, *_) in REAL_FILES.items():
        with pytest.raises(UserError, match=f"data file {file} is not in {tmp_path} .FEDSPARSE_DATA"):
            load_dataset(name)


# Files


def test_digits_equal_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    expected, digits = load_digits(), load_dataset("digits")
    assert np.array_equal(digits.x, expected.images[:, None].astype(np.float32))
    assert np.array_equal(digits.y, expected.target)
    assert (digits.classes, digits.default_model, digits.x.dtype) == (10, "mlp", np.float32)


def test_default_data_import_nothing_slow() -> None:
    code = (
        "import sys; from fedsparse.data import *; federate(load_dataset('digits'), PartitionConfig(), 0); "
        "print([m for m in ('sklearn', 'datasets', 'flwr_datasets', 'flwr', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", [n for n in REAL_FILES if n != "cifar10"])
def test_real_files(name: str) -> None:
    file, shape, classes, vocabulary, examples, clients = REAL_FILES[name]
    data_file(file)
    dataset = load_dataset(name)
    assert dataset.x.shape[1:] == shape
    assert (dataset.classes, dataset.vocabulary, len(dataset.client_names)) == (classes, vocabulary, clients)
    assert examples is None or len(dataset) == examples
    data = federate(dataset, PartitionConfig(max_clients=20), 0)
    assert (data.input_shape, data.classes, data.vocabulary) == (shape, classes, vocabulary)
    for client in data.clients:
        for split in (client.train, client.validation, client.test):
            assert split.x.dtype == (torch.int64 if vocabulary else torch.float32)
            assert bool(torch.isfinite(split.x).all())
        # Nothing is tested on that could not be learnt: the files are sorted by class.
        if name in ("dsa", "femnist", "wisdm"):
            assert len(np.setdiff1d(client.test.y, client.train.y)) <= 1


def test_cifar10_mosaics_match_the_lossless_subset() -> None:
    pytest.importorskip("PIL")
    small = np.load(data_file("cifar10_small.npz"), allow_pickle=False)
    data_file("cifar10.npz")
    full, index = load_dataset("cifar10"), small["index_in_cifar10"]
    assert (full.x.shape, full.default_model) == ((60000, 3, 32, 32), "lenet")
    assert np.array_equal(full.y[index], small["y"])
    error = np.abs(full.x[index[:200]] - small["x"][:200].transpose(0, 3, 1, 2) / 255).mean()
    assert error < 3 / 255


def test_shakespeare_windows() -> None:
    raw = np.load(data_file("shakespeare_roles.npz"), allow_pickle=False)
    dataset = load_dataset("shakespeare")
    assert dataset.client is not None
    symbols = np.unique(raw["text"])
    for role in (0, 7, 788):
        text = raw["text"][raw["offset"][role] : raw["offset"][role + 1]].tobytes()
        mine = np.flatnonzero(dataset.client == role)
        assert len(mine) == len(text) // 81
        for i, row in enumerate(mine):
            window = symbols[dataset.x[row]].tobytes() + symbols[dataset.y[row]].tobytes()
            assert window == text[81 * i : 81 * (i + 1)]


def test_heart_cholesterol_of_zero_is_missing() -> None:
    raw = np.load(data_file("heart_disease.npz"), allow_pickle=False)
    column = raw["column_names"].tolist().index("chol")
    assert (raw["x"][:, column] == 0).any()
    assert not (load_dataset("heart").x[:, column] == 0).any()


@pytest.mark.parametrize(
    ("x", "shape", "model", "options"),
    [
        (np.zeros((6, 8, 8), np.uint8), (1, 8, 8), "mlp", {}),
        (np.zeros((6, 28, 30), np.uint8), (1, 28, 30), "leafcnn1", {}),
        (np.zeros((6, 32, 40, 3), np.uint8), (3, 32, 40), "lenet", {}),
        (np.zeros((6, 5), np.int32), (5,), "mlp", {}),
        (np.zeros((6, 2, 9), np.float64), (2, 9), "cnn1d", {}),
        (np.zeros((6, 9), np.int64), (9,), "charlstm", {"vocabulary": 4}),
    ],
)
def test_npz_by_path(tmp_path: Path, x: Array, shape: tuple[int, ...], model: str, options: dict[str, int]) -> None:
    np.savez(tmp_path / "mine.npz", x=x, y=np.arange(6) % 2, client=[9, 9, 3, 3, 3, 9], **options)
    dataset = load_dataset(str(tmp_path / "mine.npz"))
    assert dataset.x.shape == (6, *shape)
    assert dataset.x.dtype == (np.int64 if options else np.float32)
    assert (dataset.default_model, dataset.classes, dataset.client_names) == (model, 2, ("3", "9"))
    assert dataset.client is not None
    assert dataset.client.tolist() == [1, 1, 0, 0, 0, 1]


def test_image_bytes_become_channels_first_in_0_to_1(tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(256, size=(4, 5, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", x=x, y=[0, 1, 2, 1], class_names=["a", "b", "c", "d"])
    dataset = load_dataset(str(tmp_path / "rgb.npz"))
    assert dataset.classes == 4
    assert dataset.x[3, 2, 4, 1] == np.float32(x[3, 4, 1, 2]) / np.float32(255)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((3, 2))}, "the array 'y' is missing"),
        ({"x": np.zeros((3, 2)), "y": [0, 1]}, r"y has shape \(2,\), but x has 3 examples"),
        ({"x": np.zeros((2, 2)), "y": [0.0, 1.0]}, "y must be integers, got float64"),
        ({"x": np.zeros((2, 2)), "y": [0, -1]}, "y must lie in 0..0, got -1"),
        ({"x": np.zeros((2, 2)), "y": [0, 3], "class_names": ["a", "b"]}, "y must lie in 0..1, got 3"),
        ({"x": np.zeros((2, 2)), "y": [0, 1], "part": [0, 2]}, "part must lie in 0..1, got 2"),
        ({"x": np.zeros((2, 2)), "y": [0, 1], "client": [0, 5], "client_names": ["a"]}, "client must lie in 0..0"),
        ({"x": np.array([[1, 5]]), "y": [0], "vocabulary": 5}, "x must lie in 0..4, got 5"),
        ({"x": np.array([["a"]]), "y": [0]}, "x must be numbers"),
        ({"x": np.array([[np.inf]]), "y": [0]}, "x has infinite values"),
        ({"x": np.zeros(3), "y": [0, 0, 0]}, "x must have 2 to 4 dimensions"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, int)}, "no examples"),
        ({"x": np.array([[None]]), "y": [0]}, "without pickled objects"),
    ],
)
def test_malformed_npz(tmp_path: Path, arrays: dict[str, Array], message: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        load_dataset(str(tmp_path / "bad.npz"))
    assert "bad.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x03\x04 broken"])
def test_files_that_are_no_npz(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*bad.npz"):
        load_dataset(str(tmp_path / "bad.npz"))


def test_image_folder(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(256, size=(4, 7, 5, 3), dtype=np.uint8)
    for i, folder in enumerate(("cat", "cat", "dog", "owl")):
        (tmp_path / folder).mkdir(exist_ok=True)
        image.fromarray(pixels[i]).save(tmp_path / folder / f"{i}.png")
    dataset = load_dataset(str(tmp_path))
    assert (dataset.classes, dataset.y.tolist()) == (3, [0, 0, 1, 2])
    np.testing.assert_allclose(dataset.x, pixels.transpose(0, 3, 1, 2) / np.float32(255))
    image.fromarray(pixels[0, :3]).save(tmp_path / "owl" / "9.png")
    with pytest.raises(UserError, match="images must have one size"):
        load_dataset(str(tmp_path))
    (tmp_path / "owl" / "9.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"cannot read image .*9.png"):
        load_dataset(str(tmp_path))


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither a saved Hugging Face data set nor folders of images"):
        load_dataset(str(tmp_path))


def test_saved_hugging_face_data_sets(tmp_path: Path) -> None:
    import datasets as hf
    from PIL import Image

    pixels = np.random.default_rng(0).integers(256, size=(6, 4, 4), dtype=np.uint8)
    features = hf.Features(
        {"image": hf.Image(), "label": hf.ClassLabel(names=["a", "b", "c"]), "writer_id": hf.Value("string")}
    )
    columns = {
        "image": [Image.fromarray(p) for p in pixels],
        "label": [0, 1, 1, 0, 1, 1],
        "writer_id": ["u", "v", "u", "v", "v", "u"],
    }
    table = hf.Dataset.from_dict(columns, features=features)
    hf.DatasetDict(train=table.select(range(4)), test=table.select(range(4, 6))).save_to_disk(tmp_path / "images")
    dataset = load_dataset(str(tmp_path / "images"))
    np.testing.assert_allclose(dataset.x, pixels[:, None] / np.float32(255))
    assert (dataset.classes, dataset.y.tolist(), dataset.client_names) == (3, columns["label"], ("u", "v"))
    assert dataset.part is not None
    assert dataset.part.tolist() == [0, 0, 0, 0, 1, 1]

    hf.Dataset.from_dict({"age": [1, 2], "weight": [0.5, 1.5], "y": ["no", "yes"]}).save_to_disk(tmp_path / "table")
    dataset = load_dataset(str(tmp_path / "table"))
    assert (dataset.x.tolist(), dataset.y.tolist(), dataset.part) == ([[1, 0.5], [2, 1.5]], [0, 1], None)

    hf.Dataset.from_dict({"signal": [[[1, 2]], [[3, 4]]], "y": [0, 1]}).save_to_disk(tmp_path / "lists")
    assert load_dataset(str(tmp_path / "lists")).x.tolist() == [[[1, 2]], [[3, 4]]]

    hf.Dataset.from_dict({"text": ["a"], "y": [0]}).save_to_disk(tmp_path / "text")
    with pytest.raises(UserError, match="no column of images, lists or numbers"):
        load_dataset(str(tmp_path / "text"))
    hf.Dataset.from_dict({"age": [1]}).save_to_disk(tmp_path / "unlabelled")
    with pytest.raises(UserError, match="no label column"):
        load_dataset(str(tmp_path / "unlabelled"))


def test_hugging_face_by_name_through_flower(tmp_path: Path) -> None:
    """A local folder of CSV files stands for a set on the Hub; a name that is not at hand is one line."""
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("a,b,label,client\n1,2,0,x\n3,4,1,y\n5,6,1,x\n")
    (tmp_path / "set" / "test.csv").write_text("a,b,label,client\n7,8,0,y\n")
    code = (
        "import sys\n"
        "from fedsparse.data import load_dataset\n"
        "d = load_dataset('hf:' + sys.argv[1])\n"
        "print(d.x.tolist(), d.y.tolist(), d.part.tolist(), d.client.tolist(), d.client_names)\n"
        "try: load_dataset('hf:nobody/no_such_set')\n"
        "except ValueError as error: print(type(error).__name__, error)\n"
    )
    offline = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        capture_output=True, text=True, check=True, env={**os.environ, **offline},
    )  # fmt: skip
    first, second = run.stdout.strip().splitlines()
    assert first == "[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0], [7.0, 8.0]] [0, 1, 1, 0] [0, 0, 0, 1] [0, 1, 0, 1] ('x', 'y')"
    assert second.startswith("UserError cannot load data set 'hf:nobody/no_such_set': ")


def test_every_name_has_a_loader_test() -> None:
    assert set(dataset_names()) == {*REAL_FILES, "digits"}
