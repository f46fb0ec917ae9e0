"""Sections of the configuration that say where people come from and how α and β are found."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

EvalProfile = Literal["standard", "posenfs"]


class Section(BaseModel):
    """A part of the configuration: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class AugmentConfig(Section):
    """Training augmentation; angles in degrees, probabilities in [0, 1]."""

    scale: float = Field(0.3, ge=0, lt=1)
    rotation: float = Field(45.0, ge=0, le=180)
    rotation_probability: float = Field(0.6, ge=0, le=1)
    flip_probability: float = Field(0.5, ge=0, le=1)
    half_body_probability: float = Field(0.0, ge=0, le=1)
    half_body_min_keypoints: int = Field(8, ge=2)


class SyntheticConfig(Section):
    """Size of the rendered dataset: images, not people (each image holds 1 to `max_people`)."""

    train_images: int = Field(300, ge=1)
    val_images: int = Field(100, ge=1)
    max_people: int = Field(3, ge=1, le=8)
    image_size: tuple[int, int] = (240, 320)
    seed: int = Field(0, ge=0)


class DataConfig(Section):
    """Where people come from. `root` is the dataset's folder; splits default to the dataset's own
    names (COCO train2017/val2017, MPII train/valid, synthetic train/val)."""

    dataset: Literal["synthetic", "coco", "mpii"] = "synthetic"
    root: str | None = None
    train_split: str | None = None
    val_split: str | None = None
    boxes: str | None = None  # file with detected boxes for evaluation; None = ground-truth boxes
    box_score_threshold: float = Field(0.0, ge=0, le=1)
    profile: EvalProfile = "standard"  # colours and box rules, as in `eval.profile`
    sigma: float = Field(2.0, gt=0)  # of the Gaussian target, in score-map pixels
    workers: int = Field(2, ge=0, le=64)
    cache: str | None = None  # folder that keeps training people decoded from the first epoch on
    cache_gb: float = Field(32.0, gt=0)  # 10⁹ bytes that the cache may take
    reduced_decode: bool = False  # training decodes JPEGs of large people at 1/2, 1/4 or 1/8
    augment: AugmentConfig = AugmentConfig()
    synthetic: SyntheticConfig = SyntheticConfig()


class SearchConfig(Section):
    """How α and β are found; docs/search.md says what each strategy does.

    `none` leaves them at their start, `random` draws them from N(0, 1) by `seed` and freezes them,
    `sync` trains them with the weights' optimiser, `first-order` and `second-order` on a half of
    the people that the weights do not see, `gumbel` like `sync` through sampled mixes.

    None means the strategy's own: with `first-order` and `second-order` rate 0.003, constant, and
    weight decay 0.001; with `sync` and `gumbel` the weights' rate and schedule, and no decay.
    """

    strategy: Literal["none", "sync", "random", "first-order", "second-order", "gumbel"] = "sync"
    seed: int = Field(0, ge=0)  # of random's draw, gumbel's noise and the split into halves
    architecture: str | None = None  # architecture.json with the α, β to start from
    lr: float | None = Field(None, gt=0)
    lr_schedule: Literal["weights", "constant", "step", "cosine"] | None = None
    weight_decay: float | None = Field(None, ge=0)
    temperature: tuple[float, float] = (5.0, 1.0)  # gumbel: first and last, geometric in between
    sampled: float = Field(0.3, ge=0, le=1)  # gumbel: share of the run before the mean mixes
    macs_penalty: float = Field(0.0, ge=0)  # loss per expected 10⁹ multiply-adds of α's, β's mixes
    stop_at_skip: float | None = Field(None, gt=0, lt=1)  # freeze α, β at this mean share of skip
    log_every: int = Field(20, ge=1)  # steps between rows about α, β in metrics.jsonl

    @property
    def bilevel(self) -> bool:
        """Whether α, β are trained on people of their own."""
        return self.strategy in ("first-order", "second-order")

    @model_validator(mode="after")
    def _makes_sense(self) -> SearchConfig:
        if min(self.temperature) <= 0:
            raise ValueError(f"search.temperature: {list(self.temperature)} must be above 0")
        if self.strategy == "random" and self.architecture is not None:
            raise ValueError(
                "search.architecture: strategy random draws its own; use none (frozen) or another"
            )
        return self
