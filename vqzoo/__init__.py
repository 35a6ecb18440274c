"""A modular, plugin-based zoo of image tokenizers: what a plugin's author and a tokenizer's user import."""

import importlib

from vqzoo.codebook import Codebook, Table
from vqzoo.errors import DataError, Interrupted, LostError, NonFiniteError, OutOfMemory, PluginError, StorageError, UserError
from vqzoo.ops import all_reduce_sum
from vqzoo.plugin import CONTRACT, Plugin, Progress, Quantized, check_weights, hookimpl

__all__ = [
    "CONTRACT", "Codebook", "DataError", "FeatureDiscriminator", "Features", "Frozen", "Interrupted", "LPIPSDistance",
    "LostError", "NonFiniteError", "OutOfMemory", "PatchDiscriminator", "Plugin", "PluginError", "Progress",
    "Quantized", "StorageError", "Table", "Tokenizer", "UserError", "all_reduce_sum", "check_weights", "hookimpl",
    "load_published",
]

DEFERRED = {"FeatureDiscriminator": "discriminators", "Features": "features", "Frozen": "features",
            "LPIPSDistance": "lpips", "PatchDiscriminator": "discriminators", "Tokenizer": "tokenizer",
            "load_published": "weights"}
"""Names that are imported at first use, so that a plugin's import does not load timm."""


def __getattr__(name: str):
    if name in DEFERRED:
        return getattr(importlib.import_module(f"vqzoo.{DEFERRED[name]}"), name)
    raise AttributeError(f"module 'vqzoo' has no attribute {name!r}")
