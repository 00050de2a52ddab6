"""Where models are trained and scored: the CPU, or a GPU through CUDA, in the same bits at every run."""

from __future__ import annotations

import os

import torch

from fedsparse.errors import UserError, unknown

CPU = torch.device("cpu")
DEVICES = ("cpu", "cuda", "auto")


def compute_device(name: str) -> torch.device:
    """The device that a word of :data:`DEVICES` names; "auto" is a GPU where PyTorch sees one.

    For a GPU PyTorch is told to use deterministic operations only, and no TF32, for the rest of the process.
    Raises UserError for "cuda" where there is none.
    """
    if name not in DEVICES:
        raise unknown("device", name, DEVICES)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise UserError('device \'cuda\' needs a GPU that PyTorch sees, and this one sees none; use "cpu" or "auto"')
    _same_bits()
    return torch.device("cuda", torch.cuda.current_device())


def _same_bits() -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS' own condition for the same bits
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
