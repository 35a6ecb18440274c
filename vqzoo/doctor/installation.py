"""The installation: plugins, published weights, environment variables and accelerate's configuration."""

import os
from pathlib import Path

from accelerate.commands.config.config_args import default_config_file, load_config_from_file

from vqzoo import weights
from vqzoo.doctor.findings import Findings
from vqzoo.errors import UserError
from vqzoo.sources import ALLOW, DENY, available, offered_hooks, refused

VARIABLES = {
    ALLOW: "no other plugin is imported",
    DENY: "these plugins are not imported",
    "VQZOO_OFFLINE": "nothing is downloaded, unless it is 0",
    "VQZOO_WEIGHTS": "the folder of published weights",
    "VQZOO_CACHE": "the folder of reference statistics",
    "TORCH_HOME": "torch hub's cache, where weights lie unless VQZOO_WEIGHTS says otherwise",
    "HF_HOME": "the cache of timm's weights",
    "HF_HUB_OFFLINE": "timm downloads nothing, unless it is 0",
    "CUDA_VISIBLE_DEVICES": "the GPUs that torch may see",
    "OMP_NUM_THREADS": "torch's threads on the CPU",
    "TRITON_INTERPRET": "Triton's kernels run on the CPU, which is slow and for tests",
    "ACCELERATE_USE_FSDP": "the launcher shards; the recipe must say shard=true",
    "ACCELERATE_MIXED_PRECISION": "of the launcher; the recipe's precision counts",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "of the launcher; the recipe's accumulate counts",
}
"""Environment variables that make a difference, and what they do."""


def examine_plugins(found: Findings) -> None:
    """Load every plugin, and say which can be used, by where they come from."""
    fine: dict[str, list[str]] = {}
    for name, source in available().items():
        try:
            kind = source.load()
            kind.Config()
            described = name if offered_hooks(kind) else f"{name} (offers no hook)"
            fine.setdefault(source.place, []).append(described)
        except UserError as error:
            found.wrong(f"{error}; or uninstall it, or name it in {DENY}")
        except Exception as error:  # of a class that cannot even be described
            found.wrong(f"plugin {name!r} ({source.place}): {error!r}; uninstall it, or name it in {DENY}")
    for name, reason in refused().items():
        excluded = reason.startswith((ALLOW, DENY))
        (found.note if excluded else found.wrong)(f"plugin {name!r} cannot be used: {reason}")
    for place, names in fine.items():
        found.ok(f"{len(names)} of {place}: {', '.join(names)}")


def examine_weights(found: Findings) -> None:
    """Say which published weights are here, whole or torn, and which are not."""
    missing = [f"{name} (for {source.use})" for name, source in weights.SOURCES.items() if not source.file.is_file()]
    if missing:
        found.note(f"not in {weights.folder()}: {', '.join(missing)}; `vqzoo weights fetch NAME` gets one, `weights list` "
                   "says from where")
    for name, source in weights.SOURCES.items():
        if not source.file.is_file():
            continue
        if (size := source.file.stat().st_size) != source.bytes:
            found.wrong(f"{name}: {source.file} has {size:,} bytes where {source.bytes:,} were published; delete it and run "
                        f"`vqzoo weights fetch {name}`")
        else:
            found.ok(f"{name} is here, for {source.use}: {source.file}")


def examine_environment(found: Findings) -> None:
    """Say which variables are set that make a difference, or that are meant to and do not."""
    known = [name for name in VARIABLES if name in os.environ]
    for name in known:
        found.ok(f"{name}={os.environ[name]}: {VARIABLES[name]}")
    others = [name for name in os.environ if name.startswith("VQZOO_") and name not in VARIABLES]
    for name in others:
        found.note(f"{name}={os.environ[name]}: nobody reads it; known are {', '.join(n for n in VARIABLES if 'VQZOO' in n)}")
    if not others and not known:
        found.ok("none of the variables that make a difference is set")


def examine_processes(found: Findings) -> None:
    """Say how many processes `accelerate launch` would start."""
    if not Path(default_config_file).is_file():
        found.ok("one process; there is no configuration of accelerate's, so `accelerate launch` takes every GPU, or one CPU "
                 "process")
        return
    config = load_config_from_file(default_config_file)
    found.ok(f"one process here; `accelerate launch` would start {config.num_processes}, as {default_config_file} says "
             f"({getattr(config.distributed_type, 'value', config.distributed_type)})")
    if str(config.mixed_precision or "no") != "no":
        found.note(f"accelerate's configuration says mixed_precision {config.mixed_precision}; the recipe's precision counts")
