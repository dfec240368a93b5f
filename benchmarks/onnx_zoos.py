"""The models that `onnx_coverage.py` exports, by family: small members of many families.

`transformers_sample` builds Hugging Face models from small configurations, with random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from coverage_zoos import Sample
from torch import nn

TORCHVISION = {
    "alexnet": ["alexnet"],
    "convnext": ["convnext_tiny", "convnext_small"],
    "densenet": ["densenet121", "densenet169"],
    "efficientnet": ["efficientnet_b0", "efficientnet_b1", "efficientnet_b2", "efficientnet_v2_s"],
    "googlenet": ["googlenet"],
    "inception": ["inception_v3"],
    "maxvit": ["maxvit_t"],
    "mnasnet": ["mnasnet0_5", "mnasnet1_0"],
    "mobilenet": ["mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large"],
    "regnet": ["regnet_x_400mf", "regnet_y_400mf", "regnet_y_800mf"],
    "resnet": ["resnet18", "resnet34", "resnet50", "resnet101", "resnext50_32x4d", "wide_resnet50_2"],
    "segmentation": ["deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large"],
    "shufflenet": ["shufflenet_v2_x0_5", "shufflenet_v2_x1_0"],
    "squeezenet": ["squeezenet1_0", "squeezenet1_1"],
    "swin": ["swin_t", "swin_v2_t"],
    "vgg": ["vgg11", "vgg11_bn", "vgg16_bn"],
    "video": ["r3d_18", "mc3_18", "r2plus1d_18"],
    "vit": ["vit_b_16", "vit_b_32"],
}

TIMM = {
    "beit": ["beit_base_patch16_224"],
    "convmixer": ["convmixer_768_32"],
    "convnext": ["convnext_atto"],
    "deit": ["deit_tiny_patch16_224"],
    "efficientnet": ["efficientnet_lite0"],
    "ghostnet": ["ghostnet_100"],
    "mixer": ["mixer_s32_224"],
    "mobilevit": ["mobilevit_xs"],
    "poolformer": ["poolformer_s12"],
    "regnet": ["regnetz_b16"],
    "res2net": ["res2net50_14w_8s"],
    "resnest": ["resnest14d"],
}

TRANSFORMERS = {
    "albert": ["AlbertModel"],
    "bert": ["BertForSequenceClassification"],
    "distilbert": ["DistilBertForMaskedLM"],
    "electra": ["ElectraForTokenClassification"],
    "gpt2": ["GPT2LMHeadModel"],
    "gpt_neox": ["GPTNeoXForCausalLM"],
    "llama": ["LlamaForCausalLM"],
    "mistral": ["MistralForCausalLM"],
    "opt": ["OPTForCausalLM"],
    "qwen2": ["Qwen2ForCausalLM"],
    "roberta": ["RobertaForSequenceClassification"],
    "t5": ["T5ForConditionalGeneration"],
    "vit": ["ViTForImageClassification"],
}

_VOCABULARY, _WIDTH, _LAYERS, _HEADS, _LENGTH = 128, 32, 4, 4, 12


def transformers_sample(name: str) -> Sample:
    """A Hugging Face model of four layers, width 32."""
    import transformers

    kind = getattr(transformers, name)
    config = kind.config_class()
    sizes: dict[str, Any] = {
        "vocab_size": _VOCABULARY,
        "hidden_size": _WIDTH,
        "embedding_size": _WIDTH,
        "word_embed_proj_dim": _WIDTH,
        "dim": _WIDTH,
        "d_model": _WIDTH,
        "n_embd": _WIDTH,
        "d_kv": _WIDTH // _HEADS,
        "head_dim": _WIDTH // _HEADS,
        "num_hidden_layers": _LAYERS,
        "n_layers": _LAYERS,
        "n_layer": _LAYERS,
        "num_layers": _LAYERS,
        "num_decoder_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": 2,
        "n_heads": _HEADS,
        "n_head": _HEADS,
        "num_heads": _HEADS,
        "intermediate_size": 2 * _WIDTH,
        "hidden_dim": 2 * _WIDTH,
        "ffn_dim": 2 * _WIDTH,
        "d_ff": 2 * _WIDTH,
        "image_size": 32,
        "patch_size": 8,
        "pad_token_id": 0,
        "use_cache": False,
    }
    known = config.to_dict()
    for key, value in sizes.items():
        if key in known and not (key == "head_dim" and known[key] is None):
            setattr(config, key, value)
    for token in ("bos_token_id", "eos_token_id", "decoder_start_token_id"):
        if isinstance(known.get(token), int):
            setattr(config, token, 1)

    def build() -> nn.Module:
        model: nn.Module = kind(config)
        return model

    return Sample(name, build, _call(name, config))


def _call(name: str, config: Any) -> Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]:
    def images(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"pixel_values": torch.randn(batch, 3, config.image_size, config.image_size)}

    def text(batch: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tokens = torch.randint(2, _VOCABULARY, (batch, _LENGTH))
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if name.startswith("T5"):
            given["decoder_input_ids"] = torch.randint(2, _VOCABULARY, (batch, 5))
        return (), given

    return images if hasattr(config, "image_size") else text
