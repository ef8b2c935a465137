"""Small random models of many families, each with the cuts at which it is parted and what may come of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.recycling_models import row
from tests.recycling_oracle import RUNS, Batch, Case, call, seeded, what_feeds

PAIRS: list[Case] = []
FAST: set[str] = set()
"""Names of the pairs that every run tries; the others take minutes."""

Cut = str | tuple[str, str] | tuple[str, str, dict[str, Any]]


class Fast(str):
    """A cut that every run tries."""

    __slots__ = ()


def family(
    name: str, make: Callable[[], nn.Module], batch: Callable[[Sequence[int]], Batch], *cuts: Cut, **more: Any
) -> None:
    """Enter one model with all its cuts."""
    for cut in cuts:
        given = (cut,) if isinstance(cut, str) else cut
        at, expect, options = (*given, *("works", {})[len(given) - 1 :])
        told = "".join(f" {key}={value}" for key, value in options.items())
        case = Case(f"{name} at {at}{told}", lambda: make().double(), str(at), batch, expect, options, **more)
        assert all(case.name != other.name for other in PAIRS), case.name
        PAIRS.append(Case(**{**vars(case), "make": functools.partial(counted, case)}))
        if isinstance(at, Fast):
            FAST.add(case.name)


_classes: dict[type, type] = {}
_first: dict[str, str] = {}


def counted(case: Case) -> nn.Module:
    """The model, whose first layer below the cut counts its rows."""
    if case.name not in _first:
        _first[case.name] = first_layer(case)
        seeded(11)
    model = case.make()
    if _first[case.name]:
        layer = model.get_submodule(_first[case.name])
        layer.__class__ = counting(type(layer))
    return model


def first_layer(case: Case) -> str:
    """The first layer with parameters that feeds the cut."""
    fed = what_feeds(case).modules
    model = case.fresh()
    met: list[str] = []
    for name, module in model.named_modules():
        if name in fed and not list(module.children()) and list(module.parameters()):
            module.register_forward_pre_hook(lambda module, args, name=name: met.append(name))
    call(model, case.batch(range(case.size)))
    return met[0] if met else ""


def counting(kind: type) -> type:
    if kind not in _classes:

        def forward(self: nn.Module, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            RUNS.rows += x.shape[0]
            return kind.forward(self, x, *args, **kwargs)

        _classes[kind] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return _classes[kind]


# --- batches --------------------------------------------------------------------------------------------


def ids_of(number: int, length: int) -> torch.Tensor:
    return torch.randint(3, 50, (length,), generator=torch.Generator().manual_seed(number))


def text(rows: Sequence[int], length: int = 6, pad: int = 0, labels: bool = True) -> dict[str, Any]:
    """Token rows, padded on the right."""
    mask = (torch.arange(length) < torch.tensor([3 + number % (length - 2) for number in rows])[:, None]).long()
    ids = torch.stack([ids_of(number, length) for number in rows]) * mask + pad * (1 - mask)
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    return batch | {"labels": torch.tensor([number % 2 for number in rows])} if labels else batch


def text_sometimes_labelled(rows: Sequence[int]) -> dict[str, Any]:
    return text(rows, labels=rows[0] in (0, 1, 12))


def causal(rows: Sequence[int]) -> dict[str, Any]:
    batch = text(rows, labels=False)
    return batch | {"labels": batch["input_ids"]}


def seq2seq(rows: Sequence[int]) -> dict[str, Any]:
    batch = text(rows, labels=False)
    return batch | {"decoder_input_ids": torch.stack([ids_of(number + 500, 4) for number in rows])}


def pixels(rows: Sequence[int], size: int = 8) -> dict[str, Any]:
    return plain_pixels(rows, size) | {"labels": torch.tensor([number % 2 for number in rows])}


def plain_pixels(rows: Sequence[int], size: int = 8) -> dict[str, Any]:
    return {"pixel_values": torch.stack([row(number, 3, size, size) for number in rows])}


def text_and_pixels(rows: Sequence[int]) -> dict[str, Any]:
    return text(rows, labels=False) | plain_pixels(rows)


def spectrum(rows: Sequence[int]) -> dict[str, Any]:
    features = torch.stack([row(number, 8, 20) for number in rows])
    return {"input_features": features, "decoder_input_ids": torch.stack([ids_of(number + 500, 4) for number in rows])}


def wave(rows: Sequence[int]) -> dict[str, Any]:
    return {"input_values": torch.stack([row(number, 64) for number in rows])}


def series(rows: Sequence[int]) -> Batch:
    return (torch.stack([row(number, 5, 4) for number in rows]),)


def pictures(rows: Sequence[int]) -> Batch:
    return (torch.stack([row(number, 3, 8, 8) for number in rows]),)


# --- transformers ---------------------------------------------------------------------------------------


def tiny(model: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**values))


SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
VISION: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 24,
}
DECODER: dict[str, Any] = SIZES | {"num_key_value_heads": 1, "use_cache": False, "attention_dropout": 0.1}
EXTRA = {"extra": True}
N1, N2 = {"call": 1}, {"call": 2}

BERT = functools.partial(tiny, "BertForSequenceClassification", "BertConfig", **SIZES)

family(
    "BERT",
    BERT(),
    text,
    Fast("bert.encoder.layer.1"),
    "bert.encoder.layer.2",
    ("bert.encoder", "works"),
    ("bert.embeddings", "refused"),
    ("bert.embeddings.dropout", "works"),
    Fast("bert.encoder.layer.1.intermediate"),
    ("bert.encoder.layer.1.intermediate.intermediate_act_fn", "refused"),
    (Fast("bert.encoder.layer.1.intermediate.intermediate_act_fn"), "works", EXTRA),
    "bert.encoder.layer.1.output",
    "bert.encoder.layer.1.attention.self",
    ("bert.encoder.layer.1.attention.output", "works"),
    "bert.pooler",
    Fast("classifier"),
)
family("BERT, labels at times", BERT(), text_sometimes_labelled, Fast("bert.encoder.layer.2"))
family("BERT, eager attention", BERT(attn_implementation="eager"), text, "bert.encoder.layer.1")
family(
    "BERT, all states",
    BERT(output_hidden_states=True),
    text,
    (Fast("bert.encoder.layer.1"), "refused"),
    (Fast("bert.encoder.layer.1"), "works", EXTRA),
)
family(
    "BERT, attentions",
    BERT(output_attentions=True, attn_implementation="eager"),
    text,
    ("bert.encoder.layer.1", "refused"),
    ("bert.encoder.layer.1", "either", EXTRA),
)
family(
    "BERT, masked words",
    tiny("BertForMaskedLM", "BertConfig", **SIZES),
    causal,
    Fast("bert.encoder.layer.1"),
    "cls",
    "cls.predictions.decoder",
)
family(
    "BERT, decoder",
    tiny("BertLMHeadModel", "BertConfig", is_decoder=True, use_cache=False, **SIZES),
    causal,
    "bert.encoder.layer.1",
)
family("ELECTRA", tiny("ElectraForSequenceClassification", "ElectraConfig", embedding_size=8, **SIZES), text,
       "electra.encoder.layer.1", "classifier")  # fmt: skip
family(
    "RoBERTa",
    tiny("RobertaForSequenceClassification", "RobertaConfig", pad_token_id=1, **SIZES),
    functools.partial(text, pad=1),
    Fast("roberta.encoder.layer.1"),
    "classifier",
)
family(
    "DistilBERT",
    tiny("DistilBertForSequenceClassification", "DistilBertConfig",
         vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=24, max_position_embeddings=16),
    text,
    Fast("distilbert.transformer.layer.1"),
    "pre_classifier",
)  # fmt: skip
for _version in ("", "V2"):
    family(
        f"DeBERTa{_version}",
        tiny(f"Deberta{_version}ForSequenceClassification", f"Deberta{_version}Config",
             relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=8, **SIZES),
        text,
        Fast("deberta.encoder.layer.1"),
        "pooler",
    )  # fmt: skip
family("MPNet", tiny("MPNetForSequenceClassification", "MPNetConfig", **SIZES), functools.partial(text, pad=1),
       Fast("mpnet.encoder.layer.1"), "classifier")  # fmt: skip
family(
    "ModernBERT",
    tiny("ModernBertForSequenceClassification", "ModernBertConfig",
         pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=4, **SIZES),
    text,
    Fast("model.layers.1"),
    "model.layers.1.attn_norm",
    ("model.layers.1.mlp", "refused"),
    "head",
)  # fmt: skip
family(
    "ALBERT",
    tiny("AlbertForSequenceClassification", "AlbertConfig", embedding_size=8, **SIZES),
    text,
    (Fast("albert.encoder.albert_layer_groups.0"), "works", N1),
    ("albert.encoder.albert_layer_groups.0.albert_layers.0", "works", N2),
    ("albert.encoder.albert_layer_groups.0", "refused", {"call": 3}),
    "albert.pooler",
)
family("FNet", tiny("FNetForSequenceClassification", "FNetConfig", **SIZES),
       lambda rows: {"input_ids": text(rows)["input_ids"]}, "fnet.encoder.layer.1")  # fmt: skip

family("ViT", tiny("ViTForImageClassification", "ViTConfig", hidden_dropout_prob=0.1, **VISION), pixels,
       Fast("vit.layers.1"), "vit.layers.1.layernorm_before", "vit.layernorm", "classifier")  # fmt: skip
family("DINOv2", tiny("Dinov2ForImageClassification", "Dinov2Config", **VISION), pixels,
       "dinov2.encoder.layer.1", "classifier")  # fmt: skip
family("BEiT", tiny("BeitForImageClassification", "BeitConfig", **VISION), pixels, "beit.layers.1")
family(
    "CLIP",
    tiny("CLIPModel", "CLIPConfig", projection_dim=8,
         text_config=SIZES | {"projection_dim": 8, "eos_token_id": 49}, vision_config=VISION | {"projection_dim": 8}),
    text_and_pixels,
    Fast("vision_model.encoder.layers.1"),
    Fast("text_model.encoder.layers.1"),
    ("visual_projection", "refused"),
    ("visual_projection", "works", EXTRA),
    ("text_projection", "refused"),
    ("text_projection", "works", EXTRA),
)  # fmt: skip
family("SigLIP", tiny("SiglipModel", "SiglipConfig", text_config=SIZES, vision_config=VISION), text_and_pixels,
       "vision_model.encoder.layers.1", "text_model.encoder.layers.1")  # fmt: skip
family(
    "ResNet",
    tiny("ResNetForImageClassification", "ResNetConfig",
         embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic"),
    pixels,
    Fast("resnet.encoder.stages.1"),
    "resnet.encoder.stages.0.layers.1",
    "classifier",
)  # fmt: skip
family("ConvNeXt", tiny("ConvNextForImageClassification", "ConvNextConfig",
                        hidden_sizes=[4, 8], depths=[2, 2], num_stages=2, patch_size=2), pixels,
       "convnext.encoder.stages.1", "convnext.encoder.stages.1.layers.1", "convnext.layernorm")  # fmt: skip
family(
    "Swin",
    tiny("SwinForImageClassification", "SwinConfig", drop_path_rate=0.0,
         image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2),
    functools.partial(pixels, size=16),
    "swin.encoder.layers.1",
    Fast("swin.encoder.layers.0.blocks.1"),
    ("swin.encoder.layers.0.blocks.1.attention", "refused"),
    "swin.layernorm",
)  # fmt: skip
family(
    "SegFormer",
    tiny("SegformerForSemanticSegmentation", "SegformerConfig", drop_path_rate=0.0,
         num_encoder_blocks=2, depths=[2, 2], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
         strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=8),
    plain_pixels,
    ("segformer.stages.1", "refused"),
    (Fast("segformer.stages.1"), "works", EXTRA),
    "decode_head",
)  # fmt: skip
family("EfficientNet", tiny("EfficientNetForImageClassification", "EfficientNetConfig",
       image_size=16, width_coefficient=0.1, depth_coefficient=0.3, hidden_dim=128, in_channels=[32, 16],
       out_channels=[16, 24], kernel_sizes=[3, 3], strides=[1, 2], num_block_repeats=[2, 2], expand_ratios=[1, 2],
       depthwise_padding=[]), functools.partial(pixels, size=16),
       "efficientnet.encoder.blocks.1", "efficientnet.encoder.top_conv")  # fmt: skip
family("MobileNetV2", tiny("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=32,
       depth_multiplier=0.1, min_depth=4, depth_divisible_by=4), functools.partial(pixels, size=32),
       "mobilenet_v2.layer.8")  # fmt: skip
family(
    "DETR",
    tiny("DetrForObjectDetection", "DetrConfig", use_timm_backbone=False, backbone=None, use_pretrained_backbone=False,
         backbone_config={"model_type": "resnet", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
                          "layer_type": "basic", "out_features": ["stage2"]},
         num_queries=3, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
         decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24),
    functools.partial(plain_pixels, size=16),
    ("model.encoder", "either"),
    ("model.encoder.layers.1", "either", EXTRA),
    ("model.decoder.layers.1", "either", EXTRA),
    (Fast("class_labels_classifier"), "refused"),
    (Fast("class_labels_classifier"), "either", EXTRA),
)  # fmt: skip

family(
    "T5",
    tiny("T5ForConditionalGeneration", "T5Config", use_cache=False,
         vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=3, num_heads=2),
    seq2seq,
    Fast("encoder.block.1"),
    "encoder.final_layer_norm",
    Fast("decoder.block.1"),
    ("lm_head", "refused"),
    ("lm_head", "works", EXTRA),
)  # fmt: skip
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "dropout": 0.0, "use_cache": False,
}  # fmt: skip
family(
    "BART",
    tiny("BartForConditionalGeneration", "BartConfig", max_position_embeddings=16, **_SEQ2SEQ),
    seq2seq,
    Fast("model.encoder.layers.1"),
    "model.decoder.layers.1",
    "model.decoder.layers.0",
    "model.decoder.layers.1.encoder_attn",
    ("model.decoder.layers.1.fc1", "refused"),
    ("lm_head", "refused"),
    ("lm_head", "works", EXTRA),
)
family(
    "Whisper",
    tiny("WhisperForConditionalGeneration", "WhisperConfig", num_mel_bins=8, max_source_positions=10,
         max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, **_SEQ2SEQ),
    spectrum,
    "model.encoder.layers.1",
    Fast("model.decoder.layers.1"),
    ("proj_out", "refused"),
    ("proj_out", "works", EXTRA),
)  # fmt: skip
for _speech in ("Wav2Vec2", "Hubert"):
    family(
        _speech,
        tiny(f"{_speech}ForSequenceClassification", f"{_speech}Config", conv_dim=(8, 8), conv_stride=(4, 2),
             conv_kernel=(4, 2), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
             num_conv_pos_embedding_groups=2, mask_time_prob=0.0, layerdrop=0.0,
             **SIZES | {"vocab_size": 10}),
        wave,
        Fast(f"{_speech.lower()}.encoder.layers.1"),
        "projector",
    )  # fmt: skip

GPT = {"vocab_size": 50, "n_embd": 16, "n_layer": 3, "n_head": 2}
family(
    "GPT-2",
    tiny(
        "GPT2LMHeadModel", "GPT2Config", use_cache=False, vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=16
    ),
    causal,
    Fast("transformer.h.1"),
    ("transformer.h.1.attn", "refused"),
    ("transformer.h.1.attn", "works", EXTRA),
    "transformer.ln_f",
    "lm_head",
)
family("GPT-2 with a cache", tiny("GPT2LMHeadModel", "GPT2Config", n_positions=16, **GPT), causal,
       (Fast("transformer.h.1"), "refused"))  # fmt: skip
family(
    "Llama",
    tiny("LlamaForCausalLM", "LlamaConfig", **DECODER),
    causal,
    Fast("model.layers.1"),
    "model.layers.1.input_layernorm",
    ("model.layers.1.self_attn", "refused"),
    "model.norm",
    "lm_head",
)
family("Llama with a cache", tiny("LlamaForCausalLM", "LlamaConfig", **DECODER | {"use_cache": True}), causal,
       ("model.layers.1", "refused"))  # fmt: skip
family("Llama, classifier", tiny("LlamaForSequenceClassification", "LlamaConfig", pad_token_id=0, **DECODER), text,
       "model.layers.1")  # fmt: skip
for _name in ("Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Phi", "Olmo2"):
    _more = {"head_dim": 8} if _name in ("Gemma", "Gemma2", "Qwen3") else {}
    _cut: Any = Fast("model.layers.1") if _name == "Qwen2" else "model.layers.1"
    family(_name, tiny(f"{_name}ForCausalLM", f"{_name}Config", **DECODER, **_more), causal, _cut)
family("Gemma 3", tiny("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=8, **DECODER), causal, "model.layers.1")
family("Mixtral", tiny("MixtralForCausalLM", "MixtralConfig", num_local_experts=2,
                       experts_implementation="eager", **DECODER), causal,
       Fast("model.layers.1"), "model.norm", tolerance=1e-9)  # fmt: skip
family("Mamba", tiny("MambaForCausalLM", "MambaConfig", use_cache=False,
                     vocab_size=50, hidden_size=16, num_hidden_layers=3, state_size=4), causal,
       Fast("backbone.layers.1"), "backbone.norm_f")  # fmt: skip
family("GPT-NeoX", tiny("GPTNeoXForCausalLM", "GPTNeoXConfig", use_cache=False, **SIZES), causal, "gpt_neox.layers.1")
family("OPT", tiny("OPTForCausalLM", "OPTConfig", use_cache=False, dropout=0.0, ffn_dim=24, word_embed_proj_dim=16,
                   **{key: SIZES[key] for key in SIZES if key != "intermediate_size"}), causal,
       "model.decoder.layers.1")  # fmt: skip
family("Bloom", tiny("BloomForCausalLM", "BloomConfig", use_cache=False, vocab_size=50, hidden_size=16, n_layer=3,
                     n_head=2), causal, "transformer.h.1")  # fmt: skip


# --- written by hand ------------------------------------------------------------------------------------


class Double(nn.Sequential):
    """Two convolutions with batch norms."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True),
        )  # fmt: skip


class UNet(nn.Module):
    """Down, down, up, up; each way up joins the way down."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.middle = Double(3, 4), Double(4, 6), Double(6, 8)
        self.up2, self.up1 = Double(14, 6), Double(10, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.down1(x)
        b = self.down2(F.max_pool2d(a, 2))
        c = self.middle(F.max_pool2d(b, 2))
        d = self.up2(torch.cat([F.interpolate(c, scale_factor=2), b], 1))
        return self.out(self.up1(torch.cat([F.interpolate(d, scale_factor=2), a], 1)))


class Basic(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        identity = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class TorchvisionResNet(nn.Module):
    """As torchvision writes it: named stages, a flatten, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Basic(4, 4, 1), Basic(4, 4, 1))
        self.layer2 = nn.Sequential(Basic(4, 8, 2), Basic(8, 8, 1))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.avgpool(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(x, 1))


class DenseNet(nn.Module):
    """Each layer reads what all before it gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3 + 2 * place, 2, 3, padding=1) for place in range(4))
        self.norm, self.out = nn.BatchNorm2d(11), nn.Linear(11, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = [x]
        for layer in self.layers:
            features.append(F.relu(layer(torch.cat(features, 1))))
        return self.out(self.norm(torch.cat(features, 1)).mean((2, 3)))


class Recurrent(nn.Module):
    """Two LSTM layers over a series, and a classifier on the last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Linear(4, 6), nn.Dropout(0.2)
        self.lstm1, self.lstm2 = nn.LSTM(6, 6, batch_first=True), nn.LSTM(6, 6, 2, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h, _ = self.lstm1(self.drop(self.embed(x)))
        _, (h, _) = self.lstm2(h)
        return self.fc(torch.cat([h[-2], h[-1]], 1))


class Seq2Seq(nn.Module):
    """A GRU reads, its last state starts another one, which writes with attention to what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.writer = nn.GRU(4, 6, batch_first=True), nn.GRUCell(6, 6)
        self.start, self.out = nn.Parameter(torch.randn(6)), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        read, state = self.reader(x)
        h, inputs, out = state[0], self.start.expand(len(x), -1), []
        for _ in range(3):
            h = self.writer(inputs, h)
            weights = (read @ h[:, :, None]).softmax(1)
            inputs = (read * weights).sum(1)
            out.append(self.out(h + inputs))
        return torch.stack(out, 1)


class Mixer(nn.Module):
    """Layers that mix tokens and channels by turns."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
            self.tokens, self.channels = nn.Linear(5, 5), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + F.gelu(self.tokens(self.norm1(x).transpose(1, 2))).transpose(1, 2)
            return x + F.gelu(self.channels(self.norm2(x)))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers, self.fc = (
            nn.Linear(4, 4),
            nn.Sequential(*(Mixer.Layer() for _ in range(3))),
            nn.Linear(4, 2),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.layers(self.embed(x)).mean(1))


class EncoderDecoder(nn.Module):
    """Torch's own transformer, rows along dimension 1 as it likes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.transformer = nn.Transformer(8, 2, 2, 2, 16, 0.1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x).transpose(0, 1)
        mask = nn.Transformer.generate_square_subsequent_mask(len(h), dtype=h.dtype)
        return self.fc(self.transformer(h, h.flip(0), tgt_mask=mask)).transpose(0, 1)


class Autoencoder(nn.Module):
    """Gives what it made of its input, and the loss; the input is used again above."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 20))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        code = self.encoder(x.flatten(1))
        made = self.decoder(code).view_as(x)
        return {"loss": F.mse_loss(made, x), "made": made}


class PointNet(nn.Module):
    """Points share a network; the largest value over all points goes on, a learned turn in front."""

    def __init__(self) -> None:
        super().__init__()
        self.turn, self.points = nn.Linear(4, 16), nn.Sequential(nn.Conv1d(4, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
        self.wide, self.fc = nn.Conv1d(8, 8, 1), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turn = self.turn(x.mean(1)).view(-1, 4, 4) + torch.eye(4, dtype=x.dtype)
        h = self.points(torch.bmm(x, turn).transpose(1, 2))
        return self.fc(self.wide(h).max(2).values)


class Graph(nn.Module):
    """Two graph convolutions over one fixed graph that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("neighbours", torch.eye(5) + torch.eye(5).roll(1, 0))
        self.first, self.second, self.fc = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.neighbours @ self.first(x))
        return self.fc((self.neighbours @ self.second(h)).sum(1))


family("U-Net", UNet, pictures, (Fast("middle"), "refused"), (Fast("middle"), "works", EXTRA),
       ("up2", "works", EXTRA), "out")  # fmt: skip
family("ResNet of torchvision", TorchvisionResNet, pictures, Fast("layer2"), "layer2.1", "fc",
       ("layer2.0.relu", "works", N1),
       ("layer2.0.conv2", "refused"))  # fmt: skip
family("DenseNet", DenseNet, pictures, ("layers.2", "refused"), (Fast("layers.2"), "works", EXTRA), "norm")
family("LSTM", Recurrent, series, Fast("lstm2"), "fc")
family("GRU with attention", Seq2Seq, series, ("writer", "either"), ("writer", "works", EXTRA),
       ("writer", "works", EXTRA | N1))  # fmt: skip
family("Mixer", Mixer, series, Fast("layers.1"), "layers.1.norm1", ("layers.1.channels", "refused"), "fc")
family("Transformer of torch", EncoderDecoder, series, ("transformer.encoder.layers.1", "either"),
       ("transformer.decoder", "works"), Fast("transformer.decoder.layers.1"), "fc")  # fmt: skip
family("Autoencoder", Autoencoder, series, Fast("decoder"), "encoder.2")
family("PointNet", PointNet, series, "points", Fast("wide"))
family("Graph", Graph, series, Fast("second"), "fc")
