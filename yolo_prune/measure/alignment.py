# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checks an exported graph: are the channel counts of its convolutions multiples that hardware prefers?"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from yolo_prune.errors import BenchError


@dataclass(frozen=True)
class Alignment:
    """Result of `alignment`: the convolutions of a graph whose channel counts are multiples of a number.

    Attributes:
        multiple: the number.
        convolutions: number of all convolutions.
        others: `{name: (input channels, output channels)}` of the convolutions that are not aligned: one or both counts
            are not a multiple. The first convolution, which reads 3 channels, is among them, and often those that
            output class scores.
    """

    multiple: int
    convolutions: int
    others: dict[str, tuple[int, int]]

    @property
    def aligned(self) -> int:
        """Number of convolutions whose input and output channels are multiples."""
        return self.convolutions - len(self.others)


def alignment(path: str | Path, multiple: int = 8) -> Alignment:
    """Count the convolutions of an ONNX file whose channels are multiples of a number that hardware prefers.

    TensorRT pads channels to multiples of 8 (float16 on tensor cores) or more. So a width between two multiples costs
    as much as the larger one.

    Raises:
        BenchError: If onnx is not installed, or the file is not an ONNX model.

    Example:
        >>> import yolo_prune
        >>> channels = yolo_prune.alignment("pruned.onnx", multiple=8)
        >>> channels.aligned + len(channels.others) == channels.convolutions
        True
    """
    try:
        onnx = importlib.import_module("onnx")
        graph = onnx.load(str(path)).graph
    except ImportError as e:
        raise BenchError("Reading an ONNX file needs onnx. Run: pip install 'yolo-prune[onnx]'") from e
    except Exception as e:  # onnx raises protobuf's own errors
        raise BenchError(f"'{path}' is not an ONNX model: {type(e).__name__}: {e}. Pass an exported .onnx file.") from e
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for node in graph.node:  # these operations do not change the shape of a weight
        if node.op_type in ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity") and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    count, others = 0, {}
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose") or node.input[1] not in shapes:
            continue
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        first, second = shapes[node.input[1]][:2]
        ins, outs = (second * groups, first) if node.op_type == "Conv" else (first, second * groups)
        count += 1
        if ins % multiple or outs % multiple:
            others[node.name or node.output[0]] = (ins, outs)
    return Alignment(multiple, count, others)
