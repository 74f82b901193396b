"""What conversion did to each layer, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from lutra.train.conversion.speed_gate import Decision


@dataclass(frozen=True)
class LayerReport:
    """One layer. Byte and operation counts are of the exported layer; lookups per output row.

    `method` is "pq", "lookup" or "int8", or None where the layer was kept; an int8 layer stores
    `int8_bytes` of weights, has no tables and looks nothing up; a lookup layer stores `index_bytes`
    of weight indices and one table of `levels` x `weights` entries. `error` is the mean
    squared output error relative to the output's variance, on calibration rows with the integers of
    the engine, before fine-tuning. `used` is the share of centroids that these rows chose.
    `gate` has the times and the decision of the speed gate, where it was asked.
    """

    name: str
    kind: str
    replaced: bool
    reason: str
    encoder: str | None = None
    v: int | None = None
    k: int | None = None
    books: int | None = None
    weight_bytes: int = 0
    table_bytes: int = 0
    lookups_per_row: int = 0
    multiplies_per_row: int = 0
    error: float | None = None
    used: float | None = None
    method: str | None = None
    int8_bytes: int = 0
    index_bytes: int = 0
    levels: int | None = None
    weights: int | None = None
    gate: Decision | None = None


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
    `functions` has an entry for each function table.
    """

    layers: tuple[LayerReport, ...] = field(default_factory=tuple)
    seed: int = 0
    speed_gate: dict[str, Any] | None = None
    functions: tuple[FunctionReport, ...] = ()

    def __getitem__(self, name: str) -> LayerReport:
        for layer in self.layers:
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
        rows: list[tuple[str, ...]] = [header]
        for layer in self.layers:
            if not layer.replaced:
                rows.append(
                    (layer.name, layer.kind, f"kept: {layer.reason}", "", "", "",
                     f"{layer.weight_bytes}", "", "", "")
                )  # fmt: skip
                continue
            if layer.method == "int8":
                rows.append(
                    (layer.name, layer.kind, "int8", "", "", "", f"{layer.weight_bytes}", "",
                     f"{layer.error:.5f}", "")
                )  # fmt: skip
                continue
            if layer.method == "lookup":
                method = f"lookup {layer.levels}x{layer.weights}"
                rows.append(
                    (layer.name, layer.kind, method, "", "", f"{layer.table_bytes}",
                     f"{layer.weight_bytes}", "1/1", f"{layer.error:.4f}", "")
                )  # fmt: skip
                continue
            method = "pq" if layer.encoder == "nearest" else f"pq, {layer.encoder}"
            ratio = f"{layer.lookups_per_row}/{layer.multiplies_per_row}"
            rows.append(
                (layer.name, layer.kind, method, f"{layer.v}", f"{layer.k}", f"{layer.table_bytes}",
                 f"{layer.weight_bytes}", ratio, f"{layer.error:.3f}", f"{layer.used:.0%}")
            )  # fmt: skip
        if self.speed_gate is not None:
            rows = [(*row, *cells) for row, cells in zip(rows, self._gate_cells(), strict=True)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lookups = [layer for layer in self.replaced if layer.method == "pq"]
        lines.append(
            f"{len(self.replaced)} of {len(self.layers)} layers replaced; tables "
            f"{sum(r.table_bytes for r in lookups)} bytes for "
            f"{sum(r.weight_bytes for r in lookups)} bytes of float32 weights"
        )
        responses = [layer for layer in self.replaced if layer.method == "lookup"]
        if responses:
            lines[-1] += (
                f", response tables {sum(r.table_bytes for r in responses)} bytes and indices "
                f"{sum(r.index_bytes for r in responses)} bytes for "
                f"{sum(r.weight_bytes for r in responses)}"
            )
        integer = [layer for layer in self.replaced if layer.method == "int8"]
        if integer:
            lines[-1] += (
                f", int8 weights {sum(r.int8_bytes for r in integer)} bytes for "
                f"{sum(r.weight_bytes for r in integer)}"
            )
        lines += [str(function) for function in self.functions]
        return "\n".join(lines)

    def _gate_cells(self) -> list[tuple[str, ...]]:
        """The columns of the speed gate, a head first."""
        rows: list[tuple[str, ...]] = [("lookup ms", "dense ms", "decision")]
        for gate in (layer.gate for layer in self.layers):
            if gate is None:
                rows.append(("", "", ""))
            else:
                rows.append((f"{gate.lookup_ms:.4f}", f"{gate.dense_ms:.4f}", gate.summary))
        return rows
