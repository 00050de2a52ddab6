"""The Ray engine on a cluster of two nodes, one of which is lost in the middle of a round."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import ray

from fedsparse.engine.local import LocalGrid
from fedsparse.engine.ray import RayGrid
from fedsparse.errors import UserError
from tests.test_engine_ray import CLIENTS, app, end_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of Ray's own


@pytest.fixture
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    ray.shutdown()
    made.shutdown()


def test_a_node_is_lost_in_mid_round(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    node = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    taken: list[int] = []
    plain = RayGrid._take

    def take(self: RayGrid, *args: Any) -> None:
        taken.append(1)
        if len(taken) == 12:  # a few answers of the second round have come, others have not
            cluster.remove_node(node, allow_graceful=False)
        plain(self, *args)

    monkeypatch.setattr(RayGrid, "_take", take)
    with RayGrid(app, CLIENTS, workers=3, own_replies=False, address=cluster.address) as grid:
        found = end_of("pfedgate", grid)
        assert grid.lost  # workers of that node
    assert found == end_of("pfedgate", LocalGrid(app(), CLIENTS, own_replies=False))


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    with pytest.raises(UserError, match="engine 'ray', address '127.0.0.1:1': no cluster answers there"):
        RayGrid(app, 2, address="127.0.0.1:1")
