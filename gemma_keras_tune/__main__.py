"""The command line: parse, call, print. `python -m gemma_keras_tune --help`."""

import argparse
import contextlib
import difflib
import json
import numbers
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gemma_keras_tune._support.files import check_file, check_free
from gemma_keras_tune._support.interrupts import ENDING
from gemma_keras_tune._support.numbers import NOT_NEGATIVE, Rule, integer
from gemma_keras_tune.training.settings import SETTINGS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: Words after the program's name. Defaults to those of the process.

    Returns:
        The exit code: 0; 1 after an error the user can mend, which is printed without a traceback;
        or 130 after Ctrl-C. Words that cannot be understood end the process with 2, as argparse
        does.
    """
    options, unknown = _parser().parse_known_args(arguments)
    known = re.findall(r"--[a-z][a-z-]+", options.command.format_help())
    if unknown:
        options.command.error(_unknown(unknown, known))
    from gemma_keras_tune._support.compilation import compilation_cache
    from gemma_keras_tune.errors import GemmaTuneError

    try:
        with ENDING.unwinding(), compilation_cache():
            options.run(options)
    except (GemmaTuneError, OSError) as error:
        print(f"error: {_by_options(str(error), known)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return ENDING.end()
    return 0


class _Parser(argparse.ArgumentParser):
    """A parser that does not bury its message under the usage, which has some thirty options."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nSee `{self.prog} --help`.\n")


def _unknown(words: list[str], known: list[str]) -> str:
    """Describe words that are no arguments of a command, with the option that may be meant."""
    near = difflib.get_close_matches(words[0].partition("=")[0], known, 1)
    meant = f". Do you mean {near[0]}?" if near else ""
    return f"unrecognized arguments: {' '.join(words)}{meant}"


def _by_options(message: str, known: list[str]) -> str:
    """Call arguments of Python's functions by the options that set them: `--epochs`."""

    def option(found: re.Match[str]) -> str:
        flag, value = "--" + found[1].replace("_", "-"), found[2]
        if flag not in known:
            return found[0]
        plain = "" if value in (None, "True") else " " + value.strip("'")
        return f"`{flag}{plain}`"

    return re.sub(r"`(?:\w+\([^`=]*)?\b([a-z_]+)(?:=([^`=)]*)\)?)?`", option, message)


_MODEL = "preset name, folder, hf://…, kaggle://…, .gguf file or package://gemma3_270m"


def _number(rule: Rule, *, auto: bool = False) -> Callable[[str], Any]:
    """Make a converter for argparse, which makes exit code 2 of what it refuses."""

    def convert(text: str) -> Any:
        if auto and text == "auto":
            return text
        with contextlib.suppress(ValueError):
            value = int(text) if rule.kind is numbers.Integral else float(text)
            if rule.accepts(value):
                return value
        expected = "'auto' or " * auto + rule.words
        raise argparse.ArgumentTypeError(f"must be {expected}. Received: {text!r}")

    return convert


_COUNT = _number(integer(1))


def _names(text: str) -> str | list[str]:
    return text.split(",") if "," in text else text


_READING = (
    "prompt_column", "response_column", "system_column", "preference", "reasoning", "on_error"
)  # fmt: skip


def _add_reading(command: argparse.ArgumentParser) -> None:
    """Add the options of `read_pairs`."""
    group = command.add_argument_group("reading of the pairs")
    for name in ("prompt", "response", "system"):
        group.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {name} text")
    group.add_argument(
        "--preference", choices=["chosen"],
        help="train the preferred answer of rows that have a chosen and a rejected one",
    )  # fmt: skip
    group.add_argument(
        "--reasoning", choices=["refuse", "keep", "drop"], default="refuse",
        help="what to do with reasoning beside an answer; default: %(default)s",
    )  # fmt: skip
    group.add_argument(
        "--on-error", choices=["raise", "skip"], default="raise",
        help="skip: leave out rows that cannot be trained on, and list them; default: %(default)s",
    )  # fmt: skip


def _add_settings(command: argparse.ArgumentParser) -> None:
    """Add an option for each setting of a run; one that is not given is not in the result."""
    group = command.add_argument_group("settings of the run", argument_default=argparse.SUPPRESS)
    for name, setting in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        reading: dict[str, Any] = {"metavar": setting.metavar}
        if setting.rule:
            reading["type"] = _number(setting.rule, auto=bool(setting.auto))
        elif True in setting.values:
            reading = {"action": "store_const", "const": True}
        elif setting.values:
            reading["choices"] = setting.values
        elif name == "target_modules":
            reading["type"] = _names
        group.add_argument(flag, help=setting.text.replace("%", "%%"), **reading)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", help=_MODEL)
    command.add_argument("pairs", help="file or folder of pairs, or a TFDS name")
    command.add_argument(
        "--validation-data", metavar="PATH", help="more pairs to watch the loss on"
    )
    command.add_argument(
        "--dtype", default="auto", help="to load the model in; default: %(default)s"
    )
    command.add_argument(
        "--from-adapter", metavar="DIR", help="go on from this adapter, with its rank and layers"
    )
    _add_reading(command)
    _add_settings(command)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m gemma_keras_tune",
        description="Tune Gemma models with Keras. Gemma weights are under the Gemma terms of use.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (
        _add_tune,
        _add_plan,
        _add_generate,
        _add_export,
        _add_verify,
        _add_test,
        _add_preview,
        _add_demo,
    ):
        add(commands)
    for command in commands.choices.values():
        command.set_defaults(command=command)
    return parser


def _add_tune(commands: Any) -> None:
    tune = commands.add_parser("tune", help="tune a model on pairs and save it")
    _add_run(tune)
    tune.add_argument("--plan", metavar="FILE", help="a plan that `plan` saved, to carry out")
    tune.add_argument("--preset", metavar="DIR", help="save a KerasHub preset, merged")
    tune.add_argument("--adapter", metavar="DIR", help="save the adapter in PEFT's layout")
    tune.add_argument("--overwrite", action="store_true", help="replace what is in DIR")
    tune.add_argument("--quiet", action="store_true")
    tune.set_defaults(run=_tune)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="print the plan of a run, without training")
    _add_run(plan)
    plan.add_argument("--save", metavar="FILE", help="write the plan as JSON, for `tune --plan`")
    plan.set_defaults(run=_plan)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser("generate", help="answer prompts")
    generate.add_argument("model", help=_MODEL)
    generate.add_argument("texts", nargs="*", metavar="PROMPT")
    generate.add_argument(
        "--prompts", metavar="FILE",
        help="a .txt file with a prompt on each line, or .jsonl, .csv, … with `prompt` or "
        "`messages`; the answers are written as JSON lines",
    )  # fmt: skip
    generate.add_argument("--system", metavar="TEXT", help="a system message before each prompt")
    generate.add_argument("--adapter", metavar="DIR", help="an adapter to put on the model")
    generate.add_argument("--max-new-tokens", type=_COUNT, default=256)
    generate.add_argument(
        "--temperature", type=_number(NOT_NEGATIVE), help="draw at random; 0, the default, does not"
    )
    generate.add_argument("--sampler", default="auto", help="greedy, top_k, top_p or random")
    generate.add_argument("--seed", type=_number(integer(0)), help="draw the same again")
    generate.add_argument("--template", default="auto")
    generate.add_argument("--batch-size", type=_COUNT, default=8)
    generate.add_argument("--dtype", default="auto")
    generate.set_defaults(run=_generate)


def _add_export(commands: Any) -> None:
    export = commands.add_parser("export", help="write a model for another runtime")
    export.add_argument("model", help=_MODEL)
    export.add_argument("path", help="folder to make, or a .gguf file")
    export.add_argument(
        "--format", default="auto", help="see the documentation; default: %(default)s"
    )
    export.add_argument("--adapter", metavar="DIR", help="an adapter to merge into the model")
    export.add_argument("--dtype", default="auto", help="dtype to write")
    export.add_argument(
        "--quantization", help="Q8_0, Q4_0 or a K-quant such as Q4_K_M, for GGUF and Ollama"
    )
    export.add_argument("--shard-size", help="for keras and safetensors; default: 5GB")
    export.add_argument(
        "--check",
        choices=["record", "run", "none"],
        default="none",
        help="record answers for `verify`, verify at once, or neither; default: %(default)s",
    )
    export.add_argument("--overwrite", action="store_true", help="replace what is there")
    export.add_argument("--quiet", action="store_true")
    export.set_defaults(run=_export)


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify", help="hold an export against its receipt; exit code 1 if it fails"
    )
    verify.add_argument("path", help="what `export`, `save_preset` or `save_adapter` wrote")
    verify.add_argument("--base", metavar="MODEL", help="for an adapter, what it belongs on")
    verify.add_argument(
        "--no-update", action="store_true", help="leave the result in the receipt as it is"
    )
    verify.add_argument("--no-run", action="store_true", help="compare the files alone")
    verify.set_defaults(run=_verify)


def _add_test(commands: Any) -> None:
    test = commands.add_parser(
        "test", help="put a test plan to a model; exit code 1 if it fails or misses its target"
    )
    test.add_argument("model", help=_MODEL)
    test.add_argument("plan", help="test plan: .jsonl, .csv, .yaml")
    test.add_argument("--adapter", metavar="DIR", help="the adapter to test, against its base")
    test.add_argument("--baseline", metavar="MODEL", help="the base of a fully tuned model")
    test.add_argument("--pairs", metavar="PATH", help="the training pairs, to look for leaks")
    test.add_argument("--report", metavar="FILE", action="append", default=[],
                      help="write .html, .json, .md or .xml (JUnit); may be repeated")  # fmt: skip
    test.add_argument("--target", type=float, default=0.9, help="pass rate each kind must have")
    test.add_argument("--confidence", type=float, default=0.95)
    test.add_argument("--strict", action="store_true", help="what is not shown is a failure too")
    test.add_argument("--max-new-tokens", type=int, default=256)
    test.add_argument("--batch-size", type=int, default=16)
    test.add_argument("--shieldgemma", metavar="MODEL",
                      help="a ShieldGemma that judges failure and boundary cases")  # fmt: skip
    test.add_argument("--resume", metavar="FILE", help="keep answers here, and go on from them")
    test.add_argument("--seed", type=int, default=0)
    test.add_argument("--dtype", default="auto")
    test.add_argument("--quiet", action="store_true", help="no progress bar")
    test.set_defaults(run=_test)


def _add_preview(commands: Any) -> None:
    preview = commands.add_parser("preview", help="show rows exactly as they would be trained")
    preview.add_argument("model", help=_MODEL)
    preview.add_argument("pairs", help="file or folder of pairs, or a TFDS name")
    preview.add_argument("--rows", type=_COUNT, default=3)
    preview.add_argument("--template", default="auto")
    preview.add_argument("--dtype", default="auto")
    _add_reading(preview)
    preview.set_defaults(run=_preview)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser("demo", help="tune the embedded Gemma 3 270M on business e-mails")
    demo.add_argument("--out", metavar="DIR", help="write what it made there")
    demo.set_defaults(run=_demo)


def _tune(options: argparse.Namespace) -> None:
    import gemma_keras_tune as gkt
    from gemma_keras_tune.errors import TrainingError

    plan = gkt.Plan.load(options.plan) if options.plan else None
    settings = _settings(options)
    _refuse_lost_work(options, settings.get("method", plan.method if plan else "lora"))
    _check_run(options, plan)
    pairs, validation = _pairs(options, "pairs"), _pairs(options, "validation_data")
    kept = options.adapter and gkt.callbacks.AdapterCheckpoint(
        options.adapter, overwrite=options.overwrite
    )
    ENDING.say(lambda: f"interrupted. {_left(kept)}")
    model = _load(options, options.from_adapter)
    try:
        gkt.tune(
            model, pairs, validation_data=validation, plan=plan, verbose=int(not options.quiet),
            callbacks=[kept] if kept else [], **settings,
        )  # fmt: skip
    except TrainingError:
        print(_left(kept), file=sys.stderr)
        raise
    if kept:
        overwrite = options.overwrite or kept.epochs > 0
        print(gkt.save_adapter(model, options.adapter, overwrite=overwrite))
    if options.preset:
        print(gkt.save_preset(model, options.preset, overwrite=options.overwrite))


def _left(kept: Any) -> str:
    """Say what a run leaves that does not come to its end."""
    if not kept:
        return "Nothing is saved. `--adapter DIR` would keep the last whole epoch."
    if not kept.epochs:
        return "Nothing is saved: the first epoch had not ended."
    return (
        f"{kept.path} has the adapter after {kept.epochs:,} whole epochs. Answer with it by "
        f"`generate MODEL PROMPT --adapter {kept.path}`, or go on from it by "
        f"`tune MODEL PAIRS --from-adapter {kept.path}`."
    )


def _plan(options: argparse.Namespace) -> None:
    import gemma_keras_tune as gkt

    _check_run(options, None)
    if options.save:
        check_file(options.save)
    pairs, validation = _pairs(options, "pairs"), _pairs(options, "validation_data")
    model = _load(options, options.from_adapter)
    plan = gkt.make_plan(model, pairs, validation_data=validation, **_settings(options))
    print(plan)
    if options.save:
        print(plan.save(options.save))


def _check_run(options: argparse.Namespace, plan: Any) -> None:
    """Refuse settings and names that no model can be tuned with, before one is loaded."""
    from gemma_keras_tune.training.planning import resolve_settings
    from gemma_keras_tune.training.preparing import check_names

    check_names(resolve_settings(_settings(options), plan, validation_data=options.validation_data))


def _load(options: argparse.Namespace, adapter: str | None) -> Any:
    """Load the model, and put an adapter on it."""
    import gemma_keras_tune as gkt
    from gemma_keras_tune.errors import AdapterError

    if adapter and not pathlib.Path(adapter).expanduser().exists():
        raise AdapterError(
            f"There is no adapter: {adapter} does not exist.",
            next_step="Pass the folder that `tune --adapter` wrote, or another one in PEFT's form.",
        )
    model = gkt.load(options.model, dtype=getattr(options, "dtype", "auto"))
    if adapter:
        gkt.load_adapter(model, adapter)
    return model


def _settings(options: argparse.Namespace) -> Any:
    """Collect the settings that are given."""
    return {name: value for name, value in vars(options).items() if name in SETTINGS}


def _pairs(options: argparse.Namespace, name: str) -> Any:
    from gemma_keras_tune import read_pairs

    source = getattr(options, name)
    reading = {name: getattr(options, name) for name in _READING}
    return None if source is None else read_pairs(source, **reading)


def _refuse_lost_work(options: argparse.Namespace, method: str) -> None:
    """Refuse what could not be saved in the end, before anything is loaded."""
    from gemma_keras_tune.errors import ExportError, PlanError

    given = {"--preset": options.preset, "--adapter": options.adapter}
    places = {name: pathlib.Path(path).resolve() for name, path in given.items() if path}
    problems = []
    if options.from_adapter and method == "full":
        problems.append("`--from-adapter`: `--method full` trains every weight, and no adapter")
    if not places:
        problems.append("no place is named: pass `--preset DIR`, `--adapter DIR`, or both")
    if options.adapter and method == "full":
        problems.append("`--adapter`: `--method full` leaves no adapter; save with `--preset DIR`")
    if len(places) == 2:
        first, second = places.values()
        if first.is_relative_to(second) or second.is_relative_to(first):
            problems.append("`--preset` and `--adapter` must be two folders, neither in the other")
    for name, path in places.items():
        try:
            check_free(path, overwrite=options.overwrite)
        except ExportError as error:
            hint = "" if options.overwrite else " Choose another name, or pass `--overwrite`."
            problems.append(f"`{name}`: {error.headline}{hint}")
    if problems:
        raise PlanError("The tuned model would be lost.", problems)


def _generate(options: argparse.Namespace) -> None:
    import gemma_keras_tune as gkt
    from gemma_keras_tune.errors import GenerationError
    from gemma_keras_tune.generation.prompts import read_prompts, with_system
    from gemma_keras_tune.generation.samplers import resolve_sampler

    if bool(options.texts) == bool(options.prompts):
        raise GenerationError("Pass prompts, or a file of them as `--prompts FILE`.")
    resolve_sampler(options.sampler, options.temperature)
    _check_template(options)
    prompts: list[Any] = read_prompts(options.prompts) if options.prompts else options.texts
    asked = with_system(prompts, options.system) if options.system else prompts
    model = _load(options, options.adapter)
    names = ("max_new_tokens", "sampler", "temperature", "seed", "batch_size", "template")
    answers = gkt.generate_answers(model, asked, **{name: getattr(options, name) for name in names})
    for prompt, answer in zip(prompts, answers, strict=True):
        text = answer.text.strip()
        row = {"prompt": prompt, "response": text}
        print(json.dumps(row, ensure_ascii=False) if options.prompts else text)


def _check_template(options: argparse.Namespace) -> None:
    from gemma_keras_tune.gemma.templates import get_template

    if options.template != "auto":
        get_template(None, options.template)


def _export(options: argparse.Namespace) -> None:
    import gemma_keras_tune as gkt
    from gemma_keras_tune.exporting.exporter import check_target, resolve_export

    target, *_ = resolve_export(
        options.path, options.format, options.dtype, options.quantization, options.shard_size
    )
    check_target(target, overwrite=options.overwrite)
    names = ("format", "dtype", "quantization", "shard_size", "overwrite")
    settings = {name: getattr(options, name) for name in names}
    settings["check"] = {"record": True, "run": "run", "none": False}[options.check]
    del options.dtype  # the one to write, not to load in
    model = _load(options, options.adapter)
    print(gkt.export(model, options.path, verbose=int(not options.quiet), **settings))


def _verify(options: argparse.Namespace) -> None:
    from gemma_keras_tune.exporting.verifying import verify

    verdict = verify(
        options.path, base=options.base, run=not options.no_run, update=not options.no_update
    )
    print(verdict)
    verdict.raise_if_failed()


def _test(options: argparse.Namespace) -> None:
    import gemma_keras_tune as gkt
    from gemma_keras_tune.evaluation.report import check_report_path

    for path in options.report:
        check_file(check_report_path(path))
    plan = gkt.TestPlan.from_file(options.plan)
    model = _load(options, options.adapter)
    names = (
        "pairs", "target", "confidence", "max_new_tokens", "batch_size", "resume", "seed"
    )  # fmt: skip
    policy = gkt.safety.ShieldGemma(options.shieldgemma) if options.shieldgemma else None
    report = gkt.evaluate(
        model,
        plan,
        baseline=gkt.load(options.baseline, dtype=options.dtype) if options.baseline else "auto",
        policy=policy,
        verbose=int(not options.quiet),
        **{name: getattr(options, name) for name in names},
    )
    print(report)
    for path in options.report:
        print(report.save(path))
    report.raise_if_failed(strict=options.strict)


def _preview(options: argparse.Namespace) -> None:
    import gemma_keras_tune as gkt

    _check_template(options)
    pairs = _pairs(options, "pairs")
    model = _load(options, None)
    print(gkt.preview(model, pairs, rows=options.rows, template=options.template))


def _demo(options: argparse.Namespace) -> None:
    from gemma_keras_tune.demo import process_started, run_demo

    run_demo(options.out, started=process_started())


if __name__ == "__main__":
    ENDING.install()
    sys.exit(main())
