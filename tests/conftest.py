"""One thread per test process, as in every client computation; figures of this machine go to a folder of the tests."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("no deadline", deadline=None)  # tests are not timed: the machine may be busy
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _seed_of_the_tests() -> None:
    torch.manual_seed(0)  # models that a test builds itself start from the same values in whatever order tests run


@pytest.fixture(autouse=True, scope="session")
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["FEDSPARSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
