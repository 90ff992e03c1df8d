"""The command line of normatch: train, evaluate, predict, convert, plot, measure; `normatch --help` lists it all."""

import argparse
import json
import os
import sys
import warnings
from typing import Literal, get_args, get_origin

from . import __version__
from .config import METHODS, Config, known_keys, make_config, method_class, preset_text, presets
from .data import TABLES
from .errors import UserError
from .published.flags import ALIASES, PUBLISHED, SWITCHES, UNNEEDED_SWITCHES, canonical


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 not, 128 + the number of the signal that ended it."""
    # Idle OpenMP threads spin for some 20 microseconds, then sleep: on cores shared with other work, spinning on made a
    # step ten times as long, and sleeping at once costs a sixth on idle ones.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # Large tensors in huge pages, where the system gives them to who asks: of a tensor new from the system most of the
    # time goes into its pages, and huge ones take a sixth of it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    arguments = sys.argv[1:] if arguments is None else arguments
    format_before, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        options = make_parser(arguments).parse_args(_spell_check(arguments))
        return options.run(options)
    except UserError as error:
        print(f"normatch: {' '.join(str(error).split())}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("normatch: interrupted", file=sys.stderr)
        return 130
    except ImportError as error:  # of what NORMATCH_LIB asks for, or of a broken installation
        print(f"normatch: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        return 0
    except OSError as error:
        print(f"normatch: {error}", file=sys.stderr)
        return 1
    finally:
        warnings.formatwarning = format_before


def _one_line(message, category, filename, lineno, line=None) -> str:
    """A warning in one line, without its place in the code."""
    return f"normatch: {' '.join(str(message).split())}\n"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser(words: list[str] = ()) -> argparse.ArgumentParser:
    """The parser; `words`, the arguments, say which command's options have to be known."""
    parser = _Parser(prog="normatch", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"normatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _training_commands(commands, words)
    _model_commands(commands)
    _data_commands(commands, words)
    _bench_commands(commands, words)
    info = commands.add_parser("info", help="versions, where the ops come from, and what this machine can do")
    info.set_defaults(run=_info)
    return parser


def _training_commands(commands, words: list[str]):
    train = commands.add_parser(
        "train",
        help="train a classifier; without arguments NorMatch on scikit-learn's digits, 40 labels",
        description="Train a classifier. Keys on the command line win over the file, the file over the preset.",
        allow_abbrev=False,
    )
    train.set_defaults(run=_train)
    verify = commands.add_parser(
        "verify-resume",
        help="kill -9 a short run at random moments, resume it, and compare its weights bit by bit",
        description="Certify that a run survives being killed. Takes the keys of `train`; leaves certificate.json.",
        allow_abbrev=False,
    )
    verify.add_argument("--kills", type=int, default=20, help="how often the run is killed (default: 20)")
    verify.set_defaults(run=_verify)
    for command, name in ((train, "train"), (verify, "verify-resume")):
        if name in words[:1]:
            _add_keys(command, words)

    show = commands.add_parser("presets", help="list the presets, or print one to start a configuration file from")
    show.add_argument("name", nargs="?", metavar="PRESET")
    show.set_defaults(run=_presets)


def _model_commands(commands):
    evaluate = commands.add_parser("eval", help="accuracy of a run or checkpoint on its test set")
    evaluate.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    evaluate.add_argument("--data_dir", help="folder that holds the data set (default: as in training)")
    evaluate.set_defaults(run=_eval)

    predict = commands.add_parser("predict", help="classify image files, or the rows of CSV files")
    predict.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    predict.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="of a model of a table: CSV files")
    predict.set_defaults(run=_predict)
    convert = commands.add_parser(
        "convert",
        help="a run, our checkpoint or a published one -> a checkpoint without optimizers, or safetensors",
    )
    convert.add_argument("source", metavar="IN", help="a run folder or a checkpoint, ours or published")
    convert.add_argument("target", metavar="OUT", help="the new file, .pt or .safetensors")
    convert.set_defaults(run=_convert)
    for command in (evaluate, predict, convert):
        command.add_argument("--dataset", help="what a published checkpoint was trained on (default: by its classes)")

    plot = commands.add_parser("plot", help="draw the curves of runs; those that differ in their seed as mean and band")
    plot.add_argument("runs", nargs="+", metavar="RUN", help="a run folder, finished or not")
    plot.add_argument("--out", metavar="FILE", help=".png, .pdf or .svg (default: RUN/curves.png; several: curves.png)")
    plot.set_defaults(run=_plot)

    for command in (evaluate, predict):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        command.add_argument("--json", action="store_true", help="print JSON")


def _data_commands(commands, words: list[str]):
    data = commands.add_parser("data", help="what a data set or a folder of yours holds, and a picture of its views")
    if "data" in words[:1]:
        from .tools import contact_sheet

        contact_sheet.data_arguments(data)
        data.set_defaults(run=contact_sheet.data_command)

    compare = commands.add_parser("compare", help="flows and the classical baselines on the same labels, in one table")
    compare.add_argument(
        "presets", nargs="+", metavar="PRESET_OR_DATASET", help="such as flowgmm-ag-news, wine, moons; several of one"
    )
    compare.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    compare.add_argument("--data_dir", help="folder that holds the data set")
    compare.add_argument("--num_labels", type=int, help="labeled rows (default: the preset's)")
    compare.add_argument("--out", metavar="FILE", help="leave the table in FILE.md and the records in FILE.json")
    compare.add_argument(
        "--runs", metavar="FOLDER", help="keep the flows' runs there: what is finished is not repeated"
    )
    compare.set_defaults(run=_compare)

    embed = commands.add_parser("embed", help="embed texts by a sentence-transformers model on disk, for flows")
    embed.add_argument("dataset", choices=("ag-news", "yahoo"))
    embed.add_argument("--data_dir", help="folder that holds the texts; the embeddings are left there")
    embed.add_argument("--model", required=True, help="folder of a sentence-transformers model")
    embed.set_defaults(run=_embed)


def _bench_commands(commands, words: list[str]):
    bench = commands.add_parser("bench", help="measure the ops, the views, the loader or a step side by side")
    benches = bench.add_subparsers(required=True, metavar="{kernels,augment,loader,step}")
    for name in ("kernels", "augment", "loader", "step"):
        one = benches.add_parser(name)
        if list(words[:2]) != ["bench", name]:
            continue
        from .bench import kernels, step, views

        arguments, run = {
            "kernels": (kernels.add_arguments, kernels.run),
            "augment": (views.augment_arguments, views.augment),
            "loader": (views.loader_arguments, views.loader),
            "step": (step.add_arguments, step.run),
        }[name]
        arguments(one)
        one.set_defaults(run=run)


def _add_keys(parser: argparse.ArgumentParser, words: list[str]):
    """Every key as a flag, under its own and its published names; the help shows those of the chosen method."""
    chosen = _chosen_method(words)
    parser.epilog = f"Keys of method {chosen}. For those of {', '.join(METHODS)}: --method NAME --help"
    parser.add_argument(
        "preset",
        nargs="?",
        metavar="PRESET",
        help="such as cifar10-40, of those that `normatch presets` lists (default: digits)",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of `key: value` lines")
    shown = method_class(chosen).Keys.model_fields
    for name, users in known_keys().items():
        field = shown.get(name) or method_class(users[0]).Keys.model_fields[name]
        flags = [f"--{name}", *(f"--{alias}" for alias, ours in ALIASES.items() if ours == name)]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        is_switch = bool in (field.annotation, *get_args(field.annotation))
        default = "" if field.default is None else f" (default: {field.default})"
        parser.add_argument(
            *flags,
            dest=name,
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(choices) + "}" if choices else name.upper(),
            help=f"{field.description}{default}".replace("%", "%%") if name in shown else argparse.SUPPRESS,
            **({"nargs": "?", "const": "true"} if is_switch else {}),  # `--download` alone means `--download true`
        )
    for name in PUBLISHED - {"config"}:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def _chosen_method(words: list[str]) -> str:
    """The method that `--help` is about: the one that the arguments name, else that of the preset."""
    for i, word in enumerate(words):
        name, _, value = word.partition("=")
        if name == "--method":
            chosen = value or "".join(words[i + 1 : i + 2])
            return chosen if chosen in METHODS else "normatch"
    preset = presets().get("".join(words[1:2]), {}) if "--help" in words or "-h" in words else {}
    return preset.get("method", "normatch")


def _spell_check(arguments: list[str]) -> list[str]:
    """Spell keys as the parser knows them; an unknown one raises `UserError` with the nearest known."""
    if arguments[:1] not in (["train"], ["verify-resume"]):
        return arguments
    result = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and name not in ("", "config", "help", "kills"):
            name = canonical(name, known_keys())
            if name in (*SWITCHES, *UNNEEDED_SWITCHES) and not equals:
                equals, value = "=", "true"
            argument = f"--{name}{equals}{value}"
        result.append(argument)
    return result


def _config(options, **defaults) -> Config:
    given = {name: value for name, value in vars(options).items() if name in known_keys() or name in PUBLISHED}
    given.pop("config", None)
    return make_config(options.preset, options.config, **{**defaults, **given})


def _verify(options) -> int:
    short = {"steps": 300, "batch_size": 8, "eval_every": 10, "device": "cpu"}
    if options.preset or options.config:
        short = {}
    elif "uratio" in method_class(vars(options).get("method", "normatch")).Keys.model_fields:
        short["uratio"] = 2
    config = _config(options, out="runs/verify-resume", **short)
    from .tools.verify import verify_resume

    certificate = verify_resume(config, options.kills)
    print(f"bit-equal after {certificate['kills']} kills: {config.folder}/certificate.json")
    return 0


def _train(options) -> int:
    config = _config(options)
    from .methods import distributed
    from .training.trainer import train

    result = train(config)
    if distributed.rank():  # only rank 0 reports
        return 0
    summary = result.summary
    flow = summary["test_accuracy_flow"]
    print(
        f"test accuracy      {summary['test_accuracy']:.2f} %   (averaged weights, {config.num_labels or 'all'} labels)"
    )
    if flow is not None:
        print(f"  by the flow      {flow:.2f} %")
    print(f"best               {summary['best_test_accuracy']:.2f} %   at step {summary['best_step']}")
    print(f"protocol           {summary['protocol']}")
    print(f"time               {summary['seconds_total']:.0f} s, {1000 * summary['seconds_per_step']:.1f} ms a step")
    print(f"run folder         {result.out}")
    return 0


def _presets(options) -> int:
    if options.name:
        print(preset_text(options.name), end="")
        return 0
    rows = [(name, keys["method"], keys["dataset"]) for name, keys in presets().items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in sorted(rows, key=lambda row: (row[2] in TABLES, row[2])):  # images first, then tables
        columns = (f"{text:{width}}" for text, width in zip(row, widths, strict=True))
        print(*columns, preset_text(row[0]).split("\n", 1)[0].removeprefix("# "), sep="  ")
    return 0


def _eval(options) -> int:
    from .methods import distributed
    from .model import evaluate

    scores = evaluate(options.checkpoint, options.data_dir, distributed.start(options.device), options.dataset)
    if distributed.rank():
        return 0
    if options.json:
        print(json.dumps(scores))
        return 0
    print(f"{scores['dataset']}, {scores['images']} test images")
    percent = ("test_accuracy", "test_accuracy_flow", "test_top5", "test_balanced_accuracy")
    for name in (*percent, "test_log_prob", "test_log_prob_flow"):
        if name in scores:
            print(f"{name:22} {scores[name]:6.2f} {'%' if name in percent else 'nats'}")
    print(f"\n{'class':22} accuracy   most often taken for")
    for (name, score), row in zip(scores["per_class"].items(), scores["confusion"], strict=True):
        wrong = [(n, taken) for n, taken in zip(row, scores["per_class"], strict=True) if n and taken != name]
        mistakes = ", ".join(f"{taken} ({n})" for n, taken in sorted(wrong, key=lambda pair: -pair[0])[:3])
        print(f"{name:22} {'no image' if score is None else f'{score:6.2f} %'}   {mistakes}".rstrip())
    return 0


def _convert(options) -> int:
    from .tools.convert import convert

    print(convert(options.source, options.target, options.dataset))
    return 0


def _plot(options) -> int:
    from .tools.plot import plot

    print(plot(options.runs, options.out))
    return 0


def _compare(options) -> int:
    from .tools.compare import compare

    keys = {name: getattr(options, name) for name in ("data_dir", "num_labels")}
    given = {name: value for name, value in keys.items() if value is not None}
    print(compare(*options.presets, seeds=options.seeds, out=options.out, runs=options.runs, **given), end="")
    return 0


def _embed(options) -> int:
    from .data.tables import embed

    print(embed(options.dataset, options.data_dir, options.model))
    return 0


def _predict(options) -> int:
    import numpy as np

    from .methods import distributed
    from .model import find_images, load

    model = load(options.checkpoint, distributed.start(options.device), options.dataset)
    kind = "row" if model.image_size is None else "image"
    paths, unreadable = options.images if kind == "row" else find_images(options.images), 0
    for start in range(0, len(paths), 500):
        samples = {}
        for path in paths[start : start + 500]:
            try:
                content = model.read(path)
                # A row is named by its number in the file, whose first is the header.
                names = [f"{path}:{2 + n}" for n in range(len(content))] if kind == "row" else [str(path)]
                samples.update(zip(names, content, strict=True))
            except UserError as error:  # one bad file costs nobody the others
                print(f"normatch: {error}", file=sys.stderr)
                unreadable += 1
        if not samples:
            continue
        confidence, classes = model.predict_proba(np.stack(list(samples.values()))).max(1)
        for name, p, k in zip(samples, confidence.tolist(), classes.tolist(), strict=True):
            if options.json:
                print(json.dumps({kind: name, "class": model.classes[k], "probability": p}))
            else:
                print(f"{name}\t{model.classes[k]}\t{p:.3f}")
    return 1 if unreadable else 0


def _info(options) -> int:
    from .tools.info import info

    print(info())
    return 0
