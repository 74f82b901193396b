"""What to do about torch operators that have no lowering: operator name -> one hint."""

from __future__ import annotations

DEFAULT_HINT = "rewrite it with supported operators or keep it outside the exported model"
_BATCH_STATISTICS = (
    "this batch norm uses the statistics of the batch; build it with track_running_stats=True"
)

_TABLE = [
    (
        "gelu silu hardswish sigmoid tanh leaky_relu elu mish softplus hardsigmoid prelu celu selu",
        "use ReLU or ReLU6 and fine-tune",
    ),
    (
        "layer_norm native_layer_norm group_norm native_group_norm instance_norm rms_norm",
        "use batch norm, which export folds into the layer before it",
    ),
    (
        "bmm baddbmm einsum scaled_dot_product_attention",
        "products of two activations have no lutra op; keep this part in torch",
    ),
    ("gru lstm rnn_tanh rnn_relu", "recurrent layers have no lutra op; use convolutions over time"),
    (
        "permute transpose movedim t swapaxes channel_shuffle",
        "lutra keeps the order of axes; use flatten or reshape where the order does not change",
    ),
    (
        "conv3d max_pool3d avg_pool3d",
        "only the 1-D and 2-D forms exist",
    ),
    (
        "conv_transpose2d conv_transpose1d",
        "lutra has no transposed convolution; use upsampling or nn.PixelShuffle and a convolution",
    ),
    (
        "upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest1d "
        "upsample_linear1d upsample_trilinear3d",
        "lutra has nearest and bilinear upsampling of images, without antialiasing",
    ),
    ("_native_batch_norm_legit _native_batch_norm_legit_functional", _BATCH_STATISTICS),
    ("native_dropout bernoulli rand rand_like randn_like", "remove what is random in eval mode"),
    ("log_softmax _log_softmax", "export the logits, or use softmax"),
    ("embedding", "lutra reads float32 only; look embeddings up before the model"),
    ("index", "use slices such as x[:, a:b] in place of index tensors"),
    ("argmax topk sort", "return the scores and do this in NumPy"),
]

_HINTS = {name: hint for names, hint in _TABLE for name in names.split()}


def hint_for(target: str) -> str:
    """Return the hint for an operator written like `aten.gelu.default`."""
    parts = target.split(".")
    return _HINTS.get(parts[1].rstrip("_") if len(parts) > 1 else target, DEFAULT_HINT)
