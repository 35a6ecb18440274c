"""enter_stage: start the codebook from data."""

import torch

from vqzoo import Plugin, hookimpl
from vqzoo.ops import gather_rows


class SampleStart(Plugin):
    """Sample start: before the first stage, set the codes to latents of training images, drawn at random."""

    @hookimpl
    def enter_stage(self, leaving, tokenizer, batches, generator):
        if leaving is not None:
            return
        codebook, parts = tokenizer.codebook, []
        while sum(map(len, parts)) < codebook.rows:
            parts.append(gather_rows(tokenizer.latents(next(batches))[0].flatten(0, 1)))
        latents = torch.cat(parts)
        order = torch.randperm(len(latents), generator=generator, device=latents.device)
        codebook.replace_(torch.arange(codebook.rows, device=latents.device), latents[order[: codebook.rows]])
