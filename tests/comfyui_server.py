"""A real ComfyUI, started headless on the CPU from the checkout that COMFYUI_PATH names, and its HTTP API."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

STARTS_WITHIN, RUNS_WITHIN = 300, 1500  # seconds, for a loaded machine of two cores


class ComfyUI:
    """A running server."""

    def __init__(self, address: str, base: Path, log: Path) -> None:
        self.address, self.base, self.log = address, base, log

    def request(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as refusal:
            return json.load(refusal)

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        queued = self.request("/prompt", {"prompt": workflow})
        assert "prompt_id" in queued, queued
        end = time.monotonic() + RUNS_WITHIN
        while time.monotonic() < end:
            if entry := self.request(f"/history/{queued['prompt_id']}").get(queued["prompt_id"]):
                return entry
            time.sleep(0.5)
        raise TimeoutError(f"no end of the workflow in {RUNS_WITHIN} s:\n{self.log.read_text()[-3000:]}")

    def saved(self, entry: dict[str, Any]) -> list[Path]:
        images = [image for output in entry["outputs"].values() for image in output.get("images", [])]
        written = [image for image in images if image["type"] == "output"]
        return [self.base / "output" / image["subfolder"] / image["filename"] for image in written]


@contextmanager
def comfyui(base: Path, python_path: list[Path]) -> Iterator[ComfyUI]:
    """Start a ComfyUI whose folders are in `base`, which holds custom_nodes, and end it again."""
    for name in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / name).mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)  # has ComfyUI's requirements and this package
    command = [python, "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    command += ["--disable-auto-launch", "--disable-api-nodes"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, python_path))}
    log = base / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=os.environ["COMFYUI_PATH"], env=environment, stdout=file, stderr=subprocess.STDOUT
        )
        server = ComfyUI(f"http://127.0.0.1:{port}", base, log)
        try:
            _wait(server, process)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()
            process.wait()


def _wait(server: ComfyUI, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < end and process.poll() is None:
        with suppress(OSError):
            server.request("/system_stats")
            return
        time.sleep(0.5)
    raise RuntimeError(f"ComfyUI did not start (exit status {process.poll()}):\n{server.log.read_text()[-3000:]}")
