"""Key extractors: what names a row.

Give one of these, or its name, as ``key=`` to `cached_module`; without one, each argument is keyed by its type:
texts by their UTF-8 bytes, tensors and arrays by their values, ``pathlib`` paths by the content of the file,
images and registered objects by their registered function.
"""

from .extractors import Extractor, custom, path, tensor, text, tokens
from .registry import register_key_extractor

__all__ = ["Extractor", "custom", "path", "register_key_extractor", "tensor", "text", "tokens"]
