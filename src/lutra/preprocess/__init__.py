"""Images, sound and text become the inputs of a model."""

from __future__ import annotations

from lutra._moved import forward

__getattr__ = forward(__name__, "lutra.preprocess.image", ("KEY", "ImagePreprocess", "shown"))
