"""Training speed on short pairs, side by side in one run.

    python tests/benchmarks/training_speed.py [--json FILE] [--pairs 64]

Gemma 3 270M in float32, LoRA rank 4 on query and value, the same pairs in the same words. Each
contender runs in a process of its own, as its user would run it; it trains one epoch to compile and
warm up, and the best of the next ones counts. KerasHub runs its documented recipe
(`sequence_length=256`, batch 1), and again with the length our pipeline chose and our batch. TRL
runs `SFTTrainer` with PEFT on the same weights, loss on the completion alone, batch 8, and else its
own defaults, of which gradient checkpointing is one; and again without that. The Gemma library for
JAX runs a jitted step with its own LoRA on random weights, padded to our length; it may stand in an
environment of its own, whose Python `GEMMA_JAX_PYTHON` names.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import _short_pairs

BATCH = 8
EPOCHS = 4
TEMPLATE = "{input}\n{output}"
GEMMA_JAX = os.environ.get("GEMMA_JAX_PYTHON", sys.executable)
Pairs = list[tuple[str, str]]


def best_epoch(epoch: Callable[[], object], pairs: int) -> float:
    """Pairs a second of the best epoch after the first."""
    epoch()
    seconds = []
    for _ in range(EPOCHS - 1):
        begin = time.perf_counter()
        epoch()
        seconds.append(time.perf_counter() - begin)
    return pairs / min(seconds)


def ours(pairs: Pairs, folder: str) -> dict[str, Any]:
    """Our pairs a second, and the longest length the pipeline chose."""
    import _bench

    model = _bench.gkt.load(_bench.MODEL)
    trainer = _bench.ours(model)
    data = _bench.gkt.make_dataset(pairs, model, batch_size=BATCH, template=TEMPLATE)
    length = max(int(x["token_ids"].shape[1]) for x, _, _ in data)
    rate = best_epoch(lambda: trainer.fit(data, epochs=1, shuffle=False, verbose=0), len(pairs))
    return {"rate": rate, "length": length}


def kerashub(pairs: Pairs, length: int, batch: int) -> dict[str, Any]:
    """Pairs a second of KerasHub's recipe at a length and batch."""
    import _bench

    model = _bench.kerashub_recipe(length)
    data = {"prompts": [p + "\n" for p, _ in pairs], "responses": [r for _, r in pairs]}
    fit = lambda: model.fit(data, batch_size=batch, epochs=1, verbose=0)  # noqa: E731
    return {"rate": best_epoch(fit, len(pairs))}


def trl(pairs: Pairs, folder: str, **changed: Any) -> dict[str, Any]:
    """Pairs a second of TRL's `SFTTrainer` with PEFT on the same weights."""
    import datasets
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    transformers.logging.set_verbosity_error()
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begin = time.perf_counter()

        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.begin)

    rows = [{"prompt": p + "\n", "completion": r} for p, r in pairs]
    trainer = SFTTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"),
        processing_class=transformers.AutoTokenizer.from_pretrained(folder),
        args=SFTConfig(
            output_dir=str(pathlib.Path(folder) / "out"),
            per_device_train_batch_size=BATCH,
            num_train_epochs=EPOCHS,
            learning_rate=5e-5,
            completion_only_loss=True,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            **changed,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        peft_config=peft.LoraConfig(
            r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return {"rate": len(pairs) / min(seconds[1:])}


def gemma_jax(pairs: Pairs, length: int) -> dict[str, Any]:
    """Pairs a second of the Gemma library for JAX; 0 where it is not installed."""
    import _bench
    import numpy as np

    if subprocess.run([GEMMA_JAX, "-c", "import gemma"], capture_output=True).returncode:
        return {"rate": 0}
    model = _bench.gkt.load(_bench.MODEL)
    tokenizer = model.preprocessor.tokenizer
    bos, end = tokenizer.start_token_id, tokenizer.end_token_id
    ids, mask = np.zeros((len(pairs), length), int), np.zeros((len(pairs), length - 1), int)
    for row, (prompt, response) in enumerate(pairs):
        asked = [bos, *tokenizer(prompt + "\n").tolist()]
        whole = [*asked, *tokenizer(response).tolist(), end][:length]
        ids[row, : len(whole)] = whole
        mask[row, len(asked) - 1 : len(whole) - 1] = 1
    with tempfile.TemporaryDirectory() as folder:
        request, answer = (pathlib.Path(folder, name) for name in ("request", "answer"))
        batches = {"ids": ids.reshape(-1, BATCH, length).tolist(), "epochs": EPOCHS}
        batches["mask"] = mask.reshape(-1, BATCH, length - 1).tolist()
        request.write_text(json.dumps(batches))
        script = pathlib.Path(__file__).with_name("_gemma_jax_step.py")
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([GEMMA_JAX, script, request, answer], check=True, env=environment)
        return json.loads(answer.read_text())


def alone(contender: str, pairs: int, **options: Any) -> dict[str, Any]:
    """What a contender measures in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--pairs", str(pairs), "--json", file.name]
        command += ["--contender", contender, "--options", json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(pathlib.Path(file.name).read_text())


def hugging_face_folder(path: str) -> None:
    """The embedded weights as a Hugging Face folder."""
    import _bench

    model = _bench.gkt.load(_bench.MODEL)
    _bench.gkt.export(model, path, format="safetensors", overwrite=True, verbose=0)


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": ours,
    "kerashub": kerashub,
    "trl": trl,
    "gemma_jax": gemma_jax,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--pairs", type=int, default=64, help="pairs in an epoch")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--options", type=json.loads, default={}, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        pairs = _short_pairs.short_pairs(options.pairs)
        figures = CONTENDERS[options.contender](pairs, **options.options)
        options.json.write_text(json.dumps(figures))
        return
    compare(options.pairs, options.json)


def compare(pairs: int, path: pathlib.Path | None) -> None:
    """Run every contender that is installed, print the table and write the figures."""
    with tempfile.TemporaryDirectory() as folder:
        mine = alone("ours", pairs, folder=folder)
        length = mine["length"]
        rates = {
            "gemma_keras_tune": mine["rate"],
            f"KerasHub, padded to {length}, batch {BATCH}": alone(
                "kerashub", pairs, length=length, batch=BATCH
            )["rate"],
            # The recipe is slow, and its rate does not depend on how many pairs there are.
            "KerasHub's recipe, 256 tokens, batch 1": alone(
                "kerashub", max(8, pairs // 8), length=256, batch=1
            )["rate"],
        }
        same, recipe = list(rates.values())[1:]
        figures: dict[str, float | None] = {
            "vs_kerashub_recipe": mine["rate"] / recipe,
            "vs_kerashub_same_length": mine["rate"] / same,
            "vs_trl": None,
            "vs_gemma_jax": None,
            "pairs_per_second": mine["rate"],
        }
        if all(importlib.util.find_spec(name) for name in ("trl", "peft", "datasets")):
            hugging_face_folder(folder)
            rate = alone("trl", pairs, folder=folder)["rate"]
            rates[f"TRL and PEFT, batch {BATCH}"] = rate
            figures["vs_trl"] = mine["rate"] / rate
            bare = alone("trl", pairs, folder=folder, gradient_checkpointing=False)["rate"]
            rates["the same without gradient checkpointing"] = bare
            figures["vs_trl_without_checkpointing"] = mine["rate"] / bare
        if rate := alone("gemma_jax", pairs, length=length)["rate"]:
            rates[f"Gemma library for JAX, batch {BATCH}"] = rate
            figures["vs_gemma_jax"] = mine["rate"] / rate
    import _bench

    _bench.report(
        f"Training speed, {pairs} short pairs",
        [f"  {n:42} {r:7.2f} pairs/s   {mine['rate'] / r:5.2f} x" for n, r in rates.items()],
        figures,
        path,
    )


if __name__ == "__main__":
    main()
