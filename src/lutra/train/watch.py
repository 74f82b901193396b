"""Knowing when something that was computed from tensors is stale."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor


class Watch:
    """Remembers which tensors these are and how often they were written.

    Writes through `.data` leave no trace, and tensors made in inference mode do not count theirs:
    with one of these `unchanged` is always false.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # Weak references, because an address may be that of another tensor later.
        self._known = [
            (weakref.ref(t), -1 if t.is_inference() else int(t._version)) for t in tensors
        ]

    def unchanged(self, tensors: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, not written since."""
        return len(tensors) == len(self._known) and all(
            ref() is t and not t.is_inference() and t._version == version
            for (ref, version), t in zip(self._known, tensors, strict=True)
        )
