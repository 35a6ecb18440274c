"""Evaluation: how well images are reconstructed, and how codes are used."""

import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vqzoo.codebook import Codebook
from vqzoo.data import Batch, to_images
from vqzoo.errors import MissingWeights
from vqzoo.evaluation import reference
from vqzoo.evaluation.config import OF_CODES, OF_FD, OF_INCEPTION, PER_IMAGE, UNPAIRED, EvaluateConfig, better, check
from vqzoo.evaluation.meters import CodeMeter, FeatureMeter, ImageMeter
from vqzoo.evaluation.networks import Inception, Pooled
from vqzoo.evaluation.offered import offered_metrics
from vqzoo.evaluation.protocols import PROTOCOLS, Pair
from vqzoo.lpips import LPIPSDistance
from vqzoo.ops import gather_names, gather_ragged

KINDS = ("frechet", "kernel", "precision", "recall")
"""What OF_INCEPTION and OF_FD ask for, in their order."""

NO_PICTURES = "a folder of pictures has no tokens"
UNPAIRED_ONLY = "samples have no images of which they are reconstructions"
IDLE = "it gathers lists, and there is a process without images to measure; take more images, or smaller batches"

Keep = Callable[[Pair, Tensor], None]


@dataclass
class Result:
    """Hold metrics by name, what is missing and why, the usage after so many images, and each image's own values.

    `positions` are those of the images measured, sorted, in whose order `table` holds a list per metric. `pixels` identifies
    the images as they were compared; `networks` says which gave features, `left_out` names files that did not decode, and
    `notes` says what weakens a number.
    """

    metrics: dict[str, float]
    missing: dict[str, str]
    usage_curve: list[tuple[int, float]]
    table: dict[str, list[float]]
    positions: list[int]
    pixels: str
    networks: dict[str, dict[str, str]]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Evaluator:
    """Measure by one protocol what a configuration asks for; its networks are loaded once, when it is made.

    A metric whose weights cannot be had is missing in each result. Every process calls it, each with its part of the images.
    """

    def __init__(self, config: EvaluateConfig, device: torch.device, prefix: str = "evaluate."):
        check(config, prefix)
        self.config, self.device, self.protocol = config, device, PROTOCOLS[config.protocol]
        self.missing: dict[str, str] = {}
        self.lpips: dict[str, LPIPSDistance] = {}
        self.networks: list[tuple[nn.Module, dict[str, str]]] = []
        self.offered = offered_metrics(config, device, prefix)
        for name in self._wanted(PER_IMAGE):
            if name.startswith("lpips_"):
                self._try([name], lambda name=name: self.lpips.update({name: self._judge(name)}))
        pooled = partial(self._pooled, f"{prefix}fd")
        for names, make in ((self._inception_names(), self._inception), (self._fd_names(), pooled)):
            if names:
                self._try(list(names.values()), lambda names=names, make=make: self.networks.append((make(), names)))

    def _wanted(self, names: Iterable[str]) -> list[str]:
        return [name for name in self.config.metrics if name in names]

    def _try(self, names: list[str], make: Callable[[], None]) -> None:
        try:
            make()
        except MissingWeights as error:
            self.missing |= dict.fromkeys(names, str(error))

    def _inception_names(self) -> dict[str, str]:
        offered = OF_INCEPTION if self.protocol.paired else UNPAIRED
        return {kind: name for kind, name in zip(KINDS, offered, strict=False) if name in self.config.metrics}

    def _fd_names(self) -> dict[str, str]:
        label = self.config.fd.label
        names = zip(KINDS, OF_FD, strict=True)
        return {kind: f"{name}_{label}" for kind, name in names if name in self.config.metrics}

    def _judge(self, name: str) -> LPIPSDistance:
        return LPIPSDistance(name.removeprefix("lpips_"), key=name, verify=True).eval().requires_grad_(False)

    def _inception(self) -> Inception:
        return Inception(self.protocol.resizing, "inception")

    def _pooled(self, key: str) -> Pooled:
        fd = self.config.fd
        return Pooled(fd.name, fd.pretrained, fd.size, fd.args, key)

    def better(self, name: str, value: float, than: float | None) -> bool:
        """Tell whether a metric's value is better than another, or the first that is a number; False if nobody can say."""
        if name not in self.offered:
            return better(name, value, than)
        higher = self.offered[name].higher_is_better
        return higher is not None and not math.isnan(value) and (than is None or (value > than if higher else value < than))

    def name_of(self, metric: str) -> str:
        """Return the name that a metric of the configuration has among results."""
        return f"{metric}_{self.config.fd.label}" if metric in OF_FD else metric

    @torch.no_grad()
    def tokenizer(
        self, tokenizer: nn.Module, batches: Iterable[Batch], stamp: str | None = None, keep: Keep | None = None
    ) -> Result:
        """Reconstruct held-out images and measure; `stamp` identifies the set, whose statistics are cached under it.

        `keep` is called with each pair and the positions of its images.
        """
        mode = tokenizer.training
        tokenizer.eval()
        session = _Session(self, tokenizer.codebook, stamp)
        for batch in batches:
            session.left_out += batch.bad
            if len(batch.images):
                output = tokenizer(to_images(batch.images, self.device))
                session.add(batch.images, output.reconstructions, batch.positions, output.indices, keep)
                session.facts["tokens_per_image"] = output.latents.shape[1]
        tokenizer.train(mode)
        return session.result("this tokenizer's codes are not discrete")

    @torch.no_grad()
    def pictures(self, pairs: Iterable[tuple[Tensor, Tensor, Tensor]], left_out: list[str], keep: Keep | None = None) -> Result:
        """Measure pairs of images and reconstructions, both uint8 [B, 3, H, W], with their positions [B].

        `left_out` collects, as the pairs are read, the names of files that do not decode.
        """
        session = _Session(self, None, None)
        session.left_out = left_out
        for images, reconstructions, positions in pairs:
            session.add(images, reconstructions.to(self.device), positions, None, keep)
        return session.result(NO_PICTURES)

    @torch.no_grad()
    def samples(self, samples: Iterable[Batch], against: Iterable[Batch] | reference.Moments) -> Result:
        """Compare a folder of samples with a reference set, or with its known statistics."""
        known = against if isinstance(against, reference.Moments) else None
        session = _Session(self, None, None, known)
        for which, batches in ((0, () if known else against), (1, samples)):
            for batch in batches:
                session.left_out += batch.bad
                session.add_set(which, batch)
        return session.result(NO_PICTURES)


class _Session:
    """Add up one evaluation."""

    def __init__(
        self, evaluator: Evaluator, codebook: Codebook | None, stamp: str | None, known: reference.Moments | None = None
    ):
        self.evaluator, self.device, protocol = evaluator, evaluator.device, evaluator.protocol
        self.missing = dict(evaluator.missing)
        columns = [name for name in evaluator._wanted(PER_IMAGE) if name not in self.missing]
        if not protocol.paired:
            self.missing |= dict.fromkeys(columns, UNPAIRED_ONLY)
            columns = []
        self.images = ImageMeter(columns, evaluator.lpips, protocol, self.device)
        self.offered = list(evaluator.offered.values()) if protocol.paired else []
        self.missing |= {} if protocol.paired else dict.fromkeys(evaluator.offered, UNPAIRED_ONLY)
        for one in self.offered:
            one.metric.reset()
        self.codes = None if codebook is None else CodeMeter(codebook, self.device)
        for network in (*evaluator.lpips.values(), *(network for network, _ in evaluator.networks)):
            network.to(self.device)
        self.features = []
        for network, names in evaluator.networks:
            kinds = dict(names)
            if known is not None:  # of which there are no features but Inception's moments
                unknown = KINDS[1:] if isinstance(network, Inception) else KINDS
                gone = [kinds.pop(kind) for kind in unknown if kind in kinds]
                self.missing |= dict.fromkeys(gone, "published statistics are moments of Inception's features and no more; "
                                              "give a folder of images")
            place = reference.place(stamp, protocol, network) if stamp and set(kinds) == {"frechet"} else None
            found = known if known is not None else reference.load(place, network.width, self.device) if place else None
            self.features.append((FeatureMeter(network, kinds, self.device, found), place))
        self.positions: list[Tensor] = []
        self.pixels = 0
        self.facts: dict[str, float] = {}
        self.left_out: list[str] = []

    def add(
        self, images: Tensor, reconstructions: Tensor, positions: Tensor, indices: Tensor | None, keep: Keep | None
    ) -> None:
        self._identify(images)
        pair = Pair(images.to(self.device), reconstructions, self.evaluator.protocol)
        self.positions.append(positions.to(self.device))
        self.images.add(pair)
        for one in self.offered:
            one.add(*pair.levels)
        if indices is not None and self.codes is not None:
            self.codes.add(indices, positions)
        else:
            self.codes = None
        for meter, _ in self.features:
            for which, levels in enumerate(pair.features()):
                meter.add(which, levels, positions)
        if keep is not None:
            keep(pair, positions)

    def add_set(self, which: int, batch: Batch) -> None:
        """Add images of one of two sets that are not paired."""
        if which == 0:
            self._identify(batch.images)
        else:
            self.positions.append(batch.positions.to(self.device))
        for meter, _ in self.features:
            meter.add(which, batch.images.to(self.device).float(), batch.positions)

    def _identify(self, images: Tensor) -> None:
        for image in images:
            self.pixels += int.from_bytes(hashlib.sha256(image.contiguous().numpy()).digest(), "big")

    def result(self, no_codes: str) -> Result:
        evaluator = self.evaluator
        positions = torch.cat(self.positions) if self.positions else torch.zeros(0, dtype=torch.int64, device=self.device)
        positions, order = gather_ragged(positions).sort()
        metrics, too_small, table = self.images.results(order)
        missing, curve = self.missing | too_small, []
        wanted = evaluator._wanted(OF_CODES)
        codes = bool(gather_names(["codes"] if self.codes is not None and self.codes.counts.any() else []))
        if codes and self.codes is not None:
            found, curve = self.codes.results(positions)
            metrics |= {name: found[name] for name in wanted}
            self.facts["codebook_size"] = self.codes.codebook.size
        else:
            missing |= dict.fromkeys(wanted, no_codes)
        idle = "idle" in gather_names([] if self.positions else ["idle"])
        for one in self.offered:
            if idle and one.keeps_lists:
                missing[one.name] = IDLE
            else:
                metrics |= one.results()
        for meter, place in self.features:
            metrics |= meter.results()
            if place and meter.known is None:
                reference.save(place, meter.reference())
        pixels = sum(int(part) for part in gather_names([str(self.pixels)])) % 2**256
        return Result(_ordered(metrics | self.facts | {"images": len(positions)}), missing, curve, table, positions.tolist(),
                      f"{pixels:064x}", self._networks(), gather_names(self.left_out), self._notes(len(positions)))

    def _notes(self, images: int) -> list[str]:
        """Say which distances of sets are of too few images."""
        return [f"{meter.names['frechet']}: {images} images are fewer than the {meter.network.width} features: the distance is "
                "biased, and only comparable at the same number" for meter, _ in self.features
                if "frechet" in meter.names and images < meter.network.width]

    def _networks(self) -> dict[str, dict[str, str]]:
        """Say of each metric that needs a network which one it is."""
        said = {name: judge.card for name, judge in self.evaluator.lpips.items()}
        for network, names in self.evaluator.networks:
            said |= dict.fromkeys(names.values(), network.card)
        return said


def _ordered(metrics: dict[str, Any]) -> dict[str, Any]:
    """Sort metrics as METRICS has them, those of networks by their first part, facts last."""
    known = [*PER_IMAGE, *OF_INCEPTION, "gfid", *OF_FD, *OF_CODES]

    def place(name: str) -> int:
        fitting = [number for number, metric in enumerate(known) if name == metric or name.startswith(f"{metric}_")]
        return fitting[-1] if fitting else len(known)

    return dict(sorted(metrics.items(), key=lambda item: place(item[0])))
