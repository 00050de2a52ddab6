"""Who holds what: partitions of a data set over clients, and each client's train, validation and test examples.

The schemes are those of Flower Datasets. Pathological partitions are drawn by its own PathologicalPartitioner. The
other three are written out in NumPy, because importing ``flwr_datasets`` takes seconds; tests hold them, row by row,
to IidPartitioner, DirichletPartitioner (Yurochkin et al. 2019, arXiv:1905.12022) and NaturalIdPartitioner.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsparse.data.datasets import load_dataset
from fedsparse.data.formats import Array, Dataset
from fedsparse.errors import UserError, unknown
from fedsparse.seeding import numpy_rng, seed_of
from fedsparse.task import Split

_SCHEMES = ("auto", "iid", "dirichlet", "pathological", "natural")
_DEFAULT_CLIENTS = 10
_MOST_NAMES = 10  # of clients in a note
_LOWEST = {
    "clients": 0,
    "classes_per_client": 1,
    "min_train": 1,
    "min_test": 0,
    "max_clients": 0,
    "retries": 1,
    "holdout": 0,
}


@dataclass(frozen=True)
class PartitionConfig:
    """How a data set is divided over clients.

    scheme: "natural" (the set's own clients), "iid", "dirichlet" (each class is divided by a draw from
    Dirichlet(alpha)), "pathological" (each client has ``classes_per_client`` classes), or "auto": natural where the
    set has clients, else dirichlet. clients: how many; 0 = all natural ones, or 10; with natural, the first so many.
    min_train: training examples, at least 1; smaller natural clients are dropped, other schemes draw again, up to
    ``retries`` times. min_test: test examples that a client gets where it has enough (see ``split_sizes``).
    max_clients: keep the first so many; 0 = all. holdout: training examples of each class that the server keeps for
    itself, drawn by seed before the division; no client has them, whatever the method. public: another data set, as
    ``load_dataset`` takes it, whose training examples the server has instead: ``holdout`` of each class, 0 = all;
    "" = none. novel: share of the clients, in [0, 1), drawn by seed, that take no part in training; at least one then
    does and one does not.
    """

    scheme: str = "auto"
    clients: int = 0
    alpha: float = 0.5
    classes_per_client: int = 2
    min_train: int = 10
    min_test: int = 30
    max_clients: int = 0
    retries: int = 20
    holdout: int = 0
    public: str = ""
    novel: float = 0.0

    def __post_init__(self) -> None:
        if self.scheme not in _SCHEMES:
            raise unknown("partition.scheme", self.scheme, _SCHEMES)
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"partition.alpha must be above 0 and finite, got {self.alpha}")
        if not 0 <= self.novel < 1:
            raise UserError(f"partition.novel must be in [0, 1), got {self.novel}")
        for name, low in _LOWEST.items():
            if getattr(self, name) < low:
                raise UserError(f"partition.{name} must be at least {low}, got {getattr(self, name)}")


@dataclass(frozen=True, eq=False)
class ClientData:
    """A client's disjoint examples. All splits of all clients are views of one tensor."""

    name: str
    train: Split
    validation: Split
    test: Split


@dataclass(frozen=True, eq=False)
class FederatedData:
    """A data set divided over clients, scaled.

    input_shape: of one example; vocabulary: number of tokens, 0 = numeric input.
    notes: what a user should know, one line each: clients dropped, clients with a small test set, unused classes.
    server: the server's own examples, held out or public, None where there are none. novel: sorted ids (places in
    ``clients``) of those that take no part in training.
    """

    name: str
    input_shape: tuple[int, ...]
    classes: int
    vocabulary: int
    clients: tuple[ClientData, ...]
    notes: tuple[str, ...]
    default_model: str
    server: Split | None = None
    novel: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Shares:
    """Row numbers of the data set for one client: train, validation, test."""

    name: str
    train: Array
    validation: Array
    test: Array

    @property
    def parts(self) -> tuple[Array, Array, Array]:
        return self.train, self.validation, self.test


def federate(dataset: Dataset, config: PartitionConfig, seed: int) -> FederatedData:
    """Divide a data set over clients, split each client's examples and scale the inputs.

    Each client's examples are divided by seed (``split_sizes``). With natural clients and a given train/test division
    inside them, test = the given test part and validation = the last quarter, in file order, of each class of the
    client's training part. Numeric inputs are scaled to mean 0 and standard deviation 1, per channel or column, by
    the training examples of all clients but the novel ones together; missing values then become 0, the training mean.
    Public examples are scaled by the same numbers and change nothing of the clients'. The same arguments give the same
    bits. Raises UserError where the division cannot be made and for a public data set that does not fit.
    """
    notes: list[str] = []
    public = _public(dataset, config, seed) if config.public else None
    held = _held_out(dataset, 0 if public else config.holdout, seed)
    try:
        kept = _divided(dataset, config, seed, held, notes)
    except UserError as error:
        if not len(held):
            raise
        _divided(dataset, config, seed, held[:0], [])  # raises the same where the hold-out is not to blame
        kept_back = f"partition.holdout = {config.holdout} keeps {len(held)} of {len(dataset)} examples at the server"
        raise UserError(f"{error}; {kept_back}") from error
    return _assemble(dataset, kept, held, public, _novel(len(kept), config.novel, seed), tuple(notes))


def _divided(dataset: Dataset, config: PartitionConfig, seed: int, held: Array, notes: list[str]) -> list[_Shares]:
    """The clients' examples, of all but those that the server keeps."""
    rows, names = _groups(dataset, config, seed, notes, held)
    return _keep(dataset, config, _split(dataset, config, seed, rows, names, notes), notes)


def split_sizes(n: int, min_train: int, min_test: int) -> tuple[int, int, int]:
    """How many of a client's n examples go to train, validation and test: 6:2:2.

    The test part is raised to ``min_test`` where the training part, three quarters of the rest, then still is no
    smaller than the test part and than ``min_train``. Two examples or more give at least one for the test.
    """
    test = min(max(1, n // 5), max(0, n - 1))
    if test < min_test and _three_quarters(n - min_test) >= max(min_train, min_test):
        test = min_test
    train = _three_quarters(n - test)
    return train, n - test - train, test


def _three_quarters(n: int) -> int:
    return n - n // 4


def _held_out(dataset: Dataset, count: int, seed: int) -> Array:
    """The rows that the server keeps: ``count`` of each class, of the train part where the set has one."""
    rng, rows = numpy_rng(seed, "holdout"), [np.empty(0, np.int64)]
    for label in np.unique(dataset.y) if count else ():
        of_class = np.flatnonzero(dataset.y == label)
        if dataset.part is not None:
            of_class = of_class[dataset.part[of_class] == 0]
        if len(of_class) < count:
            raise UserError(
                f"partition.holdout is {count}, but class {label} of {dataset.name} has"
                f" {len(of_class)} training examples"
            )
        rows.append(np.sort(rng.choice(of_class, count, replace=False)))
    return np.concatenate(rows)


def _public(dataset: Dataset, config: PartitionConfig, seed: int) -> tuple[Array, Array]:
    """Inputs and labels of the server's examples of another data set, not yet scaled."""
    try:
        public = load_dataset(config.public)
    except UserError as error:
        raise UserError(f"partition.public: {error}") from error
    for what, own, wanted in zip(
        ("kind of input", "input shape", "classes"), _form(public), _form(dataset), strict=True
    ):
        if own != wanted:
            raise UserError(f"partition.public: {what} of {public.name}: {own}, where {dataset.name} has {wanted}")
    if np.array_equal(public.x, dataset.x, equal_nan=True):
        raise UserError(f"partition.public: {public.name} is the clients' own data set; set partition.holdout alone")
    rows = np.arange(len(public)) if public.part is None else np.flatnonzero(public.part == 0)
    if not len(rows):
        raise UserError(f"partition.public: {public.name} has no training examples")
    if config.holdout:
        rows = _held_out(public, config.holdout, seed)
    return public.x[rows], public.y[rows]


def _form(dataset: Dataset) -> tuple[str, tuple[int, ...], int]:
    """What two data sets must have in common for one model: kind of input, input shape, number of classes."""
    kind = f"tokens of {dataset.vocabulary}" if dataset.vocabulary else "numbers"
    return kind, dataset.x.shape[1:], dataset.classes


# Partitions: lists of row numbers, one list a client


def _groups(
    dataset: Dataset, config: PartitionConfig, seed: int, notes: list[str], held: Array
) -> tuple[list[Array], tuple[str, ...]]:
    """Each client's rows and name, before any client is dropped; without the rows ``held`` by the server."""
    natural = dataset.client is not None
    scheme = config.scheme if config.scheme != "auto" else "natural" if natural else "dirichlet"
    if scheme == "natural":
        groups = _natural(dataset, config.clients)
        return [g[~np.isin(g, held)] for g in groups] if len(held) else groups, dataset.client_names
    clients = config.clients or _DEFAULT_CLIENTS
    if clients > len(dataset) - len(held):
        left = f"{len(dataset) - len(held)} {'remaining ' if len(held) else ''}examples"
        raise UserError(f"partition.clients is {clients}, more than the {left} of {dataset.name}")
    order = numpy_rng(seed, "partition", "shuffle").permutation(len(dataset))
    order = order[~np.isin(order, held)]
    groups = _drawn(scheme, dataset, dataset.y[order], clients, config, seed, notes)
    return [order[g] for g in groups], tuple(f"client_{i}" for i in range(clients))


def _natural(dataset: Dataset, clients: int) -> list[Array]:
    """The rows of the set's own clients in file order; with ``clients`` above 0, of the first so many."""
    if dataset.client is None:
        allowed = ", ".join(s for s in _SCHEMES if s != "natural")
        raise UserError(f"partition.scheme 'natural': {dataset.name} has no natural clients (allowed: {allowed})")
    total = len(dataset.client_names)
    if clients > total:
        raise UserError(f"partition.clients is {clients}, but {dataset.name} has {total} natural clients")
    order = np.argsort(dataset.client, kind="stable")
    ends = np.cumsum(np.bincount(dataset.client, minlength=total))
    return np.split(order, ends[:-1])[: clients or total]


def _drawn(
    scheme: str, dataset: Dataset, labels: Array, clients: int, config: PartitionConfig, seed: int, notes: list[str]
) -> list[Array]:
    """A partition of the shuffled ``labels`` in which every client has the smallest size, after bounded retries."""
    smallest = _smallest_size(config)
    tries = 1 if scheme == "iid" or clients * smallest > len(labels) else config.retries
    draw, why = _SCHEME_DRAWS[scheme], ""
    for attempt in range(tries):
        try:
            groups, found = draw(labels, clients, config, dataset, seed_of(seed, "partition", attempt))
        except _UnluckyError as error:
            why = f" ({error})"
            continue
        if min(len(g) for g in groups) >= smallest:
            notes.extend(found)
            return groups
    also = {"dirichlet": " or raise partition.alpha", "pathological": " or partition.classes_per_client"}
    article, times = "an" if scheme == "iid" else "a", "try" if tries == 1 else "tries"
    raise UserError(
        f"cannot make {article} {scheme} partition of {dataset.name} ({len(labels)} examples) for {clients} clients "
        f"with at least {config.min_train} training examples each after {tries} {times}{why}: "
        f"lower partition.clients or partition.min_train{also.get(scheme, '')}"
    )


class _UnluckyError(Exception):
    """This draw cannot be made; another one may be possible."""


def _smallest_size(config: PartitionConfig) -> int:
    """Examples that a client needs for ``min_train`` training examples and one test example."""
    sizes = itertools.count(config.min_train + 1)
    return next(n for n in sizes if split_sizes(n, config.min_train, config.min_test)[0] >= config.min_train)


Drawn = tuple[list[Array], list[str]]


def _iid(labels: Array, clients: int, config: PartitionConfig, dataset: Dataset, seed: int) -> Drawn:
    return np.array_split(np.arange(len(labels)), clients), []


def _dirichlet(labels: Array, clients: int, config: PartitionConfig, dataset: Dataset, seed: int) -> Drawn:
    """Class by class, proportions from Dirichlet(alpha) and the class's rows cut there."""
    rng = np.random.default_rng(seed)
    pieces: list[list[Array]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        proportions = rng.dirichlet(np.full(clients, float(config.alpha)))  # (clients,)
        cuts = (np.cumsum(proportions) * len(rows)).astype(int)[:-1]
        for piece, part in zip(pieces, np.split(rows, cuts), strict=True):
            piece.append(part)
    return [np.concatenate(p) for p in pieces], []


def _pathological(labels: Array, clients: int, config: PartitionConfig, dataset: Dataset, seed: int) -> Drawn:
    """``classes_per_client`` classes a client, drawn by Flower; the first of client i is class i modulo classes."""
    count = len(np.unique(labels))
    if config.classes_per_client > count:
        raise UserError(
            f"partition.classes_per_client must be at most {count}, the classes of {dataset.name}, "
            f"got {config.classes_per_client}"
        )
    import datasets
    from flwr_datasets.partitioner import PathologicalPartitioner

    partitioner = PathologicalPartitioner(
        clients, "label", config.classes_per_client, "first-deterministic", shuffle=False, seed=seed
    )
    partitioner.dataset = datasets.Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            groups = [np.array(partitioner.load_partition(i)["row"], dtype=np.int64) for i in range(clients)]
        except ValueError as error:  # a class would have to be cut into more pieces than it has examples
            raise _UnluckyError(str(error).split(". ")[0]) from error
    return groups, [f"pathological partition: {w.message}".split(" If it is")[0] for w in caught]


_SCHEME_DRAWS: dict[str, Callable[[Array, int, PartitionConfig, Dataset, int], Drawn]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "pathological": _pathological,
}


# Each client's train, validation and test rows


def _split(
    dataset: Dataset,
    config: PartitionConfig,
    seed: int,
    rows: Sequence[Array],
    names: Sequence[str],
    notes: list[str],
) -> list[_Shares]:
    """Each client's shares: by the given parts where the clients are natural and hold both parts, else by seed."""
    part = dataset.part
    natural = config.scheme == "natural" or (config.scheme == "auto" and dataset.client is not None)
    if part is not None and natural:
        if any(len(np.unique(part[r])) == 2 for r in rows):
            return [_by_part(name, r, dataset.y, part) for name, r in zip(names, rows, strict=False)]
        notes.append(f"{dataset.name}: no client is in both the train and the test part; each is split 6:2:2 by seed")
    return [_by_seed(name, r, config, seed, i) for i, (name, r) in enumerate(zip(names, rows, strict=False))]


def _by_seed(name: str, rows: Array, config: PartitionConfig, seed: int, client: int) -> _Shares:
    rows = numpy_rng(seed, "split", client).permutation(rows)
    train, validation, _ = split_sizes(len(rows), config.min_train, config.min_test)
    return _Shares(name, *np.split(rows, [train, train + validation]))


def _by_part(name: str, rows: Array, y: Array, part: Array) -> _Shares:
    """Test = the given part 1; validation = the last quarter of each class of part 0, in file order.

    Of each class, since the files are sorted by class: the last quarter of all would be the last classes alone, which
    training would then never see.
    """
    given = rows[part[rows] == 0]
    late = np.zeros(len(given), dtype=bool)
    for label in np.unique(y[given]):
        of_class = np.flatnonzero(y[given] == label)
        late[of_class[len(of_class) - round(len(of_class) / 4) :]] = True
    return _Shares(name, given[~late], given[late], rows[part[rows] == 1])


def _keep(dataset: Dataset, config: PartitionConfig, shares: Sequence[_Shares], notes: list[str]) -> list[_Shares]:
    """The clients with enough training examples and a test set; notes name the others and the small test sets."""
    enough = [s for s in shares if len(s.train) >= config.min_train and len(s.test)]
    dropped = [s.name for s in shares if len(s.train) < config.min_train or not len(s.test)]
    if not enough:
        raise UserError(
            f"no client of {dataset.name} has {config.min_train} training examples and a test example: "
            f"lower partition.min_train"
        )
    kept = enough[: config.max_clients or None]
    small = [s.name for s in kept if len(s.test) < config.min_test]
    if dropped:
        notes.append(_named(dropped, f"dropped for fewer than {config.min_train} training or no test examples"))
    if small:
        notes.append(_named(small, f"with fewer than {config.min_test} test examples"))
    return kept


def _named(clients: Sequence[str], what: str) -> str:
    """A note on some clients, by name as far as a reader may want that."""
    more = len(clients) - _MOST_NAMES
    names = ", ".join(clients[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")
    return f"{len(clients)} client{'s' if len(clients) > 1 else ''} {what}: {names}"


def _novel(clients: int, share: float, seed: int) -> tuple[int, ...]:
    """The ids of the clients that take no part in training, sorted."""
    if not share:
        return ()
    if clients < 2:
        raise UserError(f"partition.novel is {share}, but there is only one client: none would be left to train")
    count = min(max(1, round(share * clients)), clients - 1)
    return tuple(sorted(int(i) for i in numpy_rng(seed, "novel").choice(clients, size=count, replace=False)))


# One tensor for all


def _assemble(
    dataset: Dataset,
    clients: Sequence[_Shares],
    held: Array,
    public: tuple[Array, Array] | None,
    novel: tuple[int, ...],
    notes: tuple[str, ...],
) -> FederatedData:
    parts = [p for c in clients for p in c.parts] + [held]
    rows = np.concatenate(parts)
    inputs, labels = dataset.x[rows], dataset.y[rows]
    ends = np.cumsum([len(p) for p in parts]).tolist()
    if public:
        inputs, labels = np.concatenate([inputs, public[0]]), np.concatenate([labels, public[1]])
        ends[-1] = len(labels)
    spans = list(itertools.pairwise([0, *ends]))  # train, validation, test, train, ..., the server's
    if not dataset.vocabulary:
        _scale(inputs, [span for i, span in enumerate(spans[:-1:3]) if i not in novel])
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    splits = [_view(x, y, span) for span in spans]
    return FederatedData(
        name=dataset.name,
        input_shape=tuple(x.shape[1:]),
        classes=dataset.classes,
        vocabulary=dataset.vocabulary,
        clients=tuple(ClientData(c.name, *splits[3 * i : 3 * i + 3]) for i, c in enumerate(clients)),
        notes=notes,
        default_model=dataset.default_model,
        server=splits[-1] if len(splits[-1]) else None,
        novel=novel,
    )


def _view(x: Tensor, y: Tensor, span: tuple[int, int]) -> Split:
    return Split(x[slice(*span)], y[slice(*span)])


def _scale(x: Array, train: Sequence[tuple[int, int]]) -> None:
    """Standardise x (n, channels, ...) in place by its training spans; missing values become 0 = the mean.

    A feature that is constant or wholly missing in training becomes 0. Span by span: a copy of all training examples
    would double the memory.
    """
    flat = x.reshape(len(x), x.shape[1], -1)  # (n, channels, positions), a view
    missing = np.isnan(flat)
    count = np.maximum(1, sum((~missing[a:b]).sum((0, 2)) for a, b in train))  # (channels,)
    flat[missing] = 0
    mean = sum(flat[a:b].sum(2).sum(0, dtype=np.float64) for a, b in train) / count
    flat -= mean.astype(np.float32)[:, None]
    flat[missing] = 0
    square = sum(np.einsum("ncp,ncp->nc", flat[a:b], flat[a:b]).sum(0, dtype=np.float64) for a, b in train)
    deviation = np.sqrt(square / count)
    constant = deviation <= 1e-6 * np.abs(mean)  # rounding of the mean leaves a little
    flat *= np.where(constant, 0, 1 / np.where(constant, 1, deviation)).astype(np.float32)[:, None]
