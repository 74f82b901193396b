"""What conversion did to each layer, and why."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final

#: What the speed gate calls the lookup form of a layer.
LOOKUP: Final = "lookup"
#: What it calls the layer as it was.
FLOAT32: Final = "float32"
_TABLES: Final = "tables"  # of product quantisation


@dataclass(frozen=True)
class Decision:
    """What the gate found out about one layer.

    `milliseconds` has the medians of "lookup" and of every dense kind; `dense` is the kind that
    the lookups were compared with; `choice` is what the layer becomes: "lookup", "float32" or
    "int8". `input_shape` is what was timed, batch included.
    """

    input_shape: tuple[int, ...]
    milliseconds: dict[str, float]
    dense: str
    choice: str
    reason: str

    @property
    def lookup(self) -> bool:
        """Whether the lookups won."""
        return self.choice == LOOKUP

    @property
    def lookup_ms(self) -> float:
        return self.milliseconds[LOOKUP]

    @property
    def dense_ms(self) -> float:
        return self.milliseconds[self.dense]

    @property
    def summary(self) -> str:
        """The decision in a few words."""
        if self.lookup:
            return f"lookup: {self.dense_ms / self.lookup_ms:.2f}x the speed of {self.dense}"
        ratio = self.lookup_ms / self.milliseconds[self.choice]
        return f"{self.choice}: {ratio:.2f}x the speed of lookups"


@dataclass(frozen=True)
class LayerReport:
    """One layer. Byte and operation counts are of the exported layer; lookups per output row.

    `method` is the name of the recipe's method, such as "pq", or None where the layer was kept, and
    `label` says more of it. `stored` has what the exported layer holds in place of its weights,
    with bytes. `error` is the mean squared output error relative to the output's variance, on
    calibration rows with the integers of the engine, before fine-tuning. After sequential
    calibration it is the difference from the dense network, with the errors of all layers before in
    it, and `start_error` is that before the layer was fitted to it. `gate` has the times and
    the decision of the speed gate, where it was asked.

    The other fields are of one family each: encoder, v, k, codebooks and the share of `used`
    centroids of product quantisation; levels, weights and index_bytes of lookup layers; int8_bytes
    of int8 layers. `fallback` says why the layer has another method than the recipe names first.
    """

    name: str
    kind: str
    replaced: bool
    reason: str
    label: str = ""
    encoder: str | None = None
    v: int | None = None
    k: int | None = None
    codebooks: int | None = None
    weight_bytes: int = 0
    table_bytes: int = 0
    lookups_per_row: int = 0
    multiplies_per_row: int = 0
    error: float | None = None
    start_error: float | None = None
    used: float | None = None
    method: str | None = None
    int8_bytes: int = 0
    index_bytes: int = 0
    levels: int | None = None
    weights: int | None = None
    stored: tuple[tuple[str, int], ...] = ()
    gate: Decision | None = None
    fallback: str = ""

    def cells(self) -> tuple[str, ...]:
        """The layer as a row of the table."""
        if not self.replaced:
            kept = f"kept: {self.reason}"
            return (self.name, self.kind, kept, "", "", "", f"{self.weight_bytes}", "", "", "")
        ratio = f"{self.lookups_per_row}/{self.multiplies_per_row}" if self.lookups_per_row else ""
        if self.lookups_per_row == self.multiplies_per_row and ratio:
            ratio = "1/1"
        return (
            self.name,
            self.kind,
            self.label,
            "" if self.v is None else f"{self.v}",
            "" if self.k is None else f"{self.k}",
            f"{self.table_bytes}" if self.table_bytes else "",
            f"{self.weight_bytes}",
            ratio,
            "" if self.error is None else f"{self.error:.4g}",
            "" if self.used is None else f"{self.used:.0%}",
        )


@dataclass(frozen=True)
class FunctionReport:
    """A function that is read from a table: in which module, fitted how.

    `low` and `high` are the range of its inputs in the calibration data, where they were looked
    at; `error` is the largest absolute error, over all floats where the function has asymptotes.
    Softmax, attention and norms have tables for floats of every size, and none of the three.
    """

    name: str
    function: str
    entries: int
    method: str
    low: float | None = None
    high: float | None = None
    error: float | None = None

    def __str__(self) -> str:
        seen = "" if self.low is None else f", inputs {self.low:.3g}..{self.high:.3g}"
        error = "" if self.error is None else f", error up to {self.error:.2g}"
        return (
            f"{self.name or 'the model'}: {self.function}, table of {self.entries}, "
            f"{self.method}{seen}{error}"
        )


@dataclass(frozen=True)
class ConversionReport:
    """All layers that could have been replaced. `print` it for a table.

    `speed_gate` is what the gate did, as it stands in the metadata of an exported file.
    `functions` has an entry for each function table. `small` has the modules whose weights are
    vectors, such as norms: they are kept, and do not count as layers. `notes` says what happened to
    the model beside that, one sentence each.
    """

    layers: tuple[LayerReport, ...] = field(default_factory=tuple)
    seed: int = 0
    speed_gate: dict[str, Any] | None = None
    functions: tuple[FunctionReport, ...] = ()
    small: tuple[LayerReport, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> LayerReport:
        for layer in (*self.layers, *self.small):
            if layer.name == name:
                return layer
        raise KeyError(name)

    @property
    def replaced(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.replaced)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        header = ("layer", "kind", "method", "V", "K", "tables", "weights", "lookups/mults",
                  "error", "used")  # fmt: skip
        rows: list[tuple[str, ...]] = [header, *(layer.cells() for layer in self.layers)]
        if self.speed_gate is not None:
            rows = [(*row, *cells) for row, cells in zip(rows, self._gate_cells(), strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines.append(f"{len(self.replaced)} of {len(self.layers)} layers replaced; {self._bytes()}")
        if self.small:
            kinds = Counter(entry.kind for entry in self.small)
            held = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            lines.append(f"kept beside these, with vectors for weights: {held}")
        lines += [f"{layer.name}: {layer.fallback}" for layer in self.layers if layer.fallback]
        lines += [str(function) for function in self.functions]
        lines += self.notes
        return "\n".join(lines)

    def _bytes(self) -> str:
        """What the replaced layers store, and for how many bytes of weights."""
        groups: dict[tuple[str, ...], list[LayerReport]] = {(_TABLES,): []}
        for layer in self.replaced:
            groups.setdefault(tuple(what for what, _ in layer.stored), []).append(layer)
        parts: list[str] = []
        for names, layers in groups.items():
            sizes = [sum(layer.stored[i][1] for layer in layers) for i in range(len(names))]
            held = " and ".join(f"{what} {n} bytes" for what, n in zip(names, sizes, strict=True))
            unit = "" if parts else " bytes of float32 weights"
            parts.append(f"{held} for {sum(layer.weight_bytes for layer in layers)}{unit}")
        return ", ".join(parts)

    def _gate_cells(self) -> list[tuple[str, ...]]:
        """The columns of the speed gate, a head first."""
        rows: list[tuple[str, ...]] = [("lookup ms", "dense ms", "decision")]
        for gate in (layer.gate for layer in self.layers):
            if gate is None:
                rows.append(("", "", ""))
            else:
                rows.append((f"{gate.lookup_ms:.4f}", f"{gate.dense_ms:.4f}", gate.summary))
        return rows
