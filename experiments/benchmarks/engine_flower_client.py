"""The client half of the Flower runner of ``engine.py``: a module of its own, since Ray's workers import it."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp


@lru_cache(maxsize=2)
def _held(workload: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Model and data, made once per worker."""
    import engine

    torch.set_num_threads(1)
    work = engine.WORKLOADS[workload]
    return (engine.make_task(work).model, *engine.make_data(work))


def make_app(workload: str) -> ClientApp:
    """A plain ClientApp: load, three SGD steps, send back."""
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import engine

        model, xs, ys = _held(workload)
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        optimizer = torch.optim.SGD(model.parameters(), lr=engine.LR)
        i = int(context.node_config["partition-id"])
        x, y = xs[engine.rows_of(i)], ys[engine.rows_of(i)]
        server_round = int(message.content["config"]["server-round"])  # type: ignore[arg-type, index]
        rng = engine.torch_rng(engine.SEED, server_round, i, "train")
        for batch in torch.randperm(engine.EXAMPLES, generator=rng).split(engine.BATCH):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": engine.EXAMPLES})
        return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)

    return app
