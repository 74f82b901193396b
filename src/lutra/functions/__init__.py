"""Function tables: nonlinear functions as a few straight lines (NN-LUT, arXiv 2112.02191).

    table = fit("gelu", entries=16)
    y = table(x)

`fit` makes a `Piecewise` table of any function of one number; `fit_exp`, `fit_reciprocal` and
`fit_rsqrt` make the `Reduced` tables that softmax and norms use; `swap_functions` puts tables into
any graph. NumPy only.
"""

from __future__ import annotations

from lutra.functions.fit import fit
from lutra.functions.histogram import Histogram
from lutra.functions.piecewise import Errors, Piecewise, from_relu_net, to_relu_net
from lutra.functions.reduced import Reduced, fit_exp, fit_reciprocal, fit_rsqrt
from lutra.functions.scalar import KNOWN, Scalar, scalar
from lutra.functions.swap import SWAPPED, swap_functions
from lutra.ops.limits import FUNCTION_ENTRIES as ENTRIES

__all__ = [
    "ENTRIES",
    "KNOWN",
    "SWAPPED",
    "Errors",
    "Histogram",
    "Piecewise",
    "Reduced",
    "Scalar",
    "fit",
    "fit_exp",
    "fit_reciprocal",
    "fit_rsqrt",
    "from_relu_net",
    "scalar",
    "swap_functions",
    "to_relu_net",
]
