"""What conversion did to each layer, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One layer. Byte and operation counts are of the exported layer; lookups per output row.

    `error` is the mean squared output error relative to the output's variance, on calibration rows
    with int8 tables, before fine-tuning. `used` is the share of centroids that these rows chose.
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


@dataclass(frozen=True)
class ConversionReport:
    """All layers that could have been replaced. `print` it for a table."""

    layers: tuple[LayerReport, ...] = field(default_factory=tuple)
    seed: int = 0

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
        rows = [header]
        for layer in self.layers:
            if not layer.replaced:
                rows.append(
                    (layer.name, layer.kind, f"kept: {layer.reason}", "", "", "",
                     f"{layer.weight_bytes}", "", "", "")
                )  # fmt: skip
                continue
            method = "pq" if layer.encoder == "nearest" else f"pq, {layer.encoder}"
            ratio = f"{layer.lookups_per_row}/{layer.multiplies_per_row}"
            rows.append(
                (layer.name, layer.kind, method, f"{layer.v}", f"{layer.k}", f"{layer.table_bytes}",
                 f"{layer.weight_bytes}", ratio, f"{layer.error:.3f}", f"{layer.used:.0%}")
            )  # fmt: skip
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        replaced = self.replaced
        lines.append(
            f"{len(replaced)} of {len(self.layers)} layers replaced; tables "
            f"{sum(r.table_bytes for r in replaced)} bytes for "
            f"{sum(r.weight_bytes for r in replaced)} bytes of float32 weights"
        )
        return "\n".join(lines)
