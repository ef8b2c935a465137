"""More families of transformers, each parted inside: importing this file enters them among the pairs."""

from __future__ import annotations

import functools

from tests.recycling_architectures import (
    DECODER,
    SIZES,
    VISION,
    Fast,
    causal,
    family,
    pixels,
    plain_pixels,
    seq2seq,
    text,
    tiny,
)

__all__: list[str] = []

UNLABELLED = functools.partial(text, labels=False)
SEQ2SEQ = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "dropout": 0.0,
    "use_cache": False,
    "pad_token_id": 0,
}
EXPERTS = DECODER | {"num_experts_per_tok": 2, "experts_implementation": "eager", "moe_intermediate_size": 16}

for _name in ("Apertus", "BitNet", "Cohere", "Cohere2", "Ernie4_5", "Exaone4", "Glm", "Granite", "Helium", "Ministral",
              "Nemotron", "Olmo", "Olmo3", "Persimmon", "Phi3", "SeedOss", "SmolLM3", "StableLm",
              "Starcoder2"):  # fmt: skip
    family(
        _name,
        tiny(f"{_name}ForCausalLM", f"{_name}Config", **DECODER | {"pad_token_id": 0, "head_dim": 8}),
        causal,
        Fast("model.layers.1") if _name == "Cohere2" else "model.layers.1",
    )
family("OLMoE", tiny("OlmoeForCausalLM", "OlmoeConfig", num_experts=4, **EXPERTS), causal, Fast("model.layers.1"))
family("Qwen3-MoE", tiny("Qwen3MoeForCausalLM", "Qwen3MoeConfig", num_experts=4, **EXPERTS), causal, "model.layers.1")
for _name, _base in (
    ("Camembert", "roberta"),
    ("Data2VecText", "data2vec_text"),
    ("MegatronBert", "bert"),
    ("RemBert", "rembert"),
    ("RoFormer", "roformer"),
    ("XLMRoberta", "roberta"),
    ("LayoutLM", "layoutlm"),
    ("Nystromformer", "nystromformer"),
    ("XLMRobertaXL", "roberta"),
):
    family(
        _name,
        tiny(f"{_name}ForSequenceClassification", f"{_name}Config", **SIZES | {"pad_token_id": 0}),
        text,
        Fast(f"{_base}.encoder.layer.1") if _name == "RoFormer" else f"{_base}.encoder.layer.1",
    )
family("DPR", tiny("DPRQuestionEncoder", "DPRConfig", **SIZES), UNLABELLED,
       "question_encoder.bert_model.encoder.layer.1")  # fmt: skip
family("DeiT", tiny("DeiTForImageClassification", "DeiTConfig", **VISION), pixels, "deit.layers.1")
family("DINOv2 with registers", tiny("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig",
                                     **VISION), pixels, "dinov2_with_registers.encoder.layer.1")  # fmt: skip
family("DINOv3", tiny("DINOv3ViTModel", "DINOv3ViTConfig", **VISION), plain_pixels, Fast("model.layer.1"))
family("AIMv2", tiny("Aimv2VisionModel", "Aimv2VisionConfig", **VISION), plain_pixels, "encoder.layers.1")
for _name in ("MBart", "Pegasus", "Marian", "BlenderbotSmall"):
    family(
        _name,
        tiny("MarianMTModel" if _name == "Marian" else f"{_name}ForConditionalGeneration", f"{_name}Config",
             **SEQ2SEQ | {"decoder_start_token_id": 1, "eos_token_id": 2}),
        seq2seq,
        Fast("model.decoder.layers.1") if _name == "MBart" else "model.decoder.layers.1",
        "model.encoder.layers.1",
    )  # fmt: skip
family(
    "Funnel",
    tiny("FunnelForSequenceClassification", "FunnelConfig", vocab_size=50, block_sizes=[2, 2], d_model=16, n_head=2,
         d_head=8, d_inner=24, num_decoder_layers=1, hidden_dropout=0.0, attention_dropout=0.0),
    text,
    "funnel.encoder.blocks.0.1",
)  # fmt: skip
