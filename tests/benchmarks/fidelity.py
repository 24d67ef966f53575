"""Does every runtime answer as the model in memory does? One tuned model, handed to all of them.

    python tests/benchmarks/fidelity.py [--json FILE]

Tunes the embedded Gemma 3 270M on 20 short pairs until it knows them, exports it to every target,
opens each in its own runtime, and compares 20 prompts: greedy answers token by token, and the
logits at the last eight places of prompt and answer (largest absolute difference). llama.cpp gives
log-probabilities, so both sides are normalised for it, at the last place, where they do not
underflow. On a CPU it takes GELU from a table in float16, which shows in them: so the float32 file
is also read back by `load`. Then the base: its answers and hidden states with an adapter loaded and
off, bit for bit; and switching between two adapters, until the other weights are in place.

Every export is timed as a user calls it, answers recorded. `export_peak_ratio` is the resident
memory it takes beyond the process that holds the model, in shards: one is the largest file of the
safetensors folder, cut at `SHARD_SIZE`; a tensor beyond that, such as the embedding, has one to
itself. The model in memory and one shard are a ratio of 1.

LiteRT-LM tells texts alone, so it has no `max_abs_difference`: they must be the same to the letter,
ended by its own stop tokens.

Runtimes that are not installed give null; one that fails ends the run. transformers, PEFT and
llama.cpp come with `pip install ".[interop]"`; `GEMMA_JAX_PYTHON` names a Python with the Gemma
library, `LITERT_PYTHON` one with `litert-torch` and `litert-lm-api`.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import _bench
import jax
import numpy as np
from _peak_memory import PeakMemory
from _short_pairs import short_pairs

import gemma_keras_tune as gkt
from gemma_keras_tune.exporting import llama_cpp
from gemma_keras_tune.gemma.templates import attach_template
from gemma_keras_tune.generation.answers import compiled_programs

PROMPTS = 20
NEW_TOKENS = 24
POSITIONS = 8
SHARD_SIZE = "200MB"
WORKER = pathlib.Path(__file__).with_name("_fidelity_worker.py")
TWINS = pathlib.Path(__file__).parent.parent / "runtimes"
GEMMA_JAX = os.environ.get("GEMMA_JAX_PYTHON", sys.executable)
LITERT = os.environ.get("LITERT_PYTHON", sys.executable)


class Reference:
    """What the model in memory says, its adapter on."""

    def __init__(self, model: Any, prompts: list[str]) -> None:
        self.prompts = prompts
        template = gkt.template_of(model) or gkt.get_template(model)
        tokenizer = model.preprocessor.tokenizer
        self.stops = np.array(sorted(template.stop_token_ids(tokenizer)))
        from gemma_keras_tune.generation.answers import encode_prompts

        rows = encode_prompts(prompts, template, tokenizer)
        self.rendered = [tokenizer.detokenize(row[1:]) for row in rows]
        answers = gkt.generate_answers(model, prompts, max_new_tokens=NEW_TOKENS)
        self.texts = [answer.text for answer in answers]
        self.written = np.full((len(rows), NEW_TOKENS), -1, np.int32)
        self.lengths = np.array([len(r) + len(a.ids) for r, a in zip(rows, answers, strict=True)])
        self.starts = np.array([len(row) for row in rows])
        self.ids = np.zeros((len(rows), self.lengths.max()), np.int32)
        for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
            self.written[i, : len(answer.ids)] = answer.ids
            self.ids[i, : self.lengths[i]] = np.concatenate([row, answer.ids])
        self.logits = self.logits_of(model)

    def hidden_of(self, model: Any) -> np.ndarray:
        """`[rows, POSITIONS, width]`: hidden states at the places that are compared."""
        mask = (np.arange(self.ids.shape[1])[None] < self.lengths[:, None]).astype("int32")
        hidden = np.asarray(model.backbone({"token_ids": self.ids, "padding_mask": mask}))
        return np.stack([hidden[i, n - POSITIONS : n] for i, n in enumerate(self.lengths)])

    def logits_of(self, model: Any) -> np.ndarray:
        """`[rows, POSITIONS, vocabulary]`."""
        embedding = np.asarray(model.backbone.token_embedding.embeddings)
        return self.hidden_of(model) @ embedding.T

    def request(self, **more: Any) -> dict[str, Any]:
        """What a worker is asked."""
        return {
            "ids": self.ids, "lengths": self.lengths, "prompts": self.starts, "stops": self.stops,
            "positions": POSITIONS, **more,
        }  # fmt: skip


def asked(python: str, runtime: str, reference: Reference, **more: Any) -> dict[str, Any]:
    """What a runtime answers in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = (str(pathlib.Path(folder, name)) for name in ("in.npz", "out.npz"))
        np.savez(request, **reference.request(**more))
        done = subprocess.run(
            [python, str(WORKER), runtime, request, answer],
            capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{runtime}: {done.stderr[-3000:]}")
        return dict(np.load(answer))


def normalised(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def compare(reference: Reference, found: dict[str, Any]) -> tuple[int, float]:
    """Equal answers, and the largest difference of logits."""
    same = int((found["written"] == reference.written).all(axis=1).sum())
    return same, float(np.abs(found["logits"] - reference.logits).max())


def from_llama_cpp(path: pathlib.Path, reference: Reference) -> tuple[int, float]:
    """llama.cpp, through a binding."""
    runtime = llama_cpp.open_runtime(path)
    same, largest = 0, 0.0
    try:
        for i, (start, length) in enumerate(zip(reference.starts, reference.lengths, strict=True)):
            ids = reference.ids[i, :length].tolist()
            new = runtime.generate(ids[:start], NEW_TOKENS)
            mine = reference.written[i]
            same += new == mine[mine >= 0].tolist()
            expected = normalised(reference.logits[i, -1])
            given = runtime.next_logits(ids)
            some = np.isfinite(given)
            largest = max(largest, float(np.abs(given - expected)[some].max()))
    finally:
        runtime.close()
    return same, largest


def from_litert(path: pathlib.Path, reference: Reference) -> int:
    """Equal texts of LiteRT-LM, as it ends them itself; it gives no logits."""
    with tempfile.TemporaryDirectory() as folder:
        request, answer = (pathlib.Path(folder, name) for name in ("in.json", "out.json"))
        request.write_text(json.dumps({"texts": reference.rendered}))
        twin = TWINS / "litert_twin.py"
        file = next(path.rglob("*.litertlm"))
        done = subprocess.run(
            [LITERT, twin, file, request, answer], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"litert: {done.stderr[-3000:]}")
        texts = json.loads(answer.read_text())["texts"]
    pairs = zip(texts, reference.texts, strict=True)
    return sum(given == mine != "" for given, mine in pairs)


def has(*names: str) -> bool:
    return all(importlib.util.find_spec(name) for name in names)


def can(python: str, code: str) -> bool:
    return subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0


def main() -> None:
    options = _bench.arguments(__doc__)
    keys = ("preset", "adapter_peft", "safetensors", "gguf_f32", "gguf_f32_read_back", "gguf_f16",
            "gguf_q8_0", "gemma_jax", "litert")  # fmt: skip
    same: dict[str, int | None] = dict.fromkeys(keys)
    largest: dict[str, float | None] = dict.fromkeys(keys)
    seconds: dict[str, float] = {}
    grown: dict[str, int] = {}
    model = gkt.load(_bench.MODEL)
    pairs = short_pairs(PROMPTS)
    untouched = gkt.generate(model, [p for p, _ in pairs], max_new_tokens=NEW_TOKENS,
                             template="{prompt}\n{response}")  # fmt: skip
    gkt.tune(model, pairs, rank=8, template="{prompt}\n{response}", epochs=20, learning_rate=1e-3,
             verbose=0)  # fmt: skip
    reference = Reference(model, [prompt for prompt, _ in pairs])
    known = sum(text == answer for text, (_, answer) in zip(reference.texts, pairs, strict=True))
    print(f"  tuned: {known} of {PROMPTS} answers are those of the pairs", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)

        def note(key: str, found: tuple[int, float]) -> None:
            same[key], largest[key] = found
            print(f"  {key:14} {found[0]:2d} of {PROMPTS} answers equal, logits within "
                  f"{found[1]:.1e}", flush=True)  # fmt: skip

        def written(key: str, name: str = "", **more: Any) -> pathlib.Path:
            path = folder / (name or key)
            with PeakMemory() as memory:
                gkt.export(model, path, verbose=0, **more)
            seconds[key], grown[key] = memory.seconds, memory.grown
            return path

        gkt.save_preset(model, folder / "preset")
        note("preset", compare(reference, asked(sys.executable, "keras", reference,
                                                path=str(folder / "preset"))))  # fmt: skip
        gkt.save_adapter(model, folder / "adapter")
        whole = written("safetensors", shard_size=SHARD_SIZE)
        shard = max(file.stat().st_size for file in whole.glob("*.safetensors"))
        if has("transformers", "torch"):
            found = asked(sys.executable, "transformers", reference, path=str(whole))
            note("safetensors", compare(reference, found))
        if has("peft", "torch"):
            base = folder / "base"
            gkt.export(gkt.load(_bench.MODEL), base, format="safetensors", verbose=0)
            found = asked(sys.executable, "transformers", reference, path=str(base),
                          adapter=str(folder / "adapter"))  # fmt: skip
            note("adapter_peft", compare(reference, found))
        for key, more in (("gguf_f32", {"dtype": "float32"}), ("gguf_f16", {}),
                          ("gguf_q8_0", {"quantization": "Q8_0"})):  # fmt: skip
            file = written(key, f"{key}.gguf", **more)
            if has("xllamacpp"):
                note(key, from_llama_cpp(file, reference))
        again = gkt.load(folder / "gguf_f32.gguf")
        attach_template(again, gkt.template_of(model))
        note("gguf_f32_read_back", compare(reference, vars(Reference(again, reference.prompts))))
        if can(GEMMA_JAX, "from gemma import gm"):
            path = written("gemma_jax", format="gemma_jax")
            found = asked(GEMMA_JAX, "gemma_jax", reference, path=str(path / "params"))
            note("gemma_jax", compare(reference, found))
        if can(LITERT, "import litert_lm, litert_torch"):
            os.environ["LITERT_PYTHON"] = LITERT
            same["litert"] = from_litert(written("litert", format="litert"), reference)
            print(f"  litert         {same['litert']} of {PROMPTS} answers equal")
        figures = {
            "same_of_20": same,
            "max_abs_difference": largest,
            **switching(model, folder, reference, untouched),
            "export_seconds": seconds,
            "export_peak_ratio": {key: taken / shard for key, taken in grown.items()},
        }
    rest = [f"  {k:20} {v}" for k, v in figures.items() if not isinstance(v, dict)]
    rest += [
        f"  {key:20} {seconds[key]:6.1f} s, peak beyond the model {taken / 1e6:,.0f} MB: "
        f"{taken / shard:.2f} shards of {shard / 1e6:,.0f} MB"
        for key, taken in grown.items()
    ]
    _bench.report("Fidelity of hand-overs, Gemma 3 270M, 20 prompts", rest, figures, options.json)


def switching(
    model: Any, folder: pathlib.Path, reference: Reference, untouched: list[str]
) -> dict[str, Any]:
    """Two adapters on one base: does the base stay itself, and what does a switch cost?"""
    fresh = gkt.load(_bench.MODEL)
    hidden = reference.hidden_of(fresh)
    for name in ("one", "two"):
        gkt.load_adapter(fresh, folder / "adapter", name=name)
    ask = dict(max_new_tokens=NEW_TOKENS, template="{prompt}\n{response}")
    gkt.generate(fresh, reference.prompts, adapter="one", **ask)
    made = compiled_programs(fresh)
    times = []
    for name in ("two", "one", "two", "one"):
        begin = time.perf_counter()
        with gkt.adapters.use(fresh, name):
            jax.block_until_ready([variable.value for variable in fresh.variables])
            times.append(time.perf_counter() - begin)
        gkt.generate(fresh, reference.prompts, adapter=name, **ask)
    base = gkt.generate(fresh, reference.prompts, adapter=None, **ask)
    with gkt.adapters.use(fresh, None):
        equal = bool((reference.hidden_of(fresh) == hidden).all())
    return {
        "base_untouched": int(equal and base == untouched),
        "switch_compilations": compiled_programs(fresh) - made,
        "switch_ms": 1000 * max(times),
    }


if __name__ == "__main__":
    main()
