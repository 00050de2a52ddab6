"""The code in the documentation runs as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_the_plug_in_tutorial_runs(tmp_path: Path) -> None:
    method, model, app, engine = re.findall(r"```python\n(.*?)```", (DOCS / "plugin.md").read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(method)
    (tmp_path / "net.py").write_text(model)
    (tmp_path / "app.py").write_text(app + engine + "print(sorted(result.evaluate_metrics_clientapp))\n")
    command = ["-m", "fedsparse", "run", "--method", "mine.py", "--model", "net.py", "--rounds", "2", "--out", "run"]
    subprocess.run([sys.executable, *command, "--quiet"], cwd=tmp_path, check=True)
    assert (tmp_path / "run" / "summary.json").exists()
    done = subprocess.run([sys.executable, "app.py"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[1, 2, 3]"
