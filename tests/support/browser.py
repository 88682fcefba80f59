"""A real browser, and what it made of a page."""

import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")


class Page(HTMLParser):
    """What a browser made of a page: its elements, its text, and what it printed."""

    def __init__(self, html, console):
        super().__init__()
        self.console, self.tags, self.text = console, [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.text += data

    def count(self, tag, kind=None):
        classes = [(a.get("class") or "").split() for name, a in self.tags if name == tag]
        return sum(kind is None or kind in found for found in classes)


def require_browser():
    """Skips the test where there is no browser; in CI, fails it."""
    if BROWSER is None:
        text = "needs Chromium: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(text)


def visit(path, query="", folder=None):
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += [
        f"--user-data-dir={(folder or path.parent) / 'profile'}",
        "--virtual-time-budget=10000",
    ]
    log = ["--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = [BROWSER, *flags, *log, path.as_uri() + query]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    return Page(done.stdout, re.findall(r"CONSOLE:\d+\] (.*)", done.stderr))
