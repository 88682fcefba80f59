"""Any of our YAML files is checked without the framework that reads it."""

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from gradclip import Auto, ClipByNorm, ClipConfig, LogConfig, load_yaml
from gradclip.config.presets import preset_file, presets
from gradclip.tools.check import check_file, describe_as_json, describe_as_yaml
from gradclip.tools.main import main
from lightning_clip import GradientClip

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = [*map(preset_file, presets()), *sorted(CONFIGS.rglob("*.yaml"))]
NORM = "{policies: [{type: norm, max_norm: 1.0}]}"


def written(folder, text):
    path = folder / "file.yaml"
    path.write_text(text)
    return path


def trainer(callbacks, more=""):
    return f"trainer:\n  max_steps: 3\n{more}  callbacks:\n{callbacks}"


def callback(policy=NORM, more=""):
    return (
        "    - class_path: lightning_clip.GradientClip\n"
        f"      init_args:\n{more}        policy: {policy}\n"
    )


def test_each_shipped_file_is_valid_and_of_its_kind(subtests):
    kinds = {"lightning_cli": "lightning", "accelerate": "accelerate"}
    for path in FILES:
        with subtests.test(path.name):
            checked = check_file(path)
            assert checked.fault is None
            assert checked.kind == kinds.get(path.stem, kinds.get(path.parent.name, "gradclip"))
            [config] = checked.configs.values()
            if checked.kind == "gradclip":
                assert config == load_yaml(path)


def test_the_settings_shown_are_complete_and_read_back(tmp_path):
    path = written(tmp_path, "policies: [{type: norm, max_norm: .inf}]\non_nonfinite: ignore\n")
    shown = describe_as_yaml([check_file(path)])
    content = yaml.safe_load(shown)
    assert content["log"] == LogConfig().model_dump()
    assert ClipConfig.model_validate(content) == load_yaml(path)
    [entry] = json.loads(describe_as_json([check_file(path)]))
    assert entry["settings"][""]["policies"][0]["max_norm"] == ".inf"


def test_a_callback_under_a_subcommand_with_a_file(tmp_path):
    policy = written(tmp_path, "policies: [{type: norm, max_norm: 2.0}]\n").rename(
        tmp_path / "policy.yaml"
    )
    text = "\n".join(f"  {line}" for line in trainer(callback(policy)).splitlines())
    checked = check_file(written(tmp_path, f"fit:\n{text}\n"))
    assert checked.fault is None
    [(place, config)] = checked.configs.items()
    assert place == "fit.trainer.callbacks[0].init_args.policy"
    assert config.policies == [ClipByNorm(max_norm=2.0)]


def test_a_callback_without_a_policy_is_auto(tmp_path):
    text = trainer("    - class_path: lightning_clip.GradientClip\n")
    [config] = check_file(written(tmp_path, text)).configs.values()
    assert config.policies == [Auto()]


ACCELERATE = "distributed_type: DEEPSPEED\nnum_processes: 2\n"
OURS = f"gradient_clip_config: {NORM}\n"
BAD = {
    "a key": (
        "policies:\n  - type: zclip\n    decy: 0.9\n",
        "line 3: policies[0].decy is not a known key; did you mean 'decay'?",
    ),
    "a key in a callback": (
        trainer(callback("{policies: [{type: norm, max_nrm: 1.0}]}")),
        "line 6: policies[0].max_nrm is not a known key; did you mean 'max_norm'?",
    ),
    "a key in a section": (
        ACCELERATE + "gradient_clip_config: {polices: []}\n",
        "line 3: polices is not a known key; did you mean 'policies'?",
    ),
    "no section": (ACCELERATE, "the section 'gradient_clip_config' is missing"),
    "no callback": (
        trainer("    - class_path: lightning_clip.GradientClp\n"),
        "Line 4 has 'lightning_clip.GradientClp'.",
    ),
    "no such file": (trainer(callback("nowhere.yaml")), "line 6: nowhere.yaml: the file can't"),
    "an argument": (
        trainer(callback(more="        progres_bar: true\n")),
        "line 6: init_args.progres_bar is not a known key",
    ),
    "no flag": (
        trainer(callback(more="        restore: 7\n")),
        "line 6: init_args.restore is 7; allowed: true or false",
    ),
    "a class": (
        trainer(callback("\n          class_path: gradclip.ZClp")),
        "line 7: class_path is 'gradclip.ZClp'; did you mean 'gradclip.ZClip'? Known: gradclip.",
    ),
    "an argument of a class": (
        trainer(
            callback(
                "\n        - class_path: gradclip.ClipByNorm\n          init_args:\n"
                "            max_norm: 1.0\n        - class_path: gradclip.ZClip\n"
                "          init_args:\n            decy: 0.9"
            )
        ),
        "line 12: policies[1].decy is not a known key; did you mean 'decay'?",
    ),
    "the trainer clips": (
        trainer(callback(), "  gradient_clip_val: 0.5\n"),
        "line 3: gradient_clip_val is 0.5, and GradientClip clips too",
    ),
    "two callbacks": (trainer(callback() * 2), "line 7: a second GradientClip would clip again"),
    "DeepSpeed clips": (
        f"{ACCELERATE}deepspeed_config: {{gradient_clipping: 0.5}}\n{OURS}",
        "line 3: deepspeed_config.gradient_clipping is 0.5, and only one can clip",
    ),
    "DeepSpeed clips, as text": (
        f"{ACCELERATE}deepspeed_config: {{gradient_clipping: '0.5'}}\n{OURS}",
        "line 3: deepspeed_config.gradient_clipping is 0.5, and only one can clip",
    ),
    "DeepSpeed's threshold is no number": (
        f"{ACCELERATE}deepspeed_config: {{gradient_clipping: often}}\n{OURS}",
        "line 3: gradient_clipping is 'often'; allowed: a number, or auto",
    ),
    "DeepSpeed's file is missing": (
        f"{ACCELERATE}deepspeed_config: {{deepspeed_config_file: nowhere.json}}\n{OURS}",
        "line 3: nowhere.json can't be read (No such file or directory)",
    ),
    "Megatron": (
        f"num_processes: 2\ndistributed_type: MEGATRON_LM\n{OURS}",
        "line 2: distributed_type asks for Megatron-LM, which steps inside its own train_step",
    ),
    "a section of Megatron": (
        "num_processes: 2\nmegatron_lm_config: {megatron_lm_gradient_clipping: 1.0}\n",
        "line 2: megatron_lm_config asks for Megatron-LM",
    ),
    "axolotl": ("base_model: a/b\ndebug: true\n", "a file of axolotl; check takes three kinds: "),
    "LLaMA-Factory": ("stage: sft\nfinetuning_type: lora\n", "a file of LLaMA-Factory; check"),
    "Hydra": (
        "defaults: [{trainer: ddp}]\ncallbacks: {clip: {_target_: lightning_clip.GradientClip}}\n",
        "a file of Hydra; check takes three kinds: a configuration, with the key 'policies'; ",
    ),
    "nobody's": ("lr: 0.1\ndebug: true\n", "no key here is one of gradclip's; check takes"),
    "policy for policies": ("policy: [{type: norm}]\n", "did you mean 'policies'?"),
    "no YAML": ("policies: [", "this isn't YAML"),
    "no text": ("policies: \x00", "this isn't YAML"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, message):
    checked = check_file(written(tmp_path, text))
    assert message in checked.fault
    assert not checked.configs


def test_a_threshold_of_deepspeed_that_does_not_matter(tmp_path):
    for value in ("0", "auto", "1.0", "'1.0'"):
        text = f"{ACCELERATE}deepspeed_config: {{gradient_clipping: {value}}}\n{OURS}"
        assert check_file(written(tmp_path, text)).fault is None


def test_a_threshold_in_a_file_of_deepspeed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = f"{ACCELERATE}deepspeed_config: {{deepspeed_config_file: ds.json}}\n{OURS}"
    for value, fault in (("1.0", None), ('"auto"', None), ("0.5", "line 3: .* of ds.json is 0.5,")):
        Path("ds.json").write_text(f'{{"gradient_clipping": {value}}}')
        found = check_file(written(tmp_path, text)).fault
        assert found is None if fault is None else re.search(fault, found)


def test_the_arguments_of_the_callback_are_all_known(tmp_path):
    names = [name for name in inspect.signature(GradientClip).parameters if name != "policy"]
    more = "".join(f"        {name}: false\n" for name in names)
    assert check_file(written(tmp_path, trainer(callback(more=more)))).fault is None


def test_the_command_checks_every_file(tmp_path, capsys):
    bad = written(tmp_path, "policies: []\n")
    with pytest.raises(SystemExit) as stop:
        main(["check", str(bad), str(CONFIGS / "lightning_cli.yaml")])
    assert stop.value.code == 1
    shown = capsys.readouterr()
    assert "policies is []; at least one policy is needed" in shown.err
    assert yaml.safe_load(shown.out)["policies"][1]["max_norm"] == 10.0


def test_a_missing_file_is_a_usage_error_and_json_lists_every_file(monkeypatch, capsys):
    monkeypatch.chdir(preset_file("zclip").parent)
    with pytest.raises(SystemExit) as stop:
        main(["check", "nowhere.yaml"])
    assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        main(["check", "zclip.yaml", "agc.yaml", "--json"])
    assert stop.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert [entry["file"] for entry in shown] == ["zclip.yaml", "agc.yaml"]


def test_a_merged_key_is_named_by_the_line_it_is_merged_in(tmp_path):
    """A key from `<<` has no line of its own."""
    text = "base: &base {decy: 0.9}\n" + trainer(
        callback("\n          - class_path: gradclip.ZClip\n            init_args: {<<: *base}")
    )
    fault = check_file(written(tmp_path, text)).fault
    assert "line 8: policies[0].decy is not a known key" in fault


def test_a_class_path_imports_nothing(tmp_path):
    """jsonargparse would import what a class path names."""
    checked = check_file(written(tmp_path, trainer(callback("\n          class_path: this.ZClip"))))
    assert "class_path is 'this.ZClip'; did you mean 'gradclip.ZClip'?" in checked.fault
    assert "this" not in sys.modules
