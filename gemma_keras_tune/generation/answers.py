"""Answers from a model: prompts through its template, a few compiled programs, the answer alone.

KerasHub's own `generate` runs the prompt padded to the full length, then writes token by token from
the end of the shortest prompt, and compiles again for every length. Here prompts are sorted by
length and end at one place, with the padding on the left; they are read in chunks, as many as the
longest of the batch needs; then all rows write at once until each has met a stop token. Chunk count
and answer length are not part of the compiled program, so one program serves prompts of all
lengths.

Why padding on the left changes nothing: positions enter a Gemma only through RoPE, which sees
distances; causal and sliding-window masks see distances too; and the padding itself is masked.
"""

import dataclasses
import json
import math
import operator
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypedDict, Unpack, overload

import keras
import keras_hub
import numpy as np
from keras import ops

from gemma_keras_tune._support.backend import check_backend
from gemma_keras_tune._support.equality import ArrayEquality
from gemma_keras_tune._support.memory import kept_memory
from gemma_keras_tune._support.numbers import integer
from gemma_keras_tune.adapters.active import ACTIVE, Active, use_adapter
from gemma_keras_tune.adapters.lora import lora_config, lora_linears, lora_switched
from gemma_keras_tune.errors import GenerationError, TemplateError, warn_of_pairs
from gemma_keras_tune.gemma.encoding import RowTokenizer
from gemma_keras_tune.gemma.families import context_length
from gemma_keras_tune.gemma.packing import axes_of, pack
from gemma_keras_tune.gemma.state import locked, state_of
from gemma_keras_tune.gemma.templates import NO_TOOLS, Template, TemplateSpec, get_template
from gemma_keras_tune.gemma.tools import parse_calls
from gemma_keras_tune.generation import decoding
from gemma_keras_tune.generation.samplers import resolve_sampler
from gemma_keras_tune.pairs import Message
from gemma_keras_tune.pairs.conversations import put_tools, read_conversation
from gemma_keras_tune.pairs.tools import ToolCall, read_tools
from gemma_keras_tune.pairs.unused import Unused
from gemma_keras_tune.pairs.values import ReadingError, is_list, unreadable

SHORT_CHUNK = 32
LONG_CHUNK = 256
LONG_PROMPT = 1024
SMALLEST_BUFFER = 64
MAX_BUFFERS = 3
MAX_ROOM = 4
STOPS_AT_ONCE = 64

Prompt = str | Sequence[Message | Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Answer(ArrayEquality):
    """Answer of a model to one prompt.

    Attributes:
        text: The answer, without its stop token. Calls of tools stand in it as they were written.
        ids: `[tokens]` int32, the answer's token ids, without the stop token.
        stopped: Whether the model ended the answer itself, rather than `max_new_tokens`.
    """

    text: str
    ids: np.ndarray
    stopped: bool

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls of tools that can be read, each with `name` and `arguments`."""
        return parse_calls(self.text)[0]

    @property
    def tool_problems(self) -> tuple[str, ...]:
        """Malformed calls, each with what is wrong with it."""
        return parse_calls(self.text)[1]

    @property
    def content(self) -> str:
        """The text without the calls that can be read, and without white space around it."""
        return parse_calls(self.text)[2].strip()


class _Options(TypedDict, total=False):
    """The arguments of `generate` that do not decide what it returns."""

    max_new_tokens: int
    sampler: str | keras_hub.samplers.Sampler
    temperature: float | None
    seed: int | None
    batch_size: int
    strip: bool
    adapter: str | Active | None
    template: TemplateSpec


@overload
def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    tools: None = None,
    **options: Unpack[_Options],
) -> str | list[str]: ...
@overload
def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    tools: Tools,
    **options: Unpack[_Options],
) -> Answer | list[Answer]: ...
def generate(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    sampler: str | keras_hub.samplers.Sampler = "auto",
    temperature: float | None = None,
    seed: int | None = None,
    batch_size: int = 8,
    strip: bool = True,
    adapter: str | Active | None = ACTIVE,
    template: TemplateSpec = "auto",
    tools: Tools | None = None,
) -> str | Answer | list[str] | list[Answer]:
    """Answer prompts with the template the model was tuned with.

    Args:
        model: A KerasHub Gemma `CausalLM` with its preprocessor, tuned or not.
        prompts: A user's text; or a conversation as a list of messages, each a dict with `role`
            and `content`; or a list of either.
        max_new_tokens: Longest answer, in tokens.
        sampler: A KerasHub sampler or its name: `"greedy"`, `"top_k"`, `"top_p"` or `"random"`.
            `"auto"` is greedy, or with a temperature above 0 top-p, as Google advises for Gemma:
            0.95 of the 64 likeliest tokens.
        temperature: A number of at least 0 that the logits are divided by. 0 is greedy. `None`
            leaves it to the sampler.
        seed: Makes a random sampler repeat itself, for the same prompts and `batch_size`.
        batch_size: Rows that run at once.
        strip: Whether white space around an answer is left out.
        adapter: One of `gkt.adapters.list(model)` to answer with; `None` answers as the base, bit
            for bit. Left out, it is the adapter that is on.
        template: Anything `get_template` takes. `"auto"` is the one the model was tuned with, or
            its family's.
        tools: JSON schemas of tools that the model may call: `{"type": "function", "function":
            {"name": …, "description": …, "parameters": …}}`, or the functions alone.

    Returns:
        The answers alone, without prompt or stop token: a string for one prompt, a list in the
        same order for a list. With `tools`, each is an `Answer`, whose `tool_calls` are the calls.

    Raises:
        LoadError: `model` is none.
        TemplateError: A prompt is no conversation, the template does not fit the model or has no
            format for tools, or a tool is no JSON schema.
        AdapterError: There is no such adapter.
        GenerationError: A number is out of range, there is no such sampler, or a prompt does not
            fit into the context.
    """
    prompts = _listed(prompts)
    answers = generate_answers(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        adapter=adapter,
        template=template,
        tools=tools,
    )
    if tools is not None:
        return answers[0] if _is_one(prompts) else answers
    texts = [answer.text.strip() if strip else answer.text for answer in answers]
    return texts[0] if _is_one(prompts) else texts


def generate_answers(
    model: keras.Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    sampler: str | keras_hub.samplers.Sampler = "auto",
    temperature: float | None = None,
    seed: int | None = None,
    batch_size: int = 8,
    adapter: str | Active | None = ACTIVE,
    template: TemplateSpec = "auto",
    tools: Tools | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Answers with their token ids, and whether the model ended them itself.

    Args:
        model: As for `generate`.
        prompts: As for `generate`.
        max_new_tokens: As for `generate`.
        sampler: As for `generate`.
        temperature: As for `generate`.
        seed: As for `generate`.
        batch_size: As for `generate`.
        adapter: As for `generate`.
        template: As for `generate`.
        tools: As for `generate`.
        progress: Called after every batch with the number of prompts answered in it.

    Returns:
        One `Answer` a prompt, in order; a list of one for a single prompt.

    Raises:
        TemplateError: As for `generate`.
        GenerationError: As for `generate`.
    """
    tokenizer = tokenizer_of(model)
    with use_adapter(model, adapter):
        resolved = get_template(model, template)
        written = generate_ids(
            model,
            encode_prompts(prompts, resolved, tokenizer, tools),
            stop_token_ids=resolved.stop_token_ids(tokenizer),
            max_new_tokens=max_new_tokens,
            sampler=resolve_sampler(sampler, temperature),
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    return [Answer(str(tokenizer.detokenize(i)), i, s) for i, s in written]


@locked
def generate_ids(
    model: keras.Model,
    rows: Sequence[Sequence[int] | np.ndarray],
    *,
    stop_token_ids: Iterable[int],
    max_new_tokens: int = 256,
    sampler: str | keras_hub.samplers.Sampler = "greedy",
    seed: int | Sequence[int] | None = None,
    batch_size: int = 8,
    share_programs: bool = False,
    shapes: "ProgramShapes | None" = None,
    progress: Callable[[int], None] | None = None,
    on_batch: Callable[[list[tuple[int, np.ndarray, bool]]], None] | None = None,
) -> list[tuple[np.ndarray, bool]]:
    """Continue rows of token ids.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        rows: Token ids of each prompt, `<bos>` first, at least one each.
        stop_token_ids: Ids at which a row ends.
        max_new_tokens: Longest continuation, in tokens, at least 1.
        sampler: A KerasHub sampler or its name.
        seed: Makes a random sampler repeat itself, for the same rows and `batch_size`. With a seed
            for each row, what a row draws depends neither on the others nor on `batch_size`.
        batch_size: Rows that run at once, at least 1.
        share_programs: Run in a program for more rows where one is compiled already. For a few
            rows that are asked once, that costs less than a program of their own.
        shapes: The programs to run in, from `choose_programs`, which several calls then share.
        progress: Called after every batch with the number of rows done in it.
        on_batch: Called after every batch with what it wrote: place in `rows`, new ids, stopped.

    Returns:
        For each row, in order, the new ids (`[tokens]` int32, without the stop token) and whether
        a stop token ended them.

    Raises:
        GenerationError: A number is out of range, a row is empty or does not fit into the context,
            there is not a seed for each row, or the sampler is a search.
    """
    check_backend()
    check_numbers(rows, max_new_tokens=max_new_tokens, batch_size=batch_size)
    check_context(model, rows, max_new_tokens)
    results: list[tuple[np.ndarray, bool]] = [(np.zeros(0, np.int32), False)] * len(rows)
    if not rows:
        return results
    stops = tuple(sorted({int(i) for i in stop_token_ids}))
    state = SamplerState(resolve_sampler(sampler), seed, len(rows))
    weights = weights_of(model)
    if shapes is None:
        calls = [([len(row) for row in rows], max_new_tokens)]
        shapes = choose_programs(model, calls, state.sampler, batch_size, share=share_programs)
    for batch in batches(rows, shapes, max_new_tokens):
        state.begin(batch)
        with kept_memory():
            chosen = [rows[i] for i in batch.rows]
            written = _run_batch(model, weights, chosen, batch, stops, state)
        for index, ids in zip(batch.rows, written, strict=True):
            results[index] = cut(ids, stops)
        if on_batch:
            on_batch([(index, *results[index]) for index in batch.rows])
        if progress:
            progress(len(batch.rows))
    state.close()
    return results


def compiled_programs(model: keras.Model) -> int:
    """Count the programs compiled for a model since it was made.

    Args:
        model: A model.

    Returns:
        The number of compilations by `generate` and its kin.
    """
    return state_of(model).compilations


@dataclasses.dataclass(frozen=True)
class ProgramShapes:
    """Shapes of family programs.

    Attributes:
        size: Rows that run at once.
        buffers: Of each program, the tokens read at once, and those of prompt and answer that it
            has room for.
    """

    size: int
    buffers: frozenset[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Rows that run together.

    Attributes:
        rows: Their places among all rows.
        size: Rows of the compiled program, at least as many.
        chunk: Tokens read at once.
        chunks: Chunks the longest row needs for all but its last token.
        buffer: Tokens of prompt and answer the program has room for.
        new_tokens: Longest answer.
    """

    rows: tuple[int, ...]
    size: int
    chunk: int
    chunks: int
    buffer: int
    new_tokens: int


class SamplerState:
    """A sampler and its random state. With a seed, the user's sampler is left as it was."""

    def __init__(self, sampler: Any, seed: int | Sequence[int] | None, rows: int) -> None:
        if type(sampler).__call__ is not keras_hub.samplers.Sampler.__call__:
            raise GenerationError(
                "`sampler` must choose token by token, as 'greedy', 'top_k', 'top_p' and 'random' "
                f"do. Received: {sampler!r}. For a search over several tokens, call "
                "`model.compile(sampler=…)` and the model's own `generate`."
            )
        self.sampler = sampler
        seed = _whole(seed)
        self.seeded = seed is not None
        self.row_seeds = seed if isinstance(seed, list) else None
        if self.row_seeds is not None and len(self.row_seeds) != rows:
            raise GenerationError(f"There are {len(self.row_seeds)} seeds for {rows} rows.")
        self.values = [v.value for v in sampler.variables]
        if isinstance(seed, int):
            self.values = self._seeded(seed)

    def _seeded(self, seed: int) -> list[Any]:
        """First values of the sampler's variables."""
        count = len(self.sampler.variables)
        return [keras.random.SeedGenerator(seed + i).state.value for i in range(count)]

    def begin(self, batch: "_Batch") -> None:
        """Return the values of the seeds, each `[batch, …]`, if every row has its own."""
        if self.row_seeds is None:
            return
        values = [self._seeded(self.row_seeds[index]) for index in batch.rows]
        values += [values[-1]] * (batch.size - len(values))
        self.values = [np.stack([np.asarray(v) for v in one]) for one in zip(*values, strict=True)]

    @property
    def is_greedy(self) -> bool:
        """Tell if the sampler always takes the likeliest token."""
        return type(self.sampler) is keras_hub.samplers.GreedySampler

    @property
    def key(self) -> Any:
        """Equal for samplers that compute the same: stock ones of the same settings."""
        kind = type(self.sampler)
        if self.is_greedy:
            return "greedy"
        if not kind.__module__.startswith("keras_hub."):
            return self.sampler
        config = {k: v for k, v in self.sampler.get_config().items() if k != "seed"}
        return kind.__name__, json.dumps(config, sort_keys=True, default=repr)

    def close(self) -> None:
        """Move the user's sampler on, so that the next call draws anew."""
        if not self.seeded:
            for variable, value in zip(self.sampler.variables, self.values, strict=True):
                variable.assign(value)


def _whole(seed: Any) -> int | list[int] | None:
    """A seed, or one for each row, as Python's integers; NumPy's are taken too."""
    if seed is None:
        return None
    try:
        found = [operator.index(one) for one in seed] if np.ndim(seed) else operator.index(seed)
        np.asarray(found, np.uint32)  # as Keras keeps it
        return found
    except (TypeError, OverflowError):
        raise GenerationError(
            "`seed` must be an integer from 0 to 4,294,967,295, or one for each row. Received: "
            f"{seed!r:.80}"
        ) from None


def weights_of(model: keras.Model) -> list[Any]:
    """Values of all variables, packed."""
    return pack(values_of(model, model.variables), axes_of(model.variables, model))


def values_of(model: keras.Model, variables: Iterable[keras.Variable]) -> list[Any]:
    """Values of some of a model's variables. LoRA that is switched off counts as zero.

    So base and tuned answers come from one program; adding zeros changes no bit of the base's.
    """
    off = {id(n.layer.lora_kernel_b) for n in lora_linears(model) if not n.layer.lora_enabled}
    return [ops.zeros_like(v.value) if id(v) in off else v.value for v in variables]


def tokenizer_of(model: keras.Model) -> Any:
    """The model's tokenizer, or an error where it has none."""
    state_of(model)  # or it is no model
    if getattr(model, "preprocessor", None) is None:
        raise TemplateError(
            "The model has no preprocessor, so there is no tokenizer to write prompts with.",
            next_step="Load it with its preprocessor, or call `generate_ids` with token ids.",
        )
    return model.preprocessor.tokenizer


def _is_one(prompts: Any) -> bool:
    if isinstance(prompts, (str, Mapping, Message)):
        return True
    return bool(prompts) and all(isinstance(item, (Mapping, Message)) for item in prompts)


def _listed(prompts: Any) -> Any:
    """Prompts that may be a generator, an array or a column of a table, as a list."""
    if isinstance(prompts, (str, Mapping, Message)):
        return prompts
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes):
        raise TemplateError(
            "`prompts` must be a text, a conversation, or a list of either. Received: "
            f"{prompts!r:.80}"
        )
    return list(prompts)


def encode_prompts(
    prompts: Any, template: Template, tokenizer: Any, tools: Tools | None = None
) -> list[np.ndarray]:
    """Token ids of every prompt, all broken prompts reported at once."""
    prompts = _listed(prompts)
    encoder = RowTokenizer(tokenizer)
    rows = []
    unused = Unused("prompt")
    problems: list[str] = []
    next_step = _PROMPT_FORM
    declared = read_tools(tools, "`tools`", unused, problems)
    if problems:
        raise TemplateError("Some tools cannot be used.", problems, _TOOL_FORM)
    for number, prompt in enumerate([prompts] if _is_one(prompts) else prompts, 1):
        unused.row = number
        try:
            messages = put_tools(_messages(prompt, unused), declared)
            segments = template.segments(messages, generation_prompt=True)
        except TemplateError as error:
            problems += [f"prompt {number}: {text}" for text in error.problems or [error.headline]]
            next_step = NO_TOOLS if error.next_step == NO_TOOLS else next_step
            continue
        rows.append(encoder.encode(segments)[0])
    if problems:
        raise TemplateError("Some prompts cannot be answered.", problems, next_step)
    if lines := unused.lines():
        warn_of_pairs("The prompts have keys that hold something and are not used.", lines)
    return rows


_TOOL_FORM = (
    'A tool is `{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`, '
    "where `parameters` is a JSON schema."
)
_PROMPT_FORM = (
    "A prompt is a string, or a list of messages with `role` and `content` that ends with a user "
    "message or the result of a tool."
)


def _messages(prompt: Any, unused: Unused) -> tuple[Message, ...]:
    if isinstance(prompt, str):
        prompt = Message("user", prompt)
    if isinstance(prompt, Message):
        if problem := unreadable(prompt.content):
            raise TemplateError(f"it {problem}")
        return (prompt,)
    if isinstance(prompt, bytes) or not (isinstance(prompt, Sequence) or is_list(prompt)):
        raise TemplateError(f"a {type(prompt).__name__} is neither text nor a list of messages")
    try:
        return read_conversation(list(prompt), ends_with="user", unused=unused)
    except ReadingError as error:
        raise TemplateError("These messages are no conversation.", error.problems) from None


def check_numbers(rows: Sequence[Any], **numbers: Any) -> None:
    """Refuse numbers that are no integers of at least 1, and rows without a token."""
    for name, value in numbers.items():
        if problem := integer(1).problem(name, value):
            raise GenerationError(problem)
    empty = [i for i, row in enumerate(rows) if not len(row)]
    if empty:
        raise GenerationError(f"Every row needs at least one token. Empty rows: {empty[:20]}")


def check_context(model: keras.Model, rows: Sequence[Any], max_new_tokens: int) -> None:
    """Refuse prompts that do not fit into the model's context together with their answers."""
    problems = [
        f"prompt {number}: {problem}"
        for number, row in enumerate(rows, 1)
        if (problem := beyond_context(model, len(row), max_new_tokens))
    ]
    if problems:
        raise GenerationError("Some prompts are too long.", problems, SHORTEN)


def beyond_context(model: keras.Model, tokens: int, max_new_tokens: int) -> str | None:
    """Describe a prompt that does not fit into the model's context; `None` for one that fits."""
    context = context_length(model)
    if tokens + max_new_tokens <= context:
        return None
    return (
        f"{tokens:,} tokens and `max_new_tokens={max_new_tokens:,}` are more than the model's "
        f"context of {context:,} tokens"
    )


SHORTEN = "Shorten the prompts, or lower `max_new_tokens`."

Call = tuple[Sequence[int], int]


@locked
def choose_programs(
    model: keras.Model,
    calls: Sequence[Call],
    sampler: Any,
    batch_size: int,
    *,
    most: int = MAX_BUFFERS,
    share: bool = False,
) -> ProgramShapes:
    """Few programs that serve several calls of `generate_ids`: those compiled before, and new ones.

    A program with too much room costs less than another compilation, so a new one must serve some
    batches, or the longest of a call.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        calls: For each call the lengths of its rows, in tokens, and its `max_new_tokens`.
        sampler: A KerasHub sampler.
        batch_size: Rows that run at once, at most.
        most: How many new programs may be compiled, at least 1.
        share: Run in programs for more rows where there are some already.

    Returns:
        Their shapes.
    """
    about = (SamplerState(sampler, None, 0).key, lora_config(model))
    there = [
        (size, chunk, buffer)
        for size, chunk, buffer, *rest in state_of(model).programs
        if tuple(rest) == about
    ]
    # Powers of two, so that calls with few prompts share programs.
    size = min(batch_size, 2 ** math.ceil(math.log2(max(len(lengths) for lengths, _ in calls))))
    if share:
        size = _shared_size(there, calls, size)
    chunks = {_chunk_for(max(lengths)) for lengths, _ in calls}
    known = {(chunk, buffer) for s, chunk, buffer in there if s == size and chunk in chunks}
    return ProgramShapes(size, frozenset(_kept_buffers(calls, size, known, most)))


def batches(rows: Sequence[Any], shapes: ProgramShapes, new_tokens: int) -> list[_Batch]:
    """Rows of similar length together, each batch in the smallest program that has room for it."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    longest = len(rows[order[0]])
    fitting = {c for c, buffer in shapes.buffers if _room(longest, c, new_tokens) <= buffer}
    chunk = _chunk_for(longest) if _chunk_for(longest) in fitting else min(fitting)
    found = []
    for i in range(0, len(order), shapes.size):
        group = tuple(order[i : i + shapes.size])
        length = len(rows[group[0]])
        need = _room(length, chunk, new_tokens)
        buffer = min(b for c, b in shapes.buffers if c == chunk and b >= need)
        found.append(_Batch(group, shapes.size, chunk, _chunks(length, chunk), buffer, new_tokens))
    return found


def _shared_size(there: Sequence[tuple[int, int, int]], calls: Sequence[Call], size: int) -> int:
    """Rows of the smallest program compiled already that has room for all calls, and not too much.

    Where there is none, it is `size`.
    """
    chunk, need = max(_needs(call, size)[0] for call in calls)
    roomy = (s for s, c, b in there if s >= size and c == chunk and need <= b <= MAX_ROOM * need)
    return min(roomy, default=size)


def _needs(call: Call, size: int) -> list[tuple[int, int]]:
    """Chunk and room of every batch of a call, the longest first."""
    lengths, new_tokens = sorted(call[0], reverse=True), call[1]
    chunk = _chunk_for(lengths[0])
    return [(chunk, _room(length, chunk, new_tokens)) for length in lengths[::size]]


def _kept_buffers(
    calls: Sequence[Call], size: int, known: set[tuple[int, int]], most: int
) -> set[tuple[int, int]]:
    """Chunk and room of each program to use."""
    kept = set(known)
    for call in sorted(calls, key=lambda call: max(call[0]), reverse=True):
        longest, new_tokens = max(call[0]), call[1]
        chunk, need = _needs(call, size)[0]
        good = any(c == chunk and need <= room <= MAX_ROOM * need for c, room in kept)
        fits = any(_room(longest, c, new_tokens) <= room for c, room in kept)
        if not good and (len(kept - known) < most or not fits):
            kept.add((chunk, need))
    for batch, count in Counter(
        need for call in calls for need in _needs(call, size)
    ).most_common():
        if len(kept) < most and count >= 4:
            kept.add(batch)
    return kept


def _chunk_for(longest: int) -> int:
    """Tokens to read at once where the longest prompt has so many."""
    return LONG_CHUNK if longest > LONG_PROMPT else SHORT_CHUNK


def _chunks(length: int, chunk: int) -> int:
    """Chunks that a row's tokens but the last fill."""
    return math.ceil((length - 1) / chunk)


def _room(length: int, chunk: int, new_tokens: int) -> int:
    """Tokens that a program needs room for: the next of 64, 96, 128, 192, 256, 384, …."""
    tokens = _chunks(length, chunk) * chunk + 1 + new_tokens + decoding.MAX_GUESSES
    power = max(SMALLEST_BUFFER, 2 ** math.ceil(math.log2(tokens)))
    return power * 3 // 4 if power > SMALLEST_BUFFER and tokens <= power * 3 // 4 else power


def cut(ids: np.ndarray, stops: tuple[int, ...]) -> tuple[np.ndarray, bool]:
    """New ids up to the first stop token, and whether there is one."""
    ends = np.flatnonzero(np.isin(ids, stops))
    return (ids[: ends[0]], True) if len(ends) else (ids, False)


def _run_batch(
    model: keras.Model,
    weights: list[Any],
    rows: Sequence[Any],
    batch: _Batch,
    stops: tuple[int, ...],
    state: SamplerState,
) -> list[np.ndarray]:
    (written,) = write_batch(model, weights, rows, batch, stops, state, every=batch.new_tokens)
    return written


def write_batch(
    model: keras.Model,
    weights: list[Any],
    rows: Sequence[Any],
    batch: _Batch,
    stops: tuple[int, ...],
    state: SamplerState,
    *,
    every: int,
) -> Iterator[list[np.ndarray]]:
    """Answer the rows of a batch, some tokens at a time, all in one program.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        weights: Its weights, as `weights_of` gives them.
        rows: Token ids of each prompt.
        batch: How they run.
        stops: Ids at which a row ends.
        state: The sampler, whose random state moves on.
        every: Tokens to write before each yield, at most.

    Yields:
        The new ids of each row so far, `[tokens]` int32 each, also those after a stop token.
    """
    program = _program(model, batch, state)
    tokens, starts = padded_rows(rows, batch)
    first = batch.chunks * batch.chunk
    at, done = np.full(batch.size, first, np.int32), np.arange(batch.size) >= len(rows)
    cache = decoding.empty_cache(model, batch.size, batch.buffer)
    read, padded = 0, padded_stops(stops)
    for new in (*range(every, batch.new_tokens, every), batch.new_tokens):
        cache, *moved = program(
            weights, cache, state.values, tokens, starts, at, done,
            np.array([read, batch.chunks], np.int32), np.int32(first + new), padded,
        )  # fmt: skip
        # As NumPy's, they are of one kind in every call: else JAX would compile again.
        state.values, tokens, at, done = keras.tree.map_structure(np.asarray, moved)
        read = batch.chunks
        yield [tokens[i, first + 1 : at[i] + 1] for i in range(len(rows))]
        if done.all():
            return


def padded_rows(rows: Sequence[Any], batch: _Batch) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[batch, buffer]` with every prompt ending at one place, and where each begins."""
    end = batch.chunks * batch.chunk + 1
    tokens = np.zeros((batch.size, batch.buffer), np.int32)
    starts = np.full(batch.size, end - 1, np.int32)
    for place, row in enumerate(rows):
        tokens[place, end - len(row) : end] = row
        starts[place] = end - len(row)
    return tokens, starts


def padded_stops(stops: tuple[int, ...]) -> np.ndarray:
    """Stop ids, filled up so that their number does not compile anew.

    With examples in the prompt every run of line breaks is one: some 30 tokens of Gemma's.
    """
    size = max(1, -(-len(stops) // STOPS_AT_ONCE)) * STOPS_AT_ONCE
    padded = np.full(size, -1, np.int32)
    padded[: len(stops)] = stops
    return padded


def _program(model: keras.Model, batch: _Batch, state: SamplerState) -> Callable[..., Any]:
    """The compiled program for a batch: made once for a model, shape and sampler."""
    sampler, chunk = None if state.is_greedy else state.sampler, batch.chunk

    def write(traced: keras.Model, weights: Any, *arguments: Any) -> Any:
        return decoding.write(traced, weights, sampler, chunk, *arguments)

    return _compiled(model, (batch.size, chunk, batch.buffer, state.key), write)


def _compiled(
    model: keras.Model, about: tuple[Any, ...], function: Callable[..., Any]
) -> Callable[..., Any]:
    """Compile a function of a model, or return what was compiled before.

    Weights are arguments, so a program stays good while they are trained, and serves the base and
    every adapter. The model is held weakly, so a program does not keep it alive.

    Args:
        model: A KerasHub Gemma `CausalLM`.
        about: Key of the function. What is compiled holds for one LoRA of the model.
        function: Takes the model, its packed weights, a cache to write over, and more arrays.
    """
    import jax

    programs, key = state_of(model).programs, (*about, lora_config(model))
    if key not in programs:
        reference = weakref.ref(model)

        def program(weights: Any, *arguments: Any) -> Any:
            traced = reference()
            assert traced is not None, "a program outlived its model"
            state_of(traced).compilations += 1
            with decoding.bound(traced, weights), lora_switched(traced, on=True):
                return function(traced, weights, *arguments)

        programs[key] = jax.jit(program, donate_argnums=1)  # the cache is large
    return programs[key]
