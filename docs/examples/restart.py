"""refresh_codes: overwrite codes outside gradient descent, alike on all processes."""

import torch

from vqzoo import Plugin, hookimpl


class Restart(Plugin):
    """Random restart: at an epoch's end, codes that it never used become latents of the last step (arXiv 2005.00341)."""

    @hookimpl
    def refresh_codes(self, codebook, latents, epoch_counts, progress, generator):
        dead = (epoch_counts == 0).nonzero().squeeze(1)
        if not progress.ends_epoch or not len(dead):
            return 0
        drawn = torch.randint(len(latents), dead.shape, generator=generator, device=latents.device)
        codebook.replace_(dead, latents[drawn])
        return len(dead)
