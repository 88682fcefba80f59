"""The files in `configs/` and the schema they name."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from gradclip import load_yaml
from gradclip.config.schema import schema_text

CONFIGS = Path(__file__).parents[2] / "configs"
POLICY_FILES = [
    path
    for path in sorted(CONFIGS.glob("*.yaml"))
    if "policies" in yaml.safe_load(path.read_text())
]


def test_the_schema_is_the_models():
    assert (CONFIGS / "schema.json").read_text() == schema_text(), "run `make schema`"


def test_each_file_loads_fits_the_schema_and_names_it(subtests):
    assert len(POLICY_FILES) >= 17
    for path in POLICY_FILES:
        with subtests.test(path.name):
            load_yaml(path)
            jsonschema.validate(yaml.safe_load(path.read_text()), json.loads(schema_text()))
            assert path.read_text().startswith("# yaml-language-server: $schema=./schema.json\n")


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
