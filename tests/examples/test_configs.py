"""Every preset builds a clipper for the GPT; configs/README.md lists what is shipped."""

import sys
from pathlib import Path

import torch

from gradclip import Auto, ClipByNorm, GradientClipper, ZClip, as_config, load_section
from gradclip.config.presets import presets

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from setting import SMALL  # noqa: E402
from text import Text  # noqa: E402


def test_every_preset_clips_the_gpt(tmp_path, monkeypatch, subtests):
    monkeypatch.chdir(tmp_path)  # for flight records
    for name in presets():
        with subtests.test(name):
            model = SMALL.model(Text())
            clipper = GradientClipper(name, model.named_parameters())
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 10.0)
            record = clipper.clip()
            assert bool(record.clipped) == (name != "measure_only")


def test_presets_hold_what_their_names_say():
    policies = {name: as_config(name).policies for name in presets()}
    assert set(policies) >= {"value", "groups"}
    assert policies["measure_only"] == [ClipByNorm(max_norm=float("inf"))]
    assert policies["fixed_norm"] == [ClipByNorm(max_norm=1.0)]
    assert isinstance(policies["zclip"][0], ZClip)
    assert policies["recorder"] == policies["auto"] == [Auto()]
    assert policies["llm"] == [Auto()]
    assert as_config("llm").recorder
    assert as_config("llm").alarm.withheld == 0.1
    assert policies["zclip_per_parameter"][0].scope == "parameter"


def test_readme_lists_every_file():
    listed = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for name in presets():
        assert f"[`{name}`](../gradclip/presets/{name}.yaml)" in listed
    for path in (ROOT / "configs").glob("*.yaml"):
        assert f"[{path.name}]({path.name})" in listed


def test_accelerate_file_clips_as_the_preset_auto():
    file = ROOT / "configs" / "accelerate" / "two_processes.yaml"
    config = load_section(file, "gradient_clip_config")
    assert config.policies == as_config("auto").policies
