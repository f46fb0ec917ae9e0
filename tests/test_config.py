"""The schema: presets load, YAML goes round, and mistakes are one helpful line."""

from __future__ import annotations

import pytest
import yaml

from pnfs.config import dump_config, list_presets, load_config, parse_config
from pnfs.errors import PnfsError


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_loads_and_its_yaml_reads_back_equal(name, tmp_path):
    config = load_config(name)
    assert config.preset == name
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_overrides_are_dotted_and_typed():
    config = load_config(
        "ours-1",
        ["train.lr=5e-4", "train.lr_steps=[5, 8]", "model.fabric.channels=8", "data.boxes=null"],
    )
    assert config.train.lr == 5e-4
    assert config.train.lr_steps == (5, 8)
    assert config.model.fabric.channels == 8
    assert config.model.fabric.hidden == 1
    assert config.data.boxes is None


def test_a_config_is_frozen():
    config = load_config("ours-1")
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.lrr=1", r"unknown key 'train.lrr'.*did you mean 'lr'"),
        ("trian.lr=1", r"unknown key 'trian'.*did you mean 'train'"),
        ("train.lr=abc", r"train.lr: .*number.*'abc'"),
        ("train.batch_size=0", r"train.batch_size: .*greater.*got 0"),
        (
            "model.backbone=mobilnet_v2",
            r"model.backbone: 'mobilnet_v2'.*did you mean 'mobilenet_v2'",
        ),
        (
            "model.backbone={layers: 8, reserve: 5, chanels: 3}",
            r"model.backbone.chanels.*'channels'",
        ),
        ("model.backbone={layers: 8, reserve: 7}", r"model.backbone: reserve 7"),
        ("model.input_size=[100, 64]", r"model.input_size: .*multiples of 32"),
        ("model.parts=4", r"model.parts: 4 is not in Table I"),
        ("model.fabric.operations=[zro]", r"operation 'zro' is unknown.*did you mean 'zero'"),
        ("model.fabric.cut=6", r"model.fabric: cut 6"),
        ("model.family=hrnet", r"family 'hrnet' needs backbone"),
        ("search.strategy=syncc", r"search.strategy"),
        ("train.lr", r"section.key=value"),
        ("train=3", r"train: "),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, words):
    with pytest.raises(PnfsError, match=words) as error:
        load_config("ours-1", [override])
    assert "\n" not in str(error.value)


def test_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(PnfsError, match=r"preset 'ours1' is unknown.*did you mean 'ours-1'"):
        load_config("ours1")


def test_unreadable_and_malformed_files_are_named(tmp_path):
    with pytest.raises(PnfsError, match=r"nowhere.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: [")
    with pytest.raises(PnfsError, match=r"bad.yaml: not valid YAML"):
        load_config(bad)
    bad.write_text("- 1")
    with pytest.raises(PnfsError, match=r"must be a mapping"):
        load_config(bad)


def test_yaml_that_would_build_objects_is_refused(tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: !!python/object/apply:os.getcwd []")
    with pytest.raises(PnfsError, match="not valid YAML"):
        load_config(bad)


def test_a_resolved_config_survives_plain_yaml():
    config = load_config("tiny")
    assert parse_config(yaml.safe_load(dump_config(config))) == config
