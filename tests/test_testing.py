"""The conformance suite: each check finds what it is for, every built-in plugin keeps the contract, and authors are told."""

import json
import random
import re
import string
from dataclasses import dataclass
from pathlib import Path

import broken_plugins
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from broken_plugins import BROKEN
from safetensors.torch import save_file

from vqzoo import Plugin, Quantized, Table, UserError, cli, hookimpl
from vqzoo.ops import nearest_codes
from vqzoo.sources import SPECS, available
from vqzoo.testing import CHECKS, CheckFailed, Subject, check_plugin
from vqzoo.testing.processes import launch
from vqzoo.testing.suite import concerned

pytest_plugins = ["pytester"]

BY_NAME = {check.name: check for check in CHECKS}
PROCESSES, COMPILED, BESIDE = "processes_stay_equal", "compiled_networks_train_alike", "it_works_beside_other_plugins"
SLOW = {COMPILED: ("gan",), BESIDE: ("nsvq",)}
"""The plugins with which slow checks are made; all pairs of plugins are the business of `vqzoo bench compose`."""

FIELDS = {
    "nsvq": {"replace_after": 0},
    "gan": {"layers": 1, "width": 8, "norm": "group"},
    "perceptual": {"network": "mobilenetv2_050", "pretrained": False, "layers": [0, 1]},
}
SIZES = {"fsq": 1000}
EXPECTED = {
    "entropy": {"micro_batches_add_up": "the entropy of a batch's mean is no mean of entropies"},
    "perceptual": {"state_dict_holds_everything": "without weights, its network is drawn at random when a run begins"},
}
BUILT_IN = sorted(name for name, source in available().items() if source.distribution == "vqzoo")


class Cosine(Plugin):
    """Cosine search: choose the code that points the way the latent does."""

    @dataclass
    class Config:
        eps: float = 1e-12

    @hookimpl
    def quantize(self, latents, codebook):
        directions, vectors = latents.flatten(0, 1), codebook.vectors()
        indices, _ = nearest_codes(*(x / x.norm(dim=1, keepdim=True).clamp(min=self.config.eps) for x in (directions, vectors)))
        indices = indices.view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)


class Stepped(Plugin):
    """Stepped: a codebook of 27 codes, and of no other number."""

    @hookimpl
    def make_codebook(self, size, width):
        if size != 27:
            raise ValueError(f"size: {size} is not 27")
        return Table(size, width)


class Deaf(Plugin):
    """Deaf: the decoder sees latents, and gives them no gradient."""

    @hookimpl
    def straight_through(self, latents):
        return latents.detach()


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """The built-in plugins by name, with fields that need no download."""
    from torchvision.models import squeezenet1_1

    weights = tmp_path_factory.mktemp("weights") / "squeeze.safetensors"
    save_file({f"features.{name}": value for name, value in squeezenet1_1().features.state_dict().items()}, weights)
    fields = {**FIELDS, "lpips": {"network": "squeeze", "weights": str(weights)}}
    return {name: Subject(name, fields.get(name), SIZES.get(name, 32)) for name in BUILT_IN}


@pytest.fixture(scope="module")
def launched(subjects):
    """What two processes, in one launch, say of the built-in plugins and of broken ones, of which one that ends it is last."""
    kinds = sorted(BROKEN[PROCESSES], key=lambda kind: kind is broken_plugins.Waiting)
    everyone = {name: subject for name, subject in subjects.items() if set(subject.offered) - {"reconstruction_loss"}}
    everyone |= {kind.__name__: Subject(kind) for kind in [Cosine, *kinds]}
    return dict(zip(everyone, launch(list(everyone.values())), strict=True))


# ---- the checks


def test_every_check_has_a_plugin_that_it_must_find():
    assert set(BROKEN) == set(BY_NAME) and len(CHECKS) == len(BY_NAME)


@pytest.mark.filterwarnings("ignore:std")
@pytest.mark.parametrize(("name", "kind"), [
    pytest.param(name, kind, id=f"{name}-{kind.__name__}") for name, kinds in BROKEN.items() for kind in kinds
    if name != PROCESSES
])
def test_a_broken_plugin_is_found_and_its_author_is_told(name, kind):
    with pytest.raises(CheckFailed) as caught:
        check_plugin(kind, only=[name])
    text = str(caught.value)
    assert f"\n{name}: {BY_NAME[name].sentence}\n    seen: " in text
    assert text.partition("seen: ")[2].strip() and "Traceback" not in text


@pytest.mark.parametrize(("kind", "said"), [
    ("Unseeded", "^codebook.weight: not the same on 2 processes after step 1$"),
    ("Alone", "^plugins.alone.mean: not the same on 2 processes after step 1$"),
    ("Dying", "process 1: hook embedding_loss, served by dying, raised ZeroDivisionError at broken_plugins.py"),
    ("Waiting", "process [01]: "),
])
def test_two_processes_find_what_one_cannot(launched, kind, said):
    assert re.search(said, launched[kind])


@pytest.mark.parametrize("check", CHECKS, ids=BY_NAME)
def test_a_check_says_in_its_name_what_is_right_and_in_its_sentence_how_to_mend_it(check):
    assert re.fullmatch(r"[a-z]+(_[a-z]+)+", check.name) and set(check.hooks) <= set(SPECS)
    assert 60 <= len(check.sentence) <= 300 and check.sentence.endswith(".")
    assert check.sentence[0] in string.ascii_uppercase + "`"


@pytest.mark.parametrize("hook", SPECS)
def test_every_hook_is_checked(hook):
    assert any(hook in check.hooks for check in CHECKS)


# ---- the plugins


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_built_in_plugin_keeps_the_contract(subjects, launched, name):
    left_out = {PROCESSES, *(check for check, names in SLOW.items() if name not in names)}
    chosen = {check.name for check in concerned(subjects[name])} - left_out
    results = check_plugin(subjects[name], only=chosen, expected_failures=EXPECTED.get(name, {}))
    assert launched.get(name) is None
    skipped = {result.check.name for result in results if result.outcome == "skipped"}
    assert skipped <= ({"one_code_is_enough", "codes_can_be_overwritten"} if name == "fsq" else set())


def test_a_strangers_plugin_keeps_the_contract(launched):
    chosen = {check.name for check in CHECKS if check.concerns(["quantize"])} - {PROCESSES, *SLOW}
    results = check_plugin(Cosine, {"eps": 1e-8}, only=chosen)
    assert {result.outcome for result in results} == {"ok"} and len(results) == len(chosen) > 25
    assert launched["Cosine"] is None


# ---- what is said


def test_all_failures_are_listed_at_once():
    names = ["decoder_sees_the_codes", "latents_get_a_gradient"]
    with pytest.raises(CheckFailed, match="^deaf fails 2 of the checks of vqzoo.testing:\n") as caught:
        check_plugin(Deaf, only=[*names, "shapes_and_types_fit"])
    assert [result.check.name for result in caught.value.failed] == names


def test_a_failure_that_was_announced_is_expected_and_one_that_does_not_come_is_a_failure():
    names = ["decoder_sees_the_codes", "shapes_and_types_fit"]
    found = check_plugin(Deaf, only=names, expected_failures={"decoder_sees_the_codes": "so it is meant"})
    outcomes = {result.check.name: (result.outcome, result.seen) for result in found}
    assert outcomes == {"decoder_sees_the_codes": ("expected", "so it is meant"), "shapes_and_types_fit": ("ok", "")}
    with pytest.raises(CheckFailed, match=r"(?s)shapes_and_types_fit: .*seen: it does not fail.*\(so it is not\)") as caught:
        check_plugin(Deaf, only=names[1:], expected_failures={"shapes_and_types_fit": "so it is not"})
    assert len(caught.value.failed) == 1


@pytest.mark.parametrize("key", ["only", "expected_failures"])
def test_a_check_that_there_is_not_is_refused_with_the_nearest(key):
    with pytest.raises(UserError, match=f"^{key}: there is no check 'indices_in_range'; did you mean 'indices_are_in_range'"):
        check_plugin(Cosine, **{key: {"indices_in_range": "a reason"}})


def test_a_check_that_does_not_concern_the_plugin_is_refused():
    with pytest.raises(UserError, match="^only: metric_gives_numbers concerns make_metric, and cosine offers quantize$"):
        check_plugin(Cosine, only=["metric_gives_numbers"])


def test_a_method_of_certain_sizes_is_tested_with_one_of_them():
    with pytest.raises(UserError, match=r"^stepped: .* of 32 codes of width 8 .*size: 32 is not 27.*codebook\.size="):
        check_plugin(Stepped, only=["shapes_and_types_fit"])
    names = ["shapes_and_types_fit", "codes_can_be_overwritten", "one_code_is_enough"]
    results = check_plugin(Stepped, size=27, width=3, resolution=(16, 16), only=names)
    outcomes = {result.check.name: result.outcome for result in results}
    assert outcomes == dict(zip(names, ("ok", "ok", "skipped"), strict=True))
    assert any("size: 1 is not 27" in result.seen for result in results)


def test_fields_that_cannot_be_are_the_callers_mistake():
    with pytest.raises(UserError, match="^plugins.cosine.*epsilon"):
        check_plugin(Cosine, {"epsilon": 1.0})


def test_a_class_that_no_other_process_finds_is_not_tried_there():
    class Inner(Deaf):
        pass

    (result,) = check_plugin(Inner, only=[PROCESSES])
    assert result.outcome == "skipped" and "Inner is made inside of a function" in result.seen


def test_the_suite_leaves_random_numbers_threads_and_accelerate_as_they_were():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), torch.get_num_threads()
    shared = dict(AcceleratorState._shared_state)
    check_plugin("pixel", only=["losses_are_finite", "a_run_goes_on_bit_for_bit"])
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all() and torch.get_num_threads() == before[3]
    assert shared == AcceleratorState._shared_state


AUTHORS = '''
from broken_plugins import ByFunction, OfBatches
from vqzoo import Plugin, hookimpl
from vqzoo.testing import parametrize_with_checks

class Honest(Plugin):
    """Honest: a metric that cannot be pickled, and says so."""

    @hookimpl
    def make_metric(self):
        return ByFunction()

class Batchwise(Plugin):
    """Batchwise: a metric that depends on the batches."""

    @hookimpl
    def make_metric(self):
        return OfBatches()

@parametrize_with_checks([Honest], expected_failures={"metric_survives_pickle": "the distance is a function"})
def test_honest(check):
    check()

@parametrize_with_checks([(Batchwise, {})], expected_failures={"metric_survives_pickle": "it is not needed"})
def test_batchwise(check):
    check()
'''


def test_an_authors_tests_are_one_for_each_check_and_strict_about_what_is_expected(pytester):
    pytester.makepyfile(test_authors=AUTHORS)
    found = pytester.runpytest_inprocess("-p", "no:randomly", "-rxf")
    found.assert_outcomes(passed=15, xfailed=1, failed=2)
    found.stdout.fnmatch_lines([
        "*XPASS(strict)*it is not needed*",
        "XFAIL *test_honest?honest-metric_survives_pickle* the distance is a function",
        "FAILED *test_batchwise?batchwise-metric_takes_any_batches*",
    ])


# ---- the command


@pytest.fixture
def author(tmp_path):
    """Return a function that writes a plugin's file, and the words that make it available."""
    def write(body):
        path = tmp_path / "mine.py"
        path.write_text('"""A plugin of mine."""\n\nfrom vqzoo import Plugin, hookimpl\n\n\nclass Mine(Plugin):\n'
                        f'    """Mine: what the decoder sees."""\n\n    @hookimpl\n{body}')
        return ["check-plugin", "mine", "--plugin-file", str(path)]

    return write


def test_the_command_shows_each_check_and_fails_with_the_plugin(author, capsys, tmp_path):
    command = author("    def straight_through(self, latents, codes):\n        return latents\n")
    only = ["--only", "decoder_sees_the_codes", "--only", "latents_get_a_gradient", "--json", str(tmp_path / "found.json")]
    assert cli.main([*command, *only]) == 1
    said = capsys.readouterr().out
    assert re.match(r"mine \(\S*mine\.py\) offers straight_through\n", said)
    assert re.search(r"\n  ok       latents_get_a_gradient\n", said)
    assert re.search(r"\n  FAILED   decoder_sees_the_codes\n +The decoder trains on something else(.|\n)*\n +seen: ", said)
    assert re.search(r"\n2 checks in \d+ s: 1 passed, 1 failed\n$", said)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["plugin"] == "mine" and found["hooks"] == {"straight_through": "provides"}
    assert [(one["check"], one["outcome"]) for one in found["results"]] == [
        ("decoder_sees_the_codes", "failed"), ("latents_get_a_gradient", "ok")]


def test_the_command_takes_the_plugins_fields_and_the_codebooks_sizes(capsys):
    fields = ["levels=[5,4]", "codebook.size=20", "codebook.width=3", "data.resolution=[16,24]"]
    assert cli.main(["check-plugin", "fsq", *fields, "--only", "shapes_and_types_fit", "--only", "one_code_is_enough"]) == 0
    said = capsys.readouterr().out
    assert "skipped  one_code_is_enough (make_codebook refuses one code: size 1 is not" in " ".join(said.split("\n"))
    assert "2 checks in" in said and "1 passed, 0 failed, 1 skipped" in said


@pytest.mark.parametrize(("words", "said"), [
    (["vq", "colour=red"], "colour: unknown key"),
    (["vq", "codebook.size=0"], "codebook.size: 0 will not do; it must be a positive integer"),
    (["vq", "data.resolution=[20,20]"], "data.resolution: .* multiples of 8"),
    (["vq", "codebook.depth=2"], "codebook: unknown key"),
    (["vq", "--only", "every_thing"], "only: there is no check 'every_thing'"),
    (["vqq"], "no installed plugin is called 'vqq'"),
    (["fsq"], r"codebook\.size="),
])
def test_the_command_explains_a_users_mistake(words, said, capsys):
    assert cli.main(["check-plugin", *words]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_the_command_lists_the_checks_that_concern_a_plugin(capsys):
    assert cli.main(["check-plugin", "kmeans", "--list"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines()[2:] if not line.startswith(" ")] == [
        check.name for check in CHECKS if check.concerns(["enter_stage"])]


def test_the_suite_names_no_built_in_plugin():
    folder = Path(cli.__file__).parent / "testing"
    words = {word for path in folder.glob("*.py") for word in re.findall(r"[\"'](\w+)[\"']", path.read_text())}
    assert not words & set(BUILT_IN)
