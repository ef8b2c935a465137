"""Which modules may give other results in training mode than their inputs and weights say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.utils import parametrizations, parametrize

from .walk import original_class

if TYPE_CHECKING:
    from collections.abc import Mapping

_SAFE_NAMES = """
    Linear Bilinear Identity Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d
    LayerNorm RMSNorm GroupNorm LocalResponseNorm Embedding EmbeddingBag ReLU ReLU6 LeakyReLU PReLU
    ELU SELU CELU GELU GLU SiLU Mish Tanh Sigmoid Softmax Softmax2d LogSoftmax Softmin Softplus
    Softsign Softshrink Hardshrink Hardtanh Hardswish Hardsigmoid LogSigmoid Tanhshrink Threshold
    MaxPool1d MaxPool2d MaxPool3d AvgPool1d AvgPool2d AvgPool3d LPPool1d LPPool2d LPPool3d
    MaxUnpool1d MaxUnpool2d MaxUnpool3d AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d
    AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d Flatten Unflatten Fold Unfold PixelShuffle
    PixelUnshuffle ChannelShuffle Upsample UpsamplingNearest2d UpsamplingBilinear2d ZeroPad1d
    ZeroPad2d ZeroPad3d ConstantPad1d ConstantPad2d ConstantPad3d ReflectionPad1d ReflectionPad2d
    ReflectionPad3d ReplicationPad1d ReplicationPad2d ReplicationPad3d CircularPad1d CircularPad2d
    CircularPad3d CosineSimilarity PairwiseDistance Sequential ModuleList ModuleDict ParameterList
    ParameterDict
""".split()
_SAFE = frozenset(getattr(nn, name) for name in _SAFE_NAMES if hasattr(nn, name)) | {
    parametrize.ParametrizationList,  # made in training mode, whatever the mode of the module it is put on
    parametrizations._WeightNorm,
    parametrizations._Orthogonal,
}
_DROPOUTS = frozenset({nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout})
_RECURRENT = frozenset({nn.RNN, nn.LSTM, nn.GRU})
# They are in training mode wherever a `prepare=` uses them, and ask for no mode: those that draw are seen to draw.
_TRANSFORMS = ("torchvision.transforms.", "torchaudio.transforms.")


def first_in_training(modules: Mapping[str, nn.Module]) -> str | None:
    """The name of the first module in training mode that may be random or look at other rows (the root: its class)."""
    for name, module in modules.items():
        if module.training and not _safe(module):
            return name or original_class(module).__name__
    return None


def _safe(module: nn.Module) -> bool:
    cls = original_class(module)
    inner = vars(module)
    if (
        any(inner.get(kind) for kind in ("_forward_hooks", "_forward_pre_hooks"))
        or "parametrizations" in inner["_modules"]
    ):
        return False
    if "forward" in inner:
        return False
    if cls in _DROPOUTS:
        return not module.p
    if cls in _RECURRENT:
        return not module.dropout
    if getattr(module, "max_norm", None) is not None:  # an embedding that rescales its rows as they are read
        return False
    return cls in _SAFE or cls.__module__.startswith(_TRANSFORMS)
