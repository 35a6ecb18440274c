"""Plugins of which each breaks one promise, as authors do; BROKEN says which check must find it.

They lie at the top of a module, so that other processes find them too.
"""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchmetrics import MeanMetric, Metric

from vqzoo import Codebook, Plugin, Quantized, Table, all_reduce_sum, hookimpl
from vqzoo.ops import code_usage, nearest_codes, straight_through

BROKEN: dict[str, list[type[Plugin]]] = {}
"""The plugins that each check must find."""


def breaks(*checks):
    """Enter a plugin under the checks that must find it."""
    def enter(kind):
        for name in checks:
            BROKEN.setdefault(name, []).append(kind)
        return kind

    return enter


def search(latents, codebook):
    indices = nearest_codes(latents.flatten(0, 1), codebook.vectors())[0].view(latents.shape[:2])
    return Quantized(codebook.lookup(indices), indices)


# ---- what is said


@breaks("docstring_has_a_summary")
class Silent(Plugin):
    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)


@breaks("config_has_defaults")
class Demanding(Plugin):
    """Demanding: a field without a default."""

    @dataclass
    class Config:
        weight: float


@breaks("config_has_defaults")
class Undecorated(Plugin):
    """Undecorated: fields that no dataclass has."""

    class Config(Plugin.Config):
        weight: float = 1.0


@breaks("config_is_plain_data")
class Complex(Plugin):
    """Complex: a field that neither YAML nor JSON has."""

    @dataclass
    class Config:
        weight: complex = 1j


@breaks("companions_are_its_own_hooks")
class Lonely(Plugin):
    """Lonely: it wants a codebook of its own, which it does not make."""

    def companions(self):
        return {"quantize": ("make_codebook",)}

    @hookimpl
    def quantize(self, latents, codebook):
        return search(latents, codebook)


@breaks("named_stages_are_of_its_fields")
class Mistyped(Plugin):
    """Mistyped: a field that there is not."""

    @dataclass
    class Config:
        ramp: str = "refine"

    def named_stages(self):
        return {"ramps": (self.config.ramp,)}


@breaks("watched_losses_are_those_it_reads")
class Watcher(Plugin):
    """Watcher: a loss that it has not said it reads."""

    @hookimpl
    def stage_transition(self, progress):
        return progress.means["commitment"] < 0.1


@breaks("loss_names_are_those_it_returns")
class Promising(Plugin):
    """Promising: another loss than it returns."""

    def loss_names(self):
        return ("l1",)

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        return {"absolute": (images - reconstructions).abs().mean()}


@breaks("state_is_in_parameters_and_buffers")
class Counting(Plugin):
    """Counting: its counter is a plain attribute."""

    def __init__(self, config):
        super().__init__(config)
        self._calls = 0

    @hookimpl(wrapper=True)
    def embedding_loss(self):
        self._calls += 1
        return (yield)


@breaks("state_is_in_parameters_and_buffers")
class Flagged(Plugin):
    """Flagged: a flag that a checkpoint does not have."""

    def __init__(self, config):
        super().__init__(config)
        self.initialized = False

    @hookimpl
    def refresh_codes(self):
        self.initialized = True


@breaks("state_is_in_parameters_and_buffers")
class Stowaway(Plugin):
    """Stowaway: a tensor that moves to no GPU."""

    def __init__(self, config):
        super().__init__(config)
        self.scales = torch.ones(3)

    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents, codes)


@breaks("state_is_in_parameters_and_buffers")
class Transient(Plugin):
    """Transient: a statistic in a buffer that is not saved."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    @hookimpl
    def refresh_codes(self, latents):
        self.mean.lerp_(latents.mean(), 0.1)


@breaks("state_is_in_parameters_and_buffers")
class Pickler(Plugin):
    """Pickler: state that safetensors does not take."""

    def get_extra_state(self):
        return {"seen": 1}

    def set_extra_state(self, state):
        pass

    @hookimpl
    def refresh_codes(self):
        return None


# ---- quantizers


@breaks("shapes_and_types_fit")
class Square(Plugin):
    """Square: images that are not square are not thought of."""

    @hookimpl
    def quantize(self, latents, codebook):
        side = int(latents.shape[1] ** 0.5)
        return search(latents.view(len(latents), side * side, -1), codebook)


@breaks("shapes_and_types_fit")
class Impatient(Plugin):
    """Impatient: in evaluation there is no progress."""

    @hookimpl
    def quantize(self, latents, codebook, progress):
        return search(latents * (1.0 if progress.step else 0.5), codebook)


@breaks("indices_are_in_range")
class FromOne(Plugin):
    """FromOne: it counts from 1."""

    @hookimpl
    def quantize(self, latents, codebook):
        found = search(latents, codebook)
        return Quantized(found.codes, found.indices + 1)


class HalfLooked(Table):
    """Forget the map when codes are looked up, as a published one does."""

    def __init__(self, size, width):
        super().__init__(size, width)
        self.linear = nn.Linear(width, width)

    def compute_vectors(self):
        return self.linear(self.weight)

    def lookup(self, indices):
        return self.weight[indices]


@breaks("codes_are_those_of_the_indices", "decoding_gives_what_the_forward_gave")
class Forgetful(Plugin):
    """Forgetful: whoever decodes indices gets other codes."""

    @hookimpl
    def make_codebook(self, size, width):
        return HalfLooked(size, width)

    @hookimpl
    def quantize(self, latents, codebook):
        indices = nearest_codes(latents.flatten(0, 1), codebook.vectors())[0].view(latents.shape[:2])
        return Quantized(codebook.vectors()[indices], indices)


@breaks("evaluation_changes_nothing")
class Tracing(Plugin):
    """Tracing: it counts in evaluation too."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("tokens", torch.tensor(0))

    @hookimpl
    def quantize(self, latents, codebook):
        self.tokens += latents.shape[1]
        return search(latents, codebook)


@breaks("evaluation_changes_nothing", "evaluation_depends_on_nothing_else")
class Dicing(Plugin):
    """Dicing: chance decides, in evaluation too."""

    @hookimpl
    def quantize(self, latents, codebook):
        return search(latents + torch.randn_like(latents), codebook)


@breaks("each_image_is_judged_alone")
class Sociable(Plugin):
    """Sociable: latents are scaled by the batch's own statistics."""

    @hookimpl
    def quantize(self, latents, codebook):
        whole = latents.flatten(0, 1)
        return search((latents - whole.mean(0)) / (whole.std(0) + 1e-6), codebook)


@breaks("layout_of_memory_makes_no_difference")
class Viewing(Plugin):
    """Viewing: view() takes contiguous latents only."""

    @hookimpl
    def quantize(self, latents, codebook):
        return search(latents.contiguous(), codebook)

    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents.view(-1), codes.view(-1)).view(latents.shape)


@breaks("what_is_given_is_only_read")
class Scribbling(Plugin):
    """Scribbling: it clamps what others read after it."""

    @hookimpl
    def quantize(self, latents, codebook):
        latents.data.clamp_(-0.5, 0.5)
        return search(latents, codebook)


@breaks("what_is_given_is_only_read")
class Secretive(Plugin):
    """Secretive: it moves codes while losses are computed."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, codebook):
        codebook.weight.data.mul_(0.99)
        return (yield)


@breaks("losses_are_finite")
class Unused(Plugin):
    """Unused: the logarithm of a code's share that is zero."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, codebook):
        losses = yield
        shares = (-torch.cdist(latents.flatten(0, 1), codebook.vectors())).mul(1e3).softmax(1)
        return {**losses, "entropy": (shares * shares.log()).sum(1).mean()}


# ---- gradients


@breaks("decoder_sees_the_codes")
class Leaky(Plugin):
    """Leaky: the decoder sees latents."""

    @hookimpl
    def straight_through(self, latents):
        return latents


@breaks("latents_get_a_gradient")
class Severed(Plugin):
    """Severed: the decoder's gradient ends at the codes."""

    @hookimpl
    def straight_through(self, codes):
        return codes.detach()


@breaks("every_parameter_is_trained")
class Idle(Plugin):
    """Idle: a parameter that no loss reaches."""

    def __init__(self, config):
        super().__init__(config)
        self.temperature = nn.Parameter(torch.ones(()))

    @hookimpl
    def quantize(self, latents, codebook):
        return search(latents / self.temperature, codebook)


@breaks("frozen_parts_are_no_obstacle")
class Committed(Plugin):
    """Committed: a commitment that pulls at frozen latents."""

    @hookimpl
    def embedding_loss(self, latents, codes):
        return {"codebook": (codes - latents.detach()).square().mean(), "pull": (latents - codes.detach()).square().mean()}


@breaks("micro_batches_add_up")
class Summing(Plugin):
    """Summing: a sum over the batch."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        return {"absolute": (images - reconstructions).abs().sum()}


@breaks("reconstructions_get_a_gradient")
class Detached(Plugin):
    """Detached: a loss without a gradient."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        return {"absolute": (images - reconstructions.detach()).abs().mean()}


@breaks("perfect_reconstructions_are_no_obstacle")
class Rooted(Plugin):
    """Rooted: the root of an error that may be zero."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        return {"rmse": (images - reconstructions).square().mean().sqrt()}


class Blunt(nn.Module):
    """Judge by one of two layers."""

    def __init__(self):
        super().__init__()
        self.judge, self.spare = nn.Conv2d(3, 1, 4, 4), nn.Conv2d(3, 1, 4, 4)

    def forward(self, images):
        return self.judge(images)


@breaks("discriminator_alone_is_trained")
class Sparing(Plugin):
    """Sparing: a part of the discriminator never trains."""

    @hookimpl
    def make_discriminator(self):
        return Blunt()


@breaks("any_batch_of_images_will_do")
class Flattening(Plugin):
    """Flattening: view() takes no channels-last images."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        return {"absolute": (images.view(-1) - reconstructions.view(-1)).abs().mean()}


# ---- edges


@breaks("one_token_is_enough")
class Spread(Plugin):
    """Spread: the standard deviation of one token."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        return {**losses, "spread": (1 - latents.flatten(0, 1).std(0)).square().mean()}


@breaks("constant_latents_are_no_obstacle")
class Directed(Plugin):
    """Directed: a zero vector has no direction."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, codes):
        losses = yield
        cosine = (latents * codes).sum(-1) / (latents.norm(dim=-1) * codes.norm(dim=-1))
        return {**losses, "angle": (1 - cosine).mean()}


@breaks("large_latents_are_no_obstacle")
class Exponential(Plugin):
    """Exponential: exp without its largest argument taken away."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, codebook):
        losses = yield
        weights = (latents.flatten(0, 1) @ codebook.vectors().T).exp()
        shares = weights / weights.sum(1, keepdim=True)
        return {**losses, "peak": shares.amax(1).mean()}


@breaks("nan_latents_crash_nothing")
class Rounding(Plugin):
    """Rounding: NaN becomes an index."""

    @hookimpl
    def quantize(self, latents, codebook):
        indices = ((latents.mean(-1).tanh() + 1) / 2 * (codebook.size - 1)).round().long()
        return Quantized(codebook.lookup(indices), indices)


@breaks("one_code_is_enough")
class Normalised(Plugin):
    """Normalised: the entropy as a share of log K."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents, codebook):
        losses = yield
        shares = (-torch.cdist(latents.flatten(0, 1), codebook.vectors())).softmax(1).mean(0)
        return {**losses, "evenness": (shares * (shares + 1e-9).log()).sum() / np.log(codebook.size)}


@breaks("one_channel_is_enough")
class Whitened(Plugin):
    """Whitened: the standard deviation of one channel."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        return {**losses, "scale": (1 - latents.std(-1)).square().mean()}


# ---- devices


@breaks("tensors_are_made_on_the_device")
class Homely(Plugin):
    """Homely: its tensors are made on the CPU."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        return {**losses, "decay": (latents * torch.linspace(0, 1, latents.shape[-1])).square().mean()}


@breaks("tensors_are_made_on_the_device")
class Returned(Plugin):
    """Returned: its indices are made on the CPU."""

    @hookimpl
    def quantize(self, latents, codebook):
        indices = torch.zeros(latents.shape[:2], dtype=torch.int64)
        return Quantized(codebook.lookup(indices), indices)


@breaks("half_precision_changes_little")
class Correlated(Plugin):
    """Correlated: products of 8-bit levels, which are too large for half precision."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        real, made = ((255 * image).flatten(2) for image in (images, reconstructions))
        return {"gram": 1e-8 * (real @ real.mT - made @ made.mT).abs().mean()}


@breaks("compiled_networks_train_alike")
class Curved(Plugin):
    """Curved: a second gradient through the decoder."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions, last_layer):
        error = (images - reconstructions).square().mean()
        (slope,) = torch.autograd.grad(error, last_layer, create_graph=True)
        return {"slope": slope.square().sum()}


@breaks("memory_stays_flat")
class Hoarding(Plugin):
    """Hoarding: it keeps what it has seen."""

    def __init__(self, config):
        super().__init__(config)
        self._seen = []

    @hookimpl(wrapper=True)
    def embedding_loss(self, indices):
        self._seen.append(code_usage(indices, 32))
        return (yield)


@breaks("memory_stays_flat")
class Holding(Plugin):
    """Holding: a sum of losses that holds all their graphs."""

    def __init__(self, config):
        super().__init__(config)
        self._total = 0.0

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        self._total = self._total + latents.square().mean()
        return losses


# ---- what is kept


@breaks("state_dict_holds_everything", "a_run_goes_on_bit_for_bit")
class Warming(Plugin):
    """Warming: a weight that grows with calls, of which no checkpoint knows."""

    def __init__(self, config):
        super().__init__(config)
        self._calls = 0

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        self._calls += self.training
        return {**losses, "norm": 0.01 * self._calls * latents.square().mean()}


@breaks("a_run_goes_on_bit_for_bit")
class OwnDice(Plugin):
    """OwnDice: random numbers that nobody seeds again."""

    def __init__(self, config):
        super().__init__(config)
        self._dice = np.random.default_rng(0)

    @hookimpl
    def straight_through(self, latents, codes):
        return straight_through(latents, codes) + float(1e-3 * self._dice.random()) * (latents - latents.detach())

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        return {**losses, "noise": float(self._dice.random()) * latents.square().mean()}


@breaks("copies_are_independent")
class Shared(Plugin):
    """Shared: all of the class have one memory."""

    memory: ClassVar[torch.Tensor] = torch.zeros(8)

    @hookimpl
    def refresh_codes(self, latents):
        self.memory.add_(latents.mean(0))

    @hookimpl
    def quantize(self, latents, codebook):
        return search(latents + self.memory, codebook)


@breaks("export_keeps_the_indices")
class Projecting(Plugin):
    """Projecting: a random projection that nobody saves."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("projection", torch.randn(8, 8), persistent=False)

    @hookimpl
    def quantize(self, latents, codebook):
        return search(latents @ self.projection, codebook)


# ---- what changes codes


class Unwritable(Codebook):
    """Compute codes, and do not say that they cannot be overwritten."""

    def __init__(self, size, width):
        super().__init__(size, width)
        self.register_buffer("table", torch.randn(size, width))

    def compute_vectors(self):
        return self.table.tanh()


@breaks("codes_can_be_overwritten")
class Implicit(Plugin):
    """Implicit: codes that cannot be overwritten."""

    @hookimpl
    def make_codebook(self, size, width):
        return Unwritable(size, width)


class Skewed(Table):
    """Write other rows than asked for."""

    def write(self, rows, vectors):
        self.weight[(rows + 1) % self.size] = vectors


@breaks("codes_can_be_overwritten")
class Misplaced(Plugin):
    """Misplaced: codes land in other rows."""

    @hookimpl
    def make_codebook(self, size, width):
        return Skewed(size, width)


@breaks("refresh_is_repeatable", "processes_stay_equal")
class Unseeded(Plugin):
    """Unseeded: donors drawn from everybody's random numbers."""

    @hookimpl
    def refresh_codes(self, codebook, latents):
        chosen = torch.randint(len(latents), (4,), device=latents.device)
        codebook.replace_(torch.arange(4, device=latents.device), latents[chosen])
        return 4


@breaks("refresh_writes_by_replace")
class Bypassing(Plugin):
    """Bypassing: codes overwritten behind the host's back."""

    @hookimpl
    def refresh_codes(self, codebook, latents, epoch_counts):
        dead = epoch_counts == 0
        codebook.weight.data[dead] = latents[: int(dead.sum())]
        return int(dead.sum())


@breaks("refresh_takes_any_counts")
class Greedy(Plugin):
    """Greedy: donors in proportion to counts that may be none."""

    @hookimpl
    def refresh_codes(self, codebook, counts, generator):
        donors = torch.multinomial(counts.float(), 2, generator=generator)
        codebook.replace_(donors, codebook.vectors()[donors] * 0.99)


@breaks("stage_transition_answers_alike")
class Moody(Plugin):
    """Moody: a stage that ends by chance."""

    @hookimpl
    def stage_transition(self):
        return f"a whim of {random.random()}"


@breaks("enter_stage_is_repeatable")
class Shuffling(Plugin):
    """Shuffling: a start that each process draws for itself."""

    @hookimpl
    def enter_stage(self, tokenizer):
        codebook = tokenizer.codebook
        codebook.replace_(torch.arange(codebook.size), torch.randn(codebook.size, codebook.width))


@breaks("enter_stage_leaves_the_networks_alone")
class Meddling(Plugin):
    """Meddling: it changes the encoder."""

    @hookimpl
    def enter_stage(self, tokenizer):
        for parameter in tokenizer.encoder.parameters():
            parameter.mul_(0.5)


@breaks("report_gives_numbers")
class Hasty(Plugin):
    """Hasty: the mean of nothing."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("norms", torch.zeros(2))

    @hookimpl
    def refresh_codes(self, latents):
        self.norms += torch.stack([latents.norm(), torch.ones(())])

    @hookimpl
    def report(self):
        return {"latent_norm": self.norms[0] / self.norms[1]}


# ---- images and metrics


def pictures(first, count=4):
    return [Image.fromarray(np.full((32, 48, 3), first + number, dtype=np.uint8)) for number in range(count)]


@breaks("both_splits_have_images")
class Trainable(Plugin):
    """Trainable: nothing to evaluate on."""

    @hookimpl
    def make_dataset(self, split):
        return pictures(0) if split == "train" else []


@breaks("both_splits_have_images")
class Arrays(Plugin):
    """Arrays: items that are no images."""

    @hookimpl
    def make_dataset(self, split):
        return [np.asarray(image) for image in pictures(0 if split == "train" else 100)]


@breaks("splits_share_no_image")
class Sharing(Plugin):
    """Sharing: the same images for both."""

    @hookimpl
    def make_dataset(self):
        return pictures(0)


class Jittered(list):
    """Crop at random."""

    def __getitem__(self, index):
        left = random.randrange(8)
        return super().__getitem__(index).rotate(90).crop((left, 0, left + 32 - left, 32))


@breaks("images_are_the_same_each_time")
class Jittering(Plugin):
    """Jittering: random crops, which the host makes."""

    @hookimpl
    def make_dataset(self, split):
        return Jittered(pictures(0 if split == "train" else 100))


class Lazy:
    """Make images by a function that cannot be pickled."""

    def __init__(self, first):
        self.make = lambda index: pictures(first + index, 1)[0]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.make(index)


@breaks("images_go_to_workers")
class Lambda(Plugin):
    """Lambda: a function that no worker gets."""

    @hookimpl
    def make_dataset(self, split):
        return Lazy(0 if split == "train" else 100)


class EachImage(Metric):
    """Give a number for each image."""

    def __init__(self):
        super().__init__()
        self.add_state("errors", default=[], dist_reduce_fx="cat")

    def update(self, reconstructions, images):
        self.errors.append((reconstructions - images).abs().mean((1, 2, 3)))

    def compute(self):
        return torch.cat(self.errors)


@breaks("metric_gives_numbers")
class Single(Plugin):
    """Single: no one number."""

    @hookimpl
    def make_metric(self):
        return EachImage()


class OfBatches(MeanMetric):
    """Average the batches' averages."""

    def update(self, reconstructions, images):
        super().update((reconstructions - images).square().mean().sqrt())


@breaks("metric_takes_any_batches")
class Batchwise(Plugin):
    """Batchwise: means of means."""

    @hookimpl
    def make_metric(self):
        return OfBatches()


class Remembering(Metric):
    """Keep errors where reset does not find them."""

    def __init__(self):
        super().__init__()
        self.errors = []

    def update(self, reconstructions, images):
        self.errors += (reconstructions - images).abs().mean((1, 2, 3)).tolist()

    def compute(self):
        return torch.tensor(self.errors).mean()


@breaks("metric_forgets_at_reset")
class Elephant(Plugin):
    """Elephant: a metric that forgets nothing."""

    @hookimpl
    def make_metric(self):
        return Remembering()


class ByFunction(MeanMetric):
    """Measure by a function that cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.distance = lambda one, other: (one - other).abs().mean((1, 2, 3))

    def update(self, reconstructions, images):
        super().update(self.distance(reconstructions, images))


@breaks("metric_survives_pickle")
class Local(Plugin):
    """Local: a metric that stays where it is."""

    @hookimpl
    def make_metric(self):
        return ByFunction()


# ---- among others


@breaks("it_works_beside_other_plugins")
class Intimate(Plugin):
    """Intimate: a codebook's weight, which not every one has."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, codebook):
        losses = yield
        return {**losses, "decay": 1e-3 * codebook.weight.square().mean()}


@breaks("it_works_beside_other_plugins")
class Namesake(Plugin):
    """Namesake: a loss that is called as another plugin's."""

    @hookimpl
    def reconstruction_loss(self, images, reconstructions):
        return {"l1": F.l1_loss(reconstructions, images)}


@breaks("processes_stay_equal")
class Alone(Plugin):
    """Alone: a statistic of this process's latents."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("mean", torch.zeros(()))

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        self.mean.lerp_(latents.detach().mean(), 0.1)
        return losses


@breaks("processes_stay_equal")
class Waiting(Plugin):
    """Waiting: a sum over processes that not all of them make."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, latents):
        losses = yield
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 0:
            all_reduce_sum(latents.detach().mean())
        return losses


@breaks("processes_stay_equal")
class Dying(Plugin):
    """Dying: one process fails alone."""

    @hookimpl(wrapper=True)
    def embedding_loss(self):
        losses = yield
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise ZeroDivisionError("the second process alone")
        return losses
