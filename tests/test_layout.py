"""The house's rules: one name per op everywhere, imports downward, `import pnfs` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pnfs import kernels

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pnfs"

# A module imports only what stands before it. pnfs/__init__.py imports on first use.
ORDER = """
errors skeleton topology sections config statefile runtime capture kernels info architecture
liveness running mixing operations fabric backbones head baselines model folding distributed costs
search data decode evaluation checkpoint compat pruning runlog recorder schedule steps train
estimator plotting predict export commands demo cli
""".split()

# Files beside those of the ops.
INFRASTRUCTURE = {
    "pnfs/kernels": {
        "__init__",
        "registry",
        "calls",
        "checks",
        "native",
        "shared",
        "folded_program",
        "tickets",
    },
    "pnfs/kernels/triton": {
        "__init__",
        "aot",
        "batch_norm_once",
        "maps",
        "products",
        "separable_gradients",
        "separable_kernels",
        "tuning",
    },
    "csrc/cpu": {"cpu_module", "isa"},
    "csrc/cuda": {"cuda_module"},
    "tests/kernels": {
        "batch_norm_act_cases",
        "conftest",
        "cuda_emulation",
        "decode_heatmaps_cases",
        "depthwise_fanout_cases",
        "keypoint_vectors",
        "separable_conv_cases",
        "test_calls",
        "test_cuda_emulation",
        "test_registry",
        "test_tickets",
        "test_triton_compile",
        "test_triton_interpreter",
        "test_triton_tuning",
        "vector_heatmap_loss_cases",
    },
    "bench": {
        "conftest",
        "feeding",
        "gpu",
        "harness",
        "plain_model",
        "prediction",
        "records",
        "report",
        "step_profile",
        "timing",
        "tuning",
        "whole_models",
    },
}
WHOLE_SYSTEM_BENCHES = {"bench_train", "bench_predict", "bench_loader"}
# Of one op's source: by instruction set, or its backward kernels in a file of their own. And of its
# tests: those of values, and those of what callers and torch rely on.
VARIANTS = ("_amx", "_avx512bf16", "_avx512", "_avx2", "_portable", "_backward", "_interface")


def stems(folder: str, suffixes: tuple[str, ...]) -> set[str]:
    files = (path for path in (ROOT / folder).glob("*") if path.suffix in suffixes)
    names = {path.stem for path in files} - INFRASTRUCTURE[folder]
    for variant in VARIANTS:
        names = {name.removesuffix(variant) for name in names}
    return names


def ops_with(backend: str) -> set[str]:
    return {name for name, op in kernels.ops().items() if backend in op.backends}


@pytest.mark.parametrize(
    ("folder", "suffixes", "prefix", "backend"),
    [
        ("pnfs/kernels", (".py",), "", "torch"),
        ("csrc/cpu", (".cpp",), "", "cpp"),
        ("csrc/cuda", (".cu", ".cpp"), "", "cuda"),
        ("pnfs/kernels/triton", (".py",), "", "triton"),
        ("tests/kernels", (".py",), "test_", "torch"),
        ("bench", (".py",), "bench_", "torch"),
    ],
)
def test_every_op_has_its_file_and_every_file_its_op(
    folder: str, suffixes: tuple[str, ...], prefix: str, backend: str
) -> None:
    names = stems(folder, suffixes) - (WHOLE_SYSTEM_BENCHES if folder == "bench" else set())
    assert names == {prefix + name for name in ops_with(backend)}


def test_every_op_is_public() -> None:
    assert set(kernels.ops()) <= set(kernels.__all__)
    for name in kernels.__all__:
        assert callable(getattr(kernels, name))


def imports_at_load(tree: ast.Module) -> Iterator[str]:
    """Names of pnfs modules that are imported when the file is, not inside a function."""
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) in (
            "TYPE_CHECKING",
            "__name__ == '__main__'",
        ):
            continue
        for inner in ast.walk(node):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                break
            if isinstance(inner, ast.ImportFrom) and inner.module == "pnfs":
                yield from (f"pnfs.{alias.name}" for alias in inner.names)
            elif isinstance(inner, ast.ImportFrom) and inner.module:
                yield inner.module
            elif isinstance(inner, ast.Import):
                yield from (alias.name for alias in inner.names)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_run_downward(path: Path) -> None:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    imported = {
        name.split(".")[1]
        for name in imports_at_load(ast.parse(path.read_text(encoding="utf-8")))
        if name.startswith("pnfs.")
    }
    if parts == ("__init__",):
        assert not imported
        return
    assert parts[0] in ORDER, f"give {parts[0]} its place in ORDER"
    allowed = ORDER[: ORDER.index(parts[0]) + (len(parts) > 1)]
    assert imported <= set(allowed), f"{sorted(imported - set(allowed))} stand after {parts[0]}"


def modules_after(statement: str) -> set[str]:
    script = f"{statement}\nimport sys\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_import_pnfs_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "pydantic", "yaml", "cv2", "matplotlib", "rich", "typer"}
    assert not modules_after("import pnfs") & heavy


def test_kernels_need_neither_data_nor_plotting_packages() -> None:
    heavy = {"pycocotools", "matplotlib", "cv2", "rich", "typer", "pydantic", "tensorboard"}
    assert not modules_after("import pnfs.kernels") & heavy
