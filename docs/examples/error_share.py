"""report: a number beside the losses."""

from vqzoo import Plugin, hookimpl


class ErrorShare(Plugin):
    """Error share: how much of the latents' variance is lost by quantizing, 0 to 1 and more where it is bad."""

    def __init__(self, config):
        super().__init__(config)
        self._share = None  # of the last training step; no state, since the next step makes another

    @hookimpl(wrapper=True)
    def quantize(self, latents, progress):
        found = yield
        if progress is not None:
            self._share = (found.codes - latents).detach().square().mean() / latents.detach().var()
        return found

    @hookimpl
    def report(self):
        return {} if self._share is None else {"error_share": self._share}
