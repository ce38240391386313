"""JupyterLab for tests: own port, token and settings; it touches nothing of the user's."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 90
SETTINGS = {  # no network, no questions on the first start
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "extensionmanager-extension/plugin": {"enabled": False},
    "docmanager-extension/plugin": {"autosave": False},  # a test saves when it means to
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}


class Lab:
    """A running JupyterLab server on 127.0.0.1.

    Args:
        folder: everything of it stays in here; its `work` is what JupyterLab shows.

    Raises:
        RuntimeError: it did not answer in time; the message holds what it wrote.
    """

    def __init__(self, folder: Path):
        self.work, self.log_path = folder / "work", folder / "lab.log"
        self.work.mkdir(parents=True)
        self.token, self.port = secrets.token_hex(16), _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        with self.log_path.open("w") as log:
            self.process = subprocess.Popen(
                self._command(), cwd=self.work, env=_environment(folder), stdout=log, stderr=log
            )
        self._wait()

    def _command(self) -> list[str]:
        options = {
            "ServerApp.port": self.port,
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": self.work,
            "ServerApp.open_browser": False,
            "ServerApp.allow_root": True,
            "IdentityProvider.token": self.token,
            "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
            "LabApp.expose_app_in_browser": True,
        }
        given = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "jupyterlab", "--ip=127.0.0.1", *given]

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("status")
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.2)
        self.stop()
        raise RuntimeError(f"JupyterLab did not start: {self.log_path.read_text()[-2000:]}")

    def ask(self, path: str, method: str = "GET") -> object:
        """Call the server's REST interface; returns its JSON."""
        request = urllib.request.Request(
            f"{self.url}/api/{path}",
            method=method,
            headers={"Authorization": f"token {self.token}"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            body = answer.read()
        return json.loads(body) if body else None

    def kill_kernels(self) -> None:
        """End every session with its kernel."""
        for session in self.ask("sessions"):
            self.ask(f"sessions/{session['id']}", "DELETE")
        assert self.ask("kernels") == []

    def stop(self) -> None:
        """End the server and its kernels."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def write_notebook(self, name: str, cells: Sequence[str]) -> Path:
        """A notebook of code cells in the work folder."""
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, self.work / name)
        return self.work / name


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(folder: Path) -> Mapping[str, str]:
    settings = folder / "settings"
    for name, content in SETTINGS.items():
        path = settings / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    own = {
        "JUPYTER_CONFIG_DIR": folder / "config",
        "JUPYTER_DATA_DIR": folder / "data",
        "JUPYTER_RUNTIME_DIR": folder / "runtime",
        "JUPYTERLAB_SETTINGS_DIR": settings,
        "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        "IPYTHONDIR": folder / "ipython",
        "JUPYTER_PREFER_ENV_PATH": 1,  # the kernel of this virtual environment
        "PYTHONPATH": ROOT,  # notebooks import the tests' toy models
    }
    return {**os.environ, **{name: str(value) for name, value in own.items()}}
