"""Runs cells in a real IPython kernel, as a notebook does. The kernel and its client are in a program of their own.

    python notebook.py < CELLS: a list of texts, as JSON. Prints a list of what each cell has shown.

A cell that prints INTERRUPT is interrupted then, as by the button of a notebook.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

INTERRUPT = "interrupt me"
SECONDS = 40.0


def shown(cells: list[str], folder: Path) -> list[str]:
    """Gives what each cell shows: what it prints, and the traceback if it raises."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cells),
        cwd=folder,
        env=os.environ | {f"JUPYTER_{name}_DIR": str(folder / "jupyter") for name in ("RUNTIME", "CONFIG", "DATA")},
        capture_output=True,
        text=True,
        timeout=SECONDS * 1.2,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def main() -> None:
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        results = []
        for cell in json.load(sys.stdin):
            texts: list[str] = []

            def show(message: dict, texts: list[str] = texts) -> None:
                content = message["content"]
                if message["msg_type"] == "stream":
                    texts.append(content["text"])
                    if INTERRUPT in content["text"]:
                        manager.interrupt_kernel()
                elif message["msg_type"] == "error":
                    texts.append("\n".join(content["traceback"]))
                elif message["msg_type"] == "execute_result":
                    texts.append(content["data"]["text/plain"])

            client.execute_interactive(cell, output_hook=show, timeout=SECONDS, store_history=True)
            results.append("".join(texts).strip())
        print(json.dumps(results))
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


if __name__ == "__main__":
    main()
