"""What Lightning calls for every Trainer and every Fabric, in every script.

Nothing is imported, and nothing changes, unless the environment variable `GRADCLIP_CONFIG` is set.
"""

from __future__ import annotations

import os
from typing import Any

__all__ = ["for_fabric", "for_trainer"]


def for_trainer() -> list[Any]:
    """Callbacks for a new Trainer; see `lightning_clip.unchanged`."""
    if not os.environ.get("GRADCLIP_CONFIG"):
        return []
    from lightning_clip.unchanged import for_trainer

    return list(for_trainer())


def for_fabric() -> list[Any]:
    """Callbacks for a new Fabric."""
    if not os.environ.get("GRADCLIP_CONFIG"):
        return []
    from lightning_clip.unchanged import for_fabric

    return list(for_fabric())
