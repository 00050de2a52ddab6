"""SNIP, SynFlow, SSFL: criteria and rankings against slow versions, reductions, exact densities, costs, bad input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from clients.ssfl import SsflClient
from fedsparse.client import client_app
from fedsparse.cost import memory_bytes, train_flops
from fedsparse.engine.local import LocalGrid
from fedsparse.errors import ClientError, UserError
from fedsparse.globalmask import MaskedState, prunable, receive
from fedsparse.method import build, load_method
from fedsparse.models import build_model
from fedsparse.packet import Packet
from fedsparse.runner import digest
from fedsparse.saliency import flow_scores, snip_scores
from fedsparse.seeding import torch_rng
from fedsparse.sparse.masks import Mask
from fedsparse.sparse.pruning import largest_together, prune_in_steps
from fedsparse.strategy import Plan, Reply
from fedsparse.task import Budget, Client, Device, Params, Split, Task
from tests.helpers import CLASSES, norm_task, small_clients, small_split, small_task
from tests.test_contract import TASKS, halves, run_method

NAMES = ("snip", "synflow", "ssfl")
ALL = {"momentum": 0.9, "weight_decay": 0.01, "clip": 0.5}


def seeded(build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build()


def chain(*widths: int, bias: bool = False) -> Task:
    """Linear layers with ReLU between them; the last is the classifier, the others may be pruned."""

    def layers() -> nn.Module:
        model = nn.Sequential()
        for i, (a, b) in enumerate(itertools.pairwise(widths)):
            model.add_module(f"fc{i}", nn.Linear(a, b, bias=bias))
            if i < len(widths) - 2:
                model.add_module(f"relu{i}", nn.ReLU())
        return model

    return Task(seeded(layers), (widths[0],), widths[-1], 0)


def residual(norm: str) -> Task:
    model = seeded(lambda: build_model("resnet18", (1, 8, 8), CLASSES, width=1 / 16, norm=norm))
    return Task(model, (1, 8, 8), CLASSES, 0)


def every(task: Task) -> dict[str, Tensor]:
    return {name: torch.arange(size, dtype=torch.int32) for name, size in prunable(task).sizes.items()}


def found(name: str, task: Task, **hyper: Any) -> MaskedState:
    """The state once the mask is known."""
    clients = small_clients(3)
    strategy, half = halves(name, batch_size=8, **hyper)
    state = strategy.init(task, [c.device for c in clients])
    if state.stage == "score":
        replies = [Reply(c.device, scored(strategy, half, task, state, c)) for c in clients]
        state = strategy.reduce(task, state, replies)
    assert isinstance(state, MaskedState) and state.stage == "train"
    return state


def scored(strategy: Any, half: Any, task: Task, state: Any, client: Client) -> Packet:
    reply, memory = half.train(task, client, strategy.broadcast(state, client.device), {}, torch_rng(0, client.id))
    assert strategy.complaint(task, state, Reply(Device(0), reply)) == "" and not memory
    packet: Packet = reply
    return packet


# --- ranking ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4), st.floats(0, 1))
def test_layers_are_ranked_together_and_none_is_emptied(rows: list[list[int]], part: float) -> None:
    total = sum(len(row) for row in rows)
    k = len(rows) + round(part * (total - len(rows)))
    flat = [(-abs(v), i, at) for i, row in enumerate(rows) for at, v in enumerate(row)]
    first = {min(entry for entry in flat if entry[1] == i) for i in range(len(rows))}  # the largest of each layer
    rest = sorted(set(flat) - first)[: k - len(first)]
    expected = {str(i): sorted(at for _, j, at in [*first, *rest] if j == i) for i in range(len(rows))}
    scores = {str(i): torch.tensor(row, dtype=torch.float64) for i, row in enumerate(rows)}
    kept = largest_together(scores, k)
    assert {name: at.tolist() for name, at in kept.items()} == expected
    assert all(at.dtype == torch.int32 for at in kept.values())


def test_fewer_weights_than_layers_are_refused() -> None:
    with pytest.raises(UserError, match="1 kept weights leave nothing in some of 2 layers"):
        largest_together({"a": torch.ones(3), "b": torch.ones(3)}, 1)


def test_steps_follow_the_exponential_schedule_and_end_exactly() -> None:
    seen: list[int] = []

    def score(kept: Mask) -> dict[str, Tensor]:
        seen.append(sum(len(at) for at in kept.values()))
        return {name: at.double() + 1 for name, at in kept.items()}

    kept = prune_in_steps(score, {"a": 600, "b": 400}, {("a", "b"): 10}, 4)
    assert seen == [1000, round(1000 * 0.01**0.25), 100, round(1000 * 0.01**0.75)]
    assert kept["a"].tolist() == list(range(591, 600)) and kept["b"].tolist() == [399]
    apart = prune_in_steps(score, {"a": 600, "b": 400}, {("a",): 3, ("b",): 2}, 1)
    assert apart["a"].tolist() == [597, 598, 599] and apart["b"].tolist() == [398, 399]


@pytest.mark.parametrize(
    ("value", "message"), [(0.0, "the scores of all weights are 0"), (math.nan, "the scores of 'a' are not finite")]
)
def test_scores_that_rank_nothing_are_refused(value: float, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prune_in_steps(lambda _: {"a": torch.full((4,), value)}, {"a": 4}, {("a",): 2}, 1)


# --- SNIP ------------------------------------------------------------------------------------------------------------


def by_mask_variables(task: Task, params: Params, data: Split, kept: Mask) -> dict[str, Tensor]:
    """abs(dL/dc) of mask variables c that multiply the weights, at 1 where a weight is kept and else at 0."""
    masks = {name: torch.zeros(params[name].numel()) for name in kept}
    for name, at in kept.items():
        masks[name][at.long()] = 1.0
        masks[name].requires_grad_()
    weights = {name: params[name] * masks[name].view_as(params[name]) for name in kept}
    task.model.eval()
    logits = functional_call(task.model, {**params, **weights}, (data.x,))
    grads = torch.autograd.grad(nn.functional.cross_entropy(logits, data.y), list(masks.values()))
    return {name: g.abs()[kept[name].long()] for name, g in zip(masks, grads, strict=True)}


@pytest.mark.parametrize("task", [small_task, norm_task, lambda: residual("batch")], ids=["mlp", "chain", "residual"])
def test_saliency_is_the_gradient_of_mask_variables(task: Any) -> None:
    the_task, data = task(), small_split(150, "server")  # more than one pass
    params = the_task.init_params()
    for kept in (every(the_task), {n: at[::3] for n, at in every(the_task).items()}):
        slow = by_mask_variables(the_task, params, data, kept)
        fast = snip_scores(the_task, params, data, kept)
        assert fast.keys() == slow.keys() == kept.keys()
        assert all(torch.allclose(fast[n], slow[n], rtol=1e-3, atol=1e-7) for n in kept)
        assert any(bool(s.any()) for s in fast.values())


def test_scoring_leaves_the_statistics_of_norms_alone_and_needs_no_second_example() -> None:
    task = norm_task()
    params = task.init_params()
    before = {name: t.clone() for name, t in params.items()}
    one = small_split(1, "server")
    snip_scores(task, params, one, every(task))
    flow_scores(task, params, every(task))
    assert all(torch.equal(before[n], params[n]) and not params[n].requires_grad for n in params)
    assert all(torch.equal(before[n], t) for n, t in task.init_params().items())


def test_snip_keeps_the_largest_saliency_of_all_layers_together() -> None:
    task = residual("batch")
    state = found("snip", task, density=0.05)
    scores = by_mask_variables(task, task.init_params(), small_split(12, "server"), every(task))
    flat = torch.cat(list(scores.values()))
    total = len(flat)
    limit = flat.sort(descending=True).values[int(0.05 * total) - 1]
    kept = {n: len(at) for n, at in state.shared.mask.items()}
    assert sum(kept.values()) == int(0.05 * total)
    for name, s in scores.items():
        assert abs(kept[name] - max(1, int((s >= limit).sum()))) <= 1  # rounding near the limit
    assert len({round(kept[n] / s.numel(), 3) for n, s in scores.items()}) > 5  # densities differ


def test_several_steps_score_without_what_is_pruned() -> None:
    once, five = (found("snip", residual("batch"), density=0.02, steps=steps).shared for steps in (1, 5))
    assert sum(map(len, once.mask.values())) == sum(map(len, five.mask.values()))
    assert any(not torch.equal(once.mask[n], five.mask[n]) for n in once.mask)


# --- SynFlow ---------------------------------------------------------------------------------------------------------


def test_flow_through_two_linear_layers_is_known_in_closed_form() -> None:
    """R = sum over k, j, i of |C_kj| |B_ji| |A_i.| 1; score of A_ji: |A_ji| times what leaves j."""
    task = chain(3, 4, 2, 5)
    params = task.init_params()
    a, b, c = (params[f"fc{i}.weight"].double().abs() for i in range(3))
    inside, out = a.sum(1), c.sum(0)  # (4,), (2,)
    scores = flow_scores(task, params, every(task))
    assert torch.allclose(scores["fc0.weight"].view(4, 3), a * (b.t() @ out)[:, None])
    assert torch.allclose(scores["fc1.weight"].view(2, 4), b * out[:, None] * inside[None])
    assert scores["fc0.weight"].dtype == torch.float64 and set(scores) == {"fc0.weight", "fc1.weight"}


def conserving(task: Task) -> Mapping[str, Tensor]:
    return flow_scores(task, task.init_params(), every(task))


@pytest.mark.parametrize("bias", [False, True])
def test_every_layer_carries_the_whole_flow(bias: bool) -> None:
    sums = [float(s.sum()) for s in conserving(chain(6, 9, 5, 7, 4, bias=bias)).values()]
    assert len(sums) == 3 and sums == pytest.approx([sums[0]] * 3, rel=1e-12)


def test_every_unit_hands_on_what_it_gets() -> None:
    scores = conserving(chain(6, 9, 5, 4, bias=True))
    into, out = scores["fc0.weight"].view(9, 6).sum(1), scores["fc1.weight"].view(5, 9).sum(0)
    assert torch.allclose(into, out, rtol=1e-12)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_flow_passes_norms_and_shortcuts(norm: str) -> None:
    scores = conserving(residual(norm))
    assert all(bool((s >= 0).all() and s.any() and torch.isfinite(s).all()) for s in scores.values())
    dead = {name.split(".")[0] for name, s in scores.items() if not bool(s.all())}
    assert dead == {"layer4"}  # of 1x1 images: all taps but one see the padding alone


def test_a_deep_network_does_not_leave_the_range_of_numbers() -> None:
    task = chain(64, *[64] * 30, 4)
    with torch.no_grad():
        for weight in task.model.parameters():
            weight.mul_(30.0)  # the flow is about 120 ** 30, beyond float32
    assert float(sum(s.sum() for s in conserving(task).values())) > 1e38
    assert sum(map(len, found_mask(task, "synflow", density=0.05, steps=4).values())) == int(0.05 * 30 * 64 * 64)


def found_mask(task: Task, name: str, **hyper: Any) -> Mask:
    strategy, _ = halves(name, **hyper)
    state = strategy.init(task, [Device(0)])
    assert isinstance(state, MaskedState)
    return state.shared.mask


def narrow_in_the_middle() -> Task:
    """Layers of very different sizes, and so of magnitudes: the wide one in front has the smallest weights."""
    task = chain(20, 200, 200, 20, 20, 4)
    with torch.no_grad():
        for i, weight in enumerate(task.model.parameters()):
            weight.mul_(0.02 if i == 1 else 1.0)
    return task


def test_no_layer_collapses_where_magnitude_in_one_shot_empties_one() -> None:
    task = narrow_in_the_middle()
    params, sizes = task.init_params(), prunable(task).sizes
    budget = int(0.01 * sum(sizes.values()))
    flat = torch.cat([params[n].flatten().abs() for n in sizes])
    limit = flat.sort(descending=True).values[budget - 1]
    assert not bool((params["fc1.weight"].abs() >= limit).any())  # of 40,000 weights none is left
    mask = found_mask(task, "synflow", density=0.01)
    assert sum(map(len, mask.values())) == budget
    assert min(map(len, mask.values())) > 10  # not only the one that is kept in any case
    sums = [float(s.sum()) for s in flow_scores(task, params, mask).values()]
    assert sums[0] > 0 and sums == pytest.approx([sums[0]] * len(sums), rel=1e-9)  # and it still conserves the flow
    shot = found_mask(task, "synflow", density=0.01, steps=1)
    assert any(not torch.equal(mask[n], shot[n]) for n in mask)


def test_magnitudes_alone_count_and_the_signs_stay() -> None:
    task, other = chain(8, 16, 16, 4), chain(8, 16, 16, 4)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.abs_()
    first, second = (found("synflow", t, density=0.2) for t in (task, other))
    assert all(torch.equal(first.shared.mask[n], second.shared.mask[n]) for n in first.shared.mask)
    assert bool((first.params["fc0.weight"] < 0).any())


# --- SSFL ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [norm_task, lambda: residual("batch")], ids=["chain", "residual"])
def test_with_one_client_it_is_snip_on_its_data(task: Any) -> None:
    the_task, client = task(), small_clients(3)[2]
    ssfl, half = halves("ssfl", batch_size=128, score_batches=0)
    state = ssfl.init(the_task, [client.device])
    after = ssfl.reduce(the_task, state, [Reply(client.device, scored(ssfl, half, the_task, state, client))])
    snip, _ = halves("snip")
    snip.server_data = client.train
    assert digest(after, {}) == digest(snip.init(the_task, [client.device]), {})


def test_the_mask_is_that_of_the_mean_weighted_by_examples() -> None:
    task, clients = residual("batch"), small_clients(3)
    strategy, half = halves("ssfl", batch_size=8, density=0.1)
    state = strategy.init(task, [c.device for c in clients])
    replies = [Reply(c.device, scored(strategy, half, task, state, c)) for c in clients]
    assert [r.weight for r in replies] == [11, 16, 21] and all(r.packet.scalars["samples"] == 8 for r in replies)
    names = list(prunable(task).sizes)
    mean = {n: sum(r.weight * r.packet.tensors[n].double() for r in replies) / 48 for n in names}
    expected = largest_together({n: s.float() for n, s in mean.items()}, int(0.1 * sum(map(len, mean.values()))))
    after = strategy.reduce(task, state, iter(replies))
    assert isinstance(after, MaskedState)
    masked = {n: at for n, at in expected.items() if len(at) < prunable(task).sizes[n]}
    assert after.shared.mask.keys() == masked.keys() and len(masked) > 15
    assert all(torch.equal(after.shared.mask[n], at) for n, at in masked.items())
    assert all(torch.equal(after.params[n], task.init_params()[n].flatten()[at.long()]) for n, at in masked.items())
    alone = strategy.reduce(task, state, iter(replies[:1]))
    assert isinstance(alone, MaskedState)
    assert digest(alone, {}) != digest(after, {})


def test_scores_are_of_so_many_batches() -> None:
    client = small_clients(4)[3]  # 26 examples
    seen = {}
    for count in (0, 1, 2, 9):
        half = SsflClient(batch_size=8, score_batches=count)
        seen[count] = half._examples(client.train, torch_rng(1))
    assert {count: len(data) for count, data in seen.items()} == {0: 26, 1: 8, 2: 16, 9: 26}
    assert len({tuple(x.flatten().tolist()) for x in seen[2].x}) == 16  # without replacement
    assert torch.equal(seen[9].x, client.train.x)


def test_the_exchange_before_round_one_is_accounted() -> None:
    task = norm_task()
    _, memories, reports = run_method("ssfl", task, rounds=2)
    assert [(r["stage"], r["round"]) for r in reports] == [("score", 0), ("train", 1), ("train", 2)]
    assert reports[0]["accuracy"] is None and reports[1]["accuracy"] is not None
    layers, size = prunable(task).layers, prunable(task).sizes["fc1.weight"]
    dense = sum(t.nbytes for t in task.init_params().values())
    for row in reports[0]["rows"]:
        assert dense < row["bytes_down"] < dense + 2500 and 4 * size < row["bytes_up"] < 4 * size + 1500
        assert row["flops"] == train_flops(layers, 8) and row["density_true"] == row["density_nominal"] == 1.0
        assert row["memory"] == memory_bytes(layers, 8, decision=8 * size).total
        assert row["loss"] is None
    for report in reports[1:]:
        rows = [row for row in report["rows"] if row["bytes_up"] is not None]
        assert all(row["density_nominal"] == pytest.approx(0.1, abs=1e-4) for row in rows)
        assert all(row["bytes_up"] < 0.3 * dense for row in rows)
    assert all(m.keys() == {"version", "mask/fc1.weight"} for m in memories.values())


def test_after_the_scores_it_is_fedavg_on_the_mask() -> None:
    """The same rounds as those of another method that starts with SSFL's mask."""
    task, client = norm_task(), small_clients(3)[2]
    strategy, half = halves("ssfl", batch_size=8)
    state = strategy.init(task, [client.device])
    state = strategy.reduce(task, state, [Reply(client.device, scored(strategy, half, task, state, client))])
    packet = strategy.broadcast(state, client.device)
    _, plain = halves("fixed_mask", batch_size=8)
    ours, memory = half.train(task, client, packet, {}, torch_rng(5))
    theirs, _ = plain.train(task, client, packet, {}, torch_rng(5))
    assert ours.scalars == theirs.scalars
    assert all(torch.equal(ours.tensors[n], theirs.tensors[n]) for n in ours.tensors)
    after = strategy.reduce(task, state, [Reply(client.device, ours)])
    later = strategy.broadcast(after, client.device)
    assert not [n for n in later.tensors if n.startswith("mask/")]  # values alone
    assert torch.equal(receive(task, later, memory).mask["fc1.weight"], memory["mask/fc1.weight"])


# --- all three -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", NAMES)
def test_at_density_one_it_is_fedavg(name: str, task: str) -> None:
    avg, _, first = run_method("fedavg", TASKS[task](), rounds=2, **ALL)
    full, memories, second = run_method(name, TASKS[task](), rounds=2, density=1.0, **ALL)
    assert digest(avg.state, {}) == digest(full.state, {}) and not memories
    assert [(r["accuracy"], r["flops"], r["round"]) for r in first] == [
        (r["accuracy"], r["flops"], r["round"]) for r in second
    ]


def test_a_model_without_a_hidden_layer_is_dense_or_refused() -> None:
    for name in NAMES:
        strategy, _ = halves(name, density=1.0)
        state = strategy.init(small_task("logistic"), [Device(0)])
        assert isinstance(state, MaskedState) and not state.shared.mask and state.stage == "train"
        strategy, _ = halves(name)
        with pytest.raises(UserError, match="the model has nothing to prune"):
            strategy.init(small_task("logistic"), [Device(0)])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", ["global", "uniform", "erk"])
@pytest.mark.parametrize("kind", ["nominal", "true"])
def test_the_density_is_met_exactly_and_exempt_layers_stay_dense(name: str, family: str, kind: str) -> None:
    task = residual("batch")
    how = {"steps": 3} if name == "synflow" else {}
    state = found(name, task, density=0.1, density_kind=kind, layer_densities=family, **how)
    model, mask = prunable(task), state.shared.mask
    kept = sum(len(mask[n]) if n in mask else size for n, size in model.sizes.items())
    total = sum(model.sizes.values())
    assert kept == (int(0.1 * total) if kind == "nominal" else int(0.1 * model.total) - model.dense)
    assert min(map(len, mask.values())) >= 1
    assert not {"conv1.weight", "output.weight", "bn1.weight"} & set(mask)
    assert all(bool((at[1:] > at[:-1]).all()) and int(at[-1]) < model.sizes[n] for n, at in mask.items())
    if family == "uniform" and kind == "nominal":
        assert all(abs(len(at) / model.sizes[n] - 0.1) < 1 / model.sizes[n] + 1e-3 for n, at in mask.items())


@pytest.mark.parametrize("name", NAMES)
def test_the_smallest_density_keeps_a_weight_a_layer(name: str) -> None:
    task = chain(12, 40, 40, 4)
    size = sum(prunable(task).sizes.values())
    data = Split(torch.randn(9, 12, generator=torch_rng(1)), torch.arange(9) % 4)
    strategy, half = halves(name, density=2 / size + 1e-6)
    strategy.server_data = data
    state = strategy.init(task, [Device(0)])
    if state.stage == "score":
        client = Client(Device(0), data, data, data)
        state = strategy.reduce(task, state, [Reply(client.device, scored(strategy, half, task, state, client))])
    assert isinstance(state, MaskedState)
    assert [len(at) for at in state.shared.mask.values()] == [1, 1]


@pytest.mark.parametrize("name", NAMES)
def test_one_digest_for_any_number_of_workers(name: str) -> None:
    digests = set()
    for workers in (1, 2):
        strategy, memories, _ = run_method(name, norm_task(), workers=workers, rounds=2, density=0.05)
        digests.add(digest(strategy.state, memories))
    assert len(digests) == 1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("snip", {"density": -0.5}, r"density must be in \(0, 1\], or 0 for what the budgets allow, got -0.5"),
        ("synflow", {"density_kind": "real"}, "unknown density_kind 'real'"),
        ("ssfl", {"layer_densities": "globally"}, "unknown layer_densities 'globally'; did you mean 'global'"),
        ("fixed_mask", {"layer_densities": "global"}, "unknown layer_densities 'global'"),
        ("synflow", {"steps": 0}, "steps must be above 0, got 0"),
        ("snip", {"steps": -1}, "steps must be above 0, got -1"),
        ("ssfl", {"score_batches": -1}, "score_batches must be at least 0, got -1"),
        ("snip", {"score_batches": 1}, "unknown hyper-parameter of snip 'score_batches'"),
    ],
)
def test_bad_hyper_parameters_are_refused(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(load_method(name), hyper)


@pytest.mark.parametrize("name", NAMES)
def test_a_density_that_is_not_possible_names_the_smallest(name: str) -> None:
    strategy, _ = halves(name, density=0.01, density_kind="true")
    with pytest.raises(UserError, match=r"true density 0.01 is below the smallest possible one, 0.024908 "):
        strategy.init(norm_task(), [Device(0)])


def test_snip_without_examples_says_where_to_get_them() -> None:
    strategy = build(load_method("snip"), {})
    with pytest.raises(UserError, match=r"snip needs examples that the server keeps; set partition\.holdout"):
        strategy.init(norm_task(), [Device(0)])


def test_synflow_of_tokens_is_refused() -> None:
    task = small_task()
    task.vocabulary = 9
    with pytest.raises(UserError, match="SynFlow needs numeric inputs"):
        flow_scores(task, task.init_params(), {})


def test_a_dead_network_is_refused() -> None:
    task = chain(5, 6, 4)
    with torch.no_grad():
        task.model.get_submodule("fc1").weight.zero_()
    strategy, _ = halves("synflow")
    with pytest.raises(UserError, match="the scores of all weights are 0"):
        strategy.init(task, [Device(0)])


def test_where_all_fail_the_first_failure_is_named() -> None:
    """Of FedTiny's exchanges before round 1 too."""
    task, clients = norm_task(), small_clients(3)
    clients = tuple(replace(c, train=Split(c.train.x[:0], c.train.y[:0])) for c in clients)
    for name, stage, message in (
        ("ssfl", "score", "there are no examples to score weights with"),
        ("fedtiny", "calibrate", "the development set is empty"),
    ):
        strategy, _ = halves(name)
        with LocalGrid(client_app(task, clients.__getitem__), 3, own_replies=False) as grid:
            plan = Plan(on_client_error="skip")
            rounds = strategy.rounds(grid, 1, task=task, devices=[c.device for c in clients], plan=plan)
            with pytest.raises(ClientError, match=f"client 0, round 0, stage {stage}: {message}"):
                next(rounds)


def test_scores_below_0_are_refused() -> None:
    task = norm_task()
    strategy, _ = halves("ssfl")
    state = strategy.init(task, [Device(0)])
    scores = {name: torch.zeros(n) for name, n in prunable(task).sizes.items()}
    assert not strategy.complaint(task, state, Reply(Device(0), Packet("scores", scores)))
    scores["fc1.weight"][3] = -1e-3
    assert (
        strategy.complaint(task, state, Reply(Device(0), Packet("scores", scores)))
        == "the scores of 'fc1.weight' must be at least 0"
    )


@pytest.mark.parametrize("case", ["nan", "empty"])
def test_data_that_give_no_scores_name_the_client(case: str) -> None:
    task, clients = norm_task(), list(small_clients(3))
    old = clients[1].train
    bad = Split(old.x * math.nan, old.y) if case == "nan" else Split(old.x[:0], old.y[:0])
    clients[1] = replace(clients[1], train=bad)
    strategy, _ = halves("ssfl")
    message = "tensor 'fc1.weight' is not finite" if case == "nan" else "there are no examples to score weights with"
    with LocalGrid(client_app(task, clients.__getitem__), 3, own_replies=False) as grid:
        rounds = strategy.rounds(grid, 1, task=task, devices=[c.device for c in clients])
        with pytest.raises(ClientError, match=f"client 1, round 0, stage score: {message}"):
            next(rounds)


def test_ssfl_refuses_clients_that_may_not_hold_the_dense_model_before_they_work() -> None:
    task, devices = norm_task(), [Device(i, Budget(density=1.0 if i else 0.5)) for i in range(4)]
    strategy, _ = halves("ssfl", density=0.1)
    with pytest.raises(UserError, match=r"client 0, round 0: density 1 exceeds its budget 0.5 "):
        strategy.foresee(task, devices, Plan())
    strategy.foresee(task, devices, Plan(on_over_budget="record"))
    strategy.foresee(task, devices[1:], Plan())
    strategy.foresee(task, devices, Plan(novel=(0,)))  # it is onboarded with the sparse model
