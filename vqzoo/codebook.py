"""The codebook: K codes of width D, however a method stores or computes them."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vqzoo.errors import UserError


class Codebook(nn.Module):
    """Hold or compute K codes of width D, and lead from the encoder to the latents and from the codes to the decoder.

    A subclass implements `compute_vectors`, and `write` if its rows can be overwritten. A method that quantizes in a space of
    its own (few dimensions, a sphere, a cube) has `from_encoder` lead there and `to_decoder` back; every hook then sees latents
    and codes of that space. encoder_width and decoder_width are the channels on the other side, by default D. With several
    `tables`, a token has one code out of each, and `vectors` holds them one below the other.
    """

    replaceable = True
    """Whether single rows can be overwritten; an implicit codebook (FSQ, LFQ, BSQ) says False."""

    def __init__(
        self, size: int, width: int, encoder_width: int | None = None, decoder_width: int | None = None, tables: int = 1
    ):
        super().__init__()
        self.size, self.width, self.tables = size, width, tables
        self.encoder_width, self.decoder_width = encoder_width or width, decoder_width or width
        self._cached: tuple[Tensor] | None = None  # in a tuple, since a module makes a parameter of its own of a bare one
        self._caching = False
        self._replaced: list[tuple[Tensor, bool]] = []

    def from_encoder(self, features: Tensor) -> Tensor:
        """Return the latents [B, N, D] of what the encoder gives [B, N, encoder_width]; called with autocast off."""
        return features

    def to_decoder(self, codes: Tensor) -> Tensor:
        """Return what the decoder sees [B, N, decoder_width] of codes [B, N, D]; called with autocast off."""
        return codes

    def compute_vectors(self) -> Tensor:
        """Return all codes [K, D], or [tables·K, D], in float32 with their graph; called with autocast off."""
        raise NotImplementedError

    def write(self, rows: Tensor, vectors: Tensor) -> None:
        """Make `compute_vectors` return `vectors` [R, D] at `rows` [R]; called without grad."""
        raise NotImplementedError

    def row_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return the parameters whose dimension 0 is the code, so that an overwritten row's moments can be cleared."""
        return ()

    @property
    def rows(self) -> int:
        """The number of rows of `vectors`: K, or tables·K."""
        return self.tables * self.size

    def rows_of(self, indices: Tensor) -> Tensor:
        """Return the rows of `vectors` that indices [...], or [..., Q] of Q = tables, name: the same where there is one."""
        if self.tables == 1:
            return indices
        return indices + self.size * torch.arange(self.tables, device=indices.device)

    def vectors(self) -> Tensor:
        """Return all codes [K, D], or [tables·K, D], float32; computed once per forward: all hooks share one graph."""
        if self._cached is not None:
            return self._cached[0]
        device = next((t.device.type for t in (*self.parameters(), *self.buffers())), "cpu")
        with torch.autocast(device, enabled=False):
            vectors = self.compute_vectors().float()
        if self._caching:
            self._cached = (vectors,)
        return vectors

    def lookup(self, indices: Tensor) -> Tensor:
        """Return the codes [..., D] of indices [...], or of [..., Q]; exactly what `quantize` gives for them in evaluation."""
        return self.vectors()[indices]

    def fingerprint(self) -> str:
        """Return a short hash of what is stored, by which tokens know the codebook that they belong to."""
        digest = hashlib.sha256(f"{self.size} {self.width}".encode())
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def replace_(self, rows: Tensor, vectors: Tensor, smooth: bool = False) -> None:
        """Overwrite the codes at `rows` [R] by `vectors` [R, D].

        The host then clears the optimizer's moments of these rows, and the weight EMA takes them over. A smooth update
        (a moving average of what was there) says so: moments and EMA are then left alone.
        """
        if not self.replaceable:
            raise UserError(f"{type(self).__name__} is implicit: its codes cannot be overwritten, as a plugin wants")
        self.write(rows, vectors)
        self._cached = None
        self._replaced.append((rows, smooth))

    def take_replaced(self) -> list[tuple[Tensor, bool]]:
        """Return (rows, smooth) of every `replace_` since the last call; for the host."""
        replaced, self._replaced = self._replaced, []
        return replaced

    @contextmanager
    def one_forward(self) -> Iterator[None]:
        """Compute the vectors at most once inside this block; for the host."""
        self._caching = True
        try:
            yield
        finally:
            self._cached, self._caching = None, False


class Table(Codebook):
    """Hold the codes as one trainable table, or several, drawn from U(-1/K, 1/K) ("uniform") or N(0, 1/D) ("normal")."""

    def __init__(self, size: int, width: int, init: str = "uniform", tables: int = 1):
        super().__init__(size, width, tables=tables)
        weight = torch.empty(self.rows, width)
        if init == "uniform":
            nn.init.uniform_(weight, -1 / size, 1 / size)
        elif init == "normal":
            nn.init.normal_(weight, std=width**-0.5)
        else:
            raise ValueError(f"init: {init!r} is not a codebook initialisation; choices: normal, uniform")
        self.weight = nn.Parameter(weight)

    def compute_vectors(self) -> Tensor:
        return self.weight

    def write(self, rows: Tensor, vectors: Tensor) -> None:
        self.weight[rows] = vectors.to(self.weight)

    def row_parameters(self) -> tuple[nn.Parameter, ...]:
        return (self.weight,)
