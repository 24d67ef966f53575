"""Open a GGUF file in llama.cpp."""

import dataclasses
import importlib
import json
import pathlib
import urllib.request
from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_keras_tune.errors import ExportError

_PACKAGE = "xllamacpp"
# llama.cpp's server takes logarithms of float32 probabilities: below the smallest normal one they
# have few bits left, and of 0 it writes the lowest float32.
_NO_CHANCE = -87.0
# Seconds: the longest answer to wait for.
_TIMEOUT = 600
# Added to a logit, it outweighs any other.
_FORCE = 10_000.0


class NotRunError(ExportError):
    """A runtime that cannot be asked, with the reason."""


@dataclasses.dataclass
class LlamaCpp:
    """A GGUF file opened in llama.cpp, through xllamacpp's server on a local port.

    Attributes:
        path: The file.
        vocabulary: Number of its tokens.
        letter: Id of a token of plain text. llama.cpp's server leaves out the probabilities of a
            step that writes a stop token or half a character, so a bias on the logits forces this
            token; the probabilities are those before the bias.
        server: The `xllamacpp.Server`.
        name: The runtime's name.
    """

    path: pathlib.Path
    vocabulary: int
    letter: int
    server: Any
    name: str = "llama.cpp"

    def tokenize(self, text: str) -> list[int]:
        """Tokenize a text, with special tokens parsed and `<bos>` added as llama.cpp does.

        Args:
            text: Any text.

        Returns:
            Token ids.
        """
        request = {"content": text, "add_special": True, "parse_special": True}
        return [int(i) for i in self._post("/tokenize", request)["tokens"]]

    def next_logits(self, ids: list[int]) -> np.ndarray:
        """Compute the log-probabilities of the token that follows.

        Args:
            ids: Token ids.

        Returns:
            `[vocabulary]` float32, minus infinity below -87, where a probability underflows.
        """
        row = np.full(self.vocabulary, -np.inf, np.float32)
        answer = self._complete(ids, 1, n_probs=self.vocabulary, logit_bias=[[self.letter, _FORCE]])
        for found in answer["completion_probabilities"][0]["top_logprobs"]:
            row[found["id"]] = found["logprob"]
        return np.where(row < _NO_CHANCE, -np.inf, row)

    def generate(self, ids: list[int], max_new_tokens: int) -> list[int]:
        """Continue greedily until llama.cpp itself stops.

        Args:
            ids: Token ids of the prompt.
            max_new_tokens: At most this many.

        Returns:
            The new ids, the stop token left out.
        """
        answer = self._complete(ids, max_new_tokens)
        new = [int(i) for i in answer["tokens"]]
        return new[:-1] if answer["stop_type"] == "eos" else new

    def close(self) -> None:
        """Shut the server down and free the model."""
        self.server = None

    def _complete(self, ids: list[int], count: int, **options: Any) -> dict[str, Any]:
        request = {
            "prompt": [int(i) for i in ids],
            "n_predict": count,
            "temperature": 0.0,
            "return_tokens": True,
            "cache_prompt": False,
            **options,
        }
        return self._post("/completion", request)

    def _post(self, route: str, content: Mapping[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.server.listening_address + route,
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        # Past any proxy: the server runs in this process.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=_TIMEOUT) as response:
                answer: dict[str, Any] = json.load(response)
        except (OSError, ValueError) as error:
            raise ExportError(f"llama.cpp failed on {self.path}.", [str(error)]) from error
        return answer


def open_runtime(
    path: pathlib.Path, *, adapter: pathlib.Path | None = None, context_length: int = 2048
) -> LlamaCpp:
    """Open a GGUF file in llama.cpp.

    Args:
        path: The file, or a folder with one.
        adapter: A LoRA in GGUF to apply, as `--lora` does.
        context_length: The longest prompt and answer together, in tokens.

    Returns:
        A runtime that tokenizes, scores and generates.

    Raises:
        NotRunError: xllamacpp is not installed.
        ExportError: llama.cpp cannot load the file.
    """
    try:
        xllamacpp = importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        raise NotRunError(
            f"llama.cpp is not installed: pip install {_PACKAGE}, or gemma-keras-tune[interop]"
        ) from error
    file = _only_file(pathlib.Path(path))
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = context_length
    params.n_parallel = 1
    params.warmup = False
    params.verbosity = -1
    # What is judged is the file, not llama.cpp's rounding of what it remembers and attends to.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [_lora(xllamacpp, adapter)]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ExportError(f"llama.cpp cannot load {file}.", [str(error)]) from error
    from gemma_keras_tune.formats.gguf.reader import read_header

    tokens = read_header(file).metadata["tokenizer.ggml.tokens"]
    letter = next(i for i, token in enumerate(tokens) if token.isalpha())
    return LlamaCpp(file, len(tokens), letter, server)


def _lora(xllamacpp: Any, path: pathlib.Path) -> Any:
    info = xllamacpp.CommonAdapterLoraInfo()
    info.path, info.scale = str(path), 1.0
    return info


def _only_file(path: pathlib.Path) -> pathlib.Path:
    if path.is_file():
        return path
    files = sorted(path.glob("*.gguf"))
    if len(files) != 1:
        raise ExportError(f"{path} must hold one .gguf file. Found: {len(files)}")
    return files[0]
