"""Every policy file in configs/ is valid, says what it is, and builds a clipper for the GPT."""

import sys
from pathlib import Path

import torch

from gradclip import Auto, ClipByNorm, GradientClipper, ZClip, load_section, load_yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from setting import SMALL  # noqa: E402
from text import Text  # noqa: E402

SCHEMA = "# yaml-language-server: $schema=./schema.json\n"
FILES = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if path.read_text(encoding="utf-8").startswith(SCHEMA)
]


def test_every_policy_file_says_what_it_is_and_clips_the_gpt(tmp_path, monkeypatch, subtests):
    monkeypatch.chdir(tmp_path)  # for flight records
    for path in FILES:
        with subtests.test(path.stem):
            assert path.read_text(encoding="utf-8").splitlines()[1].startswith("# ")
            model = SMALL.model(Text())
            clipper = GradientClipper(path, model.named_parameters())
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 10.0)
            record = clipper.clip()
            assert bool(record.clipped) == (path.stem != "measure_only")


def test_named_files_hold_what_their_names_say():
    policies = {path.stem: load_yaml(path).policies for path in FILES}
    assert set(policies) >= {"value", "groups"}
    assert policies["measure_only"] == [ClipByNorm(max_norm=float("inf"))]
    assert policies["fixed_norm"] == [ClipByNorm(max_norm=1.0)]
    assert isinstance(policies["zclip"][0], ZClip)
    assert policies["recorder"] == policies["auto"] == [Auto()]
    assert policies["zclip_per_parameter"][0].scope == "parameter"


def test_readme_lists_every_file():
    listed = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").iterdir():
        if path.suffix in {".yaml", ".json"}:
            assert f"[{path.name}]({path.name})" in listed


def test_accelerate_file_clips_as_auto_yaml():
    file = ROOT / "configs" / "accelerate" / "two_processes.yaml"
    config = load_section(file, "gradient_clip_config")
    assert config.policies == load_yaml(ROOT / "configs" / "auto.yaml").policies
