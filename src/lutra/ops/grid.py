"""The activation grid of the operators that compute in integers.

With ``qmax = 2**act_bits - 1`` their input becomes::

    x_q = clamp(round_half_even(x / float32(act_scale)) + act_zero, 0, qmax)       NaN gives 0
"""

from __future__ import annotations

from typing import Final

import numpy as np

from lutra.node import Node
from lutra.ops.limits import MAX_ACT_BITS
from lutra.ops.spec import Attr, integer, node_error, number

#: The attributes of a grid.
GRID: Final = {
    "act_scale": Attr(float),
    "act_zero": Attr(int, low=0, high=2**MAX_ACT_BITS - 1),
    "act_bits": Attr(int, low=1, high=MAX_ACT_BITS),
}


def check_grid(node: Node) -> int:
    """Checks the attributes of a grid against each other.

    Args:
        node: A node whose attributes are of the right types.

    Returns:
        The largest integer of the grid.

    Raises:
        GraphError: If the step is not a normal float32, or the zero point is not on the grid.
    """
    scale = number(node, "act_scale")
    tiny, huge = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
    if not tiny <= scale <= huge:
        raise node_error(node, f"has act_scale={scale!r}", f"it must be in {tiny!r}..{huge!r}")
    qmax: int = 2 ** integer(node, "act_bits") - 1
    if integer(node, "act_zero") > qmax:
        raise node_error(
            node,
            f"has act_zero={node.attrs['act_zero']} with act_bits={node.attrs['act_bits']}",
            f"it must be in 0..{qmax}",
        )
    return qmax
