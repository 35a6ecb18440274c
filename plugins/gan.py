"""Adversarial loss: PatchGAN or a timm network's features as discriminator, with the safeguards that a safe start needs."""

from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

import torch

from vqzoo import FeatureDiscriminator, Features, PatchDiscriminator, Plugin, UserError, all_reduce_sum, check_weights, hookimpl
from vqzoo.ops import (
    DISCRIMINATOR_LOSSES,
    GENERATOR_LOSSES,
    discriminator_loss,
    generator_loss,
    gradient_ratio,
    input_gradient,
    lecam,
    mean_logit,
)


class GAN(Plugin):
    """GAN loss: `weight` times the generator's loss, fixed, or scaled by VQGAN's ratio of gradients if `adaptive`.

    Before step `start` nothing is adversarial; then the discriminator trains alone for `warmup` steps; `ramp` maps patterns of
    stage names to the epochs in which the weight grows from 0, from the stage's start (the last match counts; 1 without any).
    A stage without gan routes both: `reconstruction_loss` to others, `discriminator_loss: []`. With accumulation, an adaptive
    weight and LeCam's averages are each micro-batch's. `network` is "patch" (`layers`, `width`, `norm`) or a timm model:
    `features` of it, frozen unless `train_network`, with heads of `width`. `lecam` weighs arXiv 2104.03310's regulariser, `r1`
    is γ of γ/2·|∇D(x)|², and `gradient_penalty` weighs (|∇D| - 1)² between images and reconstructions.
    """

    @dataclass
    class Config:
        weight: float = 1.0
        adaptive: bool = False
        max_weight: float = 1e4
        start: int = 0
        warmup: int = 0
        ramp: dict[str, float] = field(default_factory=dict)
        generator_loss: str = "non-saturating"
        discriminator_loss: str = "hinge"
        network: str = "patch"
        layers: int = 3
        width: int = 64
        norm: str = "batch"
        features: list[int] = field(default_factory=list)
        pretrained: bool | str = False
        train_network: bool = False
        args: dict[str, Any] = field(default_factory=dict)
        lecam: float = 0.0
        r1: float = 0.0
        gradient_penalty: float = 0.0

        def __post_init__(self):
            check_weights(self, "weight", "max_weight", "start", "warmup", "lecam", "r1", "gradient_penalty")
            choices = {"generator_loss": GENERATOR_LOSSES, "discriminator_loss": DISCRIMINATOR_LOSSES,
                       "norm": ("batch", "group", "none")}
            for name in choices:
                if getattr(self, name) not in choices[name]:
                    raise ValueError(f"{name}: {getattr(self, name)!r} is unknown; choices: {', '.join(choices[name])}")
            for name in (name for name in ("layers", "width") if getattr(self, name) < 1):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be at least 1")
            if not all(0 <= epochs < torch.inf for epochs in self.ramp.values()):
                raise ValueError(f"ramp: {dict(self.ramp)!r} must map stage names to epochs that are not negative")
            if self.network != "patch" and not self.pretrained and not self.train_network:
                raise ValueError(f"network: {self.network!r} would be frozen at random; set pretrained or train_network")

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("logit_means", torch.zeros(2))
        self.register_buffer("updates", torch.tensor(0))
        self._news = {}  # what was computed since the last report

    def loss_names(self):
        return ("adversarial", "discriminator", *(n for n in ("lecam", "r1", "gradient_penalty") if getattr(self.config, n)))

    def named_stages(self):
        return {"ramp": tuple(self.config.ramp)}

    @hookimpl
    def make_discriminator(self):
        c = self.config
        if c.network == "patch":
            return PatchDiscriminator(c.layers, c.width, c.norm)
        args = (c.network, c.features, c.pretrained, c.args, not c.train_network)
        return FeatureDiscriminator(Features(*args, key="plugins.gan", field="features"), c.width, c.norm)

    @hookimpl(wrapper=True)
    def reconstruction_loss(self, reconstructions, discriminator, last_layer, progress):
        """Add the generator's loss to what all others return."""
        losses = yield
        factor = self.factor(progress)
        if not factor:
            return losses
        if discriminator is None:
            raise UserError("hooks.make_discriminator: nobody makes gan's discriminator; route it to [gan], or take gan out")
        adversarial = generator_loss(self.config.generator_loss, discriminator(reconstructions))
        self._news["adversarial_weight"] = weight = self.config.weight * factor * self.balance(losses, adversarial, last_layer)
        return [*losses, {"adversarial": weight * adversarial}]

    def factor(self, progress):
        """Return the share of the weight that start, warm-up and the stage's ramp allow, in [0, 1]."""
        since = progress.step - self.config.start - self.config.warmup
        ramps = [epochs for pattern, epochs in self.config.ramp.items() if fnmatch(progress.stage, pattern)]
        steps = (ramps or [1.0])[-1] * progress.steps_per_epoch
        return 0.0 if since < 0 else min(1.0, (min(since, progress.step_in_stage) + 1) / max(steps, 1))

    def balance(self, losses, adversarial, last_layer):
        """Return what makes the adversarial loss pull at the decoder's last layer as much as the other losses do."""
        if not self.config.adaptive:
            return 1.0
        if not last_layer.requires_grad:
            raise UserError("plugins.gan.adaptive: the decoder's last layer is frozen in this stage; use a fixed weight")
        others = sum(value for found in losses for value in found.values())
        return gradient_ratio(others, adversarial, last_layer).clamp(max=self.config.max_weight)

    @hookimpl
    def discriminator_loss(self, images, reconstructions, discriminator, progress):
        c = self.config
        if progress.step < c.start:
            return {}
        real, fake = discriminator(images), discriminator(reconstructions)
        losses = {"discriminator": discriminator_loss(c.discriminator_loss, real, fake)}
        means = torch.stack([mean_logit(real), mean_logit(fake)]).detach()
        self._news |= {"logits_real": means[0], "logits_fake": means[1]}
        if c.lecam:
            self.follow(means)
            losses["lecam"] = c.lecam * lecam(real, fake, *self.logit_means.clone())
        with torch.compiler.set_stance("force_eager" if c.r1 or c.gradient_penalty else "default"):  # it has no second gradient
            if c.r1:
                losses["r1"] = c.r1 / 2 * input_gradient(discriminator, images).square().sum(1).mean()
            if c.gradient_penalty:
                between = images.lerp(reconstructions, torch.rand_like(images[:, :1, :1, :1]))
                error = input_gradient(discriminator, between).norm(dim=1) - 1
                losses["gradient_penalty"] = c.gradient_penalty * error.square().mean()
        return losses

    def follow(self, means):
        """Move the averages of the mean logits of images and of reconstructions towards these, over all processes."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=0.999)
        sums = all_reduce_sum(torch.cat([means, means.new_ones(1)]))
        self.logit_means.lerp_(sums[:2] / sums[2], 1 - decay)
        self.updates += 1

    @hookimpl
    def report(self):
        news, self._news = self._news, {}
        return news
