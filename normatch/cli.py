"""The command line: `normatch train | eval | predict | info`."""

import argparse
import json
import os
import sys
from typing import Literal, get_args, get_origin

import yaml

from . import __version__
from .config import ALIASES, PRESETS, Config, canonical, make_config
from .errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 1 could not be done, 2 not understood, 130 interrupted."""
    # Idle OpenMP threads sleep instead of spinning: on cores shared with other work, spinning made a step ten times
    # as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = make_parser().parse_args(_spell_check(arguments))
        return options.run(options)
    except UserError as error:
        print(f"normatch: {' '.join(str(error).split())}", file=sys.stderr)
        return error.status
    except KeyboardInterrupt:
        print("normatch: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output, such as `head`, has had enough
        return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="normatch", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"normatch {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a classifier; without arguments NorMatch on scikit-learn's digits, 40 labels",
        description="Train a classifier. Keys on the command line win over the file, the file over the preset.",
        allow_abbrev=False,
    )
    train.add_argument("preset", nargs="?", metavar="PRESET", help=f"one of {', '.join(PRESETS)} (default: digits)")
    train.add_argument("--config", metavar="FILE", help="YAML file of `key: value` lines")
    for name, field in Config.model_fields.items():
        flags = [f"--{name}", *(f"--{alias}" for alias, ours in ALIASES.items() if ours == name)]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        is_switch = bool in (field.annotation, *get_args(field.annotation))
        default = "" if field.default is None else f" (default: {field.default})"
        train.add_argument(
            *flags,
            dest=name,
            default=argparse.SUPPRESS,
            metavar="{" + ",".join(choices) + "}" if choices else name.upper(),
            help=f"{field.description}{default}".replace("%", "%%"),
            **({"nargs": "?", "const": "true"} if is_switch else {}),  # `--download` alone means `--download true`
        )
    train.set_defaults(run=_train)

    evaluate = commands.add_parser("eval", help="accuracy of a run or checkpoint on its test set")
    evaluate.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    evaluate.add_argument("--data_dir", help="folder that holds the data set (default: as in training)")
    evaluate.set_defaults(run=_eval)

    predict = commands.add_parser("predict", help="classify image files")
    predict.add_argument("checkpoint", metavar="RUN_OR_CHECKPOINT")
    predict.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER")
    predict.set_defaults(run=_predict)
    for command in (evaluate, predict):
        command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
        command.add_argument("--json", action="store_true", help="print JSON")

    info = commands.add_parser("info", help="versions, where the ops come from, and what this machine can do")
    info.set_defaults(run=_info)
    return parser


def _spell_check(arguments: list[str]) -> list[str]:
    """Rewrite keys of `train` under our names; an unknown one raises `UserError` with the nearest known."""
    if arguments[:1] != ["train"]:
        return arguments
    result = []
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name in ("", "config", "help"):
            result.append(argument)
            continue
        key = canonical(name)
        if isinstance(key, tuple):
            result += [f"--{key[0]}", key[1]]
        else:
            result.append(f"--{key}{equals}{value}")
    return result


def _train(options) -> int:
    given = {name: value for name, value in vars(options).items() if name in Config.model_fields}
    config = make_config(options.preset, options.config, **given)
    print(yaml.safe_dump(config.model_dump(), sort_keys=False), file=sys.stderr)
    from .trainer import train  # torch is loaded only once the configuration is known to be right

    result = train(config)
    summary = result.summary
    flow = summary["test_accuracy_flow"]
    print(f"test accuracy      {summary['test_accuracy']:.2f} %   (averaged weights, {config.num_labels} labels)")
    if flow is not None:
        print(f"  by the flow      {flow:.2f} %")
    print(f"best               {summary['best_test_accuracy']:.2f} %   at step {summary['best_step']}")
    print(f"protocol           {summary['protocol']}")
    print(f"time               {summary['seconds_total']:.0f} s, {1000 * summary['seconds_per_step']:.1f} ms a step")
    print(f"run folder         {result.out}")
    return 0


def _eval(options) -> int:
    from .evaluation import evaluate
    from .trainer import choose_device

    scores = evaluate(options.checkpoint, options.data_dir, choose_device(options.device))
    if options.json:
        print(json.dumps(scores))
    else:
        print(f"{scores['dataset']}, {scores['images']} test images")
        for name in ("test_accuracy", "test_accuracy_flow"):
            if name in scores:
                print(f"{name:20} {scores[name]:.2f} %")
    return 0


def _predict(options) -> int:
    from .evaluation import find_images, load
    from .trainer import choose_device

    model = load(options.checkpoint, choose_device(options.device))
    paths = find_images(options.images)
    for start in range(0, len(paths), 500):
        part = paths[start : start + 500]
        confidence, classes = model.predict_proba(part).max(1)
        for path, p, k in zip(part, confidence.tolist(), classes.tolist(), strict=True):
            if options.json:
                print(json.dumps({"image": str(path), "class": model.classes[k], "probability": p}))
            else:
                print(f"{path}\t{model.classes[k]}\t{p:.3f}")
    return 0


def _info(options) -> int:
    from .info import info

    print(info())
    return 0
