"""Tensors that are kept until conversion is done: in memory up to a limit, then in a file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from lutra.errors import LutraError

_LEAST = 1 << 14  # smaller tensors stay in memory: a file has a bounded number of mapped places
_ALIGNED = 64


class Spill:
    """Keeps tensors. What no longer fits goes to a temporary file without a name, which is mapped
    back into memory: values, shapes and strides stay what they were.

    Args:
        memory_bytes: that tensors may take in memory.

    Attributes:
        spilled: bytes that went to the file.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._left = memory_bytes
        self._file: IO[bytes] | None = None
        self.spilled = 0

    def keep_all(self, data: Iterable[Any]) -> list[Any]:
        """Batches. A sequence is in memory already, and stays there."""
        if isinstance(data, Sequence):
            return list(data)
        return [self._structure(batch) for batch in data]

    def keep(self, tensor: Tensor) -> Tensor:
        """A tensor of the same values; it may be another one.

        Raises:
            LutraError: the file cannot be written.
        """
        size = tensor.numel() * tensor.element_size()
        plain = type(tensor) is Tensor and tensor.layout == torch.strided
        if not plain or tensor.device.type != "cpu" or tensor.requires_grad:
            return tensor
        if size <= max(self._left, _LEAST):
            self._left -= size
            return tensor
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])
        flat = tensor.permute(order)
        if not flat.is_contiguous():
            return tensor  # its values lie apart, or on each other
        mapped = torch.from_numpy(self._write(flat)).view(tensor.dtype).view(flat.shape)
        back = [order.index(axis) for axis in range(tensor.dim())]
        return mapped.permute(back)

    def _write(self, tensor: Tensor) -> np.ndarray[Any, Any]:
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the maps
            place = -(-self._file.seek(0, 2) // _ALIGNED) * _ALIGNED
            self._file.seek(place)
            self._file.write(data.tobytes())
            self._file.flush()
            # Private pages: a model that writes into its input leaves the file as it is.
            mapped = np.memmap(self._file, np.uint8, "c", place, data.shape)
        except (OSError, ValueError) as error:
            raise LutraError(
                f"calibration: {len(data)} bytes beyond memory_bytes cannot be written to a "
                f"temporary file in '{tempfile.gettempdir()}' ({error}); make room there, set "
                "TMPDIR, or allow more memory"
            ) from error
        self.spilled += len(data)
        return np.asarray(mapped)

    def _structure(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.keep(value)
        if isinstance(value, Mapping):
            return {name: self._structure(entry) for name, entry in value.items()}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self._structure(entry) for entry in value))
        if type(value) in (tuple, list):
            return type(value)(self._structure(entry) for entry in value)
        return value
