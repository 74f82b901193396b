"""What to do about torch operators that have no lowering: operator name -> one hint."""

from __future__ import annotations

DEFAULT_HINT = "rewrite it with supported operators or keep it outside the exported model"
_BATCH_STATISTICS = (
    "this batch norm uses the statistics of the batch; build it with track_running_stats=True"
)

_TABLE = [
    ("rnn_tanh rnn_relu", "use nn.GRU or nn.LSTM"),
    (
        "conv3d max_pool3d",
        "only the 1-D and 2-D forms exist",
    ),
    ("conv_transpose3d", "only the 1-D and 2-D forms exist"),
    ("upsample_trilinear3d", "lutra has nearest, bilinear and bicubic upsampling of images"),
    (
        "masked_select nonzero unique unique2 _unique2 histc bincount",
        "values decide how many entries its result has; multiply by a mask or use torch.where",
    ),
    ("max_unpool2d max_unpool1d", "use nn.Upsample or a transposed convolution"),
    ("_native_batch_norm_legit _native_batch_norm_legit_functional", _BATCH_STATISTICS),
    ("native_dropout bernoulli rand rand_like randn_like", "remove what is random in eval mode"),
    (
        "fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn "
        "fft_ifftn fft_rfftn fft_irfftn fft_hfft stft istft view_as_complex view_as_real",
        "Fourier transforms work along axes of fixed size; go on with real and imaginary parts or "
        "sizes, and return torch.view_as_real(x) in place of complex numbers",
    ),
    ("grid_sampler_3d", "only the 2-D form exists"),
]

_HINTS = {name: hint for names, hint in _TABLE for name in names.split()}


def has_hint(target: str) -> bool:
    """Whether there is a hint for this very operator."""
    parts = target.split(".")
    return len(parts) > 1 and parts[1].rstrip("_") in _HINTS


def hint_for(target: str) -> str:
    """Return the hint for an operator written like `aten.gelu.default`."""
    parts = target.split(".")
    return _HINTS.get(parts[1].rstrip("_") if len(parts) > 1 else target, DEFAULT_HINT)
