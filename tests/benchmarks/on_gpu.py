"""One GPU: ours against KerasHub's recipe and PEFT, and the checks that need a device.

    python tests/benchmarks/on_gpu.py [--json FILE] [--minutes 8] [--sizes 270M 1B 4B]

Needs no network and no TensorFlow: the models have random weights at the published sizes of
Gemma 3, in bfloat16, and the rows are random token ids, 4 of 512 of which 128 are trained. LoRA is
of rank 4 on query and value. Each contender runs in a process of its own: a first epoch to compile,
then the best of three epochs of eight steps. KerasHub runs the loss of its recipe over all logits.
PEFT runs on transformers as its documentation shows, with AdamW, and again with gradient
checkpointing. What does not fit, or for which no time is left, is named and left out.

Model FLOPs of a step are 4 x parameters x tokens (forward, and the gradient of the activations: the
weights are frozen), with the embedding counted at the trained positions alone, and
8 x blocks x length x width of the heads x tokens for attention. MFU divides them by the time and
the peak of the device's data sheet. Recomputation counts no further FLOPs.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

ROWS, LENGTH, RESPONSE, STEPS, EPOCHS = 4, 512, 128, 8, 4
RANK, RATE, VOCABULARY = 4, 5e-5, 262144
NEW_TOKENS = 128
# Dense bfloat16 FLOP/s of the data sheets, by a part of the device's name.
PEAKS = {"H200": 989e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L4": 121e12}
CONTENDERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("ours", {}),
    ("ours, recomputed", {"rematerialize": True}),
    ("ours, int8", {"quantize": "int8"}),
    ("ours, int8, recomputed", {"quantize": "int8", "rematerialize": True}),
    ("KerasHub", {}),
    ("PEFT", {}),
    ("PEFT, checkpointing", {"checkpointing": True}),
)


def batch() -> tuple[dict[str, Any], Any, Any, Any]:
    """Inputs, trained positions, and labels and weights `[rows, length]`."""
    import numpy as np

    ids = np.random.default_rng(0).integers(3, VOCABULARY, (ROWS, LENGTH), dtype=np.int32)
    labels = np.roll(ids, -1, axis=1)
    weights = np.zeros((ROWS, LENGTH), np.float32)
    weights[:, LENGTH - RESPONSE - 1 : -1] = 1
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    return x, np.flatnonzero(weights), labels, weights


def random_gemma(size: str, quantize: str | None = None) -> Any:
    """A KerasHub Gemma 3 of a published size with random weights and no preprocessor."""
    import _shapes
    import keras
    import numpy as np

    from gemma_keras_tune.gemma.families import FAMILIES
    from gemma_keras_tune.gemma.quantization import quantizing

    random = np.random.default_rng(0)
    with quantizing(quantize):
        backbone = _shapes.gemma3_backbone(size, "bfloat16")
        for variable in backbone.variables:
            if keras.backend.is_float_dtype(variable.dtype):
                values = random.standard_normal(variable.shape, np.float32) * 0.02
                variable.assign(values.astype(variable.dtype))
    return FAMILIES["gemma3"].causal_lm_class(backbone=backbone, preprocessor=None)


def timed(epoch: Any) -> dict[str, float]:
    """Seconds of the first step with its compilation, and of a step in the best later epoch."""
    seconds = []
    for _ in range(EPOCHS):
        begin = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - begin)
    step = min(seconds[1:]) / STEPS
    return {"compile_seconds": seconds[0] - STEPS * step, "step_seconds": step}


def keras_epochs(model: Any, data: tuple[Any, ...]) -> dict[str, float]:
    """Times of a Keras model that is compiled, on one batch again and again."""
    import jax
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self) -> int:
            return STEPS

        def __getitem__(self, index: int) -> tuple[Any, ...]:
            return data

    batches = Batches()
    found = timed(lambda: model.fit(batches, epochs=1, shuffle=False, verbose=0))
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    return {**found, "peak_bytes": peak}


def ours(size: str, rematerialize: bool = False, quantize: str | None = None) -> dict[str, Any]:
    import numpy as np

    import gemma_keras_tune as gkt

    model = random_gemma(size, quantize)
    gkt.enable_lora(model, RANK, target_modules=("q_proj", "v_proj"), verbose=0)
    trainer = gkt.TuningModel(model, rematerialize=rematerialize)
    trainer.compile(gkt.make_optimizer(RATE, steps=1000))
    x, positions, labels, _ = batch()
    x["positions"] = positions.astype(np.int32)
    share = np.full(len(positions), 1 / len(positions), np.float32)
    found = keras_epochs(trainer, (x, labels.reshape(-1)[positions], share))
    if not quantize and not rematerialize:
        found["decode_tokens_per_second"] = decoding(model)
    return found


def decoding(model: Any) -> float:
    """Tokens a second of greedy answers to four prompts of 32 tokens, compiled."""
    import numpy as np

    from gemma_keras_tune.generation.answers import generate_ids

    prompts = [np.arange(3, 35, dtype=np.int32)] * ROWS
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        found = generate_ids(model, prompts, stop_token_ids=[1], max_new_tokens=NEW_TOKENS)
        seconds.append(time.perf_counter() - begin)
    return sum(len(ids) for ids, _ in found) / min(seconds[1:])


def kerashub(size: str) -> dict[str, Any]:
    import keras

    gemma = random_gemma(size)
    gemma.backbone.enable_lora(rank=RANK)
    # KerasHub's own `fit` needs TensorFlow to read the rows; the step is the same.
    model = keras.Model(gemma.input, gemma.output)
    model.compile(
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        optimizer=keras.optimizers.AdamW(learning_rate=RATE, weight_decay=0.01),
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy()],
    )
    x, _, labels, weights = batch()
    return keras_epochs(model, (x, labels, weights))


def peft(size: str, checkpointing: bool = False) -> dict[str, Any]:
    import torch
    import transformers
    from _shapes import GEMMA3
    from peft import LoraConfig, get_peft_model

    sizes = GEMMA3[size]
    config = transformers.Gemma3TextConfig(
        vocab_size=VOCABULARY, head_dim=sizes.get("head_dim", 256),
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_query_heads"],
        num_key_value_heads=sizes["num_key_value_heads"], hidden_size=sizes["hidden_dim"],
        intermediate_size=sizes["intermediate_dim"], sliding_window=sizes["sliding_window_size"],
    )  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.Gemma3ForCausalLM(config).to(device, torch.bfloat16)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    targets = ["q_proj", "v_proj"]
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    x, _, _, weights = batch()
    ids = torch.tensor(x["token_ids"], dtype=torch.long, device=device)
    trained = torch.roll(torch.tensor(weights > 0, device=device), 1, dims=1)
    labels = torch.where(trained, ids, -100)

    def epoch() -> None:
        for _ in range(STEPS):
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    found: dict[str, Any] = timed(epoch)
    found["peak_bytes"] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    return found


def checks() -> dict[str, Any]:
    """The loss of tiny models in float32, on the device and on the CPU; Gemma 2 has a soft cap."""
    import jax
    import numpy as np

    import gemma_keras_tune as gkt
    from gemma_keras_tune.gemma.families import FAMILIES

    ids = np.arange(2, 34, dtype=np.int32).reshape(2, 16)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids), "positions": np.arange(2, 14)}
    data = (x, np.arange(5, 17), np.full(12, 1 / 12, np.float32))
    found: dict[str, Any] = {"device": jax.devices()[0].device_kind}
    for name in ("gemma", "gemma2", "gemma3"):
        family = FAMILIES[name]
        vocabulary = dict.fromkeys(family.vocabulary_settings, 64)
        losses = []
        for device in (jax.devices()[0], jax.devices("cpu")[0]):
            with jax.default_device(device), jax.default_matmul_precision("highest"):
                backbone = family.backbone_class(**{**family.tiny, **vocabulary})
                for variable in backbone.variables:
                    variable.assign(np.random.default_rng(0).standard_normal(variable.shape) / 4)
                model = family.causal_lm_class(backbone=backbone, preprocessor=None)
                trainer = gkt.TuningModel(model)
                trainer.compile("sgd")
                losses.append(float(trainer.test_on_batch(*data)[0]))
        found[name] = {"device": losses[0], "cpu": losses[1]}
    return found


def model_flops(size: str) -> float:
    """Model FLOPs of a step; the formula stands at the top."""
    from _shapes import GEMMA3

    n = GEMMA3[size]
    width, heads = n["hidden_dim"], n["num_query_heads"] * n.get("head_dim", 256)
    keys = n["num_key_value_heads"] * n.get("head_dim", 256)
    block = width * (2 * heads + 2 * keys + 3 * n["intermediate_dim"])
    tokens = ROWS * LENGTH
    layers = 4 * n["num_layers"] * tokens * (block + 2 * LENGTH * heads)
    return layers + 4.0 * VOCABULARY * width * ROWS * RESPONSE


def run_one(who: str, size: str, options: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Run a contender in its own process; what goes wrong is its last line."""
    request = json.dumps([who, size, options])
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--one", request],
            capture_output=True, text=True, timeout=seconds, check=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        said = (error.stderr or error.stdout).strip().splitlines() or ["nothing was said"]
        return {"failed": said[-1][:200]}
    return json.loads(done.stdout.splitlines()[-1])


def table(size: str, found: dict[str, dict[str, Any]], peak: float | None) -> list[str]:
    lines = [f"{size:28s} ms a step  tokens/s    MFU   peak GB  compile s  against ours"]
    base = found["ours"].get("step_seconds")
    for name, figures in found.items():
        if "failed" in figures:
            lines.append(f"{name:28s} {figures['failed']}")
            continue
        step = figures["step_seconds"]
        mfu = f"{100 * model_flops(size) / step / peak:5.1f} %" if peak else "      -"
        ratio = f"{step / base:8.2f} x" if base else ""
        lines.append(
            f"{name:28s} {1e3 * step:9.1f} {ROWS * LENGTH / step:9.0f} {mfu} "
            f"{figures['peak_bytes'] / 1e9:9.2f} {figures['compile_seconds']:10.1f} {ratio}"
        )
    decoded = found["ours"].get("decode_tokens_per_second")
    return [*lines, f"  decoding: {decoded:.0f} tokens/s"] if decoded else lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--minutes", type=float, default=8, help="end after so many minutes")
    parser.add_argument("--sizes", nargs="+", default=["270M", "1B", "4B"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, size, given = json.loads(options.one)
        measure = {"checks": checks, "ours": ours, "KerasHub": kerashub, "PEFT": peft}[who]
        print(json.dumps(measure(*([size] if size else []), **given)))
        return
    end = time.monotonic() + 60 * options.minutes
    figures: dict[str, Any] = {"checks": run_one("checks", "", {}, 120)}
    print("checks:", json.dumps(figures["checks"]), flush=True)
    device = figures["checks"].get("device", "")
    peak = next((flops for name, flops in PEAKS.items() if name in device), None)
    for size in options.sizes:
        figures[size] = {}
        for name, given in CONTENDERS:
            left = end - time.monotonic()
            figures[size][name] = (
                run_one(name.split(",")[0], size, given, left)
                if left > 10
                else {"failed": "no time was left"}
            )
        print("\n".join(table(size, figures[size], peak)), flush=True)
        if options.json:
            options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
