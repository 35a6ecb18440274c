"""The conformance suite: does a plugin do what the contract with plugins says? For third parties, in a test or by hand.

In a plugin's own tests, every check is a test of its own:

    from vqzoo.testing import parametrize_with_checks

    @parametrize_with_checks(["cosine", ("cosine", {"temperature": 0.5})])
    def test_cosine_keeps_the_contract(check):
        check()

or all are made at once, and CheckFailed lists what is wrong and how to mend it:

    check_plugin("cosine")                       # an installed plugin by its name
    check_plugin(Cosine, {"temperature": 0.5})   # or its class, with its fields
    check_plugin("cosine", size=1000)            # with a codebook of 1000 codes, if the method takes certain sizes only
    check_plugin("cosine", expected_failures={"micro_batches_add_up": "the loss is a statistic of the batch"})

`vqzoo check-plugin NAME` does the same in a terminal. The plugin is run on a CPU in the smallest tokenizer there is, with a
plain reference for the hooks that it leaves open; only the checks of hooks that it offers are made. A failure that is no
mistake is announced with its reason, and one that is announced and does not come is a failure too. The checks' names are
part of the contract (`vqzoo.plugin.CONTRACT`); CHECKS has them, each with a sentence that says how to mend what fails.
"""

from vqzoo.testing.check import Check, CheckFailed, Result
from vqzoo.testing.subject import Subject
from vqzoo.testing.suite import CHECKS, check_plugin, parametrize_with_checks

__all__ = ["CHECKS", "Check", "CheckFailed", "Result", "Subject", "check_plugin", "parametrize_with_checks"]
