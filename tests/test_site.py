"""The documents as a site: built strictly, complete, and looked at in a browser."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.browser import require_browser, visit

import accelerate_clip
import gradclip
import lightning_clip
from gradclip import adapters, errors, testing

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_setting_and_public_name_has_its_place(site):
    text = (site / "settings.html").read_text()
    schema = json.loads((ROOT / "gradclip" / "presets" / "schema.json").read_text())
    for name, model in schema["$defs"].items():
        assert model["properties"].keys() <= set(re.findall(r"<td><code>(\w+)</code></td>", text))
        assert name in text
    for page, module in {
        "gradclip": gradclip,
        "adapters": adapters,
        "testing": testing,
        "lightning_clip": lightning_clip,
        "accelerate_clip": accelerate_clip,
    }.items():
        text = (site / "api" / f"{page}.html").read_text()
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in text, name


def test_the_list_of_messages(site):
    text = (site / "messages.html").read_text()
    for kind in {*errors.__all__} - {"ClipError", "escaped"}:
        assert f"<code>{kind}</code>" in text
    for message in (  # an f-string; one of two of a function; one that another function makes
        "clip: a loss has shape …; allowed: one number, what backward is called on.",
        "kernel is …; allowed: …, or None to choose.",
        "An optimizer steps inside backward: … is … as soon as its gradient is accumulated",
    ):
        assert message in text


def test_nothing_is_fetched(site):
    """No page loads a script, a style or a font from elsewhere."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?([^\">]+)", page.read_text())
        assert not [url for url in loaded if url.startswith(("http", "//"))], page


def test_in_a_browser(site, tmp_path):
    require_browser()
    home = visit(site / "index.html", folder=tmp_path)
    assert home.console == []
    assert home.count("input") >= 3  # tabs
    assert home.count("img") == 1
    for text in ("Lightning", "Accelerate, Trainer", "Plain loop"):
        assert text in home.text
    found = visit(site / "index.html", query="?q=zclip", folder=tmp_path)
    assert found.console == []
    assert found.count("li", "md-search-result__item") > 1
