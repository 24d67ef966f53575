"""A folder for Ollama: the GGUF file and the Modelfile that serves it as it was tuned.

Ollama applies adapters to Llama and Gemma 2 alone, so the model goes out merged. It does not read
the chat template of a GGUF file for every model either: the Modelfile brings the prompt format in
Go's template language, derived from the very template the model was tuned with.

Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
"""

import dataclasses
import json
import pathlib
import warnings
from typing import Any

import keras

from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.gguf import writer as gguf_writer
from gemma_keras_tune.formats.weights import Progress
from gemma_keras_tune.gemma.templates import FunctionTemplate, Template, get_template

MODELFILE = "Modelfile"

_TERMS = "Gemma is provided under the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
# Private-use characters: what a template writes around them can be told from what it was given.
_SYSTEM, _PROMPT, _ANSWER, _NEXT = "\ue000", "\ue001", "\ue002", "\ue003"
_FIELDS = {_SYSTEM: "{{ .System }}", _PROMPT: "{{ .Prompt }}"}

_NO_TOOLS = (
    "The Modelfile writes no tools and no calls: Ollama's template language cannot write them as "
    "the model was tuned. To serve tools, give the GGUF file to llama.cpp "
    "(`llama-server --jinja`), which reads the template in it."
)

# Ollama would sample, punish what was said before, and forget everything beyond 4,096 tokens. So it
# answers as `generate` does, and as far back as the shortest context of a Gemma reaches.
_PARAMETERS = {"temperature": 0, "top_k": 1, "repeat_penalty": 1, "num_ctx": 8192}


@dataclasses.dataclass(frozen=True, slots=True)
class _Message:
    role: str
    content: str


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    progress: Progress = lambda name, done, total: None,
    **options: Any,
) -> None:
    """Write a GGUF file and its Modelfile. Then `ollama create my-model -f Modelfile` there.

    Args:
        model: A KerasHub `CausalLM` of Gemma 1, 2, 3, 3n or 4.
        folder: An existing folder.
        dtype: As for `gguf_writer.write`.
        progress: As for `gguf_writer.write`.
        **options: `quantization`, as for `gguf_writer.write`.

    Raises:
        ExportError: The template is a Python function, or GGUF cannot carry the model.
    """
    template = get_template(model)
    text = modelfile(template)
    if template.tool_format:
        warnings.warn(_NO_TOOLS, UserWarning, stacklevel=4)
    gguf_writer.write(model, folder, dtype=dtype, progress=progress, **options)
    (folder / MODELFILE).write_text(text, encoding="utf-8")


def modelfile(template: Template, *, file_name: str = gguf_writer.FILE_NAME) -> str:
    """The Modelfile for a GGUF file beside it.

    Args:
        template: What the model was tuned with.
        file_name: Name of the GGUF file.

    Returns:
        The text of the Modelfile.

    Raises:
        ExportError: The template is a Python function.
    """
    parameters = [f"PARAMETER {name} {value}" for name, value in _PARAMETERS.items()]
    parameters += [f"PARAMETER stop {json.dumps(token)}" for token in template.stop_tokens]
    return "\n".join(
        [
            f"FROM ./{file_name}",
            f'TEMPLATE """{go_template(template)}"""',
            *parameters,
            f'LICENSE """{_TERMS}"""',
            "",
        ]
    )


def go_template(template: Template) -> str:
    """A template in Go's language, for one exchange, as Ollama repeats it.

    Ollama fills in the exchanges of a conversation one by one, the system text in the first, and
    ends the last at `.Response`. Ollama leaves white space around a message that the published
    Gemma formats cut away.

    Args:
        template: Any template but a Python function.

    Returns:
        The text of Ollama's `TEMPLATE`.

    Raises:
        ExportError: The template is a Python function.
    """
    if isinstance(template, FunctionTemplate):
        raise ExportError(
            f"The template is the Python function {template.name}, which Ollama cannot run.",
            next_step="Tune with a template string such as '{prompt}\\n{response}', or serve the "
            "GGUF file with the prompts written out.",
        )
    user, system = _Message("user", _PROMPT), _Message("system", _SYSTEM)
    plain = _prompt(template, user)
    with_system = _prompt(template, system, user)
    return (
        "{{ if .System }}" + _go(with_system) + "{{ else }}" + _go(plain) + "{{ end }}"
        "{{ .Response }}" + _literal(_between(template))
    )  # fmt: skip


def _prompt(template: Template, *messages: _Message) -> str:
    return "".join(s.text for s in template.segments(messages, generation_prompt=True))


def _between(template: Template) -> str:
    """Text between an answer and the next exchange."""
    following = _Message("user", _NEXT)
    text = _prompt(template, _Message("user", _PROMPT), _Message("assistant", _ANSWER), following)
    after = text.partition(_ANSWER)[2]
    return after.removesuffix(_prompt(template, following))


def _go(text: str) -> str:
    for mark, field in _FIELDS.items():
        before, found, after = text.partition(mark)
        if found:
            return _go(before) + field + _go(after)
    return _literal(text)


def _literal(text: str) -> str:
    """Text that Go's templates and the Modelfile's quotes leave as it is."""
    if "{{" in text or '"' in text:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}"
    return text
