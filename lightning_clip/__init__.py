"""Gradient clipping for Lightning: one callback for the Trainer, one call for Fabric.

>>> from lightning_clip import GradientClip
>>> callback = GradientClip({"policies": [{"type": "zclip"}]})  # for Trainer(callbacks=[callback])
"""

from gradclip import __version__
from lightning_clip.callback import GradientClip
from lightning_clip.fabric import disable, enable

__all__ = ["GradientClip", "__version__", "disable", "enable"]
