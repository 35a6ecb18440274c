"""Compare a GPU with the CPU: search, dense loss with its gradient, and a discriminator's losses; writes one JSON file."""

import json
import sys
from pathlib import Path

import torch

from vqzoo import PatchDiscriminator, ops
from vqzoo.evaluation.report import hardware


def main(target: str, device: str = "cuda") -> int:
    torch.manual_seed(0)
    results = {"search": search(device), "dense_loss": dense_loss(device), "discriminator": discriminator(device)}
    content = {"hardware": hardware(torch.device(device), 1), "torch": str(torch.__version__), "checks": results}
    Path(target).write_text(json.dumps(content, indent=2) + "\n")
    print(json.dumps(content))
    return 0 if all(check["passed"] for check in results.values()) else 1


def search(device: str) -> dict:
    """Compare the distance of the chosen code with the least in float64."""
    latents, vectors = torch.randn(4096, 128), torch.randn(16384, 128)
    indices, _ = ops.nearest_codes(latents.to(device), vectors.to(device))
    chosen = (latents.double() - vectors.double()[indices.cpu()]).square().sum(1)
    least = torch.cdist(latents.double(), vectors.double()).square().min(1).values
    excess = float(((chosen - least) / least).max())
    return {"largest_relative_excess": excess, "passed": excess < 1e-6}


def dense_loss(device: str) -> dict:
    """Compare loss and gradient with the same operation on the CPU."""
    latents, vectors = torch.randn(1024, 32) / 4, torch.randn(4096, 32) / 4
    indices, _ = ops.nearest_codes(latents, vectors)
    found = []
    for where in (device, "cpu"):
        codes = vectors.to(where, copy=True).requires_grad_()
        loss = ops.nonstationary_loss(latents.to(where), codes, indices.to(where), 0.35)
        loss.backward()
        found.append((loss.detach().cpu().double(), codes.grad.cpu().double()))
    (loss, gradient), (true_loss, true_gradient) = found
    errors = {"loss": float((loss - true_loss).abs() / true_loss.abs()),
              "gradient": float((gradient - true_gradient).norm() / true_gradient.norm())}
    return {"relative_error": errors, "passed": max(errors.values()) < 1e-4}


def discriminator(device: str) -> dict:
    """Compare the losses of a discriminator with the CPU's, and train one for 200 steps in bfloat16."""
    network, images = PatchDiscriminator(2, 16, "group"), torch.rand(8, 3, 64, 64) * 2 - 1
    other = images.roll(1, 0)
    losses = [ops.discriminator_loss("hinge", network.to(where)(images.to(where)), network(other.to(where))).item()
              for where in ("cpu", device)]
    optimizer = torch.optim.Adam(network.parameters(), 2e-4, (0.5, 0.9))
    real, fake = images.to(device), (other * 0.5).to(device)
    for _ in range(200):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            loss = ops.discriminator_loss("hinge", network(real), network(fake))
        loss = loss + ops.input_gradient(network, real).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    finite = all(bool(p.isfinite().all()) for p in network.parameters())
    difference = abs(losses[0] - losses[1])
    return {"difference": difference, "after_200_steps": loss.item(), "passed": finite and difference < 1e-3}


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
