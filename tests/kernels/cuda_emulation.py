"""The CUDA sources compiled by a C++ compiler, see csrc/cuda/host_emulation.h: as a module that
stands for pnfs._cuda, and as a program under ThreadSanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
CXX = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
FLAGS = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
FLAGS += ["-fno-strict-aliasing"]  # 16-byte loads look at elements as words


def compile_sources(output: Path, sources: list[Path], *flags: str) -> None:
    """One shared object or program of `sources`; skips the test where there is no compiler."""
    if CXX is None:
        pytest.skip("needs a C++ compiler on PATH")
    command = [CXX, *FLAGS, f"-I{CSRC}", *flags, "-x", "c++", *map(str, sources)]
    done = subprocess.run([*command, "-o", str(output)], capture_output=True, text=True)
    if re.search(r"(unrecognized|unknown|invalid).*(c\+\+20|-std)", done.stderr):
        pytest.skip("needs a C++20 compiler on PATH")
    assert done.returncode == 0, done.stderr


def build_module(folder: Path) -> ModuleType:
    """pnfs._cuda for the host; compiled unless `folder` holds it already."""
    pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    target = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [*SOURCES, CSRC / "cuda" / "cuda_module.cpp"]
    if not target.exists():
        compile_sources(target, sources, "-shared", "-fPIC", "-fvisibility=hidden", *includes)
    spec = importlib.util.spec_from_file_location("_cuda", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class RaceCheck:
    """The program of cuda_races.cpp under ThreadSanitizer."""

    def __init__(self, folder: Path) -> None:
        self.prefix: list[str] = []
        sanitizer = ["-fsanitize=thread", "-g1"]
        probe, program = folder / "probe", folder / "cuda_races"
        (folder / "probe.cpp").write_text("int main() { return 0; }\n")
        try:
            compile_sources(probe, [folder / "probe.cpp"], *sanitizer)
        except AssertionError:
            pytest.skip("the C++ compiler has no ThreadSanitizer")
        # Its runtime cannot live with every layout of the address space.
        prefixes = [[], ["setarch", "-R"]] if shutil.which("setarch") else [[]]
        works = [
            p for p in prefixes if not subprocess.run([*p, probe], capture_output=True).returncode
        ]
        if not works:
            pytest.skip("ThreadSanitizer does not start on this machine")
        self.prefix, self.program = works[0], program
        compile_sources(program, [*SOURCES, HERE / "cuda_races.cpp"], *sanitizer)

    def __call__(self, case: str, skip: str = "") -> subprocess.CompletedProcess[str]:
        """Run the case; `skip`, as "file.cu:12", leaves the barrier there out."""
        settings = {"PNFS_EMULATED_SKIP": skip, "TSAN_OPTIONS": "halt_on_error=1 exitcode=66"}
        return subprocess.run(
            [*self.prefix, self.program, case],
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=120,
        )
