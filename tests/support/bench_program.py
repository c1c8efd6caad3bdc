"""bin/qjam-bench as a program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).parents[2] / "bin" / "qjam-bench"


def bench(*words: str, folder: Path, status: int = 0) -> tuple[str, str, dict[str, Any]]:
    """Gives what a run prints, complains of, and keeps as JSON."""
    kept = folder / "figures.json"
    command = [sys.executable, "-W", "error", PROGRAM, *words, *(["--json", kept] if status == 0 else [])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout, done.stderr, json.loads(kept.read_text()) if status == 0 else {}
