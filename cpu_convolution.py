"""Mimi's decoder on a CPU: its convolutions through numpy, which brings a fast BLAS along; MLX's wheel for Linux has a slow one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from mlx_audio.codec.models.mimi.mimi import Mimi
from mlx_audio.codec.models.mimi.modules.conv import Conv1d, ConvTranspose1d
from numpy.lib.stride_tricks import sliding_window_view


def speed_up(mimi: Mimi) -> None:
    """Have the decoder's convolutions computed by numpy where MLX computes on a CPU; elsewhere, nothing.

    MLX 0.32.4 for Linux is linked with netlib's reference BLAS, and computes a transposed convolution as a plain one over an input that it
    fills with zeros: one 80 ms frame takes about a second (docs/PERFORMANCE.md). The results are the same within float error. The encoder
    is left as it is: its tokens are to be exactly stock's, and each voice prompt is encoded once.
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return
    for module in mimi.decoder.modules():
        if isinstance(module, Conv1d | ConvTranspose1d) and module.weight.dtype == mx.float32:
            module.__class__ = _NumpyConv1d if isinstance(module, Conv1d) else _NumpyConvTranspose1d


class _NumpyConv1d(Conv1d):  # type: ignore[misc]  # mlx-audio has no types
    """`Conv1d` without groups and padding, of which Mimi's decoder has none."""

    def __call__(self, xs: mx.array) -> mx.array:
        """Shape (batch, channels, samples) to (batch, channels out, samples out)."""
        weight = np.asarray(self.weight)
        channels_out, kernel, channels = weight.shape
        span = self._dilation * (kernel - 1) + 1
        windows = sliding_window_view(np.asarray(xs), span, axis=2)[:, :, :: self._stride, :: self._dilation]
        batch, _, length, _ = windows.shape
        columns = windows.transpose(0, 3, 1, 2).reshape(batch, kernel * channels, length)
        return _with_bias(weight.reshape(channels_out, -1) @ columns, self.bias)


class _NumpyConvTranspose1d(ConvTranspose1d):  # type: ignore[misc]  # mlx-audio has no types
    """`ConvTranspose1d` without groups and padding: what each input sample adds to the output, by one product."""

    def __call__(self, xs: mx.array) -> mx.array:
        """Shape (batch, channels, samples) to (batch, channels out, samples out)."""
        weight = np.asarray(self._expanded_weight)
        channels_out, kernel, channels = weight.shape
        batch, _, length = xs.shape
        added = (weight.reshape(-1, channels) @ np.asarray(xs)).reshape(batch, channels_out, kernel, length)
        reach = (length - 1) * self._stride + 1
        sums = np.zeros((batch, channels_out, reach + kernel - 1), np.float32)
        for tap in range(kernel):
            sums[:, :, tap : tap + reach : self._stride] += added[:, :, tap]
        return _with_bias(sums, self.bias)


def _with_bias(sums: np.ndarray[tuple[int, ...], np.dtype[np.float32]], bias: mx.array | None) -> mx.array:
    return mx.array(sums if bias is None else sums + np.asarray(bias)[:, None])
