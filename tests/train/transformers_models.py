"""Architectures of `transformers`, tiny, with random weights; see `test_architectures`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from architectures import Architecture, ids_alone, pixels, signal, spread, tokens
from torch import Tensor, nn

TEXT = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**TEXT, "intermediate_size": 32, "max_position_embeddings": 40}
IMAGE = (3, 32, 32)


class Output(nn.Module):
    """One tensor of what a model of `transformers` returns."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], field: str) -> None:
        super().__init__()
        self.model, self.names, self.field = model, names, field

    def forward(self, *inputs: Tensor) -> Tensor:
        made = self.model(**dict(zip(self.names, inputs, strict=True)))
        result: Tensor = made[self.field]
        return result


def _make(
    kind: str,
    config: str,
    settings: dict[str, Any],
    names: tuple[str, ...],
    field: str,
    part: str = "",
) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        made = getattr(transformers, config)(**settings)
        model = getattr(transformers, kind)(made).get_submodule(part)
        spread(model)
        return Output(model, names, field)

    return make


def text(
    kind: str,
    config: str,
    settings: dict[str, Any],
    *,
    field: str = "last_hidden_state",
    masked: bool = True,
    refused: str | None = None,
    fixed: bool = False,
) -> Architecture:
    names = ("input_ids", "attention_mask") if masked else ("input_ids",)
    make = _make(kind, config, settings, names, field)
    axes = () if fixed else (0, 1)
    return Architecture(make, tokens if masked else ids_alone, axes, refused)


def image(
    kind: str,
    config: str,
    settings: dict[str, Any],
    *,
    field: str = "last_hidden_state",
    shape: tuple[int, ...] = IMAGE,
    step: int = 0,
    refused: str | None = None,
) -> Architecture:
    make = _make(kind, config, settings, ("pixel_values",), field)
    axes = (0, 2, 3) if step else ()
    return Architecture(make, pixels(*shape, step=step), axes, refused)


_VIT = {**TEXT, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
_DECODER = {
    **ENCODER,
    "num_key_value_heads": 1,
    "use_cache": False,
    "pad_token_id": 0,
}
_GPT = {
    "vocab_size": 60,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "use_cache": False,
}
_SEGMENTS = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "window_size": 2,
}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1], "num_stages": 4}
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": 4,
}

TEXTS = {
    "bert": text("BertModel", "BertConfig", ENCODER),
    "bert-pooled": text("BertModel", "BertConfig", ENCODER, field="pooler_output"),
    "roberta": text("RobertaModel", "RobertaConfig", {**ENCODER, "pad_token_id": 1}),
    "distilbert": text(
        "DistilBertModel",
        "DistilBertConfig",
        {
            "vocab_size": 60,
            "dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 32,
            "max_position_embeddings": 40,
        },
    ),
    "albert": text("AlbertModel", "AlbertConfig", {**ENCODER, "embedding_size": 8}),
    "electra": text("ElectraModel", "ElectraConfig", {**ENCODER, "embedding_size": 8}),
    "mpnet": text("MPNetModel", "MPNetConfig", {**ENCODER, "pad_token_id": 1}),
    "t5": text(
        "T5EncoderModel",
        "T5Config",
        {
            "vocab_size": 60,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
        },
    ),
    "gpt2": text(
        "GPT2Model",
        "GPT2Config",
        {
            "vocab_size": 60,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 40,
            "use_cache": False,
        },
        masked=False,
    ),
    "gpt-neo": text(
        "GPTNeoModel",
        "GPTNeoConfig",
        {
            "vocab_size": 60,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": 40,
            "intermediate_size": 32,
            "use_cache": False,
        },
        masked=False,
    ),
    "opt": text(
        "OPTModel",
        "OPTConfig",
        {**ENCODER, "ffn_dim": 32, "word_embed_proj_dim": 16, "use_cache": False},
        masked=False,
    ),
    "llama": text("LlamaModel", "LlamaConfig", _DECODER),
    "llama-cache": text("LlamaModel", "LlamaConfig", {**_DECODER, "use_cache": True}),
    "qwen2": text("Qwen2Model", "Qwen2Config", _DECODER, masked=False),
    "mistral": text("MistralModel", "MistralConfig", {**_DECODER, "sliding_window": 4}),
    "falcon": text(
        "FalconModel",
        "FalconConfig",
        {**TEXT, "use_cache": False},  # one head of keys for all queries
    ),
    "gemma2": text("Gemma2Model", "Gemma2Config", {**_DECODER, "head_dim": 8}),
    "phi3": text("Phi3Model", "Phi3Config", {**_DECODER, "eos_token_id": 1}),
    "gpt-neox": text(
        "GPTNeoXModel", "GPTNeoXConfig", {**ENCODER, "use_cache": False}, masked=False
    ),
    "clip-text": text(
        "CLIPTextModel", "CLIPTextConfig", {**ENCODER, "eos_token_id": 2}, masked=False
    ),
    "modernbert": text(
        "ModernBertModel",
        "ModernBertConfig",
        {
            **ENCODER,
            "global_attn_every_n_layers": 2,
            "local_attention": 4,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
    ),
    "bloom": text(
        "BloomModel",
        "BloomConfig",
        {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2, "use_cache": False},
    ),
    "gpt-j": text("GPTJModel", "GPTJConfig", {**_GPT, "rotary_dim": 4}, masked=False),
    "codegen": text(
        "CodeGenModel", "CodeGenConfig", {**_GPT, "n_head": 4, "rotary_dim": 4}, masked=False
    ),
    "mixtral": text(
        "MixtralModel",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2-moe": text(
        "Qwen2MoeModel",
        "Qwen2MoeConfig",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "decoder_sparse_step": 1,
        },
    ),
    "xlnet": text(
        "XLNetModel",
        "XLNetConfig",
        {"vocab_size": 60, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
        fixed=True,
    ),
    "fnet": text(
        "FNetModel",
        "FNetConfig",
        {
            "vocab_size": 60,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 40,
        },
        masked=False,
        fixed=True,
    ),
    "mamba": text(
        "MambaModel",
        "MambaConfig",
        {
            "vocab_size": 60,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "use_cache": False,
        },
        masked=False,
        fixed=True,
    ),
    "mamba2": text(
        "Mamba2Model",
        "Mamba2Config",
        {
            "vocab_size": 60,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "use_cache": False,
        },
        masked=False,
        fixed=True,
    ),
    "rwkv": text(
        "RwkvModel",
        "RwkvConfig",
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "use_cache": False},
        masked=False,
        fixed=True,
    ),
    "deberta": text(
        "DebertaModel",
        "DebertaConfig",
        {
            **ENCODER,
            "type_vocab_size": 0,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
        },
        masked=False,
        fixed=True,
    ),
    "funnel": text(
        "FunnelModel",
        "FunnelConfig",
        {
            "vocab_size": 60,
            "block_sizes": [1, 1],
            "d_model": 16,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 32,
            "num_decoder_layers": 1,
        },
        masked=False,
        fixed=True,
    ),
    "deberta-v2": text(
        "DebertaV2Model",
        "DebertaV2Config",
        {
            **ENCODER,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "max_relative_positions": 16,
            "position_buckets": 8,
        },
    ),
}
IMAGES = {
    "vit": image("ViTModel", "ViTConfig", _VIT),
    "deit": image("DeiTModel", "DeiTConfig", _VIT),
    "beit": image("BeitModel", "BeitConfig", {**_VIT, "use_relative_position_bias": True}),
    "dinov2": image("Dinov2Model", "Dinov2Config", {**_VIT, "mlp_ratio": 2}),
    "siglip": image("SiglipVisionModel", "SiglipVisionConfig", _VIT, field="pooler_output"),
    "clip-vision": image("CLIPVisionModel", "CLIPVisionConfig", _VIT, field="pooler_output"),
    "sam": image(
        "SamVisionModel",
        "SamVisionConfig",
        {**_SEGMENTS, "output_channels": 8, "global_attn_indexes": [1], "mlp_dim": 32},
        shape=(3, 64, 64),
    ),
    "vitdet": image(
        "VitDetModel",
        "VitDetConfig",
        {**_SEGMENTS, "use_relative_position_embeddings": True, "window_block_indices": [0]},
        shape=(3, 64, 64),
    ),
    "swin": image("SwinModel", "SwinConfig", _SWIN),
    "swinv2": image("Swinv2Model", "Swinv2Config", _SWIN),
    "convnext": image("ConvNextModel", "ConvNextConfig", _STAGES, shape=(3, 64, 64), step=32),
    "convnextv2": image("ConvNextV2Model", "ConvNextV2Config", _STAGES, shape=(3, 64, 64), step=32),
    "mobilevit": image(
        "MobileViTModel",
        "MobileViTConfig",
        {
            "hidden_sizes": [16, 20, 24],
            "neck_hidden_sizes": [8, 8, 12, 12, 16, 16, 32],
            "num_attention_heads": 2,
            "image_size": 64,
        },
        shape=(3, 64, 64),
    ),
    "segformer": image(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 16, 16],
            "num_attention_heads": [1, 2, 2, 2],
            "depths": [1, 1, 1, 1],
            "decoder_hidden_size": 16,
        },
        field="logits",
        shape=(3, 64, 64),
    ),
    "resnet": image(
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
        shape=(3, 64, 64),
        step=32,
        field="pooler_output",
    ),
    "regnet": image(
        "RegNetModel",
        "RegNetConfig",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "groups_width": 8,
        },
        shape=(3, 64, 64),
        step=32,
    ),
    "mobilenet-v1": image(
        "MobileNetV1Model", "MobileNetV1Config", {"depth_multiplier": 0.25}, shape=(3, 64, 64)
    ),
    "mobilenet-v2": image(
        "MobileNetV2Model", "MobileNetV2Config", {"depth_multiplier": 0.25}, shape=(3, 64, 64)
    ),
    "efficientnet": image(
        "EfficientNetModel",
        "EfficientNetConfig",
        {
            "width_coefficient": 0.25,
            "depth_coefficient": 0.1,
            "hidden_dim": 320,
            "image_size": 64,
            "in_channels": [32, 16, 24],
            "out_channels": [16, 24, 40],
            "kernel_sizes": [3, 3, 5],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 1, 1],
            "expand_ratios": [1, 6, 6],
            "depthwise_padding": [],
        },
        shape=(3, 64, 64),
    ),
    "poolformer": image(
        "PoolFormerModel",
        "PoolFormerConfig",
        {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
        shape=(3, 64, 64),
    ),
    "levit": image(
        "LevitModel",
        "LevitConfig",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "num_attention_heads": [2, 3, 4],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        shape=(3, 64, 64),
    ),
    "cvt": image(
        "CvtModel",
        "CvtConfig",
        {
            "embed_dim": [8, 16, 24],
            "num_heads": [1, 2, 3],
            "depth": [1, 2, 3],
            "cls_token": [False, False, True],
        },
        shape=(3, 64, 64),
    ),
    "detr": Architecture(
        _make(
            "DetrForObjectDetection",
            "DetrConfig",
            {
                "use_timm_backbone": False,
                "use_pretrained_backbone": False,
                "backbone": None,
                "backbone_config": {
                    "model_type": "resnet",
                    "embedding_size": 8,
                    "hidden_sizes": [8, 16],
                    "depths": [1, 1],
                    "out_features": ["stage2"],
                },
                "d_model": 16,
                "encoder_layers": 1,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32,
                "num_queries": 5,
            },
            ("pixel_values",),
            "pred_boxes",
        ),
        pixels(3, 64, 64),
    ),
    "dpt": image(
        "DPTForDepthEstimation",
        "DPTConfig",
        {
            **_VIT,
            "is_hybrid": False,
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 8,
        },
        field="predicted_depth",
    ),
}


def _two_texts(batch: int, seed: int, more: int) -> tuple[Tensor, ...]:
    """Ids and mask of a text, and the ids of what was written of it so far."""
    return *tokens(batch, seed, more), *ids_alone(batch, seed + 50, more)


def translator(kind: str, config: str, settings: dict[str, Any]) -> Architecture:
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    return Architecture(_make(kind, config, settings, names, "logits"), _two_texts, (0, 1))


TRANSLATORS = {
    "bart": translator(
        "BartForConditionalGeneration",
        "BartConfig",
        {
            "vocab_size": 60,
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 40,
            "pad_token_id": 1,
        },
    ),
    "t5-with-decoder": translator(
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 60,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
}
WAVES = {
    **ENCODER,
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
SOUNDS = {
    "wav2vec2": Architecture(
        _make(
            "Wav2Vec2Model",
            "Wav2Vec2Config",
            WAVES,
            ("input_values",),
            "last_hidden_state",
        ),
        signal(160),
        (0, 1),
    ),
    "hubert": Architecture(
        _make(
            "HubertModel",
            "HubertConfig",
            {
                **WAVES,
                "feat_extract_norm": "layer",
                "do_stable_layer_norm": True,
            },
            ("input_values",),
            "last_hidden_state",
        ),
        signal(160),
        (0, 1),
    ),
    "whisper": Architecture(
        _make(
            "WhisperModel",
            "WhisperConfig",
            {
                "vocab_size": 60,
                "num_mel_bins": 8,
                "d_model": 16,
                "encoder_layers": 2,
                "decoder_layers": 1,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "decoder_ffn_dim": 32,
                "max_source_positions": 12,
                "max_target_positions": 10,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "decoder_start_token_id": 1,
            },
            ("input_features",),
            "last_hidden_state",
            part="encoder",
        ),
        pixels(8, 24),
    ),
}
ARCHITECTURES = {**TEXTS, **TRANSLATORS, **IMAGES, **SOUNDS}
