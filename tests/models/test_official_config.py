from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from simmim_fast.models.official_config import OfficialConfig, read_official_config

# The lines of the official simmim_pretrain__swinv2_base__img192_window12__800ep.yaml that are not about folders.
SWINV2_BASE = """
MODEL:
  TYPE: swinv2
  NAME: simmim_pretrain
  DROP_PATH_RATE: 0.1
  SIMMIM:
    NORM_TARGET:
      ENABLE: True
      PATCH_SIZE: 47
  SWINV2:
    EMBED_DIM: 128
    DEPTHS: [ 2, 2, 18, 2 ]
    NUM_HEADS: [ 4, 8, 16, 32 ]
    WINDOW_SIZE: 12
DATA:
  IMG_SIZE: 192
  MASK_PATCH_SIZE: 32
  MASK_RATIO: 0.6
TRAIN:
  EPOCHS: 800
  WARMUP_EPOCHS: 10
  BASE_LR: 1e-4
  WARMUP_LR: 5e-7
  WEIGHT_DECAY: 0.05
  LR_SCHEDULER:
    NAME: 'multistep'
    GAMMA: 0.1
    MULTISTEPS: [700,]
"""


def write(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def node(values: dict[str, Any]) -> dict[str, Any]:
    """Stands for a yacs node: a dict subclass, all the way down."""
    kind = type("CfgNode", (dict,), {"__getattr__": dict.__getitem__})
    return kind({key: node(value) if isinstance(value, dict) else value for key, value in values.items()})


def test_official_file(tmp_path: Path) -> None:
    config = read_official_config(write(tmp_path, SWINV2_BASE))
    assert (config.MODEL.TYPE, config.MODEL.SWINV2.EMBED_DIM, config.MODEL.SWINV2.WINDOW_SIZE) == ("swinv2", 128, 12)
    assert config.MODEL.SWINV2.DEPTHS == [2, 2, 18, 2]
    assert config.MODEL.SIMMIM.NORM_TARGET.to_dict() == {"ENABLE": True, "PATCH_SIZE": 47}
    assert config.TRAIN.LR_SCHEDULER.MULTISTEPS == [700]


def test_scientific_notation_without_a_point_is_a_number(tmp_path: Path) -> None:
    config = read_official_config(write(tmp_path, SWINV2_BASE))
    assert (config.TRAIN.BASE_LR, config.TRAIN.WARMUP_LR) == (1e-4, 5e-7)


def test_what_is_not_given_has_the_official_default(tmp_path: Path) -> None:
    config = read_official_config(write(tmp_path, SWINV2_BASE))
    assert config.MODEL.SWINV2.PRETRAINED_WINDOW_SIZES == [0, 0, 0, 0]
    assert config.MODEL.SWIN.WINDOW_SIZE == 7
    assert config.MODEL.VIT.USE_SHARED_RPB is True
    assert config.TRAIN.CLIP_GRAD == 5.0
    assert config.TRAIN.ACCUMULATION_STEPS == 0
    assert config.TRAIN.LR_SCHEDULER.WARMUP_PREFIX is True
    assert config.TRAIN.OPTIMIZER.BETAS == (0.9, 0.999)


@pytest.mark.parametrize(
    ("name", "same"),
    [("SWIN", "QK_SCALE"), ("SWINV2", "PRETRAINED_WINDOW_SIZES"), ("SWIN_MLP", "APE"), ("VIT", "DEPTH")],
)
def test_encoders_have_their_own_keys(name: str, same: str) -> None:
    sections = read_official_config({}).MODEL
    assert same in sections[name]
    assert ("QK_SCALE" in sections[name]) == (name == "SWIN")


@pytest.mark.parametrize("kind", [dict, node, OfficialConfig], ids=["dict", "node", "config"])
def test_mappings_and_nodes_read_as_files(tmp_path: Path, kind: Any) -> None:
    config = read_official_config(write(tmp_path, SWINV2_BASE))
    assert read_official_config(kind(config.to_dict())) == config


def test_opts_come_last_and_are_python_literals(tmp_path: Path) -> None:
    opts = ["MODEL.SWINV2.DEPTHS", "(1, 1)", "TRAIN.BASE_LR", "2e-3", "TRAIN.EPOCHS", 5, "AUG.AUTO_AUGMENT", "none"]
    opts += [
        "TRAIN.CLIP_GRAD",
        "None",
        "AUG.CUTMIX_MINMAX",
        "[0.2, 0.8]",
        "TRAIN.USE_CHECKPOINT",
        "True",
        "TAG",
        "'a b'",
    ]
    config = read_official_config(write(tmp_path, SWINV2_BASE), opts)
    assert config.MODEL.SWINV2.DEPTHS == [1, 1]
    assert (config.TRAIN.BASE_LR, config.TRAIN.EPOCHS, config.TRAIN.CLIP_GRAD) == (2e-3, 5, None)
    assert (config.AUG.AUTO_AUGMENT, config.AUG.CUTMIX_MINMAX) == ("none", [0.2, 0.8])
    assert (config.TRAIN.USE_CHECKPOINT, config.TAG) == (True, "a b")


@pytest.mark.parametrize(
    ("key", "given", "read"),
    [
        ("TRAIN.BASE_LR", 1, 1.0),
        ("TRAIN.BASE_LR", "1", 1.0),
        ("TRAIN.OPTIMIZER.BETAS", [0.9, 0.95], (0.9, 0.95)),
        ("MODEL.SWIN.DEPTHS", (2, 2), [2, 2]),
        ("MODEL.SWIN.QK_SCALE", 0.5, 0.5),
        ("TAG", "42", "42"),
        ("DATA.DATA_PATH", "1/2", "1/2"),
    ],
    ids=str,
)
def test_conversions(key: str, given: Any, read: Any) -> None:
    value: Any = read_official_config({}, [key, given])
    for name in key.split("."):
        value = value[name]
    assert (value, type(value)) == (read, type(read))


@pytest.mark.parametrize(
    ("key", "given", "message"),
    [
        ("TRAIN.EPOCHS", "many", "TRAIN.EPOCHS must be int, got str 'many'"),
        ("TRAIN.EPOCHS", "1.5", "TRAIN.EPOCHS must be int, got float 1.5"),
        ("TRAIN.EPOCHS", True, "TRAIN.EPOCHS must be int, got bool True"),
        ("TRAIN.AUTO_RESUME", 1, "TRAIN.AUTO_RESUME must be bool, got int 1"),
        ("TRAIN.BASE_LR", "fast", "TRAIN.BASE_LR must be float, got str 'fast'"),
        ("MODEL.TYPE", 3, "MODEL.TYPE must be str, got int 3"),
        ("MODEL.SWIN.DEPTHS", 2, "MODEL.SWIN.DEPTHS must be list, got int 2"),
        ("MODEL.SWIN.QK_SCALE", {}, "MODEL.SWIN.QK_SCALE must be a number, text, list or tuple, got dict"),
        ("MODEL.SWIN", "tiny", "MODEL.SWIN is a section of keys, got str 'tiny'"),
        ("TRAIN.EPOCHS.FIRST", 1, "TRAIN.EPOCHS must be int, got dict"),
    ],
    ids=str,
)
def test_wrong_types(tmp_path: Path, key: str, given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"opts: {message}"):
        read_official_config({}, [key, given])
    *sections, name = key.split(".")
    values: Any = {name: given}
    for section in reversed(sections):
        values = {section: values}
    with pytest.raises(TypeError, match=f"config: {message}"):
        read_official_config(values)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.SWIN.EMBED_DIMS", "MODEL.SWIN.EMBED_DIM"),
        ("MODEL.SWIN.embed_dim", "MODEL.SWIN.EMBED_DIM"),
        ("TRAIN.EPOCH", "TRAIN.EPOCHS"),
        ("MASK_RATIO", "DATA.MASK_RATIO"),
        ("MODLE.TYPE", "MODEL.TYPE"),
    ],
)
def test_unknown_keys_name_the_nearest(key: str, nearest: str) -> None:
    unknown = "MODLE" if key.startswith("MODLE") else key
    with pytest.raises(
        ValueError, match=rf"opts: unknown key {unknown}; did you mean '{nearest.removesuffix('.TYPE')}'\?"
    ):
        read_official_config({}, [key, 1])


def test_an_unknown_key_without_a_neighbour() -> None:
    with pytest.raises(ValueError, match=r"config: unknown key 7$"):
        read_official_config({7: 1})


@pytest.mark.parametrize("opts", [["TRAIN.EPOCHS"], "TRAIN.EPOCHS 5"], ids=["odd", "text"])
def test_opts_are_pairs(opts: Any) -> None:
    with pytest.raises(ValueError, match="opts must list keys and values in turn"):
        read_official_config({}, opts)


def test_opts_keys_are_text() -> None:
    with pytest.raises(TypeError, match=r"opts: a key must be a string such as 'TRAIN\.EPOCHS', got int 3"):
        read_official_config({}, [3, 4])


@pytest.mark.parametrize("config", [None, 3, [("MODEL", {})]], ids=["none", "int", "list"])
def test_config_is_a_path_or_a_mapping(config: Any) -> None:
    with pytest.raises(TypeError, match="config must be a path, a mapping or a yacs node, got"):
        read_official_config(config)


def test_base_files_are_read_first(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "{TRAIN: {EPOCHS: 1, BASE_LR: 1e-1}, DATA: {IMG_SIZE: 64}, TAG: root}", "root.yaml")
    write(tmp_path, "{BASE: [root.yaml, ''], TRAIN: {EPOCHS: 2}, TAG: base}", "base.yaml")
    last = write(tmp_path / "sub", "{BASE: [../base.yaml], TAG: last}", "last.yaml")
    config = read_official_config(str(last), ["TAG", "opts"])
    assert (config.TRAIN.EPOCHS, config.TRAIN.BASE_LR, config.DATA.IMG_SIZE, config.TAG) == (2, 0.1, 64, "opts")


def test_base_of_a_mapping_is_not_followed() -> None:
    assert read_official_config({"BASE": ["missing.yaml"]}).BASE == ["missing.yaml"]


FILES = {
    "BASE in a circle": ("BASE: [config.yaml]", ValueError, "the BASE entries lead back to this file"),
    "BASE of one name": ("BASE: base.yaml", TypeError, "BASE must be a list of file names, got str 'base.yaml'"),
    "BASE missing": ("BASE: [missing.yaml]", FileNotFoundError, "missing.yaml"),
    "unknown key": ("{TRAIN: {EPOCH: 1}}", ValueError, "config.yaml: unknown key TRAIN.EPOCH; did you mean"),
    "wrong type": ("{TRAIN: {EPOCHS: x}}", TypeError, "config.yaml: TRAIN.EPOCHS must be int, got str 'x'"),
    "empty": ("", ValueError, "config.yaml: must hold a mapping .*, got NoneType"),
    "a list": ("[1, 2]", ValueError, "config.yaml: must hold a mapping .*, got list"),
    "no YAML": ("MODEL: [", ValueError, "config.yaml: not a YAML file"),
    "an unhashable key": ("? [1]\n: 2", ValueError, "config.yaml: only plain YAML values.*unhashable key"),
    "no text": ("\x00", ValueError, "config.yaml: not a YAML file"),
    "a tuple tag": ("TAG: !!python/tuple [1]", ValueError, "config.yaml: only plain YAML values are accepted, no tags"),
    "too deep": ("TAG: " + "[" * 2000 + "]" * 2000, ValueError, "config.yaml: not a YAML file"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(tmp_path: Path, name: str) -> None:
    text, error, message = FILES[name]
    with pytest.raises(error, match=f"(?s){message}"):
        read_official_config(write(tmp_path, text))


def test_a_file_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"TAG: \xff")
    with pytest.raises(ValueError, match=r"config\.yaml: not a YAML file"):
        read_official_config(tmp_path / "config.yaml")


YAML_BOMBS = {
    "apply": "!!python/object/apply:os.system ['touch %s']",
    "new": "!!python/object/new:os.system ['touch %s']",
    "name": "!!python/name:os.system ''",
}
PLACES = {"value": "TAG: {}", "section": "MODEL: {{SWIN: {}}}", "BASE": "BASE: [{}]", "key": "? {}\n: 1"}


@pytest.mark.parametrize("bomb", YAML_BOMBS)
@pytest.mark.parametrize("place", PLACES)
def test_yaml_tags_execute_nothing(tmp_path: Path, place: str, bomb: str) -> None:
    marker = tmp_path / "marker"
    text = PLACES[place].format(YAML_BOMBS[bomb].replace("%s", str(marker)))
    with pytest.raises(ValueError, match=r"only plain YAML values are accepted, no tags: .*python/"):
        read_official_config(write(tmp_path, text))
    assert not marker.exists()


def test_the_yaml_bomb_is_live(tmp_path: Path) -> None:
    yaml.unsafe_load(YAML_BOMBS["apply"].replace("%s", str(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_endless_aliases_stay_small(tmp_path: Path) -> None:
    lines = ["A0: &a0 [1, 1]"] + [f"A{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 200)]
    with pytest.raises(ValueError, match="unknown key A0"):
        read_official_config(write(tmp_path, "\n".join(lines)))
    bomb = "\n".join(f"  - &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 200))
    with pytest.raises(TypeError, match="TRAIN is a section of keys, got list"):
        read_official_config(write(tmp_path, f"TRAIN:\n  - &a0 [1, 1]\n{bomb}"))


def test_the_result_is_read_only_and_owns_its_values() -> None:
    depths = [1, 1]
    config = read_official_config({"MODEL": {"SWIN": {"DEPTHS": depths}}})
    depths.append(9)
    config.to_dict()["MODEL"]["SWIN"]["DEPTHS"].append(9)
    read_official_config({}).AUG.to_dict()["MIXUP"] = 9
    assert config.MODEL.SWIN.DEPTHS == [1, 1]
    with pytest.raises(AttributeError, match="TAG cannot be set: an OfficialConfig is read-only"):
        config.TAG = "other"
    read_official_config({}).TRAIN.LR_SCHEDULER.MULTISTEPS.append(3)
    assert read_official_config({}).TRAIN.LR_SCHEDULER.MULTISTEPS == []


def test_access() -> None:
    config = read_official_config({})
    assert config["DATA"]["IMG_SIZE"] == config.DATA.IMG_SIZE == 224
    assert "DATA" in config
    assert "DATA" in dir(config)
    assert isinstance(config.to_dict()["DATA"], dict)
    assert not hasattr(config, "LOSS")
    with pytest.raises(AttributeError, match=r"no key MODELS; did you mean 'MODEL'\?"):
        _ = config.MODELS
    with pytest.raises(KeyError):
        config["MODELS"]


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["copy", "deep", "pickle"]
)
def test_copies_are_equal(copied: Any) -> None:
    config = read_official_config({"TAG": "x"})
    assert copied(config) == config
    assert copied(config) != read_official_config({"TAG": "y"})
    assert isinstance(copied(config).MODEL, OfficialConfig)


def test_repr_reads_as_a_file() -> None:
    lines = repr(read_official_config({})).splitlines()
    assert lines[0] == "OfficialConfig("
    assert "  DATA:" in lines
    assert "    IMG_SIZE: 224" in lines
    assert "    OPTIMIZER:" in lines
    assert "      BETAS: (0.9, 0.999)" in lines
