"""Networks in pure torch, built by name, or by a callable of a user's, for an input shape and a number of classes."""

from __future__ import annotations

from fedsparse.models.registry import build_model, model_names

__all__ = ["build_model", "model_names"]
