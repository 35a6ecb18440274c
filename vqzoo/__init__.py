"""A modular, plugin-based zoo of image tokenizers: what a plugin's author and a tokenizer's user import."""

from vqzoo.codebook import Codebook, Table
from vqzoo.errors import NonFiniteError, PluginError, UserError
from vqzoo.ops import all_reduce_sum
from vqzoo.plugin import Plugin, Progress, Quantized, check_weights, hookimpl

__all__ = [
    "Codebook", "NonFiniteError", "Plugin", "PluginError", "Progress", "Quantized", "Table", "Tokenizer", "UserError",
    "all_reduce_sum", "check_weights", "hookimpl",
]


def __getattr__(name: str):
    # Deferred, so that a plugin's import does not load timm.
    if name == "Tokenizer":
        from vqzoo.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'vqzoo' has no attribute {name!r}")
