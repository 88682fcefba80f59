"""Every policy file in configs/ is valid, says what it is, and builds a clipper for the GPT."""

import sys
from pathlib import Path

import pytest
import torch

from gradclip import ClipByNorm, GradientClipper, ZClip, load_yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from setting import SMALL  # noqa: E402
from text import Text  # noqa: E402

FILES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_clips_the_gpt(path):
    head = path.read_text(encoding="utf-8").splitlines()[:2]
    assert head[0] == "# yaml-language-server: $schema=./schema.json"
    assert head[1].startswith("# ")
    model = SMALL.model(Text())
    clipper = GradientClipper(path, model.named_parameters())
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0)
    record = clipper.clip()
    assert bool(record.clipped) == (path.stem != "measure_only")


def test_named_files_hold_what_their_names_say():
    assert len(FILES) >= 6
    policies = {path.stem: load_yaml(path).policies for path in FILES}
    assert policies["measure_only"] == [ClipByNorm(max_norm=float("inf"))]
    assert policies["fixed_norm"] == [ClipByNorm(max_norm=1.0)]
    assert isinstance(policies["zclip"][0], ZClip)
    assert policies["zclip_per_parameter"][0].scope == "parameter"


def test_readme_lists_every_file():
    listed = (ROOT / "configs" / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").iterdir():
        if path.suffix in {".yaml", ".json"}:
            assert f"[{path.name}]({path.name})" in listed
