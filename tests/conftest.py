"""One thread per test process, as in every client computation."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
