"""Compiles csrc/ into pnfs._cpu, where nvcc is found into pnfs._cuda, and where libjpeg-turbo's
headers are found into pnfs._jpeg; writes pnfs/_build_info.json.

No torch is needed: the sources see raw pointers. A compiler, nvcc or library that is missing or
fails leaves that module out; the package still works, one line says why, `pnfs info` repeats it.

Environment:
    CXX              C++ compiler; default: the first of c++, g++, clang++ on PATH.
    PNFS_MARCH       value of -march; default "native", the CPU that compiles. "" leaves the
                     compiler's own default, for a build that runs on other machines.
    CUDA_HOME        where CUDA lies; default: nvcc on PATH, then /usr/local/cuda.
    PNFS_CUDA_ARCHS  such as "80;90+PTX"; default: those of the visible GPUs, else "80;90+PTX".
    MAX_JOBS         compiler processes at a time; default: ninja's.

Sources named *_avx512.cpp, *_avx2.cpp and *_portable.cpp are compiled for x86-64-v4, x86-64-v3 and
x86-64 whatever PNFS_MARCH says, for kernels that choose at run time; *_avx512bf16.cpp and *_amx.cpp
for x86-64-v4 with the instructions for bfloat16. Elsewhere than on x86-64 only *_portable.cpp is
compiled, for the compiler's own default.

Objects are kept in build/, so a second build compiles only what changed.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
RECORD = "_build_info.json"
BF16 = ["-march=x86-64-v4", "-mavx512bf16"]
VARIANTS = {
    "amx": [*BF16, "-mamx-tile", "-mamx-bf16"],
    "avx512bf16": BF16,
    "avx512": ["-march=x86-64-v4"],
    "avx2": ["-march=x86-64-v3"],
    "portable": ["-march=x86-64"],
}
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
# Other libraries of this interface decode no regions.
JPEG_PROBE = """\
#include <cstdio>
#include <jpeglib.h>
#ifndef LIBJPEG_TURBO_VERSION
#error another library
#endif
int main() {
  auto* volatile crop = jpeg_crop_scanline;
  auto* volatile read = jpeg_mem_src;
  return crop == nullptr || read == nullptr;
}
"""


class NotBuilt(Exception):
    """Why a module is left out, in one line."""


@dataclass
class Module:
    """The record of one module, as `pnfs info` shows it."""

    built: bool = False
    reason: str = ""
    compiler: str = ""
    flags: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Object:
    source: Path
    command: list[str]  # without "-c source -o object" and the dependency file's flags


@dataclass
class Plan:
    """How a module is made: the link command is `link -o module objects libraries`."""

    objects: list[Object]
    link: list[str]
    libraries: list[str] = field(default_factory=list)


def tool_version(tool: str) -> str:
    """What `tool --version` says: the line with "release" (nvcc), else the first."""
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    lines = done.stdout.strip().split("\n")
    return next((line for line in lines if "release" in line), lines[0])


def find_compiler() -> str:
    if sys.platform == "win32":
        raise NotBuilt("Windows is not supported: the sources need gcc or clang")
    wanted = os.environ.get("CXX")
    for name in [shlex.split(wanted)[0]] if wanted else ["c++", "g++", "clang++"]:
        if path := shutil.which(name):
            return path
    tried = f"CXX={wanted}" if wanted else "c++, g++, clang++"
    raise NotBuilt(
        f"no C++ compiler found (tried {tried}); install one, such as g++, and reinstall"
    )


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME")
    places = [Path(home) / "bin"] if home else [*os.get_exec_path(), "/usr/local/cuda/bin"]
    for place in places:
        path = Path(place) / "nvcc"
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
    where = f"in CUDA_HOME={home}" if home else "on PATH or in /usr/local/cuda"
    raise NotBuilt(f"nvcc not found {where}; install the CUDA toolkit and reinstall")


def find_ninja() -> list[str]:
    if path := shutil.which("ninja"):
        return [path]
    try:
        import ninja
    except ImportError:
        raise NotBuilt("ninja is not installed; run `pip install ninja` and reinstall") from None
    return [str(Path(ninja.BIN_DIR) / "ninja")]


def pybind11_flags(work: Path) -> list[str]:
    """Include flags of pybind11 under a path that stays the same between isolated builds."""
    try:
        import pybind11
    except ImportError:
        raise NotBuilt("pybind11 is not installed; run `pip install pybind11`, reinstall") from None
    link = work / f"pybind11-{pybind11.__version__}"
    link.unlink(missing_ok=True)
    link.symlink_to(pybind11.get_include())
    return ["-isystem", str(link), "-isystem", sysconfig.get_path("include")]


def compiles(compiler: str, text: str, work: Path, *flags: str) -> bool:
    """Whether a program of this text compiles and, without -c, links; flags stand behind it."""
    probe = work / "probe.cpp"
    probe.write_text(text)
    command = [compiler, str(probe), "-o", str(work / "probe"), *flags]
    return subprocess.run(command, capture_output=True).returncode == 0


def cuda_arch_flags() -> list[str]:
    """-gencode flags for PNFS_CUDA_ARCHS, the visible GPUs, or the default pair."""
    text = os.environ.get("PNFS_CUDA_ARCHS", "")
    if not text:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=60)
            if done.returncode == 0:
                text = ";".join(sorted(set(done.stdout.split())))
        except (OSError, subprocess.TimeoutExpired):
            pass
    flags = []
    for name in re.split(r"[;,\s]+", text.strip() or "80;90+PTX"):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise NotBuilt(f"PNFS_CUDA_ARCHS has '{name}'; write it like 80;90+PTX and reinstall")
        arch = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def shared_link(compiler: str) -> list[str]:
    # macOS must be told that symbols may come later.
    mac = ["-bundle", "-undefined", "dynamic_lookup"]
    return [compiler, *(mac if sys.platform == "darwin" else ["-shared"])]


def cpu_plan(work: Path, record: Module) -> Plan:
    """Of pnfs._cpu."""
    compiler = find_compiler()
    record.compiler = tool_version(compiler)
    base = [compiler, "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
    base += ["-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
    if compiles(compiler, "int main() { return 0; }\n", work, "-fopenmp", "-c"):
        base.append("-fopenmp")
    march = os.environ.get("PNFS_MARCH", "native")
    record.flags = [*base[1:], *([f"-march={march}"] if march else [])]
    python = pybind11_flags(work)
    objects = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        variant = source.stem.rpartition("_")[2]
        arch = VARIANTS.get(variant, [f"-march={march}"] if march else [])
        if variant in VARIANTS and platform.machine() not in ("x86_64", "AMD64"):
            if variant != "portable":
                continue
            arch = []
        is_module = source.name == "cpu_module.cpp"
        objects.append(Object(source, [*base, *arch, *(python if is_module else [])]))
    # No -fopenmp here: the module takes the OpenMP runtime that torch has loaded, see
    # pnfs/kernels/native.py.
    return Plan(objects, shared_link(compiler))


def cuda_plan(work: Path, record: Module) -> Plan:
    """Of pnfs._cuda. The CUDA runtime is linked statically: it shares the device's primary context,
    so torch's streams and memory are its own."""
    nvcc = find_nvcc()
    compiler = find_compiler()
    record.compiler = tool_version(nvcc)
    nvcc_base = [nvcc, "-std=c++17", "-O3", f"-ccbin={compiler}", f"-I{ROOT / 'csrc'}"]
    nvcc_base += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall", "--expt-relaxed-constexpr"]
    record.flags = [*nvcc_base[1:], *cuda_arch_flags()]
    host = [compiler, "-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS]
    host += [f"-I{ROOT / 'csrc'}", *pybind11_flags(work)]
    folder = ROOT / "csrc" / "cuda"
    objects = [Object(source, [nvcc, *record.flags]) for source in sorted(folder.glob("*.cu"))]
    objects += [Object(source, host) for source in sorted(folder.glob("*.cpp"))]
    return Plan(objects, [nvcc, f"-ccbin={compiler}", "-shared", "-cudart=static"])


def jpeg_plan(work: Path, record: Module) -> Plan:
    """Of pnfs._jpeg."""
    compiler = find_compiler()
    record.compiler = tool_version(compiler)
    library, include = ["-ljpeg"], []
    if (Path(sys.prefix) / "include" / "jpeglib.h").exists():  # conda's
        folder = Path(sys.prefix) / "lib"
        include = [f"-I{sys.prefix}/include"]
        library = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-ljpeg"]
    if not compiles(compiler, JPEG_PROBE, work, *include, *library):
        raise NotBuilt(
            "libjpeg-turbo's headers not found, images are decoded whole; install libjpeg-dev "
            "(Debian, Ubuntu), libjpeg-turbo-devel (Fedora) or libjpeg-turbo (conda) and reinstall"
        )
    flags = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS]
    record.flags = [*flags, *library]
    command = [compiler, *flags, f"-I{ROOT / 'csrc'}", *include, *pybind11_flags(work)]
    sources = sorted((ROOT / "csrc" / "jpeg").glob("*.cpp"))
    return Plan([Object(source, command) for source in sources], shared_link(compiler), library)


PLANS = {"_cpu": cpu_plan, "_cuda": cuda_plan, "_jpeg": jpeg_plan}


NINJA_RULES = """\
rule compile
  command = $command
  depfile = $out.d
  deps = gcc
rule link
  command = $command
"""


def ninja_escape(text: str) -> str:
    return text.replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_rules(name: str, plan: Plan) -> list[str]:
    """Build statements for one module: an object per source, with its headers tracked."""
    lines, outputs = [], []
    for item in plan.objects:
        output = f"{name}/{item.source.name}.o"
        outputs.append(output)
        track = ["-MMD", "-MF", f"{output}.d", "-c", str(item.source), "-o", output]
        lines += [
            f"build {output}: compile {ninja_escape(str(item.source))}",
            f"  command = {shlex.join([*item.command, *track]).replace('$', '$$')}",
        ]
    target = f"{name}{SUFFIX}"
    link = [*plan.link, "-o", target, *outputs, *plan.libraries]
    return [
        *lines,
        f"build {target}: link {' '.join(outputs)}",
        f"  command = {shlex.join(link).replace('$', '$$')}",
    ]


def first_error(output: str) -> str:
    """The line of a failed build that says most."""
    lines = [line.strip() for line in output.split("\n") if line.strip()]
    for pattern in (r"\b(fatal|error)\b", r"^FAILED"):
        for line in lines:
            if re.search(pattern, line) and not line.startswith("ninja:"):
                return line[:300]
    return lines[-1][:300] if lines else "no output"


def build_modules(work: Path) -> tuple[dict[str, Module], dict[str, Path]]:
    """Build what can be built; returns the record per module and the files of the built ones."""
    work.mkdir(parents=True, exist_ok=True)
    records = {name: Module() for name in PLANS}
    lines = [NINJA_RULES]
    planned, ninja = [], [""]
    for name, plan in PLANS.items():
        try:
            ninja = find_ninja()
            lines += ninja_rules(name, plan(work, records[name]))
            planned.append(name)
        except NotBuilt as error:
            records[name].reason = str(error)
    (work / "build.ninja").write_text("\n".join([*lines, ""]))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    targets = [f"{name}{SUFFIX}" for name in planned]
    start = time.perf_counter()
    if targets:  # all modules in parallel; what fails is run again below, alone, for its message
        subprocess.run([*ninja, "-k", "0", *jobs, *targets], cwd=work, stdout=sys.stderr)
    seconds = time.perf_counter() - start
    files = {}
    for name, target in zip(planned, targets, strict=True):
        done = subprocess.run([*ninja, target], cwd=work, capture_output=True, text=True)
        record = records[name]
        if done.returncode == 0:
            record.built, record.seconds = True, round(seconds, 1)
            files[name] = work / target
            continue
        log = work / f"{name}.log"
        log.write_text(done.stdout + done.stderr)
        record.reason = (
            f"compilation failed: {first_error(done.stdout + done.stderr)} (all of it in {log})"
        )
    return records, files


class BuildKernels(build_ext):
    """Builds with ninja; installs the modules that exist and the record of those that do not."""

    def run(self) -> None:
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}"
        records, files = build_modules(ROOT / "build" / "native" / tag)
        in_place = self.inplace or self.editable_mode
        package = (ROOT if in_place else Path(self.build_lib)) / "pnfs"
        package.mkdir(parents=True, exist_ok=True)
        for name in PLANS:
            target = package / f"{name}{SUFFIX}"
            target.unlink(missing_ok=True)  # an earlier build's, or one that runs in a process now
            if name in files:
                shutil.copy2(files[name], target)
        record = {
            "python": platform.python_version(),
            "platform": sysconfig.get_platform(),
            "march": os.environ.get("PNFS_MARCH", "native"),
            "modules": {name: asdict(entry) for name, entry in records.items()},
        }
        (package / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        for name, entry in records.items():
            if not entry.built:
                print(f"pnfs: without pnfs.{name}: {entry.reason}", file=sys.stderr)
        self.extensions = [e for e in self.extensions if e.name.rpartition(".")[2] in files]


setup(
    ext_modules=[Extension(f"pnfs.{name}", sources=[]) for name in PLANS],
    cmdclass={"build_ext": BuildKernels},
)
