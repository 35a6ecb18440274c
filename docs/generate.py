"""Write what the documentation says of hooks, checks and results, from the code and files that it speaks of: `make docs`."""

import ast
import inspect
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import rendered

import vqzoo
import vqzoo.ops
from vqzoo import Codebook, Progress, Quantized, hookspecs
from vqzoo.hookspecs import DOORS, ONCE, REQUIRED
from vqzoo.sources import SPECS
from vqzoo.testing import CHECKS
from vqzoo.testing.check import CODEBOOK, IMAGES, RUN

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- begin: written by docs/generate.py -->", "<!-- end -->"

HOOKIMPL = ("Marks the method that implements the hook of its name; `@hookimpl(wrapper=True)` one that wraps others, "
            "`@hookimpl(trylast=True)` one that yields to others.")

ARGUMENTS = {
    "batches": "an endless iterator over this process's training images, [B, 3, H, W] each",
    "codebook": "the `vqzoo.Codebook`, whoever made it; see below",
    "codes": "the chosen vectors [B, N, D], as `quantize` returned them",
    "counts": "how often each code was assigned in this optimizer step [K], over all processes; None without indices",
    "discriminator": "the discriminator, or None; in `reconstruction_loss` its parameters take no gradient",
    "entering": "the name of the stage that begins",
    "epoch_counts": "how often each code was assigned since the epoch's start [K], over all processes; zeros without indices",
    "extras": "tensors that `quantize` hands on to the other hooks of its method, by name",
    "generator": "a `torch.Generator` on the codes' device, in the same state on every process; draw with nothing else",
    "grid": "the token grid (h, w), row-major",
    "images": "the images [B, 3, H, W] in [-1, 1]",
    "indices": "the numbers of the chosen codes, int64: [B, N], or [B, N, Q] of Q codes per token; [M] or [M, Q] in "
               "`refresh_codes`; None where nothing is discrete",
    "last_layer": "the weight of the decoder's last layer, for weights that follow gradients",
    "latents": "what is quantized [B, N, D], float32, in the codebook's own space; [M, D] in `refresh_codes`",
    "leaving": "the name of the stage that ends, None before the first",
    "progress": "where in the run this is (see below); None in evaluation",
    "reconstructions": "what the decoder made of them [B, 3, H, W], not clamped",
    "size": "`codebook.size` of the recipe, K",
    "split": '"train" or "val"',
    "stage": "the name of the present stage",
    "tokenizer": "the tokenizer: `tokenizer.latents(images)` gives latents [B, N, D] and grid; `tokenizer.codebook`",
    "width": "`codebook.width` of the recipe, D unless the codebook says otherwise",
}
"""What each argument of a hook is, wherever it is given."""

RECORDS = {"codebook": Codebook, "progress": Progress, "what quantize returns": Quantized}


@dataclass(frozen=True)
class Example:
    """Hold a file of docs/examples, which begins with the names of the hooks that it shows."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def source(self) -> str:
        return self.path.read_text()

    @property
    def hooks(self) -> list[str]:
        return ast.get_docstring(ast.parse(self.source)).partition(":")[0].split(" and ")

    @property
    def command(self) -> str:
        """The command that runs the example, from the folder above docs/."""
        named = {"make_dataset": f"data.name={self.name}", "make_metric": f'"evaluate.metrics=[psnr,{self.name}]"'}
        override = named.get(self.hooks[0], f"plugins.{self.name}={{}}")
        return f"vqzoo run quickstart --plugin-file docs/examples/{self.path.name} {override}"


def examples() -> list[Example]:
    return [Example(path) for path in sorted((HERE / "examples").glob("*.py"))]


def hooks_page() -> str:
    """Return docs/hooks.md: the text of hookspecs.py, with arguments and an example for each hook."""
    by_hook = {hook: example for example in examples() for hook in example.hooks}
    parts = [BEGIN, "# Hooks", inspect.getdoc(hookspecs),
             "The examples are whole plugins, in [examples/](examples/); each keeps the contract, and its command runs in the "
             "folder above docs/.",
             "| hook | asked for | example |\n|---|---|---|\n" + "\n".join(_row(hook, by_hook[hook]) for hook in SPECS),
             "## What hooks are given", "| argument | what it is |\n|---|---|\n" + "\n".join(
                 f"| `{name}` | {text} |" for name, text in ARGUMENTS.items())]
    parts += [f"**{title}**: {_flat(inspect.getdoc(record))}" for title, record in RECORDS.items()]
    shown: set[str] = set()
    for hook, example in by_hook.items():
        if hook not in SPECS:
            raise ValueError(f"{example.path}: {hook!r} is no hook; a docstring begins with those that it shows, and a colon")
    for hook in SPECS:
        parts += [f"## {hook}", f"`{hook}({', '.join(SPECS[hook])})` · {_kind(hook)}", inspect.getdoc(getattr(hookspecs, hook))]
        parts += _shown(by_hook[hook], shown)
        shown.add(by_hook[hook].name)
    return "\n\n".join([*parts, END]) + "\n"


def _row(hook: str, example: Example) -> str:
    return f"| [`{hook}`](#{hook}) | {_kind(hook)} | [{example.name}](examples/{example.path.name}) |"


def _kind(hook: str) -> str:
    """Say how many serve a hook, and when it is routed."""
    if hook in DOORS:
        return "by name: `data.name`" if hook == "make_dataset" else "by name: `evaluate.metrics`"
    many = not getattr(hookspecs, hook).vqzoo_spec.get("firstresult")
    need = "required" if hook in REQUIRED else "optional"
    return f"{'many' if many else 'one'}, {need}{', for the whole run' if hook in ONCE else ''}"


def _shown(example: Example, shown: set[str]) -> list[str]:
    if example.name in shown:
        return [f"The example is [{example.name}](examples/{example.path.name}), shown above."]
    return [f"```python\n{example.source}```", f"```sh\n{example.command}\n```"]


def checks_list() -> str:
    """Return the checks of vqzoo.testing, with what each asks for and whom it concerns."""
    lines = [f"- `{one.name}` ({concerned(one.hooks)}): {one.sentence}" for one in CHECKS]
    return "\n".join([BEGIN, *lines, END])


def concerned(hooks: tuple[str, ...]) -> str:
    """Say in words whose plugins a check concerns, by the hooks that they offer."""
    named = {(): "every plugin", RUN: "all that a run asks", CODEBOOK: "quantizers", IMAGES: "losses on images",
             CODEBOOK + IMAGES: "quantizers, losses on images"}
    return named.get(hooks) or ", ".join(f"`{hook}`" for hook in hooks)


def contract_page(before: str) -> str:
    """Return docs/contract.md with the present checks in it."""
    found = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: checks_list(), before, count=1, flags=re.DOTALL)
    if BEGIN not in found:
        raise ValueError(f"docs/contract.md has no {BEGIN}")
    return found


def names_page() -> str:
    """Return docs/names.md: what a plugin may import, with signatures and the whole docstrings."""
    parts = [BEGIN, "# Names", "What `vqzoo` and `vqzoo.ops` export, and so what a plugin may import. All of it is part of the "
             "[contract](contract.md)."]
    for package in (vqzoo, vqzoo.ops):
        parts.append(f"## {package.__name__}")
        for name in package.__all__:
            value = getattr(package, name)
            if name == "hookimpl":
                parts += [f"### {name}", HOOKIMPL]
            elif callable(value):
                parts += [f"### {name}", f"`{name}{_signature(value)}`", inspect.getdoc(value), *_methods(value)]
            else:
                parts += [f"### {name}", f"`{_constant(value)!r}`"]
    return "\n\n".join([*parts, END]) + "\n"


def _constant(value: Any) -> Any:
    return tuple(value) if isinstance(value, dict) else value


def _signature(value: Any) -> str:
    try:
        return re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(value))).replace("torch.Tensor", "Tensor")
    except ValueError:
        return "(…)"


def _methods(value: Any) -> list[str]:
    """Return what is said of the public methods that a class of vqzoo adds."""
    own = vars(value).items() if inspect.isclass(value) and value in (vqzoo.Codebook, vqzoo.Plugin) else ()
    return [f"- `{name}{_signature(member)}`: {_flat(inspect.getdoc(member))}" for name, member in own
            if inspect.isfunction(member) and not name.startswith("_") and inspect.getdoc(member)]


def _flat(text: str) -> str:
    return " ".join(text.split())


def pages() -> dict[Path, str]:
    """Return what the generated pages must be, by path."""
    contract, readme = HERE / "contract.md", HERE.parent / "README.md"
    return {HERE / "hooks.md": hooks_page(), contract: contract_page(contract.read_text()),
            HERE / "names.md": names_page(), readme: rendered(readme.read_text())}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
