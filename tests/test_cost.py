"""The cost model against published figures, PyTorch's flop counter and really cut models."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from fedsparse import cost
from fedsparse.cost import Layer
from fedsparse.errors import UserError
from fedsparse.models import build_model

IMAGE = (3, 32, 32)
SAMPLES = 5000 * 5  # of a device of FedTiny's setting: examples x epochs


def layers_of(name: str, shape: tuple[int, ...], classes: int, **options: float) -> tuple[Layer, ...]:
    with torch.device("meta"):
        model = build_model(name, shape, classes, **options)  # type: ignore[arg-type]
    return cost.trace(model, shape)


LENET = layers_of("lenet", IMAGE, 10)


@pytest.fixture(scope="module")
def resnet() -> tuple[Layer, ...]:
    return layers_of("resnet18", IMAGE, 10)


def mask(layers: tuple[Layer, ...], density: float) -> dict[str, tuple[float, float]]:
    """The same density in every layer but the first convolution and the classifier."""
    exempt = cost.exempt_layers(layers)
    return {layer.name: (density, 1.0) for layer in layers if layer.weights and layer.name not in exempt}


# ------------------------------------------------------------------------------------------------- tracing


@pytest.mark.parametrize(
    ("name", "shape", "classes", "width", "parameters", "macs"),
    [
        ("resnet18", IMAGE, 10, 1, 11_173_962, 555_422_720),
        ("resnet18", IMAGE, 10, 0.25, 701_466, 35_046_656),
        # the specification's 272,343,040 has the head of 119,578,624 weights; the small head has 199,168
        ("vgg11", IMAGE, 10, 1, 9_425_674, 272_343_040 - 119_578_624 + 199_168),
        ("leafcnn1", (1, 28, 28), 62, 1, 2_278_334, 5_961_728),
        ("lenet", IMAGE, 10, 1, 256_830, 7_204_520),
        ("leafcnn3", IMAGE, 100, 1, 3_537_444, 10_483_200),
    ],
)
def test_counts_of_the_specifications(
    name: str, shape: tuple[int, ...], classes: int, width: float, parameters: int, macs: int
) -> None:
    layers = layers_of(name, shape, classes, width=width)
    assert cost.trainable_count(layers) == parameters
    assert cost.forward_macs(layers) == macs


def test_a_conv_layer_against_loops() -> None:
    model = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    macs = sum(
        1 for _out in range(6) for _in in range(4 // 2) for _k in range(9) for _row in range(4) for _col in range(5)
    )
    (layer,) = cost.trace(model, (4, 7, 9))
    assert layer == Layer(
        "", "conv", "weight", 108, 6, units_in=4, units_out=6, macs=macs, activations=6 * 4 * 5, first=True, calls=1
    )


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp", (43,)), ("logistic", (43,)), ("lenet", IMAGE), ("cnn1d", (6, 125)), ("resnet18", IMAGE), ("vgg11", IMAGE)],
)
def test_exact_flops_are_those_that_pytorch_counts(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(name, shape, 10, width=0.25)
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(2, *shape))
        forward = counter.get_total_flops()
        logits.sum().backward()
    layers = cost.trace(model, shape)
    assert 2 * 2 * cost.forward_macs(layers) == forward
    assert cost.train_flops(layers, 2) == counter.get_total_flops()


def test_a_model_of_tokens() -> None:
    layers = cost.trace(build_model("charlstm", (5,), 7, vocabulary=7), (5,), tokens=True)
    embedding, lstm, output = layers
    weights = 4 * 256 * (8 + 256) + 4 * 256 * (256 + 256)
    assert (embedding.kind, embedding.weights, embedding.macs) == ("embedding", 7 * 8, 0)
    assert (lstm.kind, lstm.weights, lstm.macs) == ("lstm", weights, 5 * weights)
    assert lstm.biases == 2 * 2 * 4 * 256  # PyTorch has two bias vectors a layer
    assert output.macs == 256 * 7  # of the last step only
    assert not any(layer.first for layer in layers)
    assert cost.exempt_layers(layers) == ("embedding", "output")


def test_tracing_leaves_the_model_alone() -> None:
    model = build_model("resnet18", (1, 8, 8), 4, width=0.1).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    cost.trace(model, (1, 8, 8))
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


class Siamese(nn.Module):
    """One linear layer used twice, a tied output and a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.shared.weight
        self.unused = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tied(self.shared(self.shared(x)))
        return out


def test_layers_that_are_shared_tied_or_unused() -> None:
    shared, tied, unused = cost.trace(Siamese(), (4,))
    assert (shared.weights, shared.macs, shared.first) == (16, 32, False)
    assert (tied.weights, tied.macs) == (0, 16)
    assert (unused.weights, unused.biases, unused.macs) == (8, 2, 0)
    assert cost.trainable_count((shared, tied, unused)) == 16 + 10


def test_a_model_without_parameters_costs_nothing() -> None:
    layers = cost.trace(nn.Flatten(), (2, 3))
    assert layers == ()
    assert cost.forward_macs(layers) == cost.train_flops(layers, 9) == cost.kept_count(layers) == 0
    assert cost.nominal_density(layers) is None
    assert cost.memory_bytes(layers, 1).total == 0


class Asserting(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 7, "seven features are needed"
        return super().forward(x)


def test_an_input_that_does_not_fit() -> None:
    with pytest.raises(UserError, match=r"does not run on inputs of shape \(5,\): seven features are needed"):
        cost.trace(Asserting(7, 2), (5,))
    with pytest.raises(UserError, match=r"does not run on inputs of shape \(5,\)"):
        cost.trace(nn.Linear(4, 2), (5,))


# ------------------------------------------------------------------------------------------- layers without a formula


class Functional(nn.Module):
    """Uses its parameters, those of a dict and those of a child that never runs; (4,) -> (6,)."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(8, 4))
        self.scale = nn.Parameter(torch.ones(8))
        self.table = nn.ParameterDict({"mix": nn.Parameter(torch.ones(8, 8)), "shift": nn.Parameter(torch.ones(8))})
        self.lent = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x @ self.own.T * self.scale) @ self.table["mix"].T + self.table["shift"]
        return functional.linear(hidden, self.lent.weight, self.lent.bias)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, x)


class Attention(nn.Module):
    """Holds no parameter itself: scores and means of values are products of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.output = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mean = functional.scaled_dot_product_attention(q, k, v)
        return self.output(mean.mean(1))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)


FOREIGN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "attention": (encoder_layer, (5, 8)),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=False), (5, 8)),
    "functional": (Functional, (4,)),
    "scores": (lambda: nn.Sequential(nn.RMSNorm(8), Attention()), (5, 8)),
    "transposed": (lambda: nn.Sequential(nn.Conv1d(3, 4, 2), nn.ConvTranspose1d(4, 2, 3)), (3, 6)),
    "cell": (lambda: nn.GRUCell(4, 3), (4,)),
    "bilinear": (Bilinear, (4,)),
    "rms": (lambda: nn.Sequential(nn.Linear(4, 3), nn.RMSNorm(3), nn.PReLU()), (4,)),
}


def counted(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Flops of one example by PyTorch's counter, with attention in parts."""
    attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    mapping = {torch.ops.aten._trilinear: lambda a, w, *_, **__: 2 * a[0] * math.prod(w)}  # which it does not know
    with attention, FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model.train()(torch.zeros(1, *shape))
    return counter.get_total_flops()


@pytest.mark.parametrize("name", list(FOREIGN))
@pytest.mark.parametrize("frozen", [False, True])
def test_unknown_modules_cost_what_pytorch_counts(name: str, frozen: bool) -> None:
    build, shape = FOREIGN[name]
    model = build().requires_grad_(not frozen)
    layers = cost.trace(model, shape)
    assert 2 * cost.forward_macs(layers) == counted(model, shape) > 0
    assert cost.trainable_count(layers) == (0 if frozen else sum(p.numel() for p in model.parameters()))
    names = [name for name, _ in model.named_modules()]
    assert [layer.name for layer in layers] == sorted((layer.name for layer in layers), key=names.index)


def test_no_layer_of_an_encoder_is_counted_twice() -> None:
    """in_proj is held by the attention, out_proj by a child that it never calls; both share what it computes."""
    length, width, hidden = 5, 8, 16
    layers = {layer.name: layer for layer in cost.trace(encoder_layer(), (length, width))}
    attention, out = layers["self_attn"], layers["self_attn.out_proj"]
    assert (attention.kind, attention.weights, attention.biases) == ("other", 3 * width * width, 3 * width)
    assert (attention.weight_name, attention.units_in, attention.units_out) == (
        "self_attn.in_proj_weight", width, 3 * width,
    )  # fmt: skip
    assert (out.kind, out.weights, out.biases) == ("linear", width * width, width)
    scores = 2 * length * length * width
    assert attention.macs + out.macs == 4 * width * width * length + scores
    assert attention.macs == 3 * out.macs
    assert attention.activations == length * width
    assert layers["linear1"].macs == layers["linear2"].macs == length * width * hidden
    assert not any(layer.first for layer in (attention, out))


def test_parameters_that_are_used_without_a_call() -> None:
    layers = cost.trace(Functional(), (4,))
    assert [(la.name, la.kind, la.weights, la.biases, la.macs) for la in layers] == [
        ("", "other", 32, 8, 32),
        ("table", "other", 64, 8, 64),
        ("lent", "linear", 48, 6, 48),
    ]


def test_products_of_activations_stand_in_a_layer_without_weights() -> None:
    layers = cost.trace(nn.Sequential(nn.RMSNorm(8), Attention()), (5, 8))
    assert [(la.name, la.weights, la.biases, la.macs) for la in layers] == [
        ("0", 0, 8, 0),
        ("1", 0, 0, 2 * 5 * 5 * 8),
        ("1.qkv", 8 * 24, 24, 5 * 8 * 24),
        ("1.output", 16, 2, 16),
    ]
    assert cost.model_bytes(layers) == 4 * cost.trainable_count(layers)


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(input=x)


def test_an_input_by_keyword() -> None:
    (layer,) = cost.trace(Keyword(), (4,))
    assert (layer.macs, layer.first) == (12, True)


class Packed(nn.Module):
    """An LSTM over a packed sequence; (6, 4) -> (3,)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.full((len(x),), x.shape[1]), batch_first=True)
        return self.lstm(packed)[1][0][-1]


def test_a_packed_sequence() -> None:
    (layer,) = cost.trace(Packed(), (6, 4))
    assert (layer.macs, layer.activations) == (6 * 4 * 3 * (4 + 3), 6 * 3)


def test_the_counter_does_not_run_for_known_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first operation takes 1.7 seconds."""
    monkeypatch.delattr("torch.utils.flop_counter.FlopCounterMode")
    assert cost.trace(build_model("resnet18", (1, 8, 8), 4, width=0.1), (1, 8, 8))
    with pytest.raises(ImportError):
        cost.trace(nn.GRUCell(4, 3), (4,))


# ----------------------------------------------------------------------------------------------- multiply-adds


def test_the_dense_round_of_fedtiny(resnet: tuple[Layer, ...]) -> None:
    assert cost.train_flops(resnet, SAMPLES, convention="paper") == pytest.approx(8.331e13, rel=1e-4)


@pytest.mark.parametrize(
    ("density", "ratio", "flops"),
    [
        (0.1, 0.1029, 8.571e12),
        (0.05, 0.0530, 4.419e12),
        (0.01, 0.0132, 1.097e12),
        (0.005, 0.0082, 6.81e11),
        (0.003, 0.0062, 5.2e11),
        (0.001, 0.0042, 3.49e11),
    ],
)
def test_the_cost_table_of_fedtiny(resnet: tuple[Layer, ...], density: float, ratio: float, flops: float) -> None:
    cut = mask(resnet, density)
    assert cost.forward_macs(resnet, cut) / cost.forward_macs(resnet) == pytest.approx(ratio, abs=6e-5)
    assert cost.train_flops(resnet, SAMPLES, cut, "paper") == pytest.approx(flops, rel=1e-2)


@given(st.floats(0, 1), st.floats(0, 1))
def test_exact_is_at_most_paper_and_grows_with_density(a: float, b: float) -> None:
    layers = LENET
    flops = {d: cost.train_flops(layers, 10, {"conv1": (d, d), "conv2": (d, 1), "fc1": (d, 1)}) for d in (a, b)}
    assert flops[a] <= cost.train_flops(layers, 10, {"conv1": (a, a), "conv2": (a, 1), "fc1": (a, 1)}, "paper")
    assert (flops[a] <= flops[b]) or a > b


def test_the_difference_is_the_input_gradient_of_the_first_layer() -> None:
    conv1 = LENET[0]
    assert conv1.first
    difference = cost.train_flops(LENET, 7, convention="paper") - cost.train_flops(LENET, 7)
    assert difference == 2 * 7 * conv1.macs


def test_bad_cuts() -> None:
    with pytest.raises(UserError, match="unknown layer 'conv3'; did you mean"):
        cost.forward_macs(LENET, {"conv3": (1, 1)})
    with pytest.raises(UserError, match=r"densities of layer fc1 must be in \[0, 1\], got \(1.5, 1\)"):
        cost.kept_count(LENET, {"fc1": (1.5, 1)})
    with pytest.raises(UserError, match="unknown cost convention 'papers'"):
        cost.train_flops(LENET, 1, convention="papers")


# --------------------------------------------------------------------------------------------------- densities


def small_chain(out1: int, out2: int, out3: int) -> nn.Sequential:
    """conv, batch norm, conv, flatten, fc, output with so many units, on 3x8x8 inputs."""
    model = nn.Sequential()
    model.add_module("conv1", nn.Conv2d(3, out1, 3))
    model.add_module("bn1", nn.BatchNorm2d(out1))
    model.add_module("conv2", nn.Conv2d(out1, out2, 3))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc1", nn.Linear(out2 * 16, out3))
    model.add_module("output", nn.Linear(out3, 5))
    return model


@settings(max_examples=30)
@given(st.integers(1, 7), st.integers(1, 11), st.integers(1, 13))
def test_a_channel_cut_costs_what_the_smaller_model_costs(out1: int, out2: int, out3: int) -> None:
    dense = cost.trace(small_chain(7, 11, 13), (3, 8, 8))
    a, b, c = out1 / 7, out2 / 11, out3 / 13
    cut = {"conv1": (a, a), "bn1": (1.0, a), "conv2": (a * b, b), "fc1": (b * c, c), "output": (c, 1.0)}
    small = cost.trace(small_chain(out1, out2, out3), (3, 8, 8))
    assert cost.kept_count(dense, cut) == cost.trainable_count(small)
    assert cost.forward_macs(dense, cut) == pytest.approx(cost.forward_macs(small), rel=1e-12)
    assert cost.train_flops(dense, 3, cut) == pytest.approx(cost.train_flops(small, 3), rel=1e-12)
    assert cost.model_bytes(dense, cut, structured=True) == cost.model_bytes(small, structured=True)
    ours, theirs = cost.memory_bytes(dense, 4, cut, structured=True), cost.memory_bytes(small, 4, structured=True)
    assert ours.total == pytest.approx(theirs.total, abs=1)


def test_true_and_nominal_density(resnet: tuple[Layer, ...]) -> None:
    for nominal, true in ((0.01, 0.01146), (0.003, 0.00447), (0.001, 0.00247)):  # specification, 2.3
        cut = mask(resnet, nominal)
        assert cost.nominal_density(resnet, cut) == pytest.approx(nominal, rel=1e-3)
        assert cost.true_density(resnet, cut) == pytest.approx(true, abs=6e-6)
    assert cost.exempt_layers(resnet) == ("conv1", "output")
    exempt = dict.fromkeys(mask(resnet, 0), (0.0, 1.0))
    assert cost.true_density(resnet, exempt) == pytest.approx(0.00147, abs=1e-5)


def test_densities_of_extremes() -> None:
    assert cost.true_density(LENET) == cost.nominal_density(LENET) == 1.0
    assert cost.true_density(LENET, extra=256_830) == 2.0  # a gate may be larger than the model
    logistic = layers_of("logistic", (43,), 6)
    assert cost.nominal_density(logistic) is None  # nothing but the classifier
    assert cost.nominal_density(logistic, {"output": (0.5, 1)}, exempt=()) == 0.5


def test_exempt_layers_of_an_mlp_are_its_classifier() -> None:
    assert cost.exempt_layers(layers_of("mlp", (43,), 6)) == ("output",)
    leaf = layers_of("leafcnn1", (1, 28, 28), 62)
    exempt = sum(layer.weights for layer in leaf if layer.name in cost.exempt_layers(leaf))
    assert exempt / cost.trainable_count(leaf) == pytest.approx(0.056, abs=5e-4)


# --------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize(
    ("density", "megabytes"),
    [
        (1, 44.73),
        (0.5, 23.81),
        (0.3, 14.89),
        (0.2, 10.43),
        (0.1, 5.84),
        (0.05, 3.00),
        (0.03, 1.865),
        (0.01, 0.718),
        (0.005, 0.421),
        (0.003, 0.296),
        (0.001, 0.171),
    ],
)
def test_payloads_of_the_specification(resnet: tuple[Layer, ...], density: float, megabytes: float) -> None:
    """All eleven are reproduced: weights in the cheapest format, the rest and batch statistics dense."""
    assert cost.model_bytes(resnet, mask(resnet, density)) / 1e6 == pytest.approx(megabytes, rel=2e-3)


def ceil_log2(n: int) -> int:
    return math.ceil(math.log2(n)) if n else 0


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_storage_is_the_cheapest_of_four(rows: int, cols: int, data: st.DataObject) -> None:
    n, b = rows * cols, 32
    m = data.draw(st.integers(0, n))
    formulas = {
        "dense": n * b,
        "bitmap": n + m * b,
        "coo": m * ceil_log2(n) + m * b,
        "csr": m * b + min(m * ceil_log2(cols) + rows * ceil_log2(m), m * ceil_log2(rows) + cols * ceil_log2(m)),
    }
    storage = cost.storage_bits(n, m, rows, cols)
    assert storage.bits == min(formulas.values()) == formulas[storage.format]


def test_storage_formats_by_density() -> None:
    def best(density: float) -> str:
        n = 512 * 4608
        return cost.storage_bits(n, round(density * n), 512, 4608).format

    assert [best(d) for d in (1.0, 0.5, 0.2, 0.01)] == ["dense", "bitmap", "bitmap", "csr"]
    assert cost.storage_bits(0, 0, 0, 0).bits == 0
    with pytest.raises(UserError, match=r"kept must be in \[0, 4\], got 5"):
        cost.storage_bits(4, 5, 2, 2)


# ---------------------------------------------------------------------------------------------------- memory


def test_memory_of_a_dense_model() -> None:
    report = cost.memory_bytes(LENET, batch=10, optimizer_copies=2, gate=100, decision=77)
    d = 256_830 + 100
    outputs = 32 * 28 * 28 + 64 * 10 * 10 + 120 + 84 + 10
    assert (report.weights, report.gradients, report.optimizer) == (4 * d, 4 * d, 8 * d)
    assert (report.decision, report.activations) == (77, 4 * 10 * outputs)
    assert report.total == 16 * d + 77 + 40 * outputs


def test_memory_column_of_fedrts(resnet: tuple[Layer, ...]) -> None:
    """arXiv 2501.19122 has weights, gradients and one optimiser copy: 134.29 MB dense."""
    report = cost.memory_bytes(resnet, 0, optimizer_copies=1)
    assert report.total / 1e6 == pytest.approx(134.29, rel=2e-3)


@pytest.mark.parametrize("measure", [cost.forward_macs, cost.kept_count, cost.model_bytes])
def test_everything_cut_leaves_nothing_but_counts_of_zero(measure: Callable[..., float]) -> None:
    assert measure(LENET, {layer.name: (0.0, 0.0) for layer in LENET}) == 0
