"""`evaluate`: run a test plan on the base and on the tuned model, and judge the responses."""

import dataclasses
import hashlib
import itertools
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

import keras
import keras_hub
import numpy as np
from msgspec import Meta

from gemma_keras_tune._support.packages import installed_versions
from gemma_keras_tune.adapters.lora import get_factors, is_lora_on, lora_linears
from gemma_keras_tune.errors import EvaluationError
from gemma_keras_tune.evaluation.few_shot import (
    choose_examples,
    first_response,
    judge_few_shot,
    line_break_ids,
    with_examples,
)
from gemma_keras_tune.evaluation.judging import judge_cases, judge_kinds, takes_policy
from gemma_keras_tune.evaluation.leakage import find_leaks
from gemma_keras_tune.evaluation.plans import KINDS, Case, Kind, TestPlan
from gemma_keras_tune.evaluation.policy_scores import PolicyCheck, policy_names
from gemma_keras_tune.evaluation.report import Report
from gemma_keras_tune.evaluation.requests import (
    ModelPair,
    Purpose,
    Request,
    Side,
    progress_bar,
    run_requests,
    sampler_config,
    sampler_for,
)
from gemma_keras_tune.evaluation.response_log import ResponseLog
from gemma_keras_tune.evaluation.results import Leak, Tuning
from gemma_keras_tune.evaluation.retention import (
    Retention,
    RetentionItem,
    RetentionTest,
    read_items,
    retention_items,
)
from gemma_keras_tune.evaluation.values import (
    AutoCount,
    Confidence,
    PositiveInt,
    Share,
    fits,
    problem,
    shown,
)
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import family_of, fingerprint
from gemma_keras_tune.gemma.templates import Template, TemplateSpec, get_template
from gemma_keras_tune.generation.answers import Answer, SamplerState
from gemma_keras_tune.loading.loader import load
from gemma_keras_tune.pairs import Message, Pair, PairSource, read_pairs
from gemma_keras_tune.training.tuning import TuneResult

Auto = Literal["auto"]
TARGET = 0.9
PACKAGES = ("gemma_keras_tune", "keras", "keras-hub", "jax", "numpy", "scipy")


def evaluate(
    model: keras.Model | str,
    test_plan: TestPlan | Sequence[Case] | str | os.PathLike[str],
    *,
    baseline: keras.Model | Literal["auto", "base"] | None = "auto",
    pairs: Any = None,
    result: TuneResult | None = None,
    few_shot: int | Auto = "auto",
    retention: bool | Sequence[RetentionItem | Mapping[str, Any]] | Auto = "auto",
    target: float | Mapping[Kind, float] = TARGET,
    confidence: float = 0.95,
    policy: PolicyCheck | None = None,
    template: TemplateSpec = "auto",
    sampler: str | keras_hub.samplers.Sampler = "auto",
    max_new_tokens: int = 256,
    batch_size: int = 16,
    seed: int = 0,
    resume: str | os.PathLike[str] | None = None,
    verbose: int = 1,
) -> Report:
    """Run a test plan on a tuned model and on its base.

    Base and tuned are one model in memory: its adapter off, and on. Cases of one sample are
    answered greedily. Those of several are drawn at random, each sample with its own seed, so that
    the responses depend neither on the batch nor on the other cases.

    Args:
        model: A tuned KerasHub Gemma, or anything `load` takes.
        test_plan: A `TestPlan`, its cases, or the path of its file.
        baseline: `"base"` is the model with its adapter off; a model is another one, such as that
            before `tune(method="full")`; `None` asks the tuned model alone. `"auto"` is `"base"`
            if an adapter is on, else `None`.
        pairs: The training pairs, as `tune` got them: anything `read_pairs` takes. Cases that are
            among them are listed and scored apart, and some are put into the base's prompt.
        result: What `tune` returned, for the report.
        few_shot: Training pairs in the base's prompt; 0 leaves that out. `"auto"` is up to five
            if there are `pairs` and a base.
        retention: True to measure forgetting, or the items to measure it with, each a dictionary
            with `prompt` and `answer`. `"auto"` measures it if there is a base.
        target: Pass rate that each kind of case has to reach, or one for each kind.
        confidence: Confidence level of verdicts, intervals and comparisons.
        policy: A `ShieldGemma`, or a function of prompt and response that gives the probability
            that the response violates a policy, or that for each of several policies by name. It
            judges `safe` checks, and every response to a failure or boundary case. For checks of
            the prompt alone, the function is given `None` for the response.
        template: The prompts' format. `"auto"` is the one the model was tuned with.
        sampler: A KerasHub sampler or its name, for cases of several samples. `"auto"` is
            top-p 0.95 of the 64 likeliest tokens, as Google advises for Gemma.
        max_new_tokens: Longest response, in tokens.
        batch_size: Prompts that run at once.
        seed: Seed of samples and of the choice of few-shot pairs.
        resume: A file that keeps every response as it comes, and the scores of a policy that has an
            `identity`, as `ShieldGemma` has. After an interruption, the same call continues.
        verbose: 1 shows a progress bar, 0 nothing.

    Returns:
        A `Report`.

    Raises:
        EvaluationError: The plan cannot be read, an argument is out of range, there is no base to
            compare with, `resume` belongs to another evaluation, or `policy` fails; the case is
            named.
        TemplateError: Prompts that the template cannot carry; all are named.
        PairsError: `pairs` cannot be read.
    """
    begin = time.perf_counter()
    test_plan, targets = _read_plan(test_plan), _targets(target)
    _check_arguments(
        test_plan, few_shot=few_shot, confidence=confidence, policy=policy, sampler=sampler,
        max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed, result=result,
        resume=resume, pairs=pairs,
    )  # fmt: skip
    model = load(model)
    models = ModelPair(model, _base(model, baseline))
    items = _items(retention, models)
    run = _Run(models, test_plan, get_template(model, template), seed, max_new_tokens)
    run.add_pairs(pairs, few_shot)
    run.add_requests(items)
    settings = {
        "baseline": _baseline_name(baseline, models), "few_shot": few_shot,
        "retention": retention if isinstance(retention, (bool, str)) else len(items),
        "target": targets, "confidence": confidence, "template": run.template.name,
        "sampler": sampler_config(sampler), "max_new_tokens": max_new_tokens,
        "batch_size": batch_size, "policy": _policy_name(policy), "pairs": run.pair_count,
    }  # fmt: skip
    log = ResponseLog(resume, _identity(models, settings, seed) if resume else {})
    responses, kept = run.respond(sampler, batch_size, confidence, log, verbose)
    cases = judge_cases(test_plan, run.requests, responses, run.leaks, policy, log, verbose)
    return Report(
        plan_name=test_plan.name,
        cases=cases,
        verdicts=judge_kinds([c for c in cases if not c.leak], targets, confidence),
        retention=kept,
        few_shot=judge_few_shot(cases, run.examples, confidence) if run.examples else None,
        leaks=judge_kinds([c for c in cases if c.leak], targets, confidence),
        tuning=None if result is None else tuning_of(result),
        settings={**settings, **_ran_on(model)},
        versions={"python": platform.python_version()} | installed_versions(PACKAGES),
        seed=seed,
        seconds=time.perf_counter() - begin,
    )


class _Run:
    """The requests of one evaluation."""

    def __init__(
        self,
        models: ModelPair,
        plan: TestPlan,
        template: Template,
        seed: int,
        max_new_tokens: int,
    ) -> None:
        self.encoder = RowTokenizer(models.tuned.preprocessor.tokenizer)
        self.models = models
        self.plan = plan
        self.template = template
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.leaks: dict[str, Leak] = {}
        self.pair_count: int | None = None
        self.examples: tuple[Pair, ...] = ()
        self.requests: list[Request] = []
        self.general: RetentionTest | None = None

    def add_pairs(self, pairs: Any, few_shot: int | Auto) -> None:
        """Find the cases that are among the training pairs, and choose examples from the others."""
        if pairs is None:
            return
        source = pairs if isinstance(pairs, PairSource) else read_pairs(pairs)
        count = itertools.count()
        self.leaks = find_leaks(self.plan, (pair for pair in source if next(count) >= 0))
        source.raise_for_problems()
        self.pair_count = next(count)
        if few_shot == 0 or self.models.base is None:
            return
        limits = {} if few_shot == "auto" else {"count": int(few_shot), "tokens": 10**9}
        self.examples = choose_examples(
            source,
            self.encoder,
            self.template,
            leave_out=[row for leak in self.leaks.values() for row in leak.rows],
            seed=self.seed,
            **limits,
        )

    def add_requests(self, items: Sequence[RetentionItem]) -> None:
        """Make the requests to all models, those with examples last."""
        self.requests = self._requests("tuned")
        if self.models.base is not None:
            self.requests += self._requests("base")
        if self.examples:
            self.requests += self._requests("base", self.examples)
        self.general = RetentionTest(self.models, items, self.template) if items else None

    def respond(
        self,
        sampler: str | keras_hub.samplers.Sampler,
        batch_size: int,
        confidence: float,
        log: ResponseLog,
        verbose: int,
    ) -> tuple[list[Answer], Retention | None]:
        """Run all requests; return the responses to the cases, and the measure of forgetting."""
        requests = [*self.requests, *(self.general.requests if self.general else ())]
        with progress_bar(len(requests), "evaluating", "answer", verbose) as progress:
            found = run_requests(
                self.models,
                requests,
                sampler=sampler,
                batch_size=batch_size,
                log=log,
                progress=progress,
            )
        kept = None
        if self.general:
            kept = self.general.judge(found, batch_size=batch_size, confidence=confidence, log=log)
        return [self._response(request, found[request.key]) for request in self.requests], kept

    def _response(self, request: Request, response: Answer) -> Answer:
        few_shot = request.purpose == "few_shot"
        return first_response(response, self.examples) if few_shot else response

    def _requests(self, side: Side, examples: Sequence[Pair] = ()) -> list[Request]:
        """Make one request for each sample of each case; prompts that cannot be carried raise."""
        found: list[Request] = []
        problems: list[str] = []
        stops = self._stops(side, examples)
        for index, case in enumerate(self.plan):
            try:
                ids = self._ids(with_examples(examples, case.messages))
            except ValueError as error:
                problems.append(f"case {case.id}: {getattr(error, 'headline', error)}")
                continue
            purpose: Purpose = "few_shot" if examples else "cases"
            about = (side, purpose, index, ids, stops, self.max_new_tokens)
            found += [Request(*about, seed) for seed in _seeds(case, self.seed)]
        if problems:
            raise EvaluationError("Some cases cannot be asked.", problems)
        return found

    def _stops(self, side: Side, examples: Sequence[Pair]) -> frozenset[int]:
        tokenizer = self.models.model(side).preprocessor.tokenizer
        stops = {int(i) for i in self.template.stop_token_ids(tokenizer)}
        return frozenset(stops | line_break_ids(tokenizer, examples) if examples else stops)

    def _ids(self, messages: Sequence[Message]) -> np.ndarray:
        segments = self.template.segments(messages, generation_prompt=True)
        return np.asarray(self.encoder.encode(segments)[0], np.int32)


def _seeds(case: Case, seed: int) -> list[int | None]:
    if case.samples == 1:
        return [None]
    names = (f"{seed}/{case.id}/{number}" for number in range(case.samples))
    return [int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) >> 1 for name in names]


def tuning_of(result: TuneResult) -> Tuning:
    """Convert the result of `tune` to a report's record of it."""
    return Tuning(
        plan=json.loads(json.dumps(dataclasses.asdict(result.plan), default=str)),
        plan_text=str(result.plan),
        history={name: tuple(map(float, values)) for name, values in result.history.items()},
        timings={name: float(value) for name, value in result.timings.items()},
        learning_rates=tuple(result.learning_rates),
        token_lengths=tuple(result.token_lengths),
    )


# Arguments.


def _read_plan(plan: Any) -> TestPlan:
    if isinstance(plan, TestPlan):
        return plan
    if isinstance(plan, (str, os.PathLike)):
        return TestPlan.from_file(plan)
    return TestPlan(plan)


def _targets(target: Any) -> dict[Kind, float]:
    given = dict(target) if isinstance(target, Mapping) else dict.fromkeys(KINDS, target)
    problems = [f"there is no kind {kind!r}" for kind in given if kind not in KINDS]
    problems += [
        f"{kind}: a pass rate is over 0 and up to 1, got {rate!r}"
        for kind, rate in given.items()
        if not fits(rate, Share)
    ]
    if problems:
        raise EvaluationError(
            "`target` is no pass rate.",
            problems,
            f"Pass one number, or one for each of {', '.join(KINDS)}.",
        )
    return {kind: float(given.get(kind, TARGET)) for kind in KINDS}


_ARGUMENTS = {
    "few_shot": AutoCount,
    "confidence": Confidence,
    "max_new_tokens": PositiveInt,
    "batch_size": PositiveInt,
    "seed": Annotated[int, Meta(description="a whole number")],
}
_CLASSES: Mapping[str, tuple[Any, str]] = {
    "result": (TuneResult, "what `tune` returned"),
    "resume": ((str, os.PathLike), "a file's path"),
    "policy": (Callable, "a function of prompt and answer"),
}


def _check_arguments(plan: TestPlan, **given: Any) -> None:
    """Name all that is wrong with the arguments, before any work is done."""
    found = [problem(name, given[name], kind) for name, kind in _ARGUMENTS.items()]
    found += [
        f"`{name}` must be {words}, got {shown(given[name])}"
        for name, (kind, words) in _CLASSES.items()
        if given[name] is not None and not isinstance(given[name], kind)
    ]
    found += _sampler_problems(given["sampler"])
    found += _policy_problems(plan, given["policy"])
    if fits(given["few_shot"], PositiveInt) and given["pairs"] is None:
        found.append("`few_shot` takes training pairs, and there are none: pass `pairs`")
    if problems := [text for text in found if text]:
        raise EvaluationError("The evaluation cannot begin.", problems)


def _sampler_problems(sampler: Any) -> list[str]:
    try:
        SamplerState(sampler_for(sampler), None, 0)
    except (ValueError, TypeError, AttributeError) as error:
        return [f"`sampler` is none that can be used: {error}"]
    return []


def _policy_problems(plan: TestPlan, policy: PolicyCheck | None) -> list[str]:
    """Find `safe` checks that no policy can judge."""
    problems = []
    names = () if policy is None else policy_names(policy)
    for case in plan:
        for check in case.checks:
            if not takes_policy(check):
                continue
            unknown = [name for name in check.policies if names and name not in names]
            if policy is None:
                problems.append(f"`policy` must judge the `safe` check of case {case.id}")
            elif unknown:
                problems.append(
                    f"case {case.id}: `policy` has no {', '.join(unknown)}; it has "
                    f"{', '.join(names)}"
                )
    return problems


def _base(model: Any, baseline: Any) -> Any:
    """Find the base: the same model, with its adapter off, or another one, or `None`."""
    if baseline is None or (isinstance(baseline, str) and baseline == "auto"):
        return model if baseline and is_lora_on(model) else None
    if not isinstance(baseline, str) or baseline != "base":
        other = load(baseline)
        sizes = [m.preprocessor.tokenizer.vocabulary_size() for m in (model, other)]
        if sizes[0] != sizes[1]:
            raise EvaluationError(
                f"`baseline` has another tokenizer: {sizes[1]:,} tokens, not {sizes[0]:,}.",
                next_step="Pass the model that was tuned, as it was before.",
            )
        return other
    if not is_lora_on(model):
        raise EvaluationError(
            "`baseline='base'` is the model with its adapter off, and no adapter is on.",
            next_step="Evaluate before `merge_lora`, or pass the base: `baseline=load(…)`.",
        )
    return model


def _baseline_name(baseline: Any, models: ModelPair) -> str | None:
    if models.base is None:
        return None
    if models.base is models.tuned:
        return "base"
    return baseline if isinstance(baseline, str) else str(models.base.name)


def _policy_name(policy: PolicyCheck | None) -> str | None:
    if policy is None:
        return None
    return str(getattr(policy, "__qualname__", type(policy).__name__))


def _items(retention: Any, models: ModelPair) -> tuple[RetentionItem, ...]:
    """Read the retention items; none if there is no base and `"auto"`."""
    if retention is False or (retention == "auto" and models.base is None):
        return ()
    if models.base is None:
        raise EvaluationError(
            "What was forgotten is measured against the base, and there is none.",
            next_step="Pass the model before tuning, `baseline=load(…)`, or `retention=False`.",
        )
    if retention is True or retention == "auto":
        return retention_items()
    if isinstance(retention, (str, Mapping)) or not isinstance(retention, Iterable):
        raise EvaluationError(
            f"`retention` must be 'auto', true, false or items. Received: {retention!r:.80}"
        )
    return read_items(retention)


# The identity of an evaluation, and the machine.


def _identity(models: ModelPair, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Collect all that must be the same for responses to be the same."""
    other = models.base is not None and models.base is not models.tuned
    return {
        "model": _weights_hash(models.tuned),
        "adapter": _adapter_hash(models.tuned),
        "baseline": _weights_hash(models.base) if other else None,
        "seed": seed,
        **{name: settings[name] for name in ("template", "sampler")},
    }


def _weights_hash(model: Any) -> str:
    """Hash some values of every weight, to the last bit: full tuning moves all a little."""
    digest = hashlib.sha256(fingerprint(model).encode())
    for weight in family_of(model).weights(model):
        values = np.asarray(weight.variable).reshape(-1)
        digest.update(np.ascontiguousarray(values[:: max(1, values.size // 1024)]).tobytes())
    return digest.hexdigest()[:16]


def _adapter_hash(model: Any) -> str | None:
    """Hash the adapter that is on."""
    if not is_lora_on(model):
        return None
    digest = hashlib.sha256()
    for linear in lora_linears(model):
        a, b, scale = get_factors(linear)
        for part in (linear.path.encode(), a.tobytes(), b.tobytes(), repr(scale).encode()):
            digest.update(part)
    return digest.hexdigest()[:16]


def _ran_on(model: Any) -> dict[str, Any]:
    import jax

    device = jax.devices()[0].device_kind
    return {
        "fingerprint": fingerprint(model),
        "adapter": _adapter_hash(model),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {device}",
    }
