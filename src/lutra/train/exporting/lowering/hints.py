"""What to do about torch operators that have no lowering: operator name -> one hint."""

from __future__ import annotations

DEFAULT_HINT = "rewrite it with supported operators or keep it outside the exported model"
_BATCH_STATISTICS = (
    "this batch norm uses the statistics of the batch; build it with track_running_stats=True"
)

_TABLE = [
    ("rnn_relu", "sequences of fixed length work; take their axis out of dynamic_axes"),
    (
        "conv3d conv_transpose3d max_pool3d adaptive_avg_pool3d adaptive_max_pool3d",
        "volumes work whose height and width are fixed; take their axes out of dynamic_axes",
    ),
    ("avg_pool3d", "divisor_override does not go with ceil_mode; leave one of the two out"),
    (
        "inverse linalg_inv linalg_inv_ex det linalg_det logdet linalg_slogdet linalg_solve "
        "linalg_cholesky cholesky cholesky_solve linalg_solve_triangular",
        "matrices of up to 32 rows work; for larger ones compute it outside the exported model, "
        "or once, as a buffer, where the matrix is constant",
    ),
    (
        "linalg_eigh linalg_eigvalsh linalg_svd linalg_svdvals linalg_qr matrix_exp pinverse "
        "linalg_pinv cholesky_inverse triangular_solve linalg_lu linalg_ldl_factor",
        "such factors of matrices do not exist; compute it outside the exported model, or once, as "
        "a buffer, where the matrix is constant",
    ),
    (
        "polygamma igamma igammac special_zeta special_bessel_j0 special_bessel_j1 frexp",
        "compute it outside the exported model, or once, as a buffer, where its input is constant",
    ),
    (
        "masked_select nonzero unique unique2 _unique2 histc bincount",
        "values decide how many entries its result has; multiply by a mask or use torch.where",
    ),
    (
        "max_unpool2d max_unpool3d max_pool1d_with_indices max_pool3d_with_indices",
        "indices of nn.MaxPool2d with stride = kernel_size and without padding work, in images of "
        "fixed size; else use nn.Upsample or a transposed convolution",
    ),
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
