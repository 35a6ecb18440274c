"""The command line."""

import argparse
import itertools
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

from vqzoo.errors import DataError, Interrupted, LostError, NonFiniteError, OutOfMemory, PluginError, StorageError, UserError
from vqzoo.sources import Source, also, available, offered_hooks, refused

NEXT = """next:
  tensorboard --logdir {out}/tensorboard
  vqzoo encode {out} PHOTO.jpg --out tokens.safetensors{more}
  vqzoo decode {out} tokens.safetensors --out decoded{more}
  vqzoo eval {out} --data FOLDER_OF_PHOTOS{more}"""

EVAL_HELP = """metrics     psnr ssim ms_ssim lpips_alex lpips_squeeze lpips_vgg
            usage perplexity entropy bits_per_token
            rfid kid precision recall (gfid for adm-gfid): on Inception's features
            fd fd_kid fd_precision fd_recall: on those of any timm network, which fd.name names
protocols   vqzoo (default) simvq taming adm-gfid
key=value   fd.name=NAME; fd.pretrained=FILE for its weights, or true for timm's; fd.size=224, the side of its
            input in pixels, or null for the images' own; fd.args.KEY=VALUE for timm, or mean and std
environment VQZOO_WEIGHTS, the folder of published weights; VQZOO_CACHE, that of reference statistics;
            VQZOO_OFFLINE=1 for no download at all
"""

BENCH_HELP = """suites      quantizers     all plugins at as many codes, and at as many bits per token
            codebook_size  usage, quality, time and memory over the number of codes
            ablation       NSVQ's parts, one by one
            drift          a faster and a slower encoder
            headline       the paper's comparison at 65,536 codes; for a GPU
            large          up to 1,048,576 codes; for a GPU
            compose        do all pairs of plugins train together, or say why not?
            speed          time and memory of the codebook's part, beside other libraries, and of a whole step
"""

FAILURES = (DataError, LostError, NonFiniteError, OutOfMemory, PluginError, StorageError)
"""What ends a command with status 1 and needs no traceback to be understood."""

NO_NAME = ("", ".", "..", "__metadata__")
"""Names that no tokens have: the first three are no file's name, and safetensors keeps the last for itself."""


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status.

    0; 1 for a failed run; 2 for a user's mistake, which is explained; 130 for Ctrl-C and 143 for SIGTERM, at which `run` saves
    first: `run --resume auto` goes on from there.
    """
    parser = _parser()
    options, extra = parser.parse_known_args(arguments)
    more = next((name for name in ("overrides", "names") if hasattr(options, name)), None)
    if extra and (more is None or any(word.startswith("-") for word in extra)):
        parser.error(f"unrecognized arguments: {' '.join(extra)}")
    if extra:
        setattr(options, more, getattr(options, more) + extra)  # argparse takes positionals on one side of an option only
    if getattr(options, "offline", False):
        os.environ["VQZOO_OFFLINE"] = "1"
    if os.environ.get("VQZOO_OFFLINE", "0") != "0":
        os.environ["HF_HUB_OFFLINE"] = "1"  # which timm's hub reads as it is imported
    try:
        with also(getattr(options, "plugin_file", ())):
            return options.command(options) or 0
    except UserError as error:
        print(f"vqzoo: {error}", file=sys.stderr)
        return 2
    except FAILURES as error:
        kind = next(kind for kind in FAILURES if isinstance(error, kind))
        print(f"vqzoo: {kind.__name__}: {error}", file=sys.stderr)
        return 1
    except Interrupted as error:
        print(f"vqzoo: interrupted by {error}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print(f"vqzoo: interrupted{'; continue with --resume auto' if options.command is _run else ''}", file=sys.stderr)
        return 130
    finally:
        _leave_group()


def _leave_group() -> None:
    """Leave the group of processes, if `run` joined one, so that none waits for another at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("vqzoo", description="Train, evaluate and use image tokenizers.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable, text: str, plugins: bool = True) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text)
        made.set_defaults(command=function)
        if plugins:
            made.add_argument("--plugin-file", action="append", default=[], metavar="FILE.py",
                              help="also make this file's plugin available, under the file's name; it is code, and runs")
        return made

    run = command("run", _run, "train a recipe: a YAML file or a shipped recipe's name")
    check = command("check", _check, "say what a recipe would do, and what is wrong with it; trains nothing")
    for made in (run, check):
        made.add_argument("recipe")
        made.add_argument("overrides", nargs="*", metavar="key=value", help="such as optim.lr=1e-4 or stages[0].epochs=3")
    run.add_argument("--out", help="the run's folder; by default runs/RECIPE, then runs/RECIPE-2, ...")
    run.add_argument("--resume", default="never", metavar="auto|never|PATH",
                     help="auto: continue the run in that folder, if there is one, else start; never (default): start; "
                     "PATH: go on from this checkpoint, or the newest one of this run, in a new folder")
    run.add_argument("--insist", action="store_true", help="resume although recipe, plugins or images are not those of the run")

    _score_command(command)
    compared = command("compare", _compare, "show the results of `vqzoo eval --json` or of runs side by side", plugins=False)
    compared.add_argument("results", nargs="+", metavar="JSON")
    compared.add_argument("--mixed", action="store_true", help="allow several protocols or sets of images, and say so")

    fetched = command("weights", _weights, "list, fetch or verify the published weights that metrics and losses need",
                      plugins=False)
    fetched.add_argument("action", choices=("list", "fetch", "verify"))
    fetched.add_argument("names", nargs="*", metavar="NAME")
    fetched.add_argument("--dir", help="their folder; by default that of VQZOO_WEIGHTS, else torch hub's cache")

    encode = command("encode", _encode, "turn images into tokens")
    encode.add_argument("tokenizer", metavar="RUN_OR_TOKENIZER")
    encode.add_argument("images", nargs="+", metavar="IMAGE")
    encode.add_argument("--out", required=True, help="a .safetensors file: one tensor of indices [h, w] per image")
    encode.add_argument("--whole", action="store_true", help="keep each image's own size, cut to a multiple of the stride, "
                        "instead of cropping to the training resolution")
    decode = command("decode", _decode, "turn tokens back into images")
    decode.add_argument("tokenizer", metavar="RUN_OR_TOKENIZER")
    decode.add_argument("tokens")
    decode.add_argument("--out", required=True, help="a folder for the PNG files")

    plugins = command("plugins", _plugins, "list the installed plugins, their hooks and their fields")
    plugins.add_argument("--json", action="store_true")
    _plugin_commands(command)
    return parser


def _score_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    score = command("eval", _eval, "measure a tokenizer, or the pictures that any tool made, on a folder of images")
    score.epilog = EVAL_HELP
    score.formatter_class = argparse.RawDescriptionHelpFormatter
    score.add_argument("what", metavar="RUN_OR_TOKENIZER_OR_FOLDER",
                       help="a folder of pictures is paired with the images by path and name, whatever the ending")
    score.add_argument("overrides", nargs="*", metavar="key=value", help="of a recipe's `evaluate`, see below")
    score.add_argument("--data", required=True, help="a folder of images, at any depth")
    score.add_argument("--protocol", help="short for protocol=NAME")
    score.add_argument("--metrics", help="short for metrics=[NAME,...]")
    score.add_argument("--json", help="also write metrics, what is missing, and the card to this file")
    score.add_argument("--csv", help="also write each image's metrics to this file, and the worst images as a PNG beside it")
    score.add_argument("--save-images", metavar="DIR", help="write the reconstructions there, as PNG")
    score.add_argument("--partial", action="store_true", help="allow images without a picture in FOLDER")
    score.add_argument("--offline", action="store_true", help="download nothing; a metric without its weights is missing")
    score.add_argument("--batch-size", type=int, default=32)


def _plugin_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the commands for those who write plugins, and for those who look what is wrong."""
    new = command("new-plugin", _new_plugin, "lay down a distribution with a quantizer of your own, its tests and a recipe",
                  plugins=False)
    new.add_argument("name", help="the plugin's name in recipes, such as cosine")
    new.add_argument("--dir", default=".", help="where the folder vqzoo-NAME is made; by default here")

    check = command("check-plugin", _check_plugin, "try a plugin against the contract, check by check")
    check.add_argument("name")
    check.add_argument("overrides", nargs="*", metavar="key=value", help="of the plugin's fields, such as temperature=0.5")
    check.add_argument("--only", metavar="CHECK", action="append", default=[], help="this check alone; may be given again")
    check.add_argument("--list", action="store_true", help="list the checks, and run none")
    check.add_argument("--json", metavar="FILE", help="also write the results to this file")

    doctor = command("doctor", _doctor, "say what this machine has, and what a recipe would meet on it")
    doctor.add_argument("recipe", nargs="?", help="also scan its data and train two steps of it, into nowhere")
    doctor.add_argument("overrides", nargs="*", metavar="key=value")

    bench = command("bench", _bench, "compare plugins, by a suite: a YAML file or a shipped suite's name")
    bench.epilog = BENCH_HELP
    bench.formatter_class = argparse.RawDescriptionHelpFormatter
    bench.add_argument("suite")
    bench.add_argument("overrides", nargs="*", metavar="key=value", help="of every recipe; of a plugin's fields in compose")
    bench.add_argument("--out", metavar="DIR", help="where it goes on if interrupted; by default runs/bench/SUITE")
    bench.add_argument("--plugins", metavar="A,B+C,...", help="these variants alone; a name that the suite does not have is an "
                       "installed plugin, or several joined by +, and takes part")
    bench.add_argument("--baseline", metavar="A", help="the variant to which the others are compared, for the suite's own")
    bench.add_argument("--data", metavar="DIR", help="a folder with train/ and val/: data.name=folder data.root=DIR")
    bench.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from 0; fewer than 3 give no interval")
    bench.add_argument("--steps", type=int, metavar="N", help="the steps of every run, for the suite's own budget")
    bench.add_argument("--seconds", type=float, metavar="S", help="as many steps for each run as take so long on this device")
    bench.add_argument("--quick", action="store_true", help="the short form, of 15 minutes on 2 cores; says what it omits")
    bench.add_argument("--jobs", type=int, metavar="N", help="runs at a time; by default one per GPU, or one per core")
    bench.add_argument("--also", action="append", default=[], metavar="RESULTS.jsonl", help="show these results beside")
    bench.add_argument("--mixed", action="store_true", help="allow a table of several protocols, data, budgets or machines, "
                       "and mark them")
    bench.add_argument("--json", metavar="FILE", help="compose: also write the matrix to this file")


def _run(options: argparse.Namespace) -> None:
    from vqzoo.evaluation.report import table, written
    from vqzoo.recipe import load_recipe, shipped
    from vqzoo.trainer import Trainer

    recipe = load_recipe(options.recipe, options.overrides)
    name = options.recipe if options.recipe in shipped() else Path(options.recipe).stem
    out = Path(options.out) if options.out else _default_folder(name, options.resume == "auto")
    trainer = Trainer(recipe, out, options.resume, options.insist)
    result = trainer.run()
    if not trainer.main:
        return
    count, run = result["metrics"]["images"], result["run"]
    print(f"\n{count} held-out images after {run['step']} steps in {run['seconds'] / 60:.1f} minutes\n")
    print(table(result["metrics"], result["missing"]))
    for name in result["card"]["files_left_out"]:
        print(f"vqzoo: {name} does not decode and was left out", file=sys.stderr)
    print(f"\n  reconstructions  {out / 'reconstructions.png'}\n  TensorBoard      {out / 'tensorboard'}"
          f"\n  tokenizer        {out / 'tokenizer'}\n  all numbers      {out / 'metrics.json'}")
    if best := run["best"]:
        value = f"{best['metric']} {written(best['metric'], best['value'])}"
        print(f"  the best         {out / 'best'}: {value} on {best['images']} images at step {best['step']}")
    print()
    print(NEXT.format(out=out, more="".join(f" --plugin-file {file}" for file in options.plugin_file)))


def _default_folder(name: str, resume: bool) -> Path:
    """Return runs/NAME, or the first of runs/NAME-2, … that holds no run; to resume, the last one that does."""
    last, folder = None, Path("runs") / name
    for number in itertools.count(2):
        if not (folder / "recipe.yaml").exists():
            return last if resume and last else folder
        last, folder = folder, Path("runs") / f"{name}-{number}"


def _check(options: argparse.Namespace) -> None:
    from vqzoo.explain import explain
    from vqzoo.recipe import load_recipe

    print(explain(load_recipe(options.recipe, options.overrides)))


def _eval(options: argparse.Namespace) -> None:
    from vqzoo.scoring import score

    score(options)


def _compare(options: argparse.Namespace) -> None:
    from vqzoo.evaluation.report import compare

    print(compare(options.results, options.mixed))


def _weights(options: argparse.Namespace) -> None:
    from vqzoo.weights import manage

    manage(options.action, options.names, options.dir)


def _encode(options: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    from vqzoo.data import load_image, to_images
    from vqzoo.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(options.tokenizer)
    tokens = {}
    for path in options.images:
        resolution = _whole(path, tokenizer.encoder.stride) if options.whole else tuple(tokenizer.config.resolution)
        image = to_images(load_image(path, resolution)[None], torch.device("cpu"))
        name = Path(path).stem
        while name in tokens or name in NO_NAME:
            name += "_"
        tokens[name] = tokenizer.encode(image)[0].int()
        kept = "whole" if options.whole else f"cropped to {resolution[0]}x{resolution[1]} pixels (--whole keeps its size)"
        print(f"{path}: {' x '.join(map(str, tokens[name].shape))} tokens, {kept}")
    out = Path(options.out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        codebook = tokenizer.codebook
        save_file(tokens, out, {"format": "pt", "codebook_size": str(codebook.size), "codebook": codebook.fingerprint()})
    except Exception as error:
        raise UserError(f"--out: {out} cannot be written: {error}") from error


def _whole(path: str, stride: int) -> tuple[int, int]:
    from vqzoo.data import decode

    try:
        width, height = decode(path).size
    except Exception as error:
        raise UserError(f"{path}: not an image that can be read ({error})") from error
    if min(width, height) < stride:
        raise UserError(f"{path}: {width}x{height} pixels are less than one token of {stride}x{stride}")
    return height // stride * stride, width // stride * stride


def _decode(options: argparse.Namespace) -> None:
    from vqzoo.data import to_bytes
    from vqzoo.monitor import save_picture
    from vqzoo.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(options.tokenizer)
    tokens = _read_tokens(options.tokens, tokenizer.codebook)
    out = Path(options.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error}") from error
    for name, indices in tokens.items():
        try:
            image = tokenizer.decode(indices[None])
        except ValueError as error:
            raise UserError(f"{options.tokens}: {name}: {error}; were they made by another tokenizer?") from error
        path = out / f"{name}.png"
        try:
            save_picture(to_bytes(image)[0].byte(), path)
        except (OSError, ValueError) as error:  # a folder in its place, or a name that the file system does not take
            raise UserError(f"{options.tokens}: {name!r}: the picture cannot be written: {error}") from error
        print(path)


def _read_tokens(path: str, codebook: Any) -> dict[str, Any]:
    """Read what `vqzoo encode` wrote with this codebook; each name must do as a file's name."""
    from safetensors import safe_open

    try:
        with safe_open(path, "pt") as file:
            made = file.metadata() or {}
            tokens = {name: file.get_tensor(name) for name in file.keys()}
    except Exception as error:
        raise UserError(f"{path}: not a file of tokens that `vqzoo encode` wrote ({error})") from error
    if made.get("codebook_size", str(codebook.size)) != str(codebook.size):
        raise UserError(f"{path}: made by a tokenizer of {made['codebook_size']} codes, and this one has {codebook.size}")
    if made.get("codebook", codebook.fingerprint()) != codebook.fingerprint():
        raise UserError(f"{path}: made by another tokenizer: its codebook is not this one's")
    for name in tokens:
        if Path(name).name != name or name in NO_NAME:
            raise UserError(f"{path}: {name!r} cannot be the name of a picture")
    return tokens


def _new_plugin(options: argparse.Namespace) -> None:
    from vqzoo.scaffold import lay_down

    lay_down(options.name, options.dir)


def _check_plugin(options: argparse.Namespace) -> int:
    from vqzoo.testing.command import check_plugins

    return check_plugins(options)


def _doctor(options: argparse.Namespace) -> int:
    from vqzoo.doctor import diagnose

    return diagnose(options.recipe, options.overrides)


def _bench(options: argparse.Namespace) -> int:
    from vqzoo.bench import bench

    return bench(options)


def _plugins(options: argparse.Namespace) -> None:
    found = [_describe(source) for source in available().values()]
    found += [{"name": name, "distribution": None, "version": None, "problem": reason} for name, reason in refused().items()]
    if options.json:
        from vqzoo.evaluation.report import to_json

        print(to_json(found), end="")
        return
    for plugin in found:
        if plugin["problem"]:
            print(f"{plugin['name']}  (cannot be used)\n  {plugin['problem']}\n")
            continue
        print(f"{plugin['name']}  ({plugin['distribution']} {plugin['version']})\n  {plugin['summary']}")
        print(f"  hooks:  {', '.join(f'{hook} ({kind})' for hook, kind in plugin['hooks'].items()) or '–'}")
        print(f"  config: {', '.join(f'{key}={value!r}' for key, value in plugin['config'].items()) or '–'}\n")


def _default(field: Field) -> Any:
    """Return what a field is if a recipe does not set it."""
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return "???" if value is MISSING else asdict(value) if is_dataclass(value) else value


def _describe(source: Source) -> dict[str, Any]:
    """Say what a plugin is and offers, or why it cannot be used; '???' is a field that a recipe must set."""
    row = {"name": source.name, "distribution": source.distribution, "version": source.version, "problem": None}
    try:
        kind = source.load()
        config = {field.name: _default(field) for field in fields(kind.Config)}
        return {**row, "summary": (kind.__doc__ or "").strip().split("\n")[0], "hooks": offered_hooks(kind),
                "config": config, "contract": kind.contract}
    except UserError as error:
        return {**row, "problem": str(error)}
    except Exception as error:  # of a class that cannot even be described
        return {**row, "problem": f"plugin {source.name!r} ({source.place}): {error!r}"}
