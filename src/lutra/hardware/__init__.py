"""Tables for hardware: accelerators whose outputs are the engine's, bit for bit.

``Design`` says what an accelerator is built for, ``count_cycles`` how long it takes. What describes
circuits (``accelerator`` and the modules that it is made of) needs the extra ``hardware``.
"""

from lutra.hardware.cycles import Timing, count_cycles
from lutra.hardware.design import Design, HardwareError
from lutra.hardware.layer import TableLayer, graph_layer, random_layer

__all__ = [
    "Design",
    "HardwareError",
    "TableLayer",
    "Timing",
    "count_cycles",
    "graph_layer",
    "random_layer",
]
