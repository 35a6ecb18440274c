"""k-means initialisation: start the codebook at the centres of the latents that the encoder makes of real images."""

from dataclasses import dataclass

import torch

from vqzoo import Plugin, UserError, hookimpl
from vqzoo.ops import broadcast, code_sums, gather_rows, nearest_codes


class KMeans(Plugin):
    """k-means start: before a stage, set the codes to the k-means centres of latents of training images.

    Gathers about `latents_per_code` latents per code over all processes and runs `iterations` Lloyd steps; an empty cluster
    restarts at a random latent. `stage` names the stage, by default the first. Of several tables, each gets the centres of what
    those before it leave; a table that all levels of `residual` share gets those of the latents.
    """

    @dataclass
    class Config:
        latents_per_code: int = 32
        iterations: int = 10
        stage: str | None = None

        def __post_init__(self):
            for name in ("latents_per_code", "iterations"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name}: {getattr(self, name)!r} must be at least 1")

    def named_stages(self):
        return {} if self.config.stage is None else {"stage": (self.config.stage,)}

    @hookimpl
    def enter_stage(self, leaving, entering, tokenizer, batches, generator):
        wanted = self.config.stage
        if entering != wanted and (wanted is not None or leaving is not None):
            return
        codebook = tokenizer.codebook
        if not codebook.replaceable:
            raise UserError(f"plugins.kmeans: {type(codebook).__name__} computes its codes, which cannot start anywhere else; "
                            "leave kmeans out, or route hooks.enter_stage=[]")
        latents = self.collect(tokenizer, batches, codebook.size * self.config.latents_per_code)
        tables = [self.cluster(latents, codebook.size, generator)]
        for _ in range(1, codebook.tables):
            latents = latents - tables[-1][nearest_codes(latents, tables[-1])[0]]
            tables.append(self.cluster(latents, codebook.size, generator))
        codebook.replace_(torch.arange(codebook.rows, device=latents.device), torch.cat(tables))

    def collect(self, tokenizer, batches, wanted):
        """Return at least `wanted` latents [M, D], the same on every process."""
        parts, found = [], 0
        while found < wanted:
            parts.append(gather_rows(tokenizer.latents(next(batches))[0].flatten(0, 1)))
            found += len(parts[-1])
        return torch.cat(parts)

    def cluster(self, latents, size, generator):
        """Return the centres [K, D] after Lloyd's iterations, the first process's everywhere: GPUs round sums as they come."""
        device = latents.device
        order = torch.randperm(len(latents), generator=generator, device=device)
        centres = latents[order[:size]].clone()
        for _ in range(self.config.iterations):
            indices, _ = nearest_codes(latents, centres)
            sums, counts = code_sums(latents, indices, size)
            restart = latents[torch.randint(len(latents), (size,), generator=generator, device=device)]
            centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], restart)
        return broadcast(centres)
