"""One schema for models, data, training, search and evaluation; YAML in, resolved YAML out.

`load_config("ours-1")` or `load_config("my.yaml", ["train.lr=5e-4"])` gives a frozen, validated
`Config`. An unknown key or a bad value is one line that names the key, what is allowed and the
nearest right name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pnfs.errors import PnfsError, did_you_mean
from pnfs.sections import AugmentConfig as AugmentConfig  # all sections are importable from here
from pnfs.sections import DataConfig, EvalProfile, SearchConfig, Section
from pnfs.sections import SyntheticConfig as SyntheticConfig
from pnfs.skeleton import Parts, Skeleton, get_skeleton

OPERATIONS = ("zero", "skip", "separable", "atrous", "avg_pool", "max_pool")
Profile = Literal["paper", "posenfs"]
Precision = Literal["fp32", "bf16", "fp16"]
BackboneName = Literal[
    "mobilenet_v2",
    "resnet50",
    "resnet152",
    "hrnet_w32",
    "hrnet_w48",
    "fabric-1",
    "fabric-2",
    "fabric-3",
]


class _Fabric(Section):
    """What a fabric backbone and the part fabrics have in common."""

    layers: int = Field(6, ge=1, le=32)
    hidden: int = Field(1, ge=1, le=8)
    channels: int = Field(10, ge=1, le=256)
    operations: tuple[str, ...] = ("zero", "skip", "separable", "atrous")
    profile: Profile = "posenfs"
    partial: int = Field(1, ge=1, le=256)  # 1 / partial of the channels pass through the mixes
    checkpoint: bool = False  # training keeps cells' outputs alone; backward computes the rest anew

    @field_validator("operations")
    @classmethod
    def _known_operations(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if name not in OPERATIONS:
                raise ValueError(
                    f"operation '{name}' is unknown; use {', '.join(OPERATIONS)}"
                    f"{did_you_mean(name, OPERATIONS)}"
                )
        if not value or len(set(value)) != len(value):
            raise ValueError(f"{list(value)} must be distinct operations, at least one")
        return value

    @model_validator(mode="after")
    def _partial_divides(self) -> _Fabric:
        if self.channels % self.partial:
            raise ValueError(
                f"partial {self.partial} does not divide {self.channels} channels; use a divisor"
            )
        return self


class FabricConfig(_Fabric):
    """The P part fabrics: the last `layers - cut` layers of a fabric (Fig. 5, red)."""

    cut: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _cut_fits(self) -> FabricConfig:
        if self.cut >= self.layers:
            raise ValueError(
                f"cut {self.cut} leaves none of {self.layers} layers; use a smaller cut"
            )
        return self


class FabricBackboneConfig(_Fabric):
    """A fabric as the backbone: the first `reserve` layers (Fig. 5, blue; Table VIII)."""

    operations: tuple[str, ...] = OPERATIONS
    reserve: int = Field(5, ge=1)

    @model_validator(mode="after")
    def _four_outputs(self) -> FabricBackboneConfig:
        last = self.reserve - 1
        if self.reserve > self.layers or min(last + 2, self.layers - last) < 4:
            raise ValueError(
                f"reserve {self.reserve} of {self.layers} layers does not end in a layer with four "
                f"scales; use 3 <= reserve <= layers - 3 (layers >= 6)"
            )
        return self


FABRIC_BACKBONES: dict[str, FabricBackboneConfig] = {  # Table VIII
    "fabric-1": FabricBackboneConfig(layers=7, channels=10, hidden=2, reserve=3),
    "fabric-2": FabricBackboneConfig(layers=8, channels=10, hidden=1, reserve=5),
    "fabric-3": FabricBackboneConfig(layers=8, channels=12, hidden=1, reserve=5),
}


class BranchnetConfig(Section):
    """The hand-designed branch of Table VI: 1×1 to `width`, then `blocks` residual bottlenecks."""

    width: int = Field(400, ge=4)
    blocks: int = Field(8, ge=1)


class DroppedConfig(Section):
    """Mixing weights of one fabric that pruning holds at zero: [part, edge, operation] of α and
    [part, cell, parallel | above | below] of β."""

    operations: tuple[tuple[str, int, str], ...] = ()
    inputs: tuple[tuple[str, str, str], ...] = ()


class PruningConfig(Section):
    """What `pnfs prune` removed; the only part of a fabric backbone is named `backbone`."""

    fabric: DroppedConfig = DroppedConfig()
    backbone: DroppedConfig = DroppedConfig()


class ModelConfig(Section):
    """Everything that decides a model's structure and keys.

    `family` picks the model: `pnfs` (backbone → P part fabrics → vector head), or one of the
    baselines `simplebaseline`, `hrnet`, `branchnet`.
    """

    family: Literal["pnfs", "simplebaseline", "hrnet", "branchnet"] = "pnfs"
    skeleton: Literal["coco", "mpii"] = "coco"
    parts: int | dict[str, tuple[int, ...]] = 3
    backbone: BackboneName | FabricBackboneConfig = "mobilenet_v2"
    backbone_weights: str | None = None
    fabric: FabricConfig = FabricConfig()
    branchnet: BranchnetConfig = BranchnetConfig()
    pruning: PruningConfig | None = None
    vector_dim: int = Field(8, ge=1, le=64)
    input_size: tuple[int, int] = (256, 192)

    @field_validator("input_size")
    @classmethod
    def _multiple_of_32(cls, value: tuple[int, int]) -> tuple[int, int]:
        if any(side < 32 or side % 32 for side in value):
            raise ValueError(f"[height, width] {list(value)} must be positive multiples of 32")
        return value

    @field_validator("backbone", mode="before")
    @classmethod
    def _known_backbone(cls, value: Any) -> Any:
        if isinstance(value, str):
            names = BackboneName.__args__  # type: ignore[attr-defined]
            if value not in names:
                raise ValueError(
                    f"'{value}' is unknown; use {', '.join(names)}{did_you_mean(value, names)}"
                )
        elif isinstance(value, Mapping):
            return FabricBackboneConfig.model_validate(value)
        return value

    @model_validator(mode="after")
    def _parts_and_family(self) -> ModelConfig:
        self.skeleton_table.resolve_parts(self.parts)
        allowed = {
            "simplebaseline": ("resnet50", "resnet152"),
            "hrnet": ("hrnet_w32", "hrnet_w48"),
        }.get(self.family)
        if allowed and self.backbone not in allowed:
            raise ValueError(
                f"family '{self.family}' needs backbone {' or '.join(allowed)}, not {self.backbone}"
            )
        return self

    @property
    def skeleton_table(self) -> Skeleton:
        return get_skeleton(self.skeleton)

    @property
    def part_table(self) -> Parts:
        """Part name -> keypoint indices, in the order of the parts axis."""
        return self.skeleton_table.resolve_parts(self.parts)

    @property
    def heatmap_size(self) -> tuple[int, int]:
        """(height, width) of the score maps: a quarter of the input."""
        return self.input_size[0] // 4, self.input_size[1] // 4

    @property
    def fabric_backbone(self) -> FabricBackboneConfig | None:
        """The fabric that serves as backbone, or None for the fixed networks."""
        return (
            FABRIC_BACKBONES.get(self.backbone) if isinstance(self.backbone, str) else self.backbone
        )


class TrainConfig(Section):
    """The optimisation. `batch_size` is per process and step; `lr_steps` are epochs."""

    weights: str | None = None  # a run or .safetensors of the same model to start from
    epochs: int = Field(200, ge=1)
    batch_size: int = Field(24, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(1e-3, gt=0)
    lr_schedule: Literal["step", "cosine"] = "step"
    lr_steps: tuple[int, ...] = (90, 120, 150)
    lr_factor: float = Field(0.25, gt=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float | None = Field(None, gt=0)
    precision: Precision = "fp32"
    cuda_graph: bool = True  # on a GPU, launch a step as one CUDA graph where that is possible
    tune_kernels: bool = False  # on a GPU, run the fastest configuration of each Triton kernel
    seed: int = Field(0, ge=0)
    eval_every: int = Field(1, ge=0)  # epochs; 0 = only at the end
    checkpoint_every: int = Field(0, ge=0)  # steps; 0 = only at the end of each epoch
    max_skipped_fraction: float = Field(0.01, ge=0, le=1)  # of broken samples before the run stops
    max_nonfinite_steps: int = Field(20, ge=1)  # in a row, all skipped, before the run stops
    sync_batch_norm: bool = True
    tensorboard: bool = False


class EvalConfig(Section):
    """How poses are decoded and scored."""

    profile: EvalProfile = "standard"
    flip: bool = True
    batch_size: int = Field(32, ge=1)
    oks_nms_threshold: float = Field(0.9, gt=0, le=1)
    visible_threshold: float = Field(
        0.2, ge=0, lt=1
    )  # keypoint scores above it make the pose score


class Config(Section):
    """A whole run. `preset` records which preset it came from, if any."""

    preset: str | None = None
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    search: SearchConfig = SearchConfig()
    eval: EvalConfig = EvalConfig()


def list_presets() -> list[str]:
    """Names of the presets that ship with the package, sorted."""
    folder = resources.files("pnfs") / "presets"
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a preset (by name) or a YAML file (by path) and apply dotted overrides.

    Args:
        source: a preset's name, or a path that ends in .yaml, .yml or names an existing file.
        overrides: `section.key=value` strings; values are YAML, so `train.lr_steps=[5,8]` works.

    Raises:
        PnfsError: unknown preset, unreadable file, unknown key or bad value; one line.
    """
    name = str(source)
    presets = list_presets()
    if name in presets:
        text = (resources.files("pnfs") / "presets" / f"{name}.yaml").read_text(encoding="utf-8")
        tree = {"preset": name, **_parse_yaml(text, name)}
    else:
        path = Path(source)
        if path.suffix not in (".yaml", ".yml") and not path.is_file():
            raise PnfsError(
                f"preset '{name}' is unknown; presets are {', '.join(presets)}"
                f"{did_you_mean(name, presets)}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PnfsError(f"config {path}: cannot be read ({error}); check the path") from None
        tree = _parse_yaml(text, str(path))
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=name)


def parse_config(tree: Mapping[str, Any], *, where: str = "config") -> Config:
    """Validate a nested mapping; `where` names its origin in error messages."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise PnfsError(f"{where}: {_first_error(error)}") from None


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with dotted overrides (see `load_config`) on top, validated again.

    Raises:
        PnfsError: unknown key or bad value; one line.
    """
    tree = config.model_dump(mode="json")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where="override")


def dump_config(config: Config) -> str:
    """The fully resolved configuration as YAML; `load_config` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None)


def _parse_yaml(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise PnfsError(f"config {where}: not valid YAML ({error}); fix the syntax") from None
    if not isinstance(tree, dict):
        raise PnfsError(f"config {where}: must be a mapping of sections, not {type(tree).__name__}")
    return tree


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise PnfsError(
            f"override '{override}': write section.key=value, for example train.lr=5e-4"
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise PnfsError(f"override '{override}': the value is not valid YAML") from None
    if isinstance(value, str):  # YAML reads 1e-3 as a string
        with contextlib.suppress(ValueError):
            value = float(value)
    *sections, last = key.split(".")
    node = tree
    for section in sections:
        child = node.get(section)
        node[section] = dict(child) if isinstance(child, Mapping) else {}
        node = node[section]
    node[last] = value


def _first_error(error: ValidationError) -> str:
    """The first problem in plain words: key, what is wrong, what is allowed."""
    problem = error.errors()[0]
    path = [
        str(step) for step in problem["loc"] if not str(step).startswith(("function-", "literal["))
    ]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        allowed = list(_model_at(path[:-1]).model_fields)
        hint = did_you_mean(path[-1], allowed)
        return f"unknown key '{key}'; allowed here: {', '.join(allowed)}{hint}"
    message = problem["msg"].removeprefix("Value error, ")
    if not key or message.startswith((f"{key}:", f"{key}.")):
        return message
    given = problem.get("input")
    shown = (
        f" (got {given!r})"
        if isinstance(given, str | int | float | bool) and repr(given) not in message
        else ""
    )
    return f"{key}: {message}{shown}"


def _model_at(path: Sequence[str]) -> type[BaseModel]:
    """The section class that a dotted path leads to."""
    model: type[BaseModel] = Config
    for step in path:
        field = model.model_fields.get(step)
        candidates = [field.annotation] if field is not None else []
        candidates += list(getattr(field.annotation, "__args__", ())) if field is not None else []
        sections = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if sections:
            model = sections[0]
    return model
