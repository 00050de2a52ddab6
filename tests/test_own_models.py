"""Networks of a user's: found, built, refused with one line, and trained on every engine to one digest."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fedsparse.errors import UserError
from fedsparse.experiment import from_dict
from fedsparse.models import build_model
from fedsparse.runner import federation_of, resume, run
from fedsparse.verify import engines_of, verify
from tests.test_resume import InterruptedRunError, stop_after

NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, input_shape, classes, width=1.0):
        super().__init__()
        channels = 8 * max(1, round(8 * width))
        self.first = nn.Conv2d(input_shape[0], channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, stride=4)
        self.output = nn.Linear(4 * channels, classes)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.output(torch.flatten(torch.relu(self.second(x)), 1))
"""
ODD = """
import torch
from torch import nn
from torch.nn import Linear
from fedsparse.models import build_model

torch.manual_seed(0)
layer, number, table = nn.Linear(2, 2), 3, torch.full((8, 8), 0.5)

def linear(input_shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
def narrow(input_shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes - 1))
def whole(input_shape, classes): return nn.Sequential(nn.Flatten(0), nn.Linear(128, 2 * classes))
def other(input_shape, classes): return nn.Linear(3, classes)
def lazy(input_shape, classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))
def frozen(input_shape, classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes).requires_grad_(False))
def empty(input_shape, classes): return nn.Flatten()
def recurrent(input_shape, classes): return nn.Sequential(nn.Flatten(), nn.LSTM(64, classes))
def text(input_shape, classes): return "a network"
def more(input_shape, classes, depth): return linear(input_shape, classes)
def less(classes): return linear((), classes)
def failing(input_shape, classes): raise LookupError("no\\nweights")
def double(input_shape, classes): return linear(input_shape, classes).double()
def middle(layer, classes): return nn.Sequential(nn.Flatten(), layer, nn.Linear(64, classes))
def cumulative(input_shape, classes): return middle(nn.BatchNorm1d(64, momentum=None), classes)
def normed(input_shape, classes, norm=nn.BatchNorm1d): return middle(norm(64), classes)
def wide(input_shape, classes, width=64): return middle(nn.Linear(64, width), classes)
class Centred(nn.Module):
    def __init__(self, input_shape, classes, width=1.0):
        super().__init__()
        self.hidden, self.output = nn.Linear(64, max(1, int(16 * width))), nn.Linear(max(1, int(16 * width)), classes)
        self.register_buffer("calls", torch.zeros(1))
    def forward(self, x):
        self.calls.add_(1)
        return self.output(self.hidden((x - table).flatten(1)))
class Unused(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.used, self.spare = nn.Linear(64, classes), nn.Linear(64, classes)
    def forward(self, x):
        return self.used(x.flatten(1))
def ours(input_shape, classes): return build_model("cnn", (64,), classes)

class A(nn.Module): pass
class B(nn.Module): pass
"""
SHORT = ["dataset=digits", "partition.clients=3", "rounds=2", "budget.tiers=[0.6, 0.9]", "evaluate.every=2"]
PAPER = ["method.mode=paper", "budget.on_over_budget=record", "method.blocks_per_layer=5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with ``net.py`` and ``odd.py``, and no modules of those names in memory."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "odd.py").write_text(ODD)
    monkeypatch.chdir(tmp_path)
    for name in ("net", "odd", "broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


# --- what is built ---------------------------------------------------------------------------------------------------


def test_a_file_a_module_and_a_function(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("net.py", "net.py:Net", f"{here}/net.py:Net", "net:Net"):  # the last: a file beside
        assert type(build_model(spec, (1, 8, 8), 4)).__name__ == "Net"
    assert isinstance(build_model("odd.py:linear", (1, 8, 8), 4), nn.Sequential)
    (here / "lab").mkdir()
    (here / "lab" / "nets.py").write_text(NET)
    (here / "lab" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(here))
    assert type(build_model("lab.nets", (1, 8, 8), 4)).__module__ == "lab.nets"
    assert type(build_model("lab.nets:Net", (1, 8, 8), 4)).__module__ == "lab.nets"


@pytest.mark.usefixtures("here")
def test_options_go_to_callables_that_know_them() -> None:
    net = build_model("net.py", (1, 8, 8), 4, width=0.5)
    assert net.first.out_channels == 32  # type: ignore[union-attr]
    tokens = "def build(input_shape, classes, vocabulary, norm): return Tokens(vocabulary, classes, norm)"
    code = f"""
from torch import nn

class Tokens(nn.Module):
    def __init__(self, vocabulary, classes, norm):
        super().__init__()
        self.table, self.norm = nn.Embedding(vocabulary, classes), norm

    def forward(self, x):
        return self.table(x).mean(1)

{tokens}
"""
    Path("tokens.py").write_text(code)
    model = build_model("tokens.py:build", (5,), 4, norm="group", vocabulary=7)
    assert (model.norm, model(torch.zeros(3, 5, dtype=torch.int64)).shape) == ("group", (3, 4))


@pytest.mark.usefixtures("here")
def test_the_seed_fixes_the_initial_values() -> None:
    def first(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(seed + 1)  # whatever was drawn before
        return federation_of(from_dict({}, [*SHORT, "model=net.py", f"seed={seed}"])).task.init_params()

    a, b, c = first(3), first(3), first(4)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["first.weight"], c["first.weight"])


@pytest.mark.usefixtures("here")
def test_narrow_narrows_a_model_that_takes_a_width() -> None:
    federation = federation_of(from_dict({}, [*SHORT, "model=net.py", "narrow=parameters", "narrow_to=0.3"]))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (federation.task.model, federation.task.reference)]
    assert 0.1 < sizes[0] / sizes[1] <= 0.3


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere/net.py:build", "model file 'nowhere/net.py' does not exist"),
        ("nowhere.net:build", "model 'nowhere.net': no such module"),
        (":build", "model '' cannot be loaded: ValueError"),
        ("broken.py", "model file 'broken.py' cannot be loaded: SyntaxError"),
        ("broken:build", "model 'broken' cannot be loaded: SyntaxError"),
        ("odd.py", r"'odd.py' must hold one nn.Module class, it holds \['A', .*\]; name .* with odd.py:NAME"),
        ("leaving.py", "model file 'leaving.py' cannot be loaded: SystemExit: 3"),
        ("lacking:build", "model 'lacking' cannot be loaded: No module named 'no_such_package'"),
        ("odd.py:double", "1.weight is torch.float64, parameters must be torch.float32"),
        ("odd.py:Unused", "its output does not depend on the parameters .'spare.weight', 'spare.bias'."),
        ("odd.py:liner", "unknown function or class in model 'odd.py': 'liner'; did you mean 'linear'"),
        ("odd.py:layer", "layer is of type Linear, it must be a function or a class"),
        ("odd.py:number", "number is of type int, it must be a function or a class"),
        ("odd.py:more", r"cannot be called with input_shape=\(1, 8, 8\), classes=4: missing .*'depth'"),
        ("odd.py:less", "cannot be called with .*: got an unexpected keyword argument 'input_shape'"),
        ("odd.py:Linear", "cannot be called with .*: missing a required argument: 'in_features'"),
        ("odd.py:failing", "'odd.py:failing' failed with .*: LookupError: no weights$"),
        ("odd.py:ours", r"'odd.py:ours' failed with .*: model cnn needs images .*, got inputs of shape \(64,\)$"),
        ("odd.py:text", "must give a torch.nn.Module, it gave a str"),
        ("odd.py:empty", "it has no parameters"),
        ("odd.py:lazy", "1.weight has no size before it runs"),
        ("odd.py:narrow", r"it maps inputs of shape \(2, 1, 8, 8\) to \(2, 3\), they must become logits \(2, 4\)"),
        ("odd.py:whole", r"it maps inputs of shape \(2, 1, 8, 8\) to \(8,\), they must"),
        ("odd.py:other", r"it does not run on inputs of shape \(2, 1, 8, 8\): RuntimeError: "),
        ("odd.py:recurrent", r"it gives a tuple, it must give logits of shape \(n, classes\)"),
        ("builtins:zip", "model 'builtins:zip': no signature"),
    ],
)
def test_what_cannot_be_trained_is_one_line(
    spec: str, message: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "broken.py").write_text("def build(:\n")
    (here / "leaving.py").write_text("raise SystemExit(3)\n")
    (here / "lacking.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(here))
    with pytest.raises(UserError, match=message) as caught:
        build_model(spec, (1, 8, 8), 4)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("here")
def test_a_mean_over_all_batches_is_refused() -> None:
    with pytest.raises(UserError, match="layer '1' has momentum = None, a mean over all batches: set a number"):
        run(from_dict({}, [*SHORT, "model=odd.py:cumulative", "method=fedavg"]))


@pytest.mark.usefixtures("here")
def test_defaults_of_its_own_stay() -> None:
    assert build_model("odd.py:wide", (1, 8, 8), 4)[1].out_features == 64  # type: ignore[index, union-attr]
    assert isinstance(build_model("odd.py:normed", (1, 8, 8), 4)[1], nn.BatchNorm1d)  # type: ignore[index]
    with pytest.raises(UserError, match="'odd.py:wide': width is a factor here, 1 = as designed; .* the default 64"):
        build_model("odd.py:wide", (1, 8, 8), 4, width=0.5)


@pytest.mark.usefixtures("here")
def test_what_a_file_draws_and_makes_when_it_is_loaded_does_not_matter() -> None:
    """It is loaded once a process: a second build, and one of another seed, have the same values as a first one."""
    Path("late.py").write_text(ODD)  # loaded first by a build of sizes alone
    narrow = ["model=late.py:Centred", "narrow=parameters", "narrow_to=1.0"]
    first, again, late, other = (
        federation_of(from_dict({}, [*SHORT, "model=odd.py:Centred", "method=fedavg", *more])).task.init_params()
        for more in ([], [], narrow, ["seed=1"])
    )
    assert all(torch.equal(first[name], then[name]) for name in first for then in (again, late))
    assert not torch.equal(first["output.bias"], other["output.bias"])
    assert not first["calls"].any()  # what is tried before the run is a copy


@pytest.mark.usefixtures("here")
def test_a_model_that_is_not_trained_in_full_is_refused() -> None:
    with pytest.raises(UserError, match="frozen parameters are not supported, the model has 2 .*'1.weight'"):
        run(from_dict({}, [*SHORT, "model=odd.py:frozen", "method=fedavg"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["width=0.5"], "'odd.py:linear' takes no 'width', which a width other than 1 and narrow need"),
        (["narrow=parameters", "narrow_to=0.5"], "takes no 'width', which a width other than 1 and narrow need"),
        (["norm=group"], "takes no 'norm', which norm = \"group\" needs"),
    ],
)
@pytest.mark.usefixtures("here")
def test_settings_that_a_model_does_not_know_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        federation_of(from_dict({}, [*SHORT, "model=odd.py:linear", *settings]))


@pytest.mark.usefixtures("here")
def test_tokens_need_a_model_that_takes_their_number() -> None:
    with pytest.raises(UserError, match="takes no 'vocabulary', which data of tokens need"):
        build_model("odd.py:linear", (64,), 4, vocabulary=9)


# --- as a run --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [["method.mode=structural"], PAPER])
def test_pfedgate_trains_it_with_one_digest_and_goes_on(mode: list[str], here: Path) -> None:
    """By a path that is relative to the current folder, as a method's is."""
    made = from_dict({}, [*SHORT, "model=net.py:Net", *mode, "engine.checkpoint_every=1"])
    digests = [digest for _, digest in verify(made, engines_of("local:1,local:2"))]
    with pytest.raises(InterruptedRunError):
        run(made, out=here / "cut", on_round=stop_after(2))
    assert 'model = "net.py:Net"' in (here / "cut" / "config.toml").read_text()
    done = resume(here / "cut", workers=2)
    assert {*digests, done.summary["digest"]} == {digests[0]}
    assert done.summary["model"] == "net.py:Net"
    assert mode == PAPER or 0.3 < done.summary["density"]["true_max"] <= 0.9
