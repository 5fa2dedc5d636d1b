"""Zeros and shared values of weights, stored for what they are in one ordinary ONNX file.

A packed weight is bits and numbers, and a few nodes that decode them. ONNX Runtime computes what
depends on constants alone when it opens a file, before it looks for kernels: what runs is the very
graph of the unpacked file, integer kernels included, at the same speed and with equal outputs.

- Zeros are left out: one bit a weight says where the others go, in order.
- Few values are a table and indices of 1, 2, 4 or 8 bits; where each channel has a scale of its
  own (a folded BatchNorm, integers by channel), the table has a row a channel.

Tried and left, on ONNX 1.23 and ONNX Runtime 1.31: ONNX's ``sparse_initializer`` takes eight bytes
for each index, more than an int8 weight itself, and the checker refuses it as input of Conv and
DequantizeLinear; NonZero and ScatterND would decode the bits in fewer nodes, but ONNX Runtime does
not compute NonZero when it opens the file, and three times the latency goes into it at each run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

KINDS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8})
INDEX_BITS = (1, 2, 4, 8)
NODES_BYTES = 500  # about what the nodes and names take that decode a tensor


def pack_weights(graph: onnx.GraphProto) -> None:
    """Store each constant of two and more axes in the fewest bytes that hold it, in place.

    Every value stays what it is. What would not become smaller stays as it stands.
    """
    decoding: list[onnx.NodeProto] = []
    for place, tensor in enumerate(list(graph.initializer)):
        if tensor.data_type in KINDS and len(tensor.dims) > 1:
            values = numpy_helper.to_array(tensor)
            packed = min(_ways(values), key=lambda way: way.size_bytes)
            if packed.size_bytes + NODES_BYTES < values.nbytes:
                writer = _Writer(tensor.name, f"~{place}")
                packed.write(writer)
                graph.initializer.remove(tensor)
                graph.initializer.extend(writer.tensors)
                decoding += writer.nodes
    nodes = [*decoding, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _ways(values: np.ndarray) -> Iterator[_Packed]:
    """Yield every way to store a tensor that holds its values exactly."""
    yield _Packed(values.shape, values.ravel(), None)
    for axis in (None, 0, 1):
        table = _Table.of(values, axis)
        if table is not None:
            yield _Packed(values.shape, table.indices, table)


@dataclass(frozen=True)
class _Table:
    """Few values by index; index 0 is the most common one.

    Attributes:
        indices: of all values in order, uint8 ``(n,)``.
        bits: of an index.
        rows: the values, ``(1 or channels, 2**bits)``.
        offsets: where the row of a weight begins, int32, broadcast to the tensor's shape.
    """

    indices: np.ndarray
    bits: int
    rows: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, axis: int | None) -> _Table | None:
        """Make the table of a tensor, with a row for each place on ``axis``."""
        channels = values[None] if axis is None else np.moveaxis(values, axis, 0)
        indices = np.empty(channels.shape, np.uint8)
        known = []
        for row, channel in enumerate(channels):
            found, inverse, counts = np.unique(channel, return_inverse=True, return_counts=True)
            if len(found) > 2 ** INDEX_BITS[-1]:
                return None
            order = np.argsort(-counts, kind="stable")
            indices[row] = np.argsort(order)[inverse].reshape(channel.shape)
            known.append(found[order])
        bits = next(bits for bits in INDEX_BITS if 2**bits >= max(map(len, known)))
        rows = np.zeros((len(known), 2**bits), values.dtype)
        for row, found in enumerate(known):
            rows[row, : len(found)] = found
        shape = [1] * values.ndim
        if axis is not None:
            indices = np.moveaxis(indices, 0, axis)
            shape[axis] = -1
        offsets = (np.arange(len(rows), dtype=np.int32) << bits).reshape(shape)
        return cls(indices.ravel(), bits, rows, offsets)


@dataclass(frozen=True)
class _Packed:
    """A tensor whose items (values, or indices of a table) are stored, but for those that are 0."""

    shape: tuple[int, ...]
    items: np.ndarray
    table: _Table | None

    @property
    def _masked(self) -> bool:
        """Whether a bit an item costs less than the zeros do."""
        zeros = int((self.items == 0).sum())
        return zeros * self._item_bits > len(self.items)

    @property
    def _item_bits(self) -> int:
        return 8 * self.items.itemsize if self.table is None else self.table.bits

    @property
    def size_bytes(self) -> int:
        """About what is stored."""
        count = len(self.items)
        mask = count // 8 if self._masked else 0
        stored = int((self.items != 0).sum()) if self._masked else count
        table = 0 if self.table is None else self.table.rows.nbytes + self.table.offsets.nbytes
        return mask + stored * self._item_bits // 8 + table

    def write(self, writer: _Writer) -> None:
        """Write the constants, and the nodes that decode them."""
        items, masked = self.items, self._masked
        if masked:
            items = np.concatenate([items[:1] * 0, items[items != 0]])
        if self.table is None:
            found = writer.constant(items)
        else:
            found = writer.unpacked(items, self.table.bits)
        if masked:
            present = writer.unpacked((self.items != 0).astype(np.uint8), 1)
            place = writer.node("CumSum", present, writer.constant(np.array(0)))
            found = writer.node("Gather", found, writer.node("Mul", place, present))
        shape = writer.constant(np.array(self.shape, np.int64))
        if self.table is None:
            writer.result("Reshape", found, shape)
            return
        found = writer.node("Reshape", found, shape)
        if self.table.offsets.size > 1:
            found = writer.node("Add", found, writer.constant(self.table.offsets))
        writer.result("Gather", writer.constant(self.table.rows.ravel()), found)


@dataclass
class _Writer:
    """The nodes and constants that decode one tensor."""

    name: str
    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[onnx.TensorProto] = field(default_factory=list)

    def _next(self) -> str:
        return f"{self.prefix}.{len(self.nodes) + len(self.tensors)}"

    def constant(self, values: np.ndarray) -> str:
        name = self._next()
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        output = self._next()
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def result(self, operator: str, *inputs: str) -> None:
        """Add the node whose output is the tensor."""
        self.nodes.append(helper.make_node(operator, inputs, [self.name]))

    def unpacked(self, items: np.ndarray, bits: int) -> str:
        """Write items of so many bits, lowest first in a byte; return them as int32 ``(n,)``."""
        each = 8 // bits
        filled = np.zeros(math.ceil(len(items) / each) * each, np.uint8)
        filled[: len(items)] = items
        shifts = (np.arange(each) * bits).astype(np.uint8)
        stored = np.bitwise_or.reduce(filled.reshape(-1, each) << shifts, axis=1, keepdims=True)
        found = self.constant(stored.astype(np.uint8))
        if each > 1:
            found = self.node("BitShift", found, self.constant(shifts), direction="RIGHT")
            found = self.node("BitwiseAnd", found, self.constant(np.array(2**bits - 1, np.uint8)))
        found = self.node("Cast", found, to=TensorProto.INT32)
        found = self.node("Reshape", found, self.constant(np.array([-1])))
        if len(filled) > len(items):
            bounds = (np.array([bound]) for bound in (0, len(items)))
            found = self.node("Slice", found, *map(self.constant, bounds))
        return found
