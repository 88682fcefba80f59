"""gradclip for Accelerate: `enable(accelerator, policy)`, or `accelerate-clip launch`.

For transformers' `Trainer`: `GradientClipCallback(policy)`.
"""

from typing import TYPE_CHECKING, Any

try:
    import accelerate  # noqa: F401  # here, so that one place says what is missing
except ModuleNotFoundError as error:
    if error.name != "accelerate":
        raise
    msg = (
        "accelerate_clip needs Accelerate, which isn't installed. Install it: "
        'pip install "gradclip[accelerate]"'
    )
    raise ModuleNotFoundError(msg, name="accelerate") from None

from accelerate_clip.clipper import AcceleratorClip
from accelerate_clip.enable import enable
from gradclip import __version__

if TYPE_CHECKING:
    from accelerate_clip.trainer import GradientClipCallback

__all__ = ["AcceleratorClip", "GradientClipCallback", "__version__", "enable"]


def __getattr__(name: str) -> Any:
    if name != "GradientClipCallback":
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    # Not at the top: transformers is optional, and takes seconds to import.
    try:
        from accelerate_clip.trainer import GradientClipCallback
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        msg = (
            "GradientClipCallback needs transformers, which isn't installed. Install it: "
            'pip install "gradclip[transformers]"'
        )
        raise ModuleNotFoundError(msg, name="transformers") from None

    return GradientClipCallback
