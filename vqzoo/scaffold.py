"""Laying down a distribution with a plugin of one's own: one that works, to be changed."""

import keyword
import re
from importlib.util import find_spec
from pathlib import Path
from string import Template

from vqzoo.errors import UserError
from vqzoo.sources import available, refused

TEMPLATE = Path(__file__).parent / "template"
"""Files in which $name is the plugin's name in recipes, $module its Python module and $kind its class."""

LAYOUT = {
    "pyproject.toml.in": "pyproject.toml",
    "plugin.py.in": "$module.py",
    "test.py.in": "tests/test_$name.py",
    "recipe.yaml.in": "$name.yaml",
    "README.md.in": "README.md",
    "gitignore.in": ".gitignore",
}
"""What becomes of each file of the template."""

TAKEN = ("plugin", "quantized", "table")
"""Names whose class would have the name of one of vqzoo's that the template uses."""

NEXT = """next:
  cd {folder}
  pip install -e '.[test]'
  vqzoo plugins                # has {name} among them
  pytest                       # the contract, check by check, and what {module}.py promises
  vqzoo check-plugin {name}
  vqzoo run {name}.yaml"""


def lay_down(name: str, directory: str = ".") -> Path:
    """Write the distribution vqzoo-NAME into a folder of that name, say what to do next, and return the folder.

    A UserError says why it cannot have the name, or the place.
    """
    if problem := misnomer(name):
        raise UserError(f"new-plugin: {name!r} {problem}")
    words = {"name": name, "module": f"vqzoo_{name}", "kind": "".join(part.capitalize() for part in name.split("_"))}
    files = {Template(path).substitute(words): Template((TEMPLATE / source).read_text()).substitute(words)
             for source, path in LAYOUT.items()}
    folder = Path(directory) / f"vqzoo-{name}"
    try:
        folder.mkdir(parents=True)
        (folder / "tests").mkdir()
        for path, text in files.items():
            (folder / path).write_text(text)
    except FileExistsError as error:
        raise UserError(f"new-plugin: {error.filename} is there already; take another --dir or another name, or move it "
                        "away") from error
    except OSError as error:
        raise UserError(f"new-plugin: {folder} cannot be written: {error.strerror}; take another --dir") from error
    print("\n".join([f"{folder}:", *(f"  {path}" for path in files), "", NEXT.format(folder=folder, **words)]))
    return folder


def misnomer(name: str) -> str | None:
    """Say why a plugin cannot have a name, which is a key of YAML, of a ModuleDict and of entry points; None if it can."""
    from torch import nn
    from yaml import safe_load

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        near = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_0123456789")
        return ("will not do as a plugin's name, which begins with a letter and goes on in small letters, digits and single _"
                f"{f', such as {near}' if near else ''}")
    if keyword.iskeyword(name) or not isinstance(safe_load(name), str) or hasattr(nn.ModuleDict(), name) or name in TAKEN:
        return "means something else to Python, YAML, torch or vqzoo; take another name"
    if name in available() or name in refused():
        return "is the name of a plugin that is installed; take another name, or uninstall that one"
    if find_spec(f"vqzoo_{name}"):
        return f"will not do, since a module vqzoo_{name} is installed, which the plugin's would hide; take another name"
    return None
