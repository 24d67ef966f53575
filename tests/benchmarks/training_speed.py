"""Training speed on short pairs, side by side in one run.

    python tests/benchmarks/training_speed.py [--json FILE] [--pairs 64]

Gemma 3 270M in float32, LoRA rank 4 on query and value, the same pairs in the same words. Each
contender runs in a process of its own, as its user would run it; it trains one epoch to compile and
warm up, and the best of the next ones counts. KerasHub runs its documented recipe
(`sequence_length=256`, batch 1), and again with the length our pipeline chose and our batch. TRL
runs `SFTTrainer` with PEFT on the same weights, loss on the completion alone, batch 8, and else its
own defaults, of which gradient checkpointing is one; and again without that. The Gemma library for
JAX runs a jitted step on random weights, padded to our length. Its own LoRA knows no targets and
goes on every linear layer, so it is compared with ours on all linear layers. It may stand in an
environment of its own, whose Python `GEMMA_JAX_PYTHON` names. A contender that fails is left out,
with its reason printed.
"""

import argparse
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
TEMPLATE = "{prompt}\n{response}"
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


def ours(pairs: Pairs, target_modules: Any = ("q_proj", "v_proj")) -> dict[str, Any]:
    """Our pairs a second, and the longest length the pipeline chose."""
    import _bench

    model = _bench.gkt.load(_bench.MODEL)
    trainer = _bench.ours(model, target_modules)
    data = _bench.gkt.make_dataset(model, pairs, batch_size=BATCH, template=TEMPLATE)
    length = max(int(x["token_ids"].shape[1]) for x, _, _ in data)
    rate = best_epoch(lambda: trainer.fit(data, epochs=1, shuffle=False, verbose=0), len(pairs))
    parameters = _bench.gkt.lora_config(model).parameters
    return {"rate": rate, "length": length, "parameters": parameters}


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
    """Pairs a second of the Gemma library for JAX, and the layers its LoRA is on."""
    import _bench
    import numpy as np

    model = _bench.gkt.load(_bench.MODEL)
    tokenizer = model.preprocessor.tokenizer
    bos, end = tokenizer.start_token_id, tokenizer.end_token_id
    rows = -(-len(pairs) // BATCH) * BATCH  # empty rows fill the last batch
    ids, mask = np.zeros((rows, length), int), np.zeros((rows, length - 1), int)
    for row, (prompt, response) in enumerate(pairs):
        asked = [bos, *tokenizer(prompt + "\n").tolist()]
        whole = [*asked, *tokenizer(response).tolist(), end][:length]
        ids[row, : len(whole)] = whole
        mask[row, len(asked) - 1 : len(whole) - 1] = 1
    with tempfile.TemporaryDirectory() as folder:
        request, answer = (pathlib.Path(folder, name) for name in ("request", "answer"))
        batches: dict[str, Any] = {"epochs": EPOCHS, "pairs": len(pairs)}
        batches["ids"] = ids.reshape(-1, BATCH, length).tolist()
        batches["mask"] = mask.reshape(-1, BATCH, length - 1).tolist()
        request.write_text(json.dumps(batches))
        script = pathlib.Path(__file__).with_name("_gemma_jax_step.py")
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        subprocess.run([GEMMA_JAX, script, request, answer], check=True, env=environment)
        return json.loads(answer.read_text())


def alone(contender: str, pairs: int, **options: Any) -> dict[str, Any]:
    """What a contender measures in a process of its own; nothing, and why in print, if it fails."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--pairs", str(pairs), "--json", file.name]
        command += ["--contender", contender, "--options", json.dumps(options)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = done.stderr.strip() or f"exit code {done.returncode}"
            print(f"{contender} {options} was not measured:\n{reason}", file=sys.stderr)
            return {}
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


class Table:
    """Contenders in order: a name, pairs a second, and how many times as fast we are."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, name: str, found: dict[str, Any], mine: dict[str, Any]) -> float | None:
        """Add a contender and return the ratio; `None` where one of the two was not measured."""
        import _bench

        rate, own = found.get("rate"), mine.get("rate")
        ratio = own / rate if rate and own else None
        self.lines.append(
            f"  {name:46} {_bench.shown(rate, '7.2f')} pairs/s   {_bench.shown(ratio, '5.2f')} x"
        )
        return ratio


def installed(python: str, *modules: str) -> bool:
    """Whether a Python has some modules."""
    names = ", ".join(modules)
    return not subprocess.run([python, "-c", f"import {names}"], capture_output=True).returncode


def compare(pairs: int, path: pathlib.Path | None) -> None:
    """Run every contender that is installed, print the table and write the figures."""
    import _bench

    table = Table()
    mine = alone("ours", pairs)
    if not mine:
        sys.exit("Without our own figure there is nothing to compare.")
    table.add("gemma_keras_tune", mine, mine)
    length = mine["length"]
    same = alone("kerashub", pairs, length=length, batch=BATCH)
    # The recipe is slow, and its rate does not depend on how many pairs there are.
    recipe = alone("kerashub", max(8, pairs // 8), length=256, batch=1)
    figures: dict[str, float | None] = {
        "vs_kerashub_same_length": table.add(
            f"KerasHub, padded to {length}, batch {BATCH}", same, mine
        ),
        "vs_kerashub_recipe": table.add("KerasHub's recipe, 256 tokens, batch 1", recipe, mine),
        "vs_trl": None,
        "vs_trl_without_checkpointing": None,
        "vs_gemma_jax": None,
        "pairs_per_second": mine["rate"],
    }
    if installed(sys.executable, "trl", "peft", "datasets"):
        with tempfile.TemporaryDirectory() as folder:
            _bench.attempt("Hugging Face folder", lambda: hugging_face_folder(folder))
            usual = alone("trl", pairs, folder=folder)
            bare = alone("trl", pairs, folder=folder, gradient_checkpointing=False)
        figures["vs_trl"] = table.add(f"TRL and PEFT, batch {BATCH}", usual, mine)
        figures["vs_trl_without_checkpointing"] = table.add(
            "the same without gradient checkpointing", bare, mine
        )
    if installed(GEMMA_JAX, "gemma"):
        everywhere = alone("ours", pairs, target_modules="all")
        table.add("gemma_keras_tune, LoRA on all linear layers", everywhere, everywhere)
        found = alone("gemma_jax", pairs, length=length)
        figures["vs_gemma_jax"] = table.add(
            f"Gemma library for JAX, batch {BATCH}, the same", found, everywhere
        )
        if found:
            layers = ", ".join(found["layers"])
            table.lines.append(f"    its LoRA: {found['parameters']:,} parameters, on {layers}")
            table.lines.append(f"    ours on all: {everywhere.get('parameters', 0):,} parameters")
    _bench.report(
        f"Training speed, {pairs} short pairs",
        table.lines,
        figures,
        path,
    )


if __name__ == "__main__":
    main()
