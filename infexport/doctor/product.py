"""The model that providers run, written without onnx, which may not be here."""

from __future__ import annotations


def product(side: int) -> bytes:
    """An ONNX model that multiplies a float32 matrix x by itself.

    Args:
        side: rows and columns of x, less than 128.
    """
    shape = 2 * _field(1, _number(1, side))
    matrix = _field(1, _number(1, 1) + _field(2, shape))  # 1: float32
    node = _field(1, b"x") + _field(1, b"x") + _field(2, b"y") + _field(4, b"MatMul")
    x, y = (_field(1, name) + _field(2, matrix) for name in (b"x", b"y"))
    graph = _field(1, node) + _field(2, b"product") + _field(11, x) + _field(12, y)
    return _number(1, 8) + _field(7, graph) + _field(8, _number(2, 13))  # IR 8, operators 13


def _number(field: int, value: int) -> bytes:
    """Return a field's key in protobuf's wire format: one byte, as is the length below."""
    return bytes([field << 3, value])


def _field(field: int, content: bytes) -> bytes:
    assert len(content) < 128
    return bytes([field << 3 | 2, len(content)]) + content
