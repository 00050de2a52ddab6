"""The store of client memories: bounded RAM, immutable files, what a checkpoint needs; and the engine on top of it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fedsparse.client import client_app
from fedsparse.engine.local import LocalGrid
from fedsparse.engine.store import Kept, MemoryStore, memory_bytes, read_memory
from fedsparse.errors import UserError
from fedsparse.packet import Packet, decode, encode, same
from fedsparse.seeding import torch_rng
from fedsparse.strategy import Plan
from tests.helpers import norm_task, small_clients
from tests.test_contract import halves


def memory(*path: int, size: int = 100) -> RecordDict:
    rng = torch_rng("memory", *path)
    return encode(Packet("memory", {"gate": torch.randn(size, generator=rng), "n": torch.tensor([path[0]])}))


def whole_again(records: RecordDict, folder: Path) -> RecordDict:
    import zlib

    data = memory_bytes(records)
    (folder / "x").write_bytes(data)
    return read_memory(folder, Kept("x", len(data), zlib.crc32(data)))


# --- files -----------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.uint8, torch.int32, torch.int64, torch.bool])


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=4))
    made = {}
    for name in names:
        shape, dtype = draw(SHAPES), draw(DTYPES)
        raw = draw(st.lists(st.integers(0, 1), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        made[name] = torch.tensor(raw, dtype=dtype).view(shape)
    return made


@settings(max_examples=60)
@given(tensors())
def test_memories_come_back_bit_for_bit(tmp_path_factory: Any, named: dict[str, Tensor]) -> None:
    packet = Packet("memory", named)
    back = whole_again(encode(packet), tmp_path_factory.mktemp("f"))
    assert same(decode(back), packet)


def test_a_memory_is_a_plain_file_of_tensors(tmp_path: Path) -> None:
    named = {"gate/w": torch.randn(3, 2), "kept": torch.arange(4, dtype=torch.int32)}
    path = tmp_path / "m.safetensors"
    path.write_bytes(memory_bytes(encode(Packet("memory", named))))
    found = load_file(path)
    assert found.keys() == named.keys() and all(torch.equal(found[k], named[k]) for k in named)


def test_states_of_stock_apps_come_back(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.int16).reshape(2, 3)
    records = RecordDict(
        {
            "a": ArrayRecord({"x": Array(array), "y": Array(np.float64(2.5) * np.ones(1))}),
            "c": ConfigRecord({"bytes": b"\x00\xff", "text": "é", "list": [b"a", b"b"], "flag": True, "n": 3}),
            "m": MetricRecord({"loss": 0.1, "many": [1, 2]}),
        }
    )
    back = whole_again(records, tmp_path)
    assert back == records and list(back) == list(records)
    assert np.array_equal(back["a"]["x"].numpy(), array)  # type: ignore[call-overload,index,union-attr]


# --- the store -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(["put", "get", "flush"]), st.integers(0, 5), st.integers(0, 99)), max_size=40),
    st.integers(0, 2500),
)
def test_any_limit_gives_what_was_put(tmp_path_factory: Any, steps: list[tuple[str, int, int]], limit: int) -> None:
    """Against a plain dict."""
    store, model = MemoryStore(tmp_path_factory.mktemp("s"), limit), dict[int, RecordDict]()
    for step, client, value in steps:
        if step == "put":
            model[client] = memory(client, value)
            store.put(client, model[client])
        elif step == "flush":
            assert store.flush().keys() == model.keys()
        elif client in model:
            assert same(decode(store[client]), decode(model[client]))
        assert len(store) == len(model) and list(store) == sorted(model)
        if limit:
            assert store._bytes <= max(limit, max((store._sizes[c] for c in store._here), default=0))
    for client, records in model.items():
        assert same(decode(store[client]), decode(records))


def test_a_small_store_keeps_little_in_ram_and_no_limit_writes_nothing(tmp_path: Path) -> None:
    size = len(memory(0)["arrays"]["flat"].data) + 8  # type: ignore[call-overload,index]
    small, free = MemoryStore(tmp_path / "small", 3 * size + 500), MemoryStore(tmp_path / "free")
    for client in range(20):
        small.put(client, memory(client))
        free.put(client, memory(client))
    assert len(small._here) <= 3 and len(list((tmp_path / "small").glob("*/*"))) >= 17
    assert len(free._here) == 20 and not (tmp_path / "free").exists()


def test_a_checkpoint_is_a_list_of_files_that_later_changes_leave_alone(tmp_path: Path) -> None:
    store = MemoryStore(tmp_path, 1)
    for client in range(5):
        store.put(client, memory(client, 0))
    first = store.flush()
    for client in range(3):
        store.put(client, memory(client, 1))
    second = store.flush()
    assert first[4] == second[4] and first[0] != second[0]
    for manifest, version in ((first, 0), (second, 1)):
        again = MemoryStore(tmp_path)
        again.restore(manifest)
        for client in range(5):
            assert same(decode(again[client]), decode(memory(client, version if client < 3 else 0)))
        before = {entry.file for entry in manifest.values()}
        again.put(0, memory(0, 2))
        assert again.flush()[0].file not in before  # a version's name is never used for another
    store.forget(entry.file for entry in second.values())
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.glob("*/*")} == {e.file for e in second.values()}
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_memory(tmp_path, first[0])


@pytest.mark.parametrize("damage", ["short", "flipped", "empty"])
def test_a_damaged_file_is_noticed(tmp_path: Path, damage: str) -> None:
    store = MemoryStore(tmp_path, 1)
    store.put(7, memory(7))
    entry = store.flush()[7]
    path = tmp_path / entry.file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"short": bytes(data[:-1]), "flipped": bytes(data), "empty": b""}[damage])
    fresh = MemoryStore(tmp_path)
    fresh.restore({7: entry})
    with pytest.raises(UserError, match=r"client memory '.*7\.1\.safetensors' is damaged"):
        fresh[7]


def test_a_store_without_files_makes_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = MemoryStore()
    store.put(0, memory(0))
    assert store.get(0) is not None
    assert store.get(1) is None
    store.forget([])
    store.restore({})
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_goes_with_the_store() -> None:
    store = MemoryStore(None, 1)
    store.put(0, memory(0))
    store.put(1, memory(1))
    folder = store.folder
    assert folder.is_dir()
    store.close()
    assert not folder.exists()
    with pytest.raises(UserError, match="the memory limit must be at least 0 bytes, got -1"):
        MemoryStore(None, -1)


# --- the engine on a small store -------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_a_limit_changes_no_bit(tmp_path: Path, workers: int) -> None:
    found = []
    for limit in (0, 1):
        task, clients = norm_task(), small_clients(6)
        strategy, _ = halves("pfedgate", batch_size=8)
        app = client_app(task, clients.__getitem__)
        with (
            MemoryStore(tmp_path / f"{limit}", limit) as store,
            LocalGrid(app, 6, workers=workers, own_replies=False, store=store) as grid,
        ):
            plan, devices = Plan(seed=7, fraction=0.8), [c.device for c in clients]
            for _ in strategy.rounds(grid, 3, task=task, devices=devices, plan=plan):
                assert not limit or len(store._here) <= 1
            found.append({i: memory_bytes(s) for i, s in grid.states().items()})
    assert found[0] == found[1] and len(found[0]) == 6


def test_shared_memory_does_not_grow_with_the_cohort() -> None:
    """Replies of 256 kB: as many lie in shared memory as the workers' places hold, whatever the cohort."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        context.state["a"] = ArrayRecord({"x": Array(np.full(1 << 16, context.node_id, np.float32))})
        return Message(RecordDict({"a": context.state["a"]}), reply_to=message)

    sizes = {}
    for cohort in (300, 900):  # from 256 on lists of the first exchange have their full length
        with LocalGrid(app, cohort, workers=2, own_replies=False, store=MemoryStore(None, 1)) as grid:
            for _ in range(2):  # in the second exchange memories go along
                sent = [grid.create_message(RecordDict(), "train", i + 1, "1") for i in range(cohort)]
                for i, reply in enumerate(grid.send_and_receive(sent)):
                    assert reply.content["a"]["x"].numpy()[7] == i + 1  # type: ignore[call-overload,index,union-attr]
            pool = grid._pool
            assert pool is not None
            arenas = [a for slots in pool._slots for slot in slots for a in (slot.down, slot.up)]
            sizes[cohort] = sum(os.fstat(a._fd).st_size for a in arenas)
            grid.states().close()
    assert sizes[900] <= 1.1 * sizes[300]
