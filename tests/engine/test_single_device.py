"""Runs single_device_cases.py in a process of its own: what registers a device does so for good."""

import subprocess
import sys
from pathlib import Path


def test_gradients_on_a_device_without_float64():
    cases = Path(__file__).with_name("single_device_cases.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "-p",
        "no:cacheprovider",
        str(cases),
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
