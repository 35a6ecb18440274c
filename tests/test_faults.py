"""Forty ways in which a run can fail, and what is expected of each; every one is tested.

A test marked `@pytest.mark.fault(N)` is a test of fault N; pytest -m fault runs them all.
"""

import ast
from collections import defaultdict
from pathlib import Path

FAULTS = {
    1: "A run that stopped and went on ends with every bit of one that did not: weights, moments, averages, counters, metrics.",
    2: "So it does with accumulated micro-batches, and where the discriminator joins at the very step of the checkpoint.",
    3: "A process killed while it writes a checkpoint leaves the one before; the half-written one is passed by and named.",
    4: "A signal ends a run at its next step, saved, with a status of its own; a second one at once; handlers come back.",
    5: "A signal to one of two processes saves and ends both.",
    6: "A damaged file of a checkpoint is named by its checksum, and an older checkpoint serves.",
    7: "A full disk costs the checkpoint being written, never the last good one.",
    8: "A folder that cannot be written, or that vanished, is told before the first step.",
    9: "Resuming where there is nothing starts afresh; resuming from what is not there is an error.",
    10: "Strange files among the checkpoints do not matter.",
    11: "One process goes on from two and two from one, with the same codebook, batches and learning rates.",
    12: "A recipe that changed what a run is cannot resume it, and the difference is told field by field.",
    13: "A plugin that is missing or another version at the resume is told, and can be allowed.",
    14: "A checkpoint runs no code, and a malicious pickle is never executed.",
    15: "A random state that cannot be restored is an error.",
    16: "Two runs in one folder: the second is refused.",
    17: "The latest checkpoint is the one whose manifest counts most steps, whatever names and clocks say.",
    18: "What is not finite, anywhere and on any process, stops all of them before the update, says what and when, and leaves "
        "what reproduces it.",
    19: "An infinite gradient under the fp16 scaler is skipped with a lower scale, but not without end.",
    20: "A loss that jumps a hundredfold stops the run, is skipped or rolled back, as the recipe says, and is logged.",
    21: "Constant images, latents of zeros and a batch of copies give no NaN in any quantizer.",
    22: "A codebook that collapses raises the alarm, and a refresh revives it with its optimizer in order.",
    23: "Fewer latents than codes, a batch of one, a last short batch and a set smaller than a batch do what is documented.",
    24: "A huge codebook stays below the printed estimate of memory, and running out of it ends in advice.",
    25: "Half precision chooses the codes of float32 but for near ties, and a discriminator joins in it without trouble.",
    26: "A seed fixes a run's losses to the bit, whatever the number of workers.",
    27: "Learning rates and stages come at the same steps on one, two and four processes.",
    28: "All processes hold the same codebook through refreshes, k-means and stages.",
    29: "A file that is odd is converted and one that is bad is left out, named and counted, up to a limit; evaluation "
        "never puts another in its place.",
    30: "What is wrong with a folder of images is told before training, with its path.",
    31: "A worker that dies or hangs is told in time, and the run saved.",
    32: "A resolution that the encoder does not divide, or another number of channels, is told with the numbers when networks "
        "are built.",
    33: "A mistake in a recipe is told with file, key, line and the nearest choice, and status 2.",
    34: "A plugin that breaks, lies or clashes is named, and does not spoil the others.",
    35: "A recipe with a plugin that is not installed says so, and installs nothing.",
    36: "The identity scores perfectly, and no metric depends on batches or processes, nor counts an image twice.",
    37: "Weights that are not there are named with size, hash and the command that fetches them, and nothing hangs.",
    38: "A log that cannot be written does not stop training, and a resumed run's log has each step once.",
    39: "What is exported comes back bit for bit, tied tensors included, and one tensor less is refused.",
    40: "A lost GPU ends the run with a status, a message that helps, and its last checkpoint intact.",
}
"""What is expected, by number."""

UNSEEN = {
    19: "that the scaler lowers its scale takes a GPU; the skips and their limit are simulated",
    25: "the index agreement of fp16 is measured on a CPU, training in it takes a GPU",
    36: "rFID of the identity takes the published weights of Inception, and is skipped where they are not",
    40: "no GPU is lost in a test, but a process is",
}
"""What of a fault no test on a CPU sees."""


def marked():
    """Return the tests that bear each number, by the marks in the sources of all tests."""
    found = defaultdict(list)
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    assert node.name.startswith("test_") and mark.args, f"{path.name}: {node.name}: a mark that marks nothing"
                    for number in map(ast.literal_eval, mark.args):
                        found[number].append(f"{path.name}::{node.name}")
    return found


def test_every_fault_is_tested():
    found = set(marked())
    assert list(FAULTS) == list(range(1, 41))
    assert not found - set(FAULTS), f"no such fault: {found - set(FAULTS)}"
    assert set(UNSEEN) <= set(FAULTS)
    assert not set(FAULTS) - found, f"not tested: {sorted(set(FAULTS) - found)}"
