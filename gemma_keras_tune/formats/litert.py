"""A `.litertlm` file for LiteRT-LM, Google's runtime for phones and browsers.

Google's converter (`litert-torch`) turns a Hugging Face folder into it, so that folder is written
first and given to the converter in a process of its own: torch beside TensorFlow may crash. The
converter may be in another environment: the variable `LITERT_PYTHON` names its Python.

Of Gemma 3 the converted graph computes the very logits, and LiteRT-LM (0.18) answers alike.
Of Gemma 1 and 2 the graph does too, but LiteRT-LM broke off an answer of Gemma 2; of Gemma 3n the
graph computes others; and of Gemma 4 the converter (0.10, with transformers 5.23) makes none.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import keras

from gemma_keras_tune.errors import ExportError
from gemma_keras_tune.formats.hugging_face import writer as hugging_face_writer
from gemma_keras_tune.formats.weights import Progress
from gemma_keras_tune.gemma.families import family_of

FILE_NAME = "model.litertlm"
PYTHON_VARIABLE = "LITERT_PYTHON"
# The longest conversation in tokens: LiteRT reserves the memory for it.
CONTEXT_LENGTH = 2048

_PREFILL_LENGTHS = (128,)
_NOT_INSTALLED = 3
_LAST_LINES = 12
# Seconds: a 270M takes a few minutes.
_TIMEOUT = 4 * 3600
_CONVERT = f"""
import importlib.util, sys
names = ("litert_torch", "litert_lm_builder", "torch", "transformers")
missing = [name for name in names if importlib.util.find_spec(name) is None]
if missing:
    print("missing: " + ", ".join(missing))
    sys.exit({_NOT_INSTALLED})
from litert_torch.generative.export_hf.export import export
export(
    sys.argv[1],
    sys.argv[2],
    prefill_lengths={list(_PREFILL_LENGTHS)},
    cache_length={CONTEXT_LENGTH},
    quantization_recipe="none",
    bundle_litert_lm=True,
)
"""


def write(
    model: keras.Model,
    folder: pathlib.Path,
    *,
    dtype: str = "auto",
    progress: Progress = lambda name, done, total: None,
) -> None:
    """Write `model.litertlm`, with tokenizer, chat template and stop tokens in it.

    It is not read back: to work on, keep the model it is made of.

    Args:
        model: A KerasHub `CausalLM` of Gemma 3. Of a model that sees, the text tower.
        folder: An existing folder.
        dtype: `"float32"` or `"auto"`, which is float32 too.
        progress: Called for each weight of the folder in between; the conversion follows, and
            takes minutes.

    Raises:
        ExportError: The converter is not installed or fails, or it is another family.
    """
    _check(model, dtype)
    with tempfile.TemporaryDirectory(dir=folder) as space:
        source, made = pathlib.Path(space, "source"), pathlib.Path(space, "made")
        source.mkdir()
        hugging_face_writer.write(model, source, dtype="float32", progress=progress)
        _convert(source, made)
        files = sorted(made.glob("*.litertlm"))
        if len(files) != 1:
            raise ExportError(f"The converter made {len(files)} .litertlm files; 1 was expected.")
        files[0].replace(folder / FILE_NAME)


def _check(model: keras.Model, dtype: str) -> None:
    if dtype not in ("auto", "float32"):
        raise ExportError(
            f"LiteRT files are written in float32. Received: dtype={dtype!r}",
            next_step="To quantize, export 'safetensors' and pass `quantization_recipe` to "
            "`litert_torch.generative.export_hf.export.export(folder, output_dir)`.",
        )
    family = family_of(model)
    if not family.litert:
        raise ExportError(
            f"{family.title} is not written for LiteRT: of Gemma 3 alone the file answers alike.",
            next_step="Export 'safetensors' instead, which Google's converter may take.",
        )


def _convert(source: pathlib.Path, made: pathlib.Path) -> None:
    python = os.environ.get(PYTHON_VARIABLE, sys.executable)
    try:
        done = subprocess.run(
            [python, "-c", _CONVERT, str(source), str(made)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"},
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise ExportError(
            f"Google's converter to LiteRT took more than {_TIMEOUT:,} seconds.",
            next_step="Export 'safetensors', and convert that folder on a larger machine.",
        ) from error
    except OSError as error:
        raise ExportError(f"{PYTHON_VARIABLE}={python} cannot be run: {error}") from error
    if done.returncode == _NOT_INSTALLED:
        raise ExportError(
            "Google's converter to LiteRT is not installed.",
            [f"{python}: {done.stdout.strip()}"],
            "pip install litert-torch tensorflow, best in an environment of its own whose Python "
            f"{PYTHON_VARIABLE} names. Or export 'safetensors' and convert the folder elsewhere: "
            "`litert_torch.generative.export_hf.export.export(folder, output_dir)`.",
        )
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines()
        raise ExportError(
            "Google's converter to LiteRT failed.",
            lines[-_LAST_LINES:],
            "The Hugging Face folder that it was given can be had with format='safetensors'.",
        )
