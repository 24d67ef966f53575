"""The command line calls the public functions, and tells of errors without a traceback."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

import gemma_keras_tune as gkt
from gemma_keras_tune import testing
from gemma_keras_tune.__main__ import _by_options, main
from gemma_keras_tune.training.settings import SETTINGS


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "preset"
    gkt.save_preset(testing.tiny_model("gemma3"), path)
    return str(path)


@pytest.mark.slow
def test_export_writes_what_its_name_says(preset, tmp_path, capsys):
    assert main(["export", preset, str(tmp_path / "m.gguf"), "--quiet"]) == 0
    assert (tmp_path / "m.gguf").is_file()
    folder = tmp_path / "hf"
    assert main(["export", preset, str(folder), "--dtype", "bfloat16", "--quiet"]) == 0
    assert (folder / "model.safetensors").is_file()
    assert capsys.readouterr().out.split() == [str(tmp_path / "m.gguf"), str(folder)]


@pytest.mark.slow
def test_export_merges_an_adapter(preset, tmp_path):
    import numpy as np

    from gemma_keras_tune.adapters.lora import get_factors, lora_linears, set_factors
    from gemma_keras_tune.formats.weights import merged_weights

    model = gkt.load(preset)
    gkt.enable_lora(model, rank=2)
    for linear in lora_linears(model):
        a, b, _ = get_factors(linear)
        set_factors(linear, a, np.ones_like(b))
    gkt.save_adapter(model, tmp_path / "adapter")
    arguments = ["export", preset, str(tmp_path / "hf"), "--adapter", str(tmp_path / "adapter")]
    assert main([*arguments, "--quiet"]) == 0
    written = {w.path: value for w, value in merged_weights(gkt.load(str(tmp_path / "hf")))}
    for weight, value in merged_weights(model):
        np.testing.assert_array_equal(written[weight.path], value)


def test_an_error_is_printed_without_a_traceback(preset, tmp_path, capsys):
    assert main(["export", preset, str(tmp_path / "x"), "--format", "onnx", "--quiet"]) == 1
    assert capsys.readouterr().err.startswith("error: `--format` must be")
    assert main(["generate", str(tmp_path / "nothing"), "hello"]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of pairs under column names of its own."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [{"frage": question, "antwort": answer} for question, answer in testing.tiny_pairs(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


COLUMNS = ["--prompt-column", "frage", "--response-column", "antwort"]


@pytest.mark.slow
def test_tune_saves_what_generate_answers_with(preset, pairs, tmp_path, capsys):
    tuned, adapter = str(tmp_path / "tuned"), str(tmp_path / "adapter")
    arguments = [
        "tune", preset, pairs, *COLUMNS, "--preset", tuned, "--adapter", adapter, "--quiet",
        "--epochs", "20", "--rank", "3", "--target-modules", "q_proj,v_proj", "--use-rslora",
        "--learning-rate", "0.02", "--validation-data", pairs,
    ]  # fmt: skip
    assert main(arguments) == 0
    assert capsys.readouterr().out.split() == [adapter, tuned]
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["r"], config["use_rslora"]) == (3, True)
    assert config["target_modules"] == ["q_proj", "v_proj"]

    question = testing.tiny_pairs(1)[0][0]
    outputs = []
    for model in ([tuned], [preset, "--adapter", adapter], [preset]):
        options = ["--max-new-tokens", "6"]
        assert main(["generate", model[0], question, "hello", *model[1:], *options]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != outputs[2]
    expected = gkt.generate(gkt.load(tuned), [question, "hello"], max_new_tokens=6)
    assert outputs[0] == "".join(f"{answer}\n" for answer in expected)


@pytest.mark.slow
def test_preview_shows_rows_as_they_are_trained(preset, pairs, capsys):
    assert main(["preview", preset, pairs, "--rows", "2", "--dtype", "bfloat16", *COLUMNS]) == 0
    out = capsys.readouterr().out
    question, answer = testing.tiny_pairs(1)[0]
    assert question in out and f"«{answer}<end_of_turn>»" in out
    assert "row 2:" in out and "row 3:" not in out


@pytest.mark.slow
def test_a_plan_is_printed_saved_and_carried_out(preset, pairs, tmp_path, capsys):
    file, adapter = str(tmp_path / "plan.json"), str(tmp_path / "adapter")
    options = ["--rank", "3", "--epochs", "1", "--seed", "5"]
    assert main(["plan", preset, pairs, *COLUMNS, *options, "--save", file]) == 0
    out = capsys.readouterr().out
    assert "LoRA rank 3" in out and "1 epoch over 8 pairs" in out and out.endswith(f"{file}\n")
    tune = ["tune", preset, pairs, *COLUMNS, "--plan", file, "--adapter", adapter]
    assert main([*tune, "--seed", "0", "--rank", "3", "--epochs", "2"]) == 1
    error = capsys.readouterr().err
    assert "`--seed`: the plan has 5. Received: 0" in error and "`--epochs`" in error
    assert "`--rank`" not in error and not (tmp_path / "adapter").exists()
    assert main([*tune, "--quiet"]) == 0
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 3


@pytest.mark.parametrize("command", ["tune", "plan"])
def test_every_setting_is_an_option(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    words = set(capsys.readouterr().out.split())
    missing = {name for name in SETTINGS if "--" + name.replace("_", "-") not in words}
    assert missing == set()


def refused(capsys, *arguments):
    """The message of a command that is refused before it loads the model, which does not exist."""
    begin = time.monotonic()
    assert main([arguments[0], "nowhere", *arguments[1:]]) == 1
    assert time.monotonic() - begin < 2
    message = capsys.readouterr().err
    assert "nowhere" not in message, arguments
    return message


def test_what_needs_no_model_is_told_before_it_is_loaded(pairs, tmp_path, capsys, monkeypatch):
    file = tmp_path / "a.gguf"
    file.write_text("")
    tune = ["tune", pairs, *COLUMNS, "--adapter", str(tmp_path / "new")]
    message = refused(capsys, *tune, "--target-modules", "q_prj,value")
    assert "'q_prj': 'q_proj' is one" in message and "`--target-modules`" in message
    assert "There is no template 'chatml'" in refused(capsys, *tune, "--template", "chatml")
    assert "{response}" in refused(capsys, *tune, "--template", "{prompt}")
    assert "`--validation-data`" in refused(capsys, *tune, "--early-stopping", "2")
    assert "'sdg'" in refused(capsys, *tune, "--optimizer", "sdg")
    assert "gone does not exist" in refused(capsys, *tune, "--from-adapter", "gone")
    method = ["--method", "full", "--from-adapter", "gone"]
    assert "`--method full` trains every weight" in refused(capsys, *tune, *method)
    assert "gone.jsonl" in refused(capsys, "tune", "gone.jsonl", *tune[2:])
    assert "is a folder" in refused(capsys, "plan", pairs, *COLUMNS, "--save", str(tmp_path))
    assert "no template" in refused(capsys, "preview", pairs, *COLUMNS, "--template", "x")
    assert "`--overwrite`" in refused(capsys, "export", str(file))
    assert "`--format` must be" in refused(capsys, "export", str(tmp_path / "x"), "--format", "hf")
    assert "`--quantization` is for" in refused(
        capsys, "export", str(tmp_path / "x"), "--quantization", "Q4_0"
    )
    assert "gone does not exist" in refused(capsys, "generate", "hi", "--adapter", "gone")
    assert "Do you mean 'top_k'?" in refused(capsys, "generate", "hi", "--sampler", "topk")
    assert "contradict" in refused(
        capsys, "generate", "hi", "--sampler", "greedy", "--temperature", "1"
    )
    assert "no template" in refused(capsys, "generate", "hi", "--template", "x")
    assert "`--prompts FILE`" in refused(capsys, "generate")
    assert "gone.txt cannot be read" in refused(capsys, "generate", "--prompts", "gone.txt")
    monkeypatch.setattr("os.access", lambda *_: False)
    assert f"{tmp_path} cannot be written to" in refused(capsys, *tune)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf"]


def test_messages_are_not_buried_and_name_options(capsys, pairs):
    for words, told in (
        (["tune", "m"], "the following arguments are required: pairs"),
        (["tune", "m", "p", "--epoks", "3"], "--epoks 3. Do you mean --epochs?"),
        (["plan", "m", "p", "--reasoning", "no"], "argument --reasoning: invalid choice"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        message = capsys.readouterr().err
        assert caught.value.code == 2 and told in message
        assert message.count("\n") == 2 and message.endswith(f" {words[0]} --help`.\n")
    known = ["--on-error", "--overwrite", "--batch-size"]
    told = "`read_pairs(…, on_error='skip')`, `overwrite=True`, `batch_size`, `load_adapter(model)`"
    assert _by_options(told, known) == (
        "`--on-error skip`, `--overwrite`, `--batch-size`, `load_adapter(model)`"
    )


@pytest.mark.slow
def test_rows_are_skipped_and_preferred_answers_read_as_asked(preset, tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "chosen": "yes", "rejected": "no"}, {"prompt": "b", "chosen": ""}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["preview", preset, str(file), "--rows", "1"]
    assert main(options) == 1
    assert "`--preference" in capsys.readouterr().err
    assert main([*options, "--preference", "chosen", "--rows", "2"]) == 1
    assert "`--on-error skip`" in capsys.readouterr().err
    with pytest.warns(gkt.errors.PairsWarning, match="1 of 2 rows are left out") as caught:
        assert main([*options[:3], "--preference", "chosen", "--on-error", "skip"]) == 0
    assert "«yes" in capsys.readouterr().out
    assert "row 2" in str(next(w.message for w in caught if "left out" in str(w.message)))


@pytest.mark.slow
def test_a_file_of_prompts_is_answered_in_json_lines(preset, tmp_path, capsys):
    text, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    text.write_text("Hello there\n\nGood bye\n")
    talk = [{"role": "user", "content": "Good bye"}]
    rows.write_text(json.dumps({"prompt": "Hello there"}) + "\n" + json.dumps({"messages": talk}))
    options = ["--max-new-tokens", "4", "--system", "Be brief."]
    found = []
    for file in (text, rows):
        assert main(["generate", preset, "--prompts", str(file), *options]) == 0
        found.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    system = {"role": "system", "content": "Be brief."}
    asked = [[system, {"role": "user", "content": p}] for p in ("Hello there", "Good bye")]
    answers = gkt.generate(gkt.load(preset), asked, max_new_tokens=4)
    assert [row["response"] for row in found[0]] == [row["response"] for row in found[1]] == answers
    assert [row["prompt"] for row in found[0]] == ["Hello there", "Good bye"]
    assert found[1][1]["prompt"] == talk
    rows.write_text('{"prompt": "x"}\n{"text": "x"}\n{broken\n')
    assert main(["generate", "nowhere", "--prompts", str(rows)]) == 1
    error = capsys.readouterr().err
    assert "row 2: has neither `prompt` nor" in error and "row 3" in error
    rows.write_text(json.dumps({"messages": [system, *talk]}))
    assert main(["generate", "nowhere", "--prompts", str(rows), "--system", "Be brief."]) == 1
    assert "`--system` would be a second system message" in capsys.readouterr().err


def test_tune_refuses_to_train_what_could_not_be_saved(preset, pairs, tmp_path, capsys):
    def problems(*options):
        assert main(["tune", "nowhere", pairs, *options]) == 1
        message = capsys.readouterr().err
        assert "would be lost" in message and "nowhere" not in message
        return message

    taken, free = str(tmp_path / "taken"), str(tmp_path / "free")
    (tmp_path / "taken").mkdir()
    (tmp_path / "file").write_text("")
    assert "no place is named" in problems()
    message = problems("--preset", taken, "--adapter", str(tmp_path / "file/x"))
    assert "taken already exists" in message and "`--overwrite`" in message
    assert "file is a file" in message
    assert "leaves no adapter" in problems("--method", "full", "--adapter", free)
    plan = gkt.make_plan(testing.tiny_model(), testing.tiny_pairs(4), method="full")
    full = str(plan.save(tmp_path / "full.json"))
    assert "leaves no adapter" in problems("--plan", full, "--adapter", free)
    (tmp_path / "full.json").unlink()
    assert "two folders" in problems("--preset", free, "--adapter", free)
    assert "two folders" in problems("--preset", free, "--adapter", f"{free}/below")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune", "m", "p", "--rank", "0"],
        ["tune", "m", "p", "--epochs", "1.5"],
        ["tune", "m", "p", "--learning-rate", "nan"],
        ["tune", "m", "p", "--learning-rate", "0"],
        ["tune", "m", "p", "--weight-decay", "inf"],
        ["tune", "m", "p", "--warmup-steps", "-1"],
        ["tune", "m", "p", "--validation-split", "1"],
        ["tune", "m", "p", "--early-stopping", "0"],
        ["tune", "m", "p", "--seed", "-1"],
        ["generate", "m", "hello", "--max-new-tokens", "0"],
        ["preview", "m", "p", "--rows", "0"],
    ],
)
def test_numbers_out_of_range_are_told_with_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert re.search(rf"argument {arguments[-2]}: must be ('auto' or )?an? \w+ ", message)
    assert f"Received: '{arguments[-1]}'" in message


@pytest.mark.slow
def test_test_says_by_its_exit_code_whether_the_plan_is_met(preset, tmp_path, capsys):
    plan = tmp_path / "plan.jsonl"
    case = '{"prompt": "Hello?", "kind": "success", "checks": [{"%s": %s}]}\n'
    plan.write_text(case % ("length", '{"max": 3, "unit": "tokens"}'))
    report = tmp_path / "report.json"
    arguments = ["test", preset, str(plan), "--quiet", "--max-new-tokens", "3"]
    assert main([*arguments, "--report", str(report)]) == 0
    assert "success  cannot tell" in capsys.readouterr().out
    assert gkt.Report.load(report).verdict == "cannot tell"
    assert main([*arguments, "--strict"]) == 1
    assert main([*arguments[:-1], "0"]) == 1 and main([*arguments, "--batch-size", "0"]) == 1
    assert main([*arguments, "--report", "report.pdf", "--baseline", "nowhere"]) == 1
    assert "A report's file ends in" in capsys.readouterr().err
    plan.write_text(case % ("contains", '"no such words"'))
    assert main(arguments) == 1, "one of one fails, though one case cannot tell"
    assert "so few cases cannot tell" in capsys.readouterr().err
    plan.write_text(case % ("contains", '"no such words"') * 1 + case % ("exact", '"neither"'))
    assert main([*arguments, "--target", "1"]) == 1
    out, err = capsys.readouterr()
    assert "fail" in out and "success case 1" in err and "Traceback" not in err
    plan.write_text('{"prompt": "Hello?"}\n')
    assert main(arguments) == 1
    assert "row 1: `kind` is missing" in capsys.readouterr().err


# A shell may have started the tests with SIGINT ignored.
DEFAULT_SIGINT = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def interrupted(preset, pairs, folder, moment, *options):
    """Exit code, seconds after Ctrl-C and output of `tune`, interrupted at a moment."""
    tune = ["-m", "gemma_keras_tune", "tune", preset, pairs, *COLUMNS, *options]
    process = subprocess.Popen(
        [sys.executable, "-c", DEFAULT_SIGINT, *tune, "--epochs", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=folder,
    )  # fmt: skip
    moment(process)
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - begin, out, err


def wait_for(path, process):
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["imports", "first compilation", "epochs"])
def test_ctrl_c_ends_tune_within_three_seconds(preset, pairs, tmp_path, moment):
    adapter = tmp_path / "adapter"

    def wait(process):
        if moment == "imports":
            time.sleep(1)
        elif moment == "first compilation":
            process.stdout.readline()  # the plan
            time.sleep(1)
        else:
            wait_for(adapter / "receipt.json", process)
            time.sleep(0.3)

    code, seconds, _, error = interrupted(preset, pairs, tmp_path, wait, "--adapter", str(adapter))
    assert (code, seconds < 3) == (130, True), (seconds, error)
    assert "Traceback" not in error
    if moment == "epochs":
        assert re.search(r"interrupted\. \S+/adapter has the adapter after [\d,]+ whole epo", error)
        assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
        gkt.load_adapter(gkt.load(preset), adapter)
        assert gkt.verify(adapter, run=False).passed
    else:
        assert "interrupted" in error and not list(tmp_path.iterdir())
