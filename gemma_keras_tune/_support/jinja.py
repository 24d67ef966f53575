"""Chat templates of others, rendered in Jinja's sandbox.

This file imports nothing of the package: a process that has little time and memory runs it alone.
"""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

BOS, EOS = "<bos>", "<eos>"
_MOST = 1 << 24  # characters written for one conversation


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = time.strftime
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def render_chat(source: str, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
    """Render a chat template as transformers does.

    Args:
        source: The template.
        messages: Dictionaries with `role` and `content`.
        generation_prompt: True to end where the answer begins.

    Returns:
        The text.

    Raises:
        jinja2.TemplateError: The template is broken, refuses the messages, or writes too much.
    """
    parts, length = [], 0
    written = _compiled(source).generate(
        messages=list(messages),
        add_generation_prompt=generation_prompt,
        bos_token=BOS,
        eos_token=EOS,
        pad_token="<pad>",
        unk_token="<unk>",
        tools=None,
    )
    for part in written:
        parts.append(part)
        length += len(part)
        if length > _MOST:
            raise jinja2.TemplateError(f"it writes more than {_MOST:,} characters")
    return "".join(parts)
