"""A faulty file is answered with where, what was found, and what is allowed."""

import math
from itertools import pairwise

import pytest
import torch
from support.gradients import parameters

from gradclip import (
    ClipByNorm,
    ClipConfig,
    ConfigError,
    GradientClipper,
    ZClip,
    after,
    as_config,
    load_section,
    load_yaml,
)

GOOD = """\
# yaml-language-server: $schema=./schema.json
policies:
  - type: zclip
    decay: 0.97
  - type: norm
    max_norm: 1.0
log:
  every_n_steps: 10
"""

FAULTS = [
    ("type: zclip", "type: zclp", r"line 3: policies\[0\]\.type is 'zclp'; did you mean 'zclip'\?"),
    ("decay: 0.97", "decya: 0.97", r"line 4: .*\.decya is not a known key; did you mean 'decay'\?"),
    ("decay: 0.97", "decay: 1.5", r"line 4: policies\[0\]\.decay is 1.5; it must be less than 1\."),
    (
        "decay: 0.97",
        "decay: [1]",
        r"line 4: policies\[0\]\.decay is \[1\]; it must be a valid number",
    ),
    ("decay: 0.97", "mode: zscor", r"line 4: .*\.mode is 'zscor'; allowed: 'zscore' or 'perc"),
    (
        "max_norm: 1.0",
        "max_norm: -1.0",
        r"line 6: policies\[1\]\.max_norm is -1.0; .*greater than 0",
    ),
    ("max_norm: 1.0", "max_norm: 0", r"line 6: .* is 0; it must be greater than 0"),
    ("max_norm: 1.0", "max_norm: .nan", r"line 6: .* is nan; it must be greater than 0"),
    ("max_norm: 1.0", "max_norm: yes", r"line 6: .* is True; .*YAML reads yes, no, on and off as"),
    ("max_norm: 1.0", "max_norm: '1.0'", r"line 6: .* is '1.0'; .*without quotes \(infinity is"),
    ("max_norm: 1.0", "max_norm: auto", r"line 6: .* is 'auto'; it must be a valid number"),
    ("max_norm: 1.0", "max_norm: null", r"line 6: .* is None; it must be a valid number"),
    ("    max_norm: 1.0\n", "", r"line 5: policies\[1\]\.max_norm is missing; add it"),
    ("every_n_steps: 10", "every_n_steps: 0", r"line 8: log\.every_n_steps is 0; .*equal to 1"),
    ("every_n_steps: 10", "every_n_step: 5", r"line 8: log\.every_n_step is not .*'every_n_steps'"),
    (
        "log:",
        "type: zclip\nlog:",
        r"line 7: type is not a key here; a policy stands in a list: pol",
    ),
    (
        "log:",
        "logs:",
        r"line 7: logs is not a known key; did you mean 'log'\? Known: policies, on_",
    ),
    (
        "max_norm: 1.0",
        "scope: layer\n    max_norm: 1.0",
        r"line 6: .*scope is 'layer'; allowed: 'glo",
    ),
    (
        "max_norm: 1.0",
        "max_norm: 1.0\n    max_norm: 2.0",
        r"line 7: .*max_norm is given twice \(first",
    ),
    ("decay: 0.97", "decay: 0.97: 1", r"line 4: this isn't YAML: mapping values are not allowed"),
    (
        "  - type: norm",
        "  - kind: norm",
        r"line 5: policies\[1\]\.type is missing; add one of: auto",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), FAULTS, ids=[f"{n!r}" for _, n, _ in FAULTS])
def test_a_fault_names_file_line_key_value_and_remedy(tmp_path, old, new, message):
    assert GOOD.count(old) == 1
    path = tmp_path / "run.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=f"run\\.yaml, {message}"):
        load_yaml(path)


def test_a_clamp_that_is_not_the_last_names_its_line(tmp_path):
    path = tmp_path / "run.yaml"
    clamp = "policies:\n  - {type: value, clip_value: 1.0}\n"
    path.write_text(GOOD.replace("policies:\n", clamp))
    with pytest.raises(ConfigError, match=r"run\.yaml, line 2: policies has 'value' before"):
        load_yaml(path)


def test_the_good_file_and_every_fault_of_a_bad_one(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    assert [policy.type for policy in load_yaml(path).policies] == ["zclip", "norm"]
    path.write_text(GOOD.replace("0.97", "2").replace("1.0", "-1").replace("10", "x"))
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    assert len(str(caught.value).splitlines()) == 3
    path.write_text(GOOD.replace("max_norm", "max_nrm"))
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    misspelt, missing = str(caught.value).splitlines()  # the better hint stands first
    assert "did you mean 'max_norm'" in misspelt
    assert "policies[1].max_norm is missing" in missing


def test_every_way_to_write_a_small_number(tmp_path):
    path = tmp_path / "run.yaml"
    for text in ("1e-6", "1.0e-6", "1E-6", "0.000001"):
        path.write_text(GOOD.replace("max_norm: 1.0", f"max_norm: {text}"))
        assert load_yaml(path).policies[1].max_norm == 1e-6


def test_a_file_or_section_without_a_mapping(tmp_path):
    path = tmp_path / "run.yaml"
    whole = {
        "": ": found None",
        "\nzclip": ", line 2: found 'zclip'",
    }
    for text, found in whole.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"run\.yaml{found}; a mapping with the key"):
            load_yaml(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"run\.yaml, line 1: policies is \[\]; at least one"):
        load_yaml(path)
    for value in ("null", "", "1.0"):
        path.write_text(f"num_processes: 2\ngradient_clip_config: {value}\n")
        with pytest.raises(ConfigError, match=r"run\.yaml, line 2: found .*; a mapping with the k"):
            load_section(path, "gradient_clip_config")


UNREADABLE = {
    "date": ("policies: []\nlog: 2024-13-45\n", ", line 2: this isn't YAML: month must be in 1"),
    "digits": (
        f"log:\n  every_n_steps: {'1' * 5000}\n",
        ", line 2: this isn't YAML: Exceeds the limit",
    ),
    "alias": ("policies: &a [*a]\n", ": values are nested too deeply, or an alias contains itself"),
    "depth": ("policies: " + "[" * 3000, ": values are nested too deeply"),
    "aliases": (
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "".join(f"{y}: &{y} [{','.join(['*' + x] * 9)}]\n" for x, y in pairwise("abcdefghi")),
        r", line \d: the file stands for more than 20,000 values",
    ),
    "merges": (
        "a: &a {x: 1}\n"
        + "".join(
            f"{y}: &{y} {{<<: [{','.join(['*' + x] * 9)}]}}\n" for x, y in pairwise("abcdefghi")
        ),
        r", line \d: the file stands for more than 20,000 values",
    ),
    "size": (GOOD + "#" * (1 << 20), ": the file has more than 1 MiB"),
    "documents": (GOOD + "---\n" + GOOD, ", line 9: the file holds several documents; keep one"),
}


def test_what_yaml_cannot_hold_is_named(tmp_path, subtests):
    path = tmp_path / "run.yaml"
    for name, (text, message) in UNREADABLE.items():
        path.write_text(text)
        with subtests.test(name), pytest.raises(ConfigError, match=rf"run\.yaml{message}"):
            load_yaml(path)


def test_a_mapping_that_contains_itself():
    policies = []
    policies.append({"type": "norm", "max_norm": policies})
    with pytest.raises(ConfigError, match="nested too deeply, or contains itself"):
        as_config(policies)


def test_a_missing_file():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: the file can't be read \(No such file"):
        load_yaml("nowhere.yaml")


def test_thresholds_refused_in_python_and_mappings(subtests):
    for value in (-1.0, 0, 0.0, math.nan, True, "1.0", None, [1.0]):
        with subtests.test(value=value):
            with pytest.raises(ConfigError, match=r"^ClipByNorm: max_norm is .*; it must be"):
                ClipByNorm(max_norm=value)
            wrong = {"policies": [{"type": "norm", "max_norm": value}]}
            with pytest.raises(ConfigError, match=r"policies\[0\]\.max_norm is"):
                GradientClipper(wrong, parameters().items())


def test_what_is_no_policy():
    for wrong in (7, [1.0], [None]):
        with pytest.raises(ConfigError, match="allowed: a policy such as Auto"):
            GradientClipper(wrong, parameters().items())
    with pytest.raises(ConfigError, match=r"policies is \[\]; at least one policy is needed"):
        GradientClipper([], parameters().items())


def test_infinity_is_a_threshold_that_measures(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("policies: [{type: norm, max_norm: .inf}]")
    assert load_yaml(path) == ClipConfig(policies=[ClipByNorm(max_norm=math.inf)])


MODEL = torch.nn.Linear(1, 1)
SGD = torch.optim.SGD(MODEL.parameters(), lr=0.1)
UNIT = ClipByNorm(max_norm=1.0)
ALIKE = {
    "what is required by position": lambda: ClipByNorm(1.0),
    "a list of mappings": lambda: as_config([{"type": "norm", "max_norm": 1.0}]).policies[0],
    "a list of both": lambda: as_config([{"type": "norm", "max_norm": 1.0}, ZClip()]).policies[0],
    "one mapping": lambda: as_config({"type": "norm", "max_norm": 1.0}).policies[0],
    "the optimizer second": lambda: GradientClipper(UNIT, SGD).config.policies[0],
    "names as a mapping": lambda: GradientClipper(
        UNIT, dict(MODEL.named_parameters())
    ).config.policies[0],
    "optimizer and model swapped": lambda: GradientClipper(UNIT, SGD, MODEL).config.policies[0],
}
SLIPS = {
    "nothing at all": (GradientClipper, "got neither named_parameters nor optimizer"),
    "a number": (lambda: GradientClipper(3.0), "policy is 3.0; .* Write, for instance, ClipByNorm"),
    "no policy, and no names": (
        lambda: GradientClipper(MODEL.parameters()),
        "holds a Parameter without a name",
    ),
    "parameters without names": (
        lambda: GradientClipper(UNIT, MODEL.parameters()),
        r"holds a Parameter without a name; .* Write GradientClipper\(policy, model\)",
    ),
    "one parameter": (lambda: GradientClipper(UNIT, MODEL.weight), "holds a Parameter without"),
    "no iterable": (lambda: GradientClipper(UNIT, 3), "holds a int without a name"),
    "groups": (lambda: GradientClipper(UNIT, SGD.param_groups), "holds a dict without a name"),
    "no optimizer": (
        lambda: GradientClipper(UNIT, MODEL, MODEL.parameters()),
        r"optimizer is a generator; .* Write GradientClipper\(policy, model, optimizer\)",
    ),
    "by position": (lambda: ZClip(0.9), r"ZClip got 0\.9 without a name; allowed: .*decay=\.\.\."),
    "missing": (ClipByNorm, "ClipByNorm: max_norm is missing; add it"),
    "misspelt": (lambda: ClipByNorm(max_nrm=1.0), "max_nrm is not .*; did you mean 'max_norm'"),
    "within": (
        lambda: ClipConfig(policies=[{"type": "norm", "max_norm": -1}]),
        r"ClipConfig: policies\[0\]\.max_norm is -1; it must be greater than 0",
    ),
    "together": (
        lambda: ClipByNorm(max_norm=1.0, budget="size"),
        "ClipByNorm: has budget 'size' with scope 'global'",
    ),
    "after": (lambda: after(-1, ZClip()), "ZClip: after is -1; it must be greater than or equal"),
}


def test_likely_slips_mean_what_they_say():
    for name, make in ALIKE.items():
        assert make() == UNIT, name


def test_other_likely_slips_are_one_error_with_the_line_to_write(subtests):
    for name, (make, message) in SLIPS.items():
        with subtests.test(name), pytest.raises(ConfigError, match=message):
            make()


def test_a_norm_type_of_infinity_as_torch_takes_it():
    for word in ("inf", ".inf", "Infinity", "+inf", math.inf):
        assert ClipByNorm(max_norm=1.0, norm_type=word).norm_type == math.inf
    with pytest.raises(ConfigError, match="norm_type is '-inf'; it must be a valid number"):
        ClipByNorm(max_norm=1.0, norm_type="-inf")
