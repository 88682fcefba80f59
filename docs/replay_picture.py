"""Draw docs/images/replay.png: one recorded run of a small GPT, and three ways to clip it."""

from __future__ import annotations

from pathlib import Path

from gradclip import AutoClip, ClipByNorm, ZClip
from gradclip.config import as_config
from gradclip.tools.replay import replay
from gradclip.tools.show_replay import draw_replay
from gradclip.tools.trace import Trace

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Replay and draw."""
    policies = {
        "max_norm 3.5": ClipByNorm(max_norm=3.5),
        "autoclip": AutoClip(percentile=95.91, window=100, warmup_steps=100),
        "zclip": ZClip(max_norm=None),
    }
    configs = {name: as_config(policy) for name, policy in policies.items()}
    found = replay(Trace.open(ROOT / "tests" / "traces" / "gpt.jsonl"), configs)
    picture = ROOT / "docs" / "images" / "replay.png"
    draw_replay(found, "One run, three ways to clip it", png=picture, html=None)


if __name__ == "__main__":
    main()
