"""fast-jl from its source distribution, built for this machine's GPU in a folder that is thrown away.

Its setup.py asks for compute_70 whatever the device is, which compilers since CUDA 13 refuse and for which newer
devices have no kernel; the architecture is all that is changed.
"""

import importlib
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import torch

__all__ = ["build_fast_jl", "with_architecture"]

VERSION = "0.1.3"


def with_architecture(setup: str, architecture: str) -> str:
    """The text of setup.py with another value of TORCH_CUDA_ARCH_LIST.

    Raises:
        ValueError: the text sets it not once.
    """
    changed, count = re.subn(r"(TORCH_CUDA_ARCH_LIST['\"]\]\s*=\s*)(['\"])[^'\"]*\2", rf"\g<1>'{architecture}'", setup)
    if count != 1:
        raise ValueError(f"setup.py sets TORCH_CUDA_ARCH_LIST {count} times; expected once, as in fast-jl {VERSION}")
    return changed


def build_fast_jl(folder: Path) -> None:
    """Download, correct and build fast-jl in folder, and make it importable in this process.

    Raises:
        RuntimeError: there is no CUDA device or no nvcc; or pip fails, with the end of what it said.
    """
    from torch.utils.cpp_extension import CUDA_HOME

    if not torch.cuda.is_available() or CUDA_HOME is None:
        raise RuntimeError("fast-jl needs a CUDA device, a torch with CUDA, and nvcc (set CUDA_HOME) to be built")
    _pip("download", f"fast-jl=={VERSION}", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", folder)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    setup = next(folder.glob("*/setup.py"))
    major, minor = torch.cuda.get_device_capability()
    setup.write_text(with_architecture(setup.read_text(), f"{major}.{minor}"))
    target = folder / "installed"
    _pip("install", "--no-deps", "--no-build-isolation", "--target", target, setup.parent)
    sys.path.insert(0, str(target))
    importlib.invalidate_caches()


def _pip(*arguments: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed: {(done.stdout + done.stderr)[-2000:]}")
