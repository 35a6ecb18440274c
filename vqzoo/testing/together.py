"""The check of a plugin among others."""

from vqzoo.errors import MissingWeights, PluginError, UserError
from vqzoo.features import Frozen
from vqzoo.sources import available, offered_hooks
from vqzoo.testing.check import RUN, check, fail
from vqzoo.testing.passage import not_finite, weights_of
from vqzoo.testing.subject import ONE_OF, Subject
from vqzoo.testing.training import Training

OWN = "vqzoo"
"""The distribution whose plugins are tried beside the plugin under test."""


@check("Beside another plugin, the plugin fails: read of codes, extras and codebook only what hookspecs promises of anybody's, "
       "give losses names of your own, and say what cannot be by companions(), or by a ValueError or a vqzoo.UserError.", RUN)
def it_works_beside_other_plugins(subject: Subject) -> None:
    failures = []
    for name in neighbours(subject):
        try:
            training = Training(subject, subject.with_others(name)).begin()
            bad = [bad for _ in range(2) for bad in not_finite(training.step())]
            bad += not_finite(weights_of(training.tokenizer))
            training.tokenizer.eval()(subject.images())
        except MissingWeights:
            raise
        except UserError:
            continue
        except PluginError as error:
            if not isinstance(error.__cause__, ValueError):
                failures.append(f"beside {name}: {error}")
        except Exception as error:  # of whatever code of the two
            failures.append(f"beside {name}: {error!r}")
        else:
            failures += [f"beside {name}: {', '.join(bad)} not finite"] if bad else []
    if failures:
        fail("; ".join(failures))


def neighbours(subject: Subject) -> list[str]:
    """Return the plugins of vqzoo's own distribution that serve other hooks of a run, but for those that need weights."""
    found = []
    for name, source in available().items():
        if source.distribution != OWN or name == subject.name:
            continue
        kind = source.load()
        takes_part = any(hook in RUN and not (how != "wraps" and hook in ONE_OF and subject.provides(hook))
                         for hook, how in offered_hooks(kind).items())
        needs_weights = any(isinstance(value, Frozen) for value in vars(kind(kind.Config())).values())
        if takes_part and kind is not subject.kind and not needs_weights:
            found.append(name)
    return found
