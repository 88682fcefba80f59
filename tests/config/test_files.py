"""The presets, by their names, and the schema they name."""

import json
from collections import UserList
from collections.abc import Mapping
from pathlib import Path

import jsonschema
import pytest
import yaml

import gradclip
from gradclip import (
    AGC,
    ClipByNorm,
    ConfigError,
    Schedule,
    ZClip,
    as_config,
    load_section,
    load_yaml,
)
from gradclip.config.presets import preset_file, preset_text, presets
from gradclip.config.schema import schema_text

PRESETS = Path(gradclip.__file__).parent / "presets"


def test_the_schema_is_the_models():
    assert (PRESETS / "schema.json").read_text() == schema_text(), "run `make schema`"


def test_each_preset_loads_by_its_name_fits_the_schema_and_names_it(subtests):
    assert len(presets()) >= 18
    for name, line in presets().items():
        with subtests.test(name):
            text = preset_file(name).read_text()
            assert as_config(name) == load_yaml(preset_file(name))
            jsonschema.validate(yaml.safe_load(text), json.loads(schema_text()))
            assert text.startswith(f"# yaml-language-server: $schema=./schema.json\n# {line}\n")
            assert text.endswith(preset_text(name))


def test_a_name_is_a_preset_and_a_path_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("zclip").write_text("policies: [{type: norm, max_norm: 3.0}]")
    assert isinstance(as_config("zclip").policies[0], ZClip)
    for file in ("./zclip", Path("zclip"), str(tmp_path / "zclip")):
        assert as_config(file).policies == [ClipByNorm(max_norm=3.0)]


NOWHERE = {
    "zclp": r"^zclp: there is no such preset, and no such file\. .* you mean 'zclip'\? Known: ad",
    "norm": "'fixed_norm'.* A policy of this type is written {type: norm}",
    "configs/zclip.yaml": r"^configs/zclip\.yaml: the file can't be read \(No .*mean 'zclip'\?",
    "": "there is no such preset",
    "x" * 5000: "there is no such preset",
}


def test_what_is_neither_preset_nor_file_names_those_that_are_near(tmp_path, subtests):
    path = tmp_path / "run.yaml"
    for name, message in NOWHERE.items():
        with subtests.test(name), pytest.raises(ConfigError, match=message):
            as_config(name)
        path.write_text(f"{{clip: '{name}'}}")
        with subtests.test(name), pytest.raises(ConfigError, match=r"run\.yaml, line 1: "):
            load_section(path, "clip")


class Node(Mapping):
    """A mapping that is no dict, as OmegaConf's."""

    def __init__(self, **own):
        self.own = own

    def __getitem__(self, key):
        return self.own[key]

    def __iter__(self):
        return iter(self.own)

    def __len__(self):
        return len(self.own)


BOTH = [{"type": "zclip", "decay": 0.9}, {"type": "agc", "exclude": ["head.*"]}]
NODES = [Node(type="zclip", decay=0.9), Node(type="agc", exclude=UserList(["head.*"]))]
ALIKE = {
    "a list": BOTH,
    "a tuple": tuple(BOTH),
    "nodes": UserList(NODES),
    "a mapping": {"policies": BOTH},
    "tuples at any depth": {"policies": (BOTH[0], {"type": "agc", "exclude": ("head.*",)})},
    "nodes at any depth": Node(policies=UserList(NODES)),
    "a policy among nodes": Node(policies=UserList([ZClip(decay=0.9), NODES[1]])),
}


def test_every_way_to_write_the_same_is_the_same(tmp_path, subtests):
    expected = gradclip.ClipConfig.model_validate({"policies": BOTH})
    for name, given in ALIKE.items():
        with subtests.test(name):
            assert as_config(given) == expected
    for given in (tuple(BOTH), UserList(NODES), (ZClip(decay=0.9), AGC(exclude=("head.*",)))):
        assert gradclip.ClipConfig(policies=given) == expected
    slow = {"schedule": "linear", "start": 2.0, "end": 1.0, "steps": 5}
    assert ClipByNorm(Node(**slow)) == ClipByNorm(Schedule(**slow))
    assert AGC(unit_dim=Node(head=1)) == AGC(unit_dim={"head": 1})
    path = tmp_path / "run.yaml"
    for given in (BOTH, {"policies": BOTH}):
        path.write_text(yaml.safe_dump(given))
        assert load_yaml(path) == expected
        path.write_text(yaml.safe_dump({"clip": given}))
        assert load_section(path, "clip") == expected
    path.write_text("type: zclip\ndecay: 0.9\n")
    assert load_yaml(path).policies == [ZClip(decay=0.9)]
    path.write_text("clip: zclip")
    assert load_section(path, "clip") == as_config("zclip")


def test_a_fault_in_a_short_form_has_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    for text, line in {
        "type: zclip\ndecya: 1": 2,
        "- type: norm\n  max_norm: 1\n- decya: 1": 3,
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"run\.yaml, line {line}: policies\[\d\]\."):
            load_yaml(path)
        path.write_text("clip:\n" + "".join(f"  {row}\n" for row in text.splitlines()))
        with pytest.raises(ConfigError, match=rf"run\.yaml, line {line + 1}: policies\[\d\]\."):
            load_section(path, "clip")


def test_the_schema_refuses_what_the_models_refuse():
    schema = json.loads(schema_text())
    for wrong in (
        {"policies": []},
        {"policies": [{"type": "norm", "max_norm": -1.0}]},
        {"policies": [{"type": "norm", "max_norm": "1.0"}]},
        {"policies": [{"type": "zclip", "decya": 0.9}]},
        {"policies": [{"type": "zclip"}], "on_nonfinite": "stop"},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
