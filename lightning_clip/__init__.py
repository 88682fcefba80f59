"""Gradient clipping for Lightning: one callback for the Trainer.

>>> from lightning_clip import GradientClip
>>> callback = GradientClip({"policies": [{"type": "zclip"}]})  # for Trainer(callbacks=[callback])
"""

from lightning_clip.callback import GradientClip

__all__ = ["GradientClip"]
