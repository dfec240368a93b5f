# ruff: noqa: E501 (the table of models is easier to read in long lines)
"""The transformers zoo of `coverage.py`: small configurations with random weights, and inputs with labels."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from coverage_zoos import Sample
from torch import nn

Call = Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
_VOCABULARY, _LENGTH = 99, 12

_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": _VOCABULARY}
_ENCODER = {**_SMALL, "intermediate_size": 64, "max_position_embeddings": 64}
_DECODER = {**_ENCODER, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "vocab_size": _VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
_IMAGE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
_IMAGE |= {"image_size": 32, "patch_size": 8}
_SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (32, 32), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    # numpy's random masks and layers dropped by the value of a random tensor keep the whole model one node
    "mask_time_prob": 0.0, "layerdrop": 0.0, "num_conv_pos_embedding_groups": 2, "vocab_size": 32,
}  # fmt: skip


def _tokens(batch: int, length: int = _LENGTH) -> torch.Tensor:
    return torch.randint(3, _VOCABULARY, (batch, length))


def causal(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Text and the same text as labels."""
    tokens = _tokens(batch)
    return (), {"input_ids": tokens, "labels": tokens}


def masked(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Text with a padding mask, and labels."""
    tokens, mask = _tokens(batch), torch.ones(batch, _LENGTH, dtype=torch.long)
    mask[0, -3:] = 0
    return (), {"input_ids": tokens, "attention_mask": mask, "labels": tokens}


def classified(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Text and a class."""
    return (), {"input_ids": _tokens(batch), "labels": torch.arange(batch) % 2}


def pixels(size: int, labels: Callable[[int], torch.Tensor] | None = None) -> Call:
    """Images, with labels if given."""

    def call(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = {"pixel_values": torch.randn(batch, 3, size, size)}
        if labels is not None:
            kwargs["labels"] = labels(batch)
        return (), kwargs

    return call


def classes(batch: int) -> torch.Tensor:
    """One of two classes for each sample."""
    return torch.arange(batch) % 2


def pictures_and_text(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What CLIP takes."""
    tokens = _tokens(batch)
    tokens[:, -1] = _VOCABULARY - 1  # the end of text, which is pooled
    return (), {"input_ids": tokens, "pixel_values": torch.randn(batch, 3, 32, 32), "return_loss": True}


def waveform(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What Wav2Vec2 and Hubert take; their loss on labels picks values of a data-dependent number."""
    return (), {"input_values": torch.randn(batch, 800)}


def spectrogram(shape: tuple[int, int]) -> Call:
    """Audio features and text."""

    def call(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"input_features": torch.randn(batch, *shape), "labels": _tokens(batch)}

    return call


def boxes(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Text with the places of its words."""
    corner = torch.randint(0, 500, (batch, _LENGTH, 2))
    tokens = _tokens(batch)
    return (), {"input_ids": tokens, "bbox": torch.cat([corner, corner + 50], -1), "labels": tokens}


def regions(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Text and regions of a picture, for question answering."""
    return (), {
        "input_ids": _tokens(batch),
        "visual_feats": torch.randn(batch, 6, 24),
        "visual_pos": torch.rand(batch, 6, 4),
        "labels": classes(batch),
    }


def segments(batch: int) -> torch.Tensor:
    """A class for each pixel."""
    return torch.randint(0, 2, (batch, 64, 64))


def attended(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder's text and what it attends to."""
    tokens = _tokens(batch)
    return (), {"input_ids": tokens, "encoder_hidden_states": torch.randn(batch, 5, 32), "labels": tokens}


# name: configuration class, its options, model class, call
_MODELS: dict[str, tuple[str, dict[str, Any], str, Call]] = {
    "GPT-2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": _VOCABULARY},
        "GPT2LMHeadModel",
        causal,
    ),
    "Llama": ("LlamaConfig", _DECODER, "LlamaForCausalLM", causal),
    "Mistral": ("MistralConfig", _DECODER, "MistralForCausalLM", masked),
    "Mixtral": ("MixtralConfig", {**_DECODER, "num_local_experts": 4}, "MixtralForCausalLM", causal),
    "Qwen2": ("Qwen2Config", _DECODER, "Qwen2ForCausalLM", causal),
    "Gemma": ("GemmaConfig", {**_DECODER, "head_dim": 8}, "GemmaForCausalLM", causal),
    "Phi": ("PhiConfig", _DECODER, "PhiForCausalLM", causal),
    "GPT-NeoX": ("GPTNeoXConfig", _ENCODER, "GPTNeoXForCausalLM", causal),
    "OPT": (
        "OPTConfig",
        {**_SMALL, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        "OPTForCausalLM",
        causal,
    ),
    "Bloom": (
        "BloomConfig",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": _VOCABULARY},
        "BloomForCausalLM",
        causal,
    ),
    "Mamba": (
        "MambaConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": _VOCABULARY, "state_size": 8},
        "MambaForCausalLM",
        causal,
    ),
    "BERT": ("BertConfig", _ENCODER, "BertForMaskedLM", masked),
    "RoBERTa": ("RobertaConfig", _ENCODER, "RobertaForMaskedLM", masked),
    "DistilBERT": (
        "DistilBertConfig",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64, "vocab_size": _VOCABULARY},
        "DistilBertForSequenceClassification",
        classified,
    ),
    "DeBERTa": (
        "DebertaConfig",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 16},
        "DebertaForMaskedLM",
        masked,
    ),
    "DeBERTa-v2": (
        "DebertaV2Config",
        {**_ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
        "DebertaV2ForMaskedLM",
        masked,
    ),
    "ELECTRA": ("ElectraConfig", {**_ENCODER, "embedding_size": 16}, "ElectraForSequenceClassification", classified),
    "ALBERT": ("AlbertConfig", {**_ENCODER, "embedding_size": 16}, "AlbertForMaskedLM", masked),
    "MobileBERT": (
        "MobileBertConfig",
        {**_ENCODER, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
        "MobileBertForSequenceClassification",
        classified,
    ),
    "ConvBERT": (
        "ConvBertConfig",
        {**_ENCODER, "embedding_size": 32},
        "ConvBertForSequenceClassification",
        classified,
    ),
    "XLNet": (
        "XLNetConfig",
        {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 64, "vocab_size": _VOCABULARY},
        "XLNetForSequenceClassification",
        classified,
    ),
    "FNet": ("FNetConfig", _ENCODER, "FNetForSequenceClassification", classified),
    "Longformer": (
        "LongformerConfig",
        {**_ENCODER, "attention_window": [4, 4, 4]},
        "LongformerForSequenceClassification",
        classified,
    ),
    "T5": (
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": _VOCABULARY,
         "decoder_start_token_id": 0},
        "T5ForConditionalGeneration",
        causal,
    ),
    "BART": ("BartConfig", _SEQ2SEQ, "BartForConditionalGeneration", causal),
    "mBART": ("MBartConfig", _SEQ2SEQ, "MBartForConditionalGeneration", masked),
    "Blenderbot": ("BlenderbotConfig", _SEQ2SEQ, "BlenderbotForConditionalGeneration", causal),
    "Pegasus": ("PegasusConfig", _SEQ2SEQ, "PegasusForConditionalGeneration", causal),
    "ViT": ("ViTConfig", _IMAGE, "ViTForImageClassification", pixels(32, classes)),
    "DeiT": ("DeiTConfig", _IMAGE, "DeiTForImageClassification", pixels(32, classes)),
    "BEiT": ("BeitConfig", _IMAGE, "BeitForImageClassification", pixels(32, classes)),
    "Swin": (
        "SwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "SwinForImageClassification",
        pixels(64, classes),
    ),
    "ConvNext": (
        "ConvNextConfig",
        {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        "ConvNextForImageClassification",
        pixels(64, classes),
    ),
    "ResNet": (
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]},
        "ResNetForImageClassification",
        pixels(64, classes),
    ),
    "Segformer": (
        "SegformerConfig",
        {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 16},
        "SegformerForSemanticSegmentation",
        pixels(64, segments),
    ),
    "CLIP": (
        "CLIPConfig",
        {
            "text_config": {**_ENCODER, "eos_token_id": _VOCABULARY - 1},
            "vision_config": _IMAGE,
            "projection_dim": 16,
        },
        "CLIPModel",
        pictures_and_text,
    ),
    "Wav2Vec2": ("Wav2Vec2Config", _SPEECH, "Wav2Vec2ForCTC", waveform),
    "Hubert": ("HubertConfig", _SPEECH, "HubertForCTC", waveform),
    "Speech2Text": (
        "Speech2TextConfig",
        {**_SEQ2SEQ, "input_feat_per_channel": 24, "conv_channels": 16, "max_source_positions": 64,
         "max_target_positions": 64},
        "Speech2TextForConditionalGeneration",
        spectrogram((32, 24)),
    ),
    "Whisper": (
        "WhisperConfig",
        {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 64},
        "WhisperForConditionalGeneration",
        spectrogram((16, 64)),
    ),
    "LayoutLM": ("LayoutLMConfig", _ENCODER, "LayoutLMForMaskedLM", boxes),
    "Lxmert": (
        "LxmertConfig",
        {**_SMALL, "intermediate_size": 64, "l_layers": 2, "x_layers": 2, "r_layers": 2, "visual_feat_dim": 24,
         "num_qa_labels": 2},
        "LxmertForQuestionAnswering",
        regions,
    ),
    "TrOCR": (
        "TrOCRConfig",
        {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64,
         "vocab_size": _VOCABULARY, "max_position_embeddings": 64, "cross_attention_hidden_size": 32},
        "TrOCRForCausalLM",
        attended,
    ),
    "Donut-Swin": (
        "DonutSwinConfig",
        {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        "DonutSwinModel",
        pixels(64),
    ),
    "SAM vision encoder": (
        "SamVisionConfig",
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 64, "patch_size": 8,
         "output_channels": 16, "mlp_dim": 64, "window_size": 4, "global_attn_indexes": [1], "num_pos_feats": 8},
        "SamVisionModel",
        pixels(64),
    ),
}  # fmt: skip


def transformers_names() -> list[str]:
    """All models of this zoo."""
    return list(_MODELS)


def transformers_sample(name: str) -> Sample:
    """One of them."""
    config_class, options, model_class, call = _MODELS[name]

    def build() -> nn.Module:
        import transformers

        config = getattr(transformers, config_class)(**options)
        model: nn.Module = getattr(transformers, model_class)(config)
        return model

    return Sample(name, build, call, options, steps=True)
