"""The composition matrix: pairs train, are refused with a reason, or surprise; and who reads it sees which."""

import io
import json
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from vqzoo import Codebook, Interrupted, Plugin, Quantized, UserError, cli, hookimpl, sources
from vqzoo.bench import compose as bench
from vqzoo.bench.compose import REFERENCE, REFUSED, SURPRISE, TRAINS, Cell, Matrix, Provider


class Fine(Plugin):
    """Fine: an estimator that works with all."""

    @hookimpl
    def straight_through(self, latents, codes):
        return latents + (codes - latents).detach()


class Fixed(Plugin):
    """Fixed: a codebook of 1000 codes that cannot be overwritten."""

    @hookimpl
    def make_codebook(self, size, width):
        if size != 1000:
            raise ValueError(f"size: {size} is not 1000")
        return Rigid(size, width)


class Rigid(Codebook):
    replaceable = False

    def __init__(self, size, width):
        super().__init__(size, width)
        self.table = nn.Parameter(torch.randn(size, width))

    def compute_vectors(self):
        return self.table


class Writer(Plugin):
    """Writer: overwrites the first code in each step."""

    @hookimpl
    def refresh_codes(self, codebook):
        codebook.replace_(torch.tensor([0]), torch.ones(1, codebook.width))
        return 1


class Undefined(Plugin):
    """Undefined: a loss that is not a number from the second step on."""

    @hookimpl(wrapper=True)
    def embedding_loss(self, progress):
        losses = yield
        return {name: loss * (torch.nan if progress.step else 1) for name, loss in losses.items()}


class Faulty(Plugin):
    """Faulty: its numbers raise once the run has begun."""

    @hookimpl
    def report(self, progress):
        if progress.step == 2:
            raise RuntimeError("at odds")
        return {}


class Belated(Plugin):
    """Belated: says in a step what should have been said before."""

    @hookimpl
    def stage_transition(self, progress):
        raise UserError("belated: this cannot be")


class Starter(Plugin):
    """Starter: refuses as a stage is entered."""

    @hookimpl
    def enter_stage(self, tokenizer):
        tokenizer.codebook.replace_(torch.tensor([0]), torch.ones(1, tokenizer.codebook.width))


class Search(Plugin):
    """Search: its search needs its own codebook."""

    def companions(self):
        return {"quantize": ("make_codebook",)}

    @hookimpl
    def make_codebook(self, size, width):
        return Rigid(size, width)

    @hookimpl
    def quantize(self, latents, codebook):
        assert isinstance(codebook, Rigid)
        indices = torch.cdist(latents.flatten(0, 1), codebook.vectors()).argmin(1).view(latents.shape[:2])
        return Quantized(codebook.lookup(indices), indices)


CLASSES = {kind.__name__.lower(): kind
           for kind in (Fine, Fixed, Writer, Undefined, Faulty, Belated, Starter, Search)}


def call(*words, classes=CLASSES):
    """Run the command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with sources.also(classes=classes), redirect_stdout(out), redirect_stderr(err):
        code = cli.main(["bench", "compose", *map(str, words)])
    return SimpleNamespace(code=code, out=out.getvalue(), err=err.getvalue())


@pytest.fixture(scope="module")
def trial(tiny_runs, tmp_path_factory):
    """Try plugins that are made up, one of each kind."""
    file = tmp_path_factory.mktemp("bench") / "matrix.json"
    done = call("--plugins", "fine,fixed,writer,undefined,faulty,belated,starter", "--json", file)
    done.content = json.loads(file.read_text())
    done.cells = {frozenset((cell["one"]["plugin"], cell["other"]["plugin"])): cell for cell in done.content["cells"]}
    return done


def among(trial, one, other):
    return SimpleNamespace(**trial.cells[frozenset((one, other))])


# ---- what becomes of a pair


def test_a_pair_that_works_trains(trial):
    cell = among(trial, "fine", "fixed")
    assert (cell.outcome, cell.error, cell.codes) == (TRAINS, "", 1000)
    assert among(trial, "fine", "writer").outcome == TRAINS and among(trial, "fine", "writer").codes == bench.SIZES[0]


def test_a_pair_that_is_refused_before_training_is_no_surprise(trial):
    cell = among(trial, "fixed", "writer")
    assert (cell.outcome, cell.error, cell.when) == (REFUSED, "UserError", "wiring")
    assert "writer would overwrite codes, but Rigid is implicit" in cell.reason


def test_a_pair_that_is_refused_as_the_first_stage_is_entered_is_told_apart(trial):
    cell = among(trial, "fixed", "starter")
    assert (cell.outcome, cell.when) == (REFUSED, "start") and "cannot be overwritten" in cell.reason


def test_a_loss_that_is_not_finite_is_a_surprise(trial):
    cell = among(trial, "fine", "undefined")
    assert (cell.outcome, cell.when) == (SURPRISE, "training") and "is not finite" in cell.reason


def test_an_exception_of_a_plugin_is_a_surprise(trial):
    cell = among(trial, "fine", "faulty")
    assert (cell.outcome, cell.error) == (SURPRISE, "PluginError") and "faulty" in cell.reason and "at odds" in cell.reason


def test_a_refusal_in_the_middle_of_a_run_is_a_surprise(trial):
    cell = among(trial, "fine", "belated")
    assert (cell.outcome, cell.when) == (SURPRISE, "training") and "in the middle of the run" in cell.reason


def test_a_pair_that_does_not_end_is_a_surprise():
    cell = Cell(Provider("one", "report"), Provider("other", "quantize"))
    with bench._outcome(cell), bench._limit(0.05):
        try:
            time.sleep(5)
        except Exception:  # as a careless plugin has it
            time.sleep(5)
    assert cell.outcome == SURPRISE and "not done after" in cell.reason


def test_a_run_that_ends_by_itself_is_a_surprise():
    cell = Cell(Provider("one", "report"), Provider("other", "quantize"))
    with bench._outcome(cell):
        pass
    assert cell.outcome == SURPRISE and "before its time" in cell.reason


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), Interrupted("SIGINT at step 3", 2)])
def test_a_signal_ends_the_bench(stop):
    cell = Cell(Provider("one", "report"), Provider("other", "quantize"))
    with pytest.raises(type(stop)), bench._outcome(cell):
        raise stop
    assert cell.outcome == TRAINS and not cell.reason


def test_the_exit_status_says_whether_there_was_a_surprise(trial):
    assert trial.code == 1
    done = call("--plugins", "fine,fixed")
    assert done.code == 0 and "1 train" in done.out and "0 are a SURPRISE" in done.out


# ---- what is told


def test_all_pairs_are_in_the_json_with_their_recipe_and_the_versions(trial):
    providers = [(one["plugin"], one["hook"]) for one in trial.content["providers"]]
    assert len(providers) == 7 and ("starter", "enter_stage") in providers
    assert len(trial.content["cells"]) == len(trial.cells) == 21
    assert trial.content["seed"] == bench.SEED and "torch" in trial.content["versions"]
    cell = among(trial, "fine", "writer")
    assert cell.hooks["straight_through"] == ["fine"] and cell.hooks["refresh_codes"] == ["writer"]
    assert cell.hooks["quantize"] == [REFERENCE] and {"fine", "writer"} < set(cell.plugins)


def test_the_matrix_has_a_row_for_each_hook_and_the_reasons_below(trial):
    rows = re.findall(r"^(\w*) +([a-z]+) +(\d+)(.*)$", trial.out.partition("\n\n")[2].partition("\n\n")[0], re.M)
    assert [int(number) for _, _, number, _ in rows] == [1, 2, 3, 4, 5, 6, 7]
    marks = {plugin: cells.split() for _, plugin, _, cells in rows}
    assert [len(cells) for cells in marks.values()] == list(range(7))
    assert [plugin for _, plugin, *_ in rows] == ["fixed", "fine", "undefined", "writer", "belated", "starter", "faulty"]
    assert marks["fine"] == ["·"] and marks["undefined"] == ["!", "!"] and marks["writer"][:2] == ["a", "·"]
    assert re.search(r"^  a +1  .*writer would overwrite codes", trial.out, re.M)
    assert re.search(r"^  ! +\d+  PluginError in training: ", trial.out, re.M)
    assert "at odds" in " ".join(trial.out.split())


def test_progress_is_told_beside_the_matrix(trial):
    assert re.search(r"^21 of 21 pairs, \d+ surprises", trial.err, re.M)


def cells_of(*rows):
    """Make cells of (one, other, outcome, reason)."""
    made = []
    for one, other, outcome, reason in rows:
        cell = Cell(Provider(*one.split(":")), Provider(*other.split(":")), outcome, "wiring", "UserError", reason)
        made.append(cell)
    return made


def test_reasons_that_differ_in_names_and_numbers_only_are_told_once():
    cells = cells_of(("vq:quantize", "ema:report", REFUSED, "vq has 64 of ema"), ("vq:quantize", "fsq:report", REFUSED,
                     "vq has 128 of fsq"), ("ema:report", "fsq:report", REFUSED, "another reason"))
    providers = [Provider("vq", "quantize"), Provider("ema", "report"), Provider("fsq", "report")]
    text = bench.rendered(providers, cells, 1.0, 100)
    assert re.findall(r"^  ([ab]) +(\d+)  (.*)$", text, re.M) == [
        ("a", "2", "vq has 64 of ema [vq:quantize × ema:report, ...]"), ("b", "1", "another reason [ema:report × fsq:report]")]
    assert re.search(r"fsq +3  a  b$", text, re.M)


def test_the_pairs_of_a_surprise_are_named_by_what_they_have_in_common():
    pairs = [("a:quantize", "z:report"), ("b:quantize", "z:report"), ("b:quantize", "y:report"), ("c:quantize", "z:report")]
    cells = cells_of(*((one, other, SURPRISE, "") for one, other in pairs))
    assert bench._pairs(cells) == "z:report × a:quantize, b:quantize, c:quantize; y:report × b:quantize"


@pytest.mark.parametrize("width", [80, 120, 160])
def test_the_text_is_no_wider_than_the_terminal(width):
    reason = "a long reason that goes on " * 20
    cells = cells_of(("vq:quantize", "ema:report", REFUSED, reason), ("vq:quantize", "fsq:report", SURPRISE, reason))
    text = bench.rendered([Provider("vq", "quantize"), Provider("ema", "report"), Provider("fsq", "report")], cells, 1.0, width)
    assert max(map(len, text.splitlines())) <= width


# ---- what is tried


@pytest.fixture
def matrix(tiny_runs):
    """Make the matrix of plugins by name."""
    with sources.also(classes={**CLASSES, REFERENCE: bench.Reference, bench.FRAME: bench.Frame}):
        yield lambda *names: Matrix({name: {} for name in names})


def routes(matrix, *pair):
    return matrix._routes([Provider(*words.split(":"), kind=matrix.offers[words.split(":")[0]][words.split(":")[1]])
                           for words in pair])


def test_a_pair_serves_its_hooks_and_the_reference_what_is_left_open(matrix):
    made = routes(matrix("vq", "nsvq"), "vq:quantize", "nsvq:refresh_codes")
    assert made["quantize"] == ["vq"] and made["refresh_codes"] == ["nsvq"] and made["embedding_loss"] == [REFERENCE]
    assert made["stage_transition"] == [bench.FRAME] and made["make_discriminator"] == made["report"] == []


def test_a_wrapper_wraps_the_reference_or_what_the_other_provides(matrix):
    made = matrix("vq", "nsvq")
    assert routes(made, "nsvq:embedding_loss", "vq:quantize")["embedding_loss"] == [REFERENCE, "nsvq"]
    assert set(routes(made, "nsvq:embedding_loss", "vq:embedding_loss")["embedding_loss"]) == {"vq", "nsvq"}


def test_companions_come_along_unless_the_other_serves_them(matrix):
    made = matrix("search", "fine", "vq")
    assert routes(made, "search:quantize", "fine:straight_through")["make_codebook"] == ["search"]
    assert routes(made, "search:quantize", "vq:make_codebook")["make_codebook"] == ["vq"]


def test_there_is_a_discriminator_where_one_of_the_pair_has_to_do_with_it(matrix):
    made = matrix("vq", "gan")
    assert routes(made, "vq:quantize", "gan:reconstruction_loss")["make_discriminator"] == [REFERENCE]
    assert routes(made, "vq:quantize", "gan:make_discriminator")["discriminator_loss"] == [REFERENCE]


def test_two_providers_of_one_hook_are_no_pair_but_what_a_stage_can_bind_together_is(matrix):
    pairs = {(str(one), str(other)) for one, other in matrix("vq", "simvq", "nsvq", "pixel", "gan").pairs}
    assert ("vq:quantize", "simvq:quantize") not in pairs and ("vq:quantize", "vq:straight_through") in pairs
    assert ("simvq:embedding_loss", "nsvq:embedding_loss") in pairs
    assert ("pixel:reconstruction_loss", "gan:reconstruction_loss") in pairs


def test_the_doors_are_left_out():
    assert not {"make_dataset", "make_metric"} & set(bench.HOOKS)


# ---- mistakes


@pytest.mark.parametrize("words, fragment", [
    (["--plugins", "vqq"], "did you mean 'vq'?"),
    (["--plugins", "vq", "simvq.codebook_weight=1"], "'simvq' is not among the plugins to try"),
    (["--plugins", "vq", "vq.codebook_wieght=1"], "did you mean 'codebook_weight'?"),
    (["--plugins", "fine,fixed", "--json", "nowhere/x.json"], "--json: nowhere/x.json cannot be written"),
])
def test_mistakes_are_told(words, fragment, tiny_runs):
    done = call(*words)
    assert done.code == 2 and fragment in done.err


def test_a_plugin_that_cannot_be_used_is_left_out_and_that_is_said(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("import a_module_that_nobody_has")
    with sources.also([str(tmp_path / "broken.py")]):
        fields, unusable = bench._chosen(None, ["perceptual.pretrained=false"])
    assert "broken" not in fields and "a_module_that_nobody_has" in unusable["broken"]
    assert fields["perceptual"] == {"pretrained": False} and fields["vq"] == {}


# ---- the zoo


def test_a_selection_of_the_zoo_has_no_surprises(tiny_runs):
    done = call("--plugins", "factorized,nsvq", classes={})
    assert done.code == 0 and "0 are a SURPRISE" in done.out, done.out
