"""Plain nets in int8, with integers that all depths share; how graphs become one is in `onnx_graph.py`.

At depth d, batch norm multiplies channel c of a convolution by a_dc. With weights quantized symmetrically per output
channel, a_dc goes into the scale of the channel, so the integers are the same at every depth.

Weights have 7 bits: with 8, processors without instructions for such products (VNNI on x86) add two of them in 16 bits,
which overflow.
"""
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, create_calibrator
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode, load_model_with_shape_infer
from onnxruntime.quantization.registry import QLinearOpsRegistry
from torch import nn

from ..utils.errors import InputError
from .onnx_graph import merge_nets, trace_net

__all__ = ['quantize', 'quantize_nets']


_OPERATORS = [*QLinearOpsRegistry]
_GREATEST = 64  # of the integers: 255 * 64 * 2 < 2 ** 15
_BATCH_SIZE = 16


class _Reader(CalibrationDataReader):
    def __init__(self, images: torch.Tensor) -> None:
        self.batches = iter(images.split(_BATCH_SIZE))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {'images': batch.numpy()}


def quantize(nets: Mapping[int, nn.Module], images: torch.Tensor) -> onnx.ModelProto:
    """Quantize plain nets to one graph in int8: of one depth, or of several with the input `depth`.

    Args:
        nets: Plain nets in eval mode by depth, the deepest first.
        images: As for `quantize_nets`.

    Raises:
        InputError: If a norm does not become part of a convolution, and as `quantize_nets`.
    """
    floats = {depth: trace_net(net, images, True) for depth, net in nets.items()}
    left = [node.name for net in floats.values() for node in net.graph.node if node.op_type.endswith('Normalization')]
    if left:
        raise InputError(
            f'int8 needs batch norms that become part of the convolution before them, got {left[0]}: export the model '
            'without int8')
    graphs = quantize_nets(floats, images)
    return merge_nets(graphs) if len(graphs) > 1 else next(iter(graphs.values()))


def quantize_nets(nets: Mapping[int, onnx.ModelProto], images: torch.Tensor) -> dict[int, onnx.ModelProto]:
    """Quantize the graphs of several depths to int8: activations to 8 bits, weights to 7.

    The range of an activation is that over all images and depths, by onnxruntime's tools.

    Args:
        nets: Graphs of `trace_net` with norms folded, by depth, the deepest first.
        images: Images to find the ranges on, [N, C, H, W].

    Returns:
        Graphs of quantized operators by depth, in which a convolution has the same integers at every depth.

    Raises:
        InputError: If a convolution has other integers at another depth.
    """
    _share_integers(nets)
    ranges: dict[str, TensorData] = {}
    loaded = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, 'net.onnx')
        for depth, net in nets.items():
            onnx.save(net, path)
            loaded[depth] = load_model_with_shape_infer(path)
            calibrator = create_calibrator(path, _OPERATORS, str(Path(folder, 'augmented.onnx')))
            calibrator.collect_data(_Reader(images))
            for name, found in calibrator.compute_data().items():
                low, high = found.range_value
                if name in ranges:
                    low, high = min(low, ranges[name].lowest), max(high, ranges[name].highest)
                ranges[name] = TensorData(lowest=low, highest=high)
    quantized = {}
    for depth, net in loaded.items():
        quantizer = ONNXQuantizer(
            net, per_channel=True, reduce_range=True, mode=QuantizationMode.QLinearOps, static=True,
            weight_qType=QuantType.QInt8, activation_qType=QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, ranges), nodes_to_quantize=[], nodes_to_exclude=[],
            op_types_to_quantize=_OPERATORS,
        )
        quantizer.quantize_model()
        quantized[depth] = quantizer.model.model
    return quantized


def _share_integers(nets: Mapping[int, onnx.ModelProto]) -> None:
    """Round the weights of convolutions, in place, to multiples of a step per channel that are equal at every depth."""
    integers: dict[str, np.ndarray] = {}
    for depth, net in nets.items():
        weights = {t.name: t for t in net.graph.initializer if len(t.dims) == 4}
        for node in net.graph.node:
            if node.op_type != 'Conv':
                continue
            tensor = weights[node.input[1]]
            weight = numpy_helper.to_array(tensor)
            greatest = np.abs(weight).max(axis=(1, 2, 3), keepdims=True)
            step = np.where(greatest > 0, greatest, 1) / _GREATEST
            rounded = np.rint(weight / step)
            shared = integers.setdefault(node.name, rounded)
            if np.abs(rounded - shared).max() > 1:  # a tie may be rounded otherwise
                raise InputError(
                    'int8 of several depths needs convolutions of the same integers at all of them, which private '
                    f"'conv' has not, nor private 'affine' where norms have other signs; got others in {node.name} at "
                    f'depth {depth}: export one depth at a time, or without int8')
            tensor.CopyFrom(numpy_helper.from_array((shared * step).astype(weight.dtype), tensor.name))
