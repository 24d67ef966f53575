"""Evaluation speed: `evaluate` against transformers' `generate` on the same cases, in one run.

    python tests/benchmarks/evaluation_speed.py [--json FILE] [--cases 64]

Gemma 3 270M in float32, prompts of mixed lengths, batch 16, greedy, 32 new tokens: once as it is,
and once with a LoRA adapter of rank 4 on all linear layers, which the peer gets through PEFT. Each
contender runs in a process of its own and answers all cases once to warm up and compile; the better
of the next two counts. transformers gets the prompts sorted by length, as ours sorts them, padded
on the left, and is timed on `generate` and decoding; ours on all of `evaluate`, checks and verdicts
included. `programs` counts the family programs that an evaluation of mixed lengths compiles,
with base and tuned, drawn samples, few-shot prompts and the general items; and one of two cases, if
that takes more. `same_answers` counts the cases, of those without adapter, to which both write the
same tokens.
"""

import argparse
import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

BATCH = 16
NEW_TOKENS = 32
PAIRS = [("Part number for a brake caliper", "BC-1"), ("Part number for an oil filter", "OF-2")]
TOPICS = ["the sea", "a bakery", "trains", "winter", "old maps", "bread", "a lost key", "chess"]


def prompts(count: int) -> list[str]:
    """Prompts of about 10 to 120 tokens."""
    detail = "Mention who was there, what it cost, and why it was worth the long way. "
    return [
        f"Write the beginning of story {i} about {TOPICS[i % len(TOPICS)]}. {detail * (i % 7)}"
        for i in range(count)
    ]


def best(run: Callable[[], object]) -> float:
    """Seconds of the better of two runs after the first."""
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds[1:])


def ours(cases: int, folder: str) -> dict[str, Any]:
    """Our cases a second, the tokens, and how many programs were compiled."""
    import _bench
    import numpy as np

    from gemma_keras_tune.adapters.lora import lora_linears
    from gemma_keras_tune.generation.answers import compiled_programs

    gkt = _bench.gkt
    model = gkt.load(_bench.MODEL)
    gkt.export(model, folder, format="safetensors", overwrite=True, verbose=0)
    checks = gkt.checks.Length(max=NEW_TOKENS, unit="tokens")
    plan = [gkt.Case(str(i), p, "success", checks) for i, p in enumerate(prompts(cases))]
    options: dict[str, Any] = dict(max_new_tokens=NEW_TOKENS, batch_size=BATCH, verbose=0)

    def run() -> Any:
        return gkt.evaluate(model, plan, baseline=None, **options)

    plain = best(run)
    texts = [next(iter(case.variants.values()))[0].text for case in run().cases]
    gkt.enable_lora(model, 4, verbose=0)
    random = np.random.default_rng(0)
    for linear in lora_linears(model):
        b = linear.layer.lora_kernel_b
        b.assign(1e-3 * random.standard_normal(b.shape))
    gkt.save_adapter(model, pathlib.Path(folder, "adapter"))
    adapted = best(run)
    drawn = [dataclasses.replace(case, samples=2) for case in plan[::16]]
    counts = []
    for asked in ([*drawn, *plan[1:16]], [drawn[0], plan[1]]):
        fresh = gkt.load(folder)
        gkt.enable_lora(fresh, 4, verbose=0)
        gkt.evaluate(fresh, asked, pairs=PAIRS, **options)
        counts.append(compiled_programs(fresh))
    return {
        "plain": cases / plain,
        "adapter": cases / adapted,
        "texts": texts,
        "programs": max(counts),
    }


def transformers(cases: int, folder: str) -> dict[str, Any]:
    """Cases a second of transformers on the same weights, without and with PEFT, and the tokens."""
    import peft
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    asked = prompts(cases)
    order = sorted(range(cases), key=lambda i: len(tokenizer(asked[i]).input_ids))
    texts = [""] * cases

    def run() -> None:
        for start in range(0, cases, BATCH):
            group = order[start : start + BATCH]
            inputs = tokenizer([asked[i] + "\n" for i in group], return_tensors="pt", padding=True)
            with torch.inference_mode():
                ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            new = ids[:, inputs.input_ids.shape[1] :]
            for i, text in zip(
                group, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True
            ):
                texts[i] = text

    plain, written = best(run), list(texts)
    model = peft.PeftModel.from_pretrained(model, pathlib.Path(folder, "adapter")).eval()
    return {"plain": cases / plain, "adapter": cases / best(run), "texts": written}


CONTENDERS: dict[str, Callable[..., dict[str, Any]]] = {"ours": ours, "transformers": transformers}


def alone(contender: str, cases: int, folder: str) -> dict[str, Any]:
    """What a contender measures in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, __file__, "--cases", str(cases), "--json", file.name]
        command += ["--contender", contender, "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(pathlib.Path(file.name).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures there")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender:
        figures = CONTENDERS[options.contender](options.cases, options.folder)
        options.json.write_text(json.dumps(figures))
        return
    figures: dict[str, Any] = {"vs_transformers": None, "vs_peft": None, "same_answers": None}
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        mine = alone("ours", options.cases, folder)
        theirs = None
        if importlib.util.find_spec("transformers") and importlib.util.find_spec("peft"):
            theirs = alone("transformers", options.cases, folder)
    for kind, peer in (("plain", "transformers"), ("adapter", "peft")):
        name = "without adapter" if kind == "plain" else "adapter of rank 4"
        lines.append(f"  {name:20} {'gemma_keras_tune':24} {mine[kind]:6.2f} cases/s")
        if theirs:
            figures[f"vs_{peer}"] = mine[kind] / theirs[kind]
            with_peft = " with PEFT" if peer == "peft" else ""
            lines.append(
                f"  {'':20} {'transformers' + with_peft:24} {theirs[kind]:6.2f} cases/s"
                f"   {figures[f'vs_{peer}']:5.2f} x"
            )
    if theirs:
        same = sum(a == b for a, b in zip(mine["texts"], theirs["texts"], strict=True))
        figures["same_answers"] = same
        lines.append(f"  the same answer to {same} of {options.cases} cases")
    import _bench

    _bench.report(
        f"Evaluation speed, {options.cases} cases, batch {BATCH}, {NEW_TOKENS} new tokens",
        [*lines, f"  compiled programs {mine['programs']}"],
        {**figures, "rate": mine["plain"], "programs": mine["programs"]},
        options.json,
    )


if __name__ == "__main__":
    main()
