"""gradclip for Accelerate: `enable(accelerator, policy)`, or `accelerate-clip launch`.

For transformers' `Trainer`: `GradientClipCallback(policy)`.
"""

from typing import TYPE_CHECKING, Any

from accelerate_clip.clipper import AcceleratorClip
from accelerate_clip.enable import enable

if TYPE_CHECKING:
    from accelerate_clip.trainer import GradientClipCallback

__all__ = ["AcceleratorClip", "GradientClipCallback", "enable"]


def __getattr__(name: str) -> Any:
    if name != "GradientClipCallback":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    # Not at the top: transformers is optional, and takes seconds to import.
    from accelerate_clip.trainer import GradientClipCallback

    return GradientClipCallback
