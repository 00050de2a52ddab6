"""Puts the experiment files, and only those, into the wheel as ``fedsparse/_experiments``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ExperimentFiles(BuildHookInterface):  # type: ignore[type-arg]
    """An editable install finds ``experiments/`` beside the package and needs no copy."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add every TOML file of ``experiments/`` (not of its subfolders) to a wheel's files."""
        if version == "standard":
            for path in sorted(Path(self.root, "experiments").glob("*.toml")):
                build_data["force_include"][str(path)] = f"fedsparse/_experiments/{path.name}"
