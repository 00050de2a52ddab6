"""The clients of ``flwr run``, of every method: the server's greeting names the experiment."""

from __future__ import annotations

from fedsparse.engine.flower import node_app
from fedsparse.runner import app_of

client_app = node_app(app_of)
