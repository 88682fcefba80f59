"""gradclip for Accelerate: `enable(accelerator, policy)`, or `accelerate-clip launch`."""

from accelerate_clip.clipper import AcceleratorClip, enable

__all__ = ["AcceleratorClip", "enable"]
