"""Draw docs/images/report.png: the page that `gradclip report` makes of a small GPT's run.

make pictures; needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

from gpt import surprise  # noqa: E402
from setting import SEED, Setting  # noqa: E402
from text import Text  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from gradclip import ClipConfig, GradientClipper, RecorderConfig  # noqa: E402
from gradclip.config import as_config  # noqa: E402
from gradclip.tools.main import main as gradclip  # noqa: E402

BROKEN_STEP = 180
SIZE = "1200,1400"


def record_run(path: Path) -> None:
    """Train on partly corrupted text; at one step the third block's backward makes a NaN."""
    setting, text = Setting(context=64, width=64), Text()
    torch.manual_seed(SEED)
    model = setting.model(text)
    optimizer = setting.optimizer(model)
    schedule = setting.schedule(optimizer)
    config = as_config("zclip")
    config = ClipConfig(**{**dict(config), "recorder": RecorderConfig(file=str(path))})
    clipper = GradientClipper(config, model.named_parameters(), optimizer)
    batches = DataLoader(setting.training_samples(text), batch_size=setting.batch_size)
    for step, (inputs, target, scale) in enumerate(batches):
        if step == BROKEN_STEP:
            break_once(model.blocks[2].mlp)
        losses = surprise(model(inputs), target)
        optimizer.zero_grad()
        (losses * scale).mean().backward()
        clipper.batch = step
        if not clipper.clip().skipped:
            optimizer.step()
        schedule.step()
    clipper.recorder.close()


def break_once(module: nn.Module) -> None:
    """Multiply the gradient of the next output of a module by NaN."""

    def spoil(_: nn.Module, __: object, output: Tensor) -> None:
        output.register_hook(lambda grad: grad * float("nan"))
        handle.remove()

    handle = module.register_forward_hook(spoil)


def main() -> None:
    """Train, report, and take a picture of the page."""
    browser = shutil.which("chromium")
    if browser is None:
        sys.exit("docs/report_picture.py needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        trace, page = Path(folder) / "gpt.trace.jsonl", Path(folder) / "page.html"
        record_run(trace)
        try:
            gradclip(["report", str(trace), "--out", str(page)])
        except SystemExit as done:
            if done.code:
                raise
        picture = ROOT / "docs" / "images" / "report.png"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        flags += ["--virtual-time-budget=5000", f"--window-size={SIZE}", f"--screenshot={picture}"]
        subprocess.run([browser, *flags, page.as_uri()], check=True, capture_output=True)
        print(f"{picture.relative_to(ROOT)}: {picture.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
