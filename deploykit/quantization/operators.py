"""Operators of traced graphs, by what ONNX Runtime makes of them."""

from __future__ import annotations

import operator

import torch

aten = torch.ops.aten

WEIGHTED = frozenset(
    {
        aten.conv1d.default,
        aten.conv2d.default,
        aten.conv_transpose1d.default,
        aten.conv_transpose2d.input,
        aten.linear.default,
    }
)
# Layers that stay as they are, and where their weight stands.
CONSTANT_FACTORS = {
    aten.conv3d.default: 1,
    aten.conv3d.padding: 1,
    aten.conv_transpose3d.input: 1,
    aten.matmul.default: 1,
    aten.mm.default: 1,
    aten.addmm.default: 2,
}
# No integer kernel: in float, where integer weights would be converted at every run.
TRANSPOSED = frozenset({aten.conv_transpose1d.default, aten.conv_transpose2d.input})
ADDITIONS = frozenset({aten.add.Tensor, aten.add_.Tensor})
PRODUCTS = frozenset({aten.mul.Tensor, aten.mul_.Tensor})
# Kernels without weights, that are worth no conversion of their own. Left out, as measured:
# QLinearSoftmax is six times slower than the float one, QLinearMatMul of two activations no
# faster.
LIGHT = frozenset(
    {
        *ADDITIONS,
        *PRODUCTS,
        aten.sigmoid.default,
        aten.leaky_relu.default,
        aten.leaky_relu_.default,
        aten.avg_pool2d.default,
        aten.cat.default,
        torch.batch_norm,
    }
)
RECURRENT = frozenset({aten.lstm.input, aten.gru.input})
NORM = aten.batch_norm.default
# The same arithmetic by a name that no library folds into the layer before it.
LONE_NORM = torch.batch_norm
CLIPPING = frozenset(
    {
        aten.relu.default,
        aten.relu_.default,
        aten.hardtanh.default,
        aten.hardtanh_.default,
    }
)
# A clip fuses only where the range it leaves starts at zero: ONNX Runtime drops a Relu whose
# quantized output has its smallest value as zero point, and keeps the kernel in float otherwise.
RECTIFIERS = frozenset({aten.relu.default, aten.relu_.default})
# An integer of the input stands for each value of the output, under parameters that follow.
HARD_SIGMOIDS = frozenset({aten.hardsigmoid.default, aten.hardsigmoid_.default})
SPLITS = frozenset(
    {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}
)
MOVING = frozenset(
    {
        *SPLITS,
        operator.getitem,
        aten.slice.Tensor,
        aten.pad.default,
        aten.constant_pad_nd.default,
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.reshape.default,
        aten.view.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unsqueeze.default,
        aten.permute.default,
        aten.transpose.int,
        aten.movedim.int,
        aten.select.int,
        aten.contiguous.default,
        aten.clone.default,
    }
)
# Nothing in the model that ships; in training it scales what it lets through, out of the range.
DROPOUTS = frozenset({aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default})
# Where the value to pad with stands among the arguments.
PAD_VALUES: dict[object, int] = {aten.pad.default: 3, aten.constant_pad_nd.default: 2}
