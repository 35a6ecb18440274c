"""The doctor: what this machine has, what a recipe would meet on it, and the way out of what is wrong."""

import os

from vqzoo.doctor.findings import Findings
from vqzoo.doctor.installation import examine_environment, examine_plugins, examine_processes, examine_weights
from vqzoo.doctor.machine import examine_machine
from vqzoo.doctor.recipe import examine_recipe
from vqzoo.errors import UserError
from vqzoo.recipe import load_recipe

MACHINE = {"machine": examine_machine, "plugins": examine_plugins, "published weights": examine_weights,
           "environment": examine_environment, "processes": examine_processes}
"""What is examined without a recipe."""


def diagnose(name: str | None, overrides: list[str]) -> int:
    """Print what is found and return the exit status: 1 if anything is wrong.

    A UserError if there is no such recipe, and in one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"doctor: WORLD_SIZE={os.environ['WORLD_SIZE']}: it examines one process; start it without a launcher")
    recipe = load_recipe(name, overrides) if name is not None else None
    found = Findings()
    for title, examine in MACHINE.items():
        found.section(title)
        with found.examining(title):
            examine(found)
    if recipe is not None:
        examine_recipe(found, recipe)
    some = "nothing is wrong" if not found.problems else f"{found.problems} problem{'s' if found.problems > 1 else ''}"
    print(f"\n{some}, {found.notes} note{'' if found.notes == 1 else 's'}")
    return int(found.problems > 0)
