"""Real builds through setup.py: with tools, without, with tools that fail, and again.

The builds compile a few small sources in place of csrc/, so that they take no time; that csrc/
itself builds, the tests of the ops show.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
CXX = shutil.which("c++") or shutil.which("g++")
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
MARCH = {"avx2": "x86-64-v3", "avx512": "x86-64-v4", "portable": "x86-64"}
needs_compiler = pytest.mark.skipif(CXX is None, reason="needs a C++ compiler on PATH")


@dataclass
class Tree:
    """A copy of the sources; `build` runs setup.py in it with a PATH that holds chosen tools."""

    root: Path

    def tools(self, *paths: str | None) -> Path:
        folder = self.root / "tools"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in paths:
            if path:
                (folder / Path(path).name).symlink_to(path)
        return folder

    def build(
        self, tools: Path, *command: str, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in ("CXX", "CUDA_HOME") and not name.startswith("PNFS_")
        }
        environment |= {"PATH": str(tools), "CUDA_HOME": str(tools.parent / "no-cuda"), **variables}
        return subprocess.run(
            [sys.executable, *(command or ("setup.py", "build_ext", "--inplace"))],
            cwd=self.root,
            env=environment,
            capture_output=True,
            text=True,
        )

    def record(self) -> dict[str, dict[str, Any]]:
        text = (self.root / "pnfs" / "_build_info.json").read_text()
        modules: dict[str, dict[str, Any]] = json.loads(text)["modules"]
        return modules


MODULE = """
#include <Python.h>
#include "core/answer.h"
int answer();
static PyObject* call(PyObject*, PyObject*) { return PyLong_FromLong(answer()); }
static PyMethodDef methods[] = {{"answer", call, METH_NOARGS, ""}, {nullptr, nullptr, 0, nullptr}};
static PyModuleDef module = {PyModuleDef_HEAD_INIT, "NAME", "", -1, methods};
PyMODINIT_FUNC PyInit_NAME() { return PyModule_Create(&module); }
"""
SOURCES = {
    "core/answer.h": "#pragma once\nconstexpr int kAnswer = 42;\n",
    "cpu/answer.cpp": '#include "core/answer.h"\nint answer() { return kAnswer; }\n',
    "cpu/other.cpp": "int other() { return 1; }\n",
    "cpu/cpu_module.cpp": MODULE.replace("NAME", "_cpu"),
    "cuda/answer.cu": '#include "core/answer.h"\nint answer() { return kAnswer; }\n',
    "cuda/cuda_module.cpp": MODULE.replace("NAME", "_cuda"),
    "jpeg/answer.cpp": "int answer() { return 42; }\n",
    "jpeg/jpeg_module.cpp": MODULE.replace("NAME", "_jpeg").replace('#include "core/answer.h"', ""),
}


def copy_sources(root: Path) -> Tree:
    skip = shutil.ignore_patterns("*.so", "__pycache__", "_build_info.json")
    shutil.copytree(ROOT / "pnfs", root / "pnfs", ignore=skip)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, root)
    for name, text in SOURCES.items():
        path = root / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(root)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A tree built once with a compiler and without nvcc; the tests below build on it again."""
    tree = copy_sources(tmp_path_factory.mktemp("built"))
    tools = tree.tools(CXX, shutil.which("as"), shutil.which("ld"))
    done = tree.build(tools)
    assert done.returncode == 0, done.stderr
    return tree


@pytest.fixture
def tools(built: Tree) -> Path:
    return built.tools(CXX, shutil.which("as"), shutil.which("ld"))


def missing_lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    """But for pnfs._jpeg's, which a machine may miss or not."""
    lines = [line for line in done.stderr.split("\n") if line.startswith("pnfs: without")]
    return [line for line in lines if "pnfs._jpeg" not in line]


def run_python(script: str, folder: Path) -> str:
    """What `script` prints when it imports the package in `folder`."""
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def compiled_files(done: subprocess.CompletedProcess[str]) -> list[str]:
    return sorted(re.findall(r" -c \S*/(\S+) -o", done.stderr))


def test_without_a_compiler_the_package_works_and_says_why(tmp_path: Path) -> None:
    tree = copy_sources(tmp_path)
    done = tree.build(tree.tools())
    assert done.returncode == 0, done.stderr
    reason = (
        "no C++ compiler found (tried c++, g++, clang++); install one, such as g++, and reinstall"
    )
    assert missing_lines(done)[0] == f"pnfs: without pnfs._cpu: {reason}"
    assert len(missing_lines(done)) == 2
    assert tree.record()["_jpeg"]["reason"] == reason
    assert tree.record()["_cpu"]["reason"] == reason

    script = """
import torch
from pnfs import info, kernels
crop = (torch.zeros(12, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
crop += (torch.full((1, 2), 2, dtype=torch.int32), torch.zeros(1, 2, 3), torch.zeros(1).bool())
out = kernels.crop_normalize(*crop, size=(4, 4), mean=(0, 0, 0), std=(1, 1, 1))
assert out.shape == (1, 3, 4, 4)
info.print_info()
"""
    shown = run_python(script, tmp_path)
    assert f"pnfs._cpu   missing: {reason}" in shown
    assert re.search(rf"crop_normalize +cpp +no +{re.escape(reason)}", shown)


@needs_compiler
def test_without_nvcc_the_cpu_module_is_built(built: Tree) -> None:
    cpu, cuda = built.record()["_cpu"], built.record()["_cuda"]
    assert cpu["built"]
    assert "-march=native" in cpu["flags"]
    assert not cuda["built"]
    assert cuda["reason"].startswith("nvcc not found in CUDA_HOME=")
    assert not list((built.root / "pnfs").glob("_cuda.*"))
    script = "import torch; from pnfs.kernels import native; print(native.module('_cpu').answer())"
    assert run_python(script, built.root) == "42\n"


@needs_compiler
@pytest.mark.skipif(NVCC is None, reason="needs nvcc on PATH or in /usr/local/cuda")
def test_nvcc_builds_the_cuda_module_whether_or_not_a_gpu_is_there(built: Tree) -> None:
    path = os.environ["PATH"]
    done = built.build(Path(path), CUDA_HOME="", PNFS_CUDA_ARCHS="80;9.0+PTX")
    cuda = built.record()["_cuda"]
    assert cuda["built"], done.stderr
    assert [flag for flag in cuda["flags"] if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    script = "from pnfs.kernels import native; print(native.module('_cuda').answer())"
    assert run_python(script, built.root) == "42\n"


@needs_compiler
def test_nvcc_that_fails_costs_the_cuda_module_alone(built: Tree, tools: Path) -> None:
    fake = tools / "nvcc"
    fake.write_text('#!/bin/sh\necho "nvcc fatal   : Unsupported gpu architecture" >&2\nexit 1\n')
    fake.chmod(0o755)
    done = built.build(tools, CUDA_HOME="")
    assert done.returncode == 0
    (line,) = missing_lines(done)
    assert "pnfs._cuda: compilation failed: nvcc fatal   : Unsupported gpu architecture" in line
    assert built.record()["_cuda"]["reason"] in line
    assert built.record()["_cpu"]["built"]


@needs_compiler
def test_without_the_headers_of_libjpeg_turbo_its_module_is_left_out(
    built: Tree, tools: Path, tmp_path: Path
) -> None:
    (tmp_path / "jpeglib.h").write_text("#error not the library's\n")
    done = built.build(tools, CPATH=str(tmp_path))
    assert done.returncode == 0
    record = built.record()["_jpeg"]
    assert record["reason"].startswith("libjpeg-turbo's headers not found")
    assert f"pnfs: without pnfs._jpeg: {record['reason']}" in done.stderr
    assert built.record()["_cpu"]["built"] and not list((built.root / "pnfs").glob("_jpeg.*"))


@needs_compiler
def test_with_the_headers_of_libjpeg_turbo_its_module_is_built(built: Tree, tools: Path) -> None:
    built.build(tools)
    record = built.record()["_jpeg"]
    if not record["built"]:
        pytest.skip(record["reason"])
    assert "-ljpeg" in record["flags"]
    script = "from pnfs.kernels import native; print(native.module('_jpeg').answer())"
    assert run_python(script, built.root) == "42\n"


@needs_compiler
def test_a_bad_architecture_is_named(built: Tree, tools: Path) -> None:
    (tools / "nvcc").symlink_to("/bin/true")
    done = built.build(tools, CUDA_HOME="", PNFS_CUDA_ARCHS="80;hopper")
    (line,) = missing_lines(done)
    assert "PNFS_CUDA_ARCHS has 'hopper'; write it like 80;90+PTX" in line


@needs_compiler
def test_a_source_that_fails_is_named_and_the_old_module_is_gone(built: Tree, tools: Path) -> None:
    broken = built.root / "csrc" / "cpu" / "broken.cpp"
    broken.write_text("int f() { return x; }\n")
    done = built.build(tools)
    broken.unlink()
    assert done.returncode == 0
    assert re.search(r"broken.cpp:1:\d+: error: .x. was not declared", missing_lines(done)[0])
    assert not list((built.root / "pnfs").glob("_cpu.*"))
    assert built.build(tools).returncode == 0
    assert list((built.root / "pnfs").glob("_cpu.*"))


@needs_compiler
def test_a_second_build_compiles_what_changed(built: Tree, tools: Path) -> None:
    built.build(tools)
    assert compiled_files(built.build(tools)) == []
    (built.root / "csrc" / "cpu" / "other.cpp").touch()
    assert compiled_files(built.build(tools)) == ["other.cpp"]
    (built.root / "csrc" / "core" / "answer.h").touch()
    assert compiled_files(built.build(tools)) == ["answer.cpp", "cpu_module.cpp"]


@needs_compiler
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the variants are for x86-64")
def test_a_source_may_be_for_one_instruction_set(built: Tree, tools: Path) -> None:
    files = [built.root / "csrc" / "cpu" / f"extra_{name}.cpp" for name in MARCH]
    for file in files:
        file.write_text("int f_" + file.stem + "() { return 0; }\n")
    done = built.build(tools)
    for file in files:
        file.unlink()
    for name, march in MARCH.items():
        assert re.search(rf"-march={march} .*extra_{name}.cpp", done.stderr)
    assert compiled_files(done) == sorted(file.name for file in files)


@needs_compiler
def test_a_wheel_holds_presets_modules_and_the_record(built: Tree, tools: Path) -> None:
    out = built.root / "wheels"
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", str(out))
    done = built.build(tools, "-m", "pip", "wheel", ".", "-q", *options)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    assert "py3-none-any" not in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    presets = sorted(path.name for path in (ROOT / "pnfs" / "presets").glob("*.yaml"))
    assert sorted(n.split("/")[-1] for n in names if n.startswith("pnfs/presets/")) == presets
    assert "pnfs/_build_info.json" in names
    assert any(name.startswith("pnfs/_cpu.") for name in names)
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc"))]


def test_building_needs_no_torch() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    requires = re.search(r"^requires = \[(.*)\]$", text, re.MULTILINE)
    assert requires
    assert "torch" not in requires[1]
    for path in (ROOT / "csrc").rglob("*.*"):
        assert not re.search(r"#include [<\"](torch|ATen|c10)", path.read_text()), path


def test_torch_and_the_cpu_module_share_one_openmp_runtime() -> None:
    """Two copies would mean two pools of threads on the same cores."""
    script = """
import torch
from pathlib import Path
from pnfs.kernels import native
module = native.module("_cpu")
maps = Path("/proc/self/maps").read_text().split("\\n")
print(len({line.split()[-1] for line in maps if "/libgomp" in line or "/libiomp" in line}))
for count in (3, 1):
    torch.set_num_threads(count)
    print(module.max_threads())
"""
    from pnfs.kernels import native

    ok, reason = native.module_available("_cpu")
    if not ok:
        pytest.skip(reason)
    assert run_python(script, ROOT).split() == ["1", "3", "1"]


@pytest.fixture(scope="module")
def nvcc() -> Iterator[str]:
    if NVCC is None:
        pytest.skip("needs nvcc on PATH or in /usr/local/cuda")
    yield NVCC


@pytest.mark.parametrize(
    "source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.stem
)
@pytest.mark.parametrize(
    "archs", [("90",), pytest.param(("80", "100"), marks=pytest.mark.slow)], ids="-".join
)
def test_cuda_sources_compile_without_spills(
    source: Path, archs: tuple[str, ...], nvcc: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [nvcc, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "--expt-relaxed-constexpr"]
        + [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        + ["--threads=2", "-Xptxas=-v", "-fatbin", str(source), "-o", str(tmp_path / "out.fatbin")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    report = done.stdout + done.stderr
    kernels = re.findall(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", report)
    assert {arch for _, arch in kernels} == set(archs)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= len(kernels)
    assert set(spills) == {("0", "0")}, report
