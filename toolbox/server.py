"""A real ComfyUI in its own process, driven over HTTP and its websocket."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from .environment import PATHS, Environment

IMPORT_FAILURES = ("IMPORT FAILED", "Cannot import", "did not import correctly")
FOLDERS = ("models", "input", "output", "temp", "user/default", "custom_nodes")
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.Workflow.Persist": False}
# No model lookups on the network; waiting threads sleep instead of spinning, for machines with other work to do.
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
START_TIMEOUT = 240.0
FINISHED = ("execution_success", "execution_error", "execution_interrupted")


class PromptError(RuntimeError):
    """The server rejected a prompt, or a node raised. `data` is the server's answer."""

    def __init__(self, message: str, data: dict[str, Any]) -> None:
        super().__init__(message)
        self.data = data

    def sentences(self) -> str:
        """All messages of the server that the user sees."""
        errors = [str(self), str(self.data.get("exception_message", ""))]
        for node in (self.data.get("node_errors") or {}).values():
            errors += [f"{error['message']}: {error['details']}" for error in node["errors"]]
        return "\n".join(errors)


@dataclass
class PromptRun:
    prompt_id: str
    status: str = ""
    events: list[dict[str, Any]] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def of_type(self, kind: str) -> list[dict[str, Any]]:
        return [event["data"] for event in self.events if event["type"] == kind]

    @property
    def executed(self) -> set[str]:
        """The ids of the nodes that ran instead of coming from the cache."""
        return {data["node"] for data in self.of_type("executing") if data.get("node")}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(condition: Callable[[], Any], timeout: float, problem: str) -> Any:
    """Ask until the answer is true, and return it. TimeoutError, with the problem, when it takes too long."""
    end = time.monotonic() + timeout
    while not (answer := condition()):
        if time.monotonic() > end:
            raise TimeoutError(problem)
        time.sleep(0.05)
    return answer


def link_or_copy(source: Path, target: Path) -> None:
    """Link to a folder if the system allows it, else copy it. A link to where a checkout was before is replaced."""
    if target.is_symlink() and target.resolve() != source.resolve():
        target.unlink()
    if target.is_symlink() or target.exists():
        return
    try:
        target.symlink_to(source.resolve(), target_is_directory=True)
    except OSError:
        shutil.copytree(source, target)


class Server:
    """Starts on entering the context and stops on leaving it.

    base: ComfyUI's --base-directory, created if missing. node_folders: the packs, as {name in custom_nodes: folder}.
    models: a second models folder, in addition to base/models. frontend: a page to serve instead of the bundled one.
    """

    def __init__(
        self,
        environment: Environment,
        base: Path,
        node_folders: dict[str, Path],
        models: Path | None = None,
        frontend: Path | None = None,
        port: int | None = None,
        cpu: bool = True,
    ) -> None:
        self.base, self.port = base, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = base / "server.log"
        for name in FOLDERS:
            (base / name).mkdir(parents=True, exist_ok=True)
        for name, folder in node_folders.items():
            link_or_copy(folder, base / "custom_nodes" / name)
        (base / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS))
        page = ["--front-end-root", str(frontend)] if frontend else []
        more: list[str] = []
        if models:  # searched after base/models, where files are saved
            path, own = base / "extra_model_paths.json", base.resolve() / "models"  # JSON is YAML too
            folders = {each.name: f"{own / each.name}\n{each.name}" for each in models.iterdir() if each.is_dir()}
            path.write_text(json.dumps({"more": {"base_path": str(models.resolve()), **folders}}))
            more = ["--extra-model-paths-config", str(path)]
        self._command = [
            *(str(environment.python), "-u", "main.py", "--listen", "127.0.0.1", "--port", str(self.port)),
            *(["--cpu"] if cpu else []),
            *("--base-directory", str(base), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"),
            *("--disable-auto-launch", "--preview-method", "auto", *page, *more),
        ]
        self._folder, self._variables = environment.comfyui, {**QUIET, **environment.variables()}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        try:
            with self.log_path.open("wb") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=self._folder, stdout=log, stderr=log, env=self._variables, start_new_session=True
                )
            wait(self._answers, START_TIMEOUT, f"ComfyUI did not answer: see {self.log_path}")
        except BaseException:  # a signal while it starts
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _answers(self) -> bool:
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"ComfyUI ended while starting:\n{self.log()[-4000:]}")
        with contextlib.suppress(OSError):
            return bool(self.get("/system_stats"))
        return False

    def stop(self) -> None:
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def import_failures(self) -> list[str]:
        """Lines of the log that report a node pack's failed import."""
        return [line for line in self.log().splitlines() if any(text in line for text in IMPORT_FAILURES)]

    def get_bytes(self, path: str, **query: str) -> bytes:
        answer = requests.get(self.url + path, query, timeout=60)
        answer.raise_for_status()
        return answer.content

    def get(self, path: str) -> Any:
        return json.loads(self.get_bytes(path))

    def post(self, path: str, data: dict[str, Any] | None = None) -> requests.Response:
        # Not by requests' own conversion: it refuses NaN, which ComfyUI takes.
        headers = {"Content-Type": "application/json"}
        return requests.post(self.url + path, json.dumps(data or {}), headers=headers, timeout=60)

    def object_info(self) -> dict[str, Any]:
        return self.get("/object_info")

    def interrupt(self) -> None:
        self.post("/interrupt")

    def memory(self) -> int:
        """Resident bytes of the process."""
        import psutil

        assert self._process is not None, "the server was not started"
        return psutil.Process(self._process.pid).memory_info().rss

    def wait_idle(self, timeout: float = 60.0) -> None:
        """Wait until nothing is running or pending."""
        wait(lambda: not any(self.get("/queue").values()), timeout, "the server's queue did not become empty")

    def images(self, run: PromptRun, node_id: str) -> list[Any]:
        """The images that an output node of the run saved, as PIL images."""
        from PIL import Image

        return [Image.open(io.BytesIO(self.get_bytes("/view", **entry))) for entry in run.outputs[node_id]["images"]]

    def run(
        self,
        prompt: dict[str, Any],
        timeout: float = 600.0,
        on_event: Callable[[dict[str, Any]], None] | None = None,
    ) -> PromptRun:
        """Queue a prompt in API format and follow it to its end. PromptError if it is rejected or a node raises."""
        import websocket

        client, start = uuid.uuid4().hex, time.monotonic()
        channel = websocket.create_connection(f"ws://127.0.0.1:{self.port}/ws?clientId={client}", timeout=timeout)
        try:
            run = PromptRun(self.queue(prompt, client))
            while run.status not in FINISHED:
                channel.settimeout(max(0.1, start + timeout - time.monotonic()))
                message = channel.recv()
                event = json.loads(message) if isinstance(message, str) else {}  # bytes are previews
                data = event.get("data") or {}
                if not event or data.get("prompt_id", run.prompt_id) != run.prompt_id:
                    continue
                run.events.append(event)
                if on_event:
                    on_event(event)
                if event["type"] == "execution_error":
                    raise PromptError(data.get("exception_message", ""), data)
                if event["type"] in FINISHED:
                    run.status = event["type"]
        finally:
            channel.close()
        # The history is written just after the last event.
        history = wait(lambda: self.get(f"/history/{run.prompt_id}"), 10, f"no history of the prompt {run.prompt_id}")
        run.outputs = history[run.prompt_id]["outputs"]
        run.seconds = time.monotonic() - start
        return run

    def queue(self, prompt: dict[str, Any], client: str = "") -> str:
        """Queue a prompt in API format and return its id. PromptError if it is rejected, in whole or in part."""
        answer = self.post("/prompt", {"prompt": prompt, "client_id": client}).json()
        if "error" in answer:
            raise PromptError(answer["error"]["message"], answer)
        if answer.get("node_errors"):  # the server would skip a part of the graph and report success
            raise PromptError("a part of the prompt was refused", answer)
        return answer["prompt_id"]


def environment_from_variables() -> Environment:
    """The environment that demo.py and test.py pass to the processes they start."""
    comfyui, *others = (Path(value) if (value := os.environ.get(name)) else None for name in PATHS)
    if comfyui is None:
        raise RuntimeError("COMFYUI_PATH is not set: start this through toolbox/test.py or toolbox/demo.py.")
    return Environment(Path(sys.executable), comfyui, *others)
