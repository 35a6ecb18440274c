"""No quantization: the decoder sees the latents themselves, as in a plain autoencoder."""

from vqzoo import Plugin, Quantized, hookimpl


class Continuous(Plugin):
    """No quantization: latents pass as they are, so that the reconstruction is the upper bound of every quantizer.

    The codebook stays what another plugin makes of it, unused and without a gradient: list `continuous` beside that plugin,
    as in `plugins: {vq: {}, continuous: {}, pixel: {}}`, and set `freeze: ["codebook.*"]` where several processes train.
    To stop quantizing in one stage only, route `quantize`, `straight_through` and `embedding_loss` in each stage. There are
    no indices: whatever counts or replaces codes rests, and the tokenizer cannot `encode`.
    """

    @hookimpl
    def quantize(self, latents):
        return Quantized(latents, None)

    @hookimpl
    def straight_through(self, codes):
        return codes

    @hookimpl
    def embedding_loss(self):
        return {}
