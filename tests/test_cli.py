"""The command line end to end on a tiny random Llama, and how errors end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import jaxq
from jaxq.cli import app, console, products
from jaxq.cli.sources import settings_of
from jaxq.errors import JaxqError
from jaxq.formats import Codebook, PreparedArray
from jaxq.kernels import tuning

ROOT = Path(__file__).parents[1]
TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60
QUANTIZE = ["--group-size", "16", "--samples", "4", "--seq-len", "16"]


def write_model(path: Path, *, hidden=32, inner=32, heads=4, kv_heads=4, layers=1, seed=0) -> Path:
    """A random Llama with a byte-level tokenizer, as a Hugging Face directory.

    All its matrices have one shape unless told otherwise, so that a solver compiles once.
    """
    path.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=280, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
    vocab, head = tokenizer.get_vocab_size(), hidden // heads
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * head, hidden),
        "self_attn.v_proj": (kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    rng = np.random.default_rng(seed)
    tensors = {
        "model.embed_tokens.weight": rng.normal(size=(vocab, hidden)),
        "model.norm.weight": np.ones(hidden),
        "lm_head.weight": rng.normal(size=(vocab, hidden)) * 0.3,
    }
    for layer in range(layers):
        for name, shape in shapes.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = rng.normal(size=shape) * 0.2
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = np.ones(hidden)
    save_file({name: x.astype(np.float32) for name, x in tensors.items()}, path / "model.safetensors")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": layers, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "max_position_embeddings": 512,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    write_model(path / "model")
    (path / "text.txt").write_text(TEXT)
    (path / "short.txt").write_text("Too short.")
    (path / "empty.txt").write_text(" \n")
    (path / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    return path


@pytest.fixture(scope="module")
def out(place) -> Path:
    """The model at 4 bits by GPTQ."""
    path = place / "out"
    done = run("quantize", place / "model", path, "--bits", "4", "--calibration", place / "text.txt", *QUANTIZE)
    assert done.exit_code == 0, done.output
    return path


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def parsed(*args):
    """The JSON that a command prints; anything else on stdout fails."""
    done = run(*args, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def refused(*args) -> str:
    """The one line that a command prints when it refuses."""
    done = run(*args)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    *progress, last = done.stderr.strip().split("\n")
    assert all(re.match(r"\w+: \d+%  ", line) for line in progress), done.stderr
    assert last.startswith("jaxq: "), done.stderr
    return last


def test_quantize_writes_a_whole_directory(out):
    names = set(os.listdir(out))
    assert {"params", "jaxq.json", "config.json", "tokenizer.json", "report.html", "report.json"} <= names
    assert [name for name in os.listdir(out.parent) if name.startswith(".")] == []
    report = jaxq.Report.from_dict(json.loads((out / "report.json").read_text()))
    assert len(report.rows) == 9 and report.seconds > 0
    assert all(0 < row.error < 0.5 for row in report.rows if row.quantized)
    assert (out / "report.html").read_text().startswith("<!doctype html>")


def test_squeezellm_with_a_sparse_part(place, tmp_path):
    command = ["quantize", place / "model", tmp_path / "out", "--recipe", "squeezellm", "--bits", "3"]
    command += ["--sparsity", "0.02", "--calibration", place / "text.txt", "--samples", "4", "--seq-len", "16"]
    planned = parsed(*command, "--dry-run")
    assert not (tmp_path / "out").exists()
    done = parsed(*command)
    assert done["bytes_after"] == planned["bytes_after"]
    assert {site["format"] for site in done["sites"] if site["path"].endswith("up/kernel")} == {
        "codebook 3-bit + 2% sparse"
    }
    by_path = {item["path"]: item for item in parsed("inspect", tmp_path / "out", "--verify")["params"]}
    found = by_path["layers/0/mlp/up/kernel"]["format"]
    assert (found["name"], found["base"]["bits"], found["sparsity"]) == ("dense_sparse", 3, 0.02)
    score = parsed("eval", tmp_path / "out", "--data", place / "text.txt", "--windows", "2", "--seq-len", "16")
    assert score["perplexity"] > 1
    refused = run("quantize", place / "model", tmp_path / "no", "--recipe", "gptq", "--sparsity", "0.02")
    assert refused.exit_code == 2 and "no setting sparsity" in refused.stderr


def test_inspect(out):
    found = parsed("inspect", out)
    assert found["recipe"]["name"] == "gptq" and found["schema"] == 1 and found["verified"] is False
    by_path = {item["path"]: item for item in found["params"]}
    up = by_path["layers/0/mlp/up/kernel"]
    assert up["format"]["bits"] == 4 and up["format"]["group_size"] == 16 and up["shape"] == [32, 32]
    assert 4 < up["bits_per_weight"] <= 6 and up["bytes"] * 8 == up["bits_per_weight"] * 32 * 32
    assert by_path["norm/scale"]["format"] is None
    assert found["bytes"] == sum(item["bytes"] for item in found["params"])
    assert found["source"]["name"] == "model"
    assert parsed("inspect", out, "--verify")["verified"] is True
    done = run("inspect", out, "--verify")
    assert "mlp/up" in done.stdout and "every array matches" in done.stdout


def test_eval_of_float_and_quantized(place, out):
    args = ("--data", place / "text.txt", "--windows", "5", "--seq-len", "32")
    exact, rounded = parsed("eval", place / "model", *args), parsed("eval", out, *args)
    assert exact["tokens"] == rounded["tokens"] == 5 * 31
    assert "bits_per_weight" not in exact and 4 < rounded["bits_per_weight"] <= 6
    assert exact["perplexity"] != rounded["perplexity"]
    assert rounded["perplexity"] == pytest.approx(exact["perplexity"], rel=0.3)
    done = run("eval", out, *args)
    assert re.search(r"perplexity [\d.]+ \(155 tokens, 5 windows", done.stdout)


def test_eval_equals_the_library(place, out):
    result = jaxq.load(out)
    model = jaxq.models.load(place / "model")
    windows = jaxq.evaluate.windows(TEXT, model.tokenizer, 32, 5)
    expected = jaxq.evaluate.perplexity(model.apply, jaxq.dequantize(result.params), windows)
    found = parsed("eval", out, "--data", place / "text.txt", "--windows", "5", "--seq-len", "32")
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)


def test_eval_on_codes_says_what_runs_in_float(place, out):
    args = ("--data", place / "text.txt", "--windows", "5", "--seq-len", "32")
    simulated, found = parsed("eval", out, *args), parsed("eval", out, *args, "--integer")
    # The recipe rounds weights alone.
    assert set(found["in_float"].values()) == {"has scales for groups of inputs"}
    assert found["perplexity"] == pytest.approx(simulated["perplexity"], rel=1e-5)
    assert "in float: " in run("eval", out, *args, "--integer").stderr
    assert "--integer is for a quantized OUT" in refused("eval", place / "model", *args, "--integer")


def test_fewer_windows_than_asked_for_are_said(place):
    done = run(
        "eval",
        place / "model",
        "--data",
        place / "text.txt",
        "--windows",
        "9999",
        "--seq-len",
        "64",
        "--json",
    )
    found = json.loads(done.stdout)
    assert found["windows"] < 9999 and f"gives {found['windows']} windows" in done.stderr


def test_generate(place, out):
    args = ("--prompt", "The quick", "--max-tokens", "6")
    found = parsed("generate", out, *args)
    assert found["prompt"] == "The quick" and 1 <= len(found["tokens"]) <= 6
    # No kernel takes groups of 16.
    assert found["products"] == "xla"
    assert parsed("generate", out, *args)["tokens"] == found["tokens"]
    warm = (*args, "--temperature", "1.5", "--top-k", "50")
    draws = {tuple(parsed("generate", out, *warm, "--seed", seed)["tokens"]) for seed in (1, 1, 2)}
    assert len(draws) == 2
    plain = run("generate", place / "model", *args)
    assert plain.exit_code == 0 and plain.stdout.startswith("The quick")


def test_generation_takes_the_kernels_of_this_machine(monkeypatch):
    """Those of an Nvidia GPU where jax finds one; other GPUs have none."""
    array = Codebook(4).abstract((512, 8))
    params = {"a": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), array), "b": jnp.zeros(3)}
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    for device, kind in (("NVIDIA H100 80GB HBM3", "gpu"), ("AMD Instinct MI300X", "xla")):
        monkeypatch.setattr(tuning, "device", lambda device=device: device)
        laid_out, said = products.prepared(params, True)
        assert said["products"] == kind and isinstance(laid_out["a"], PreparedArray) == (kind == "gpu")
    assert products.prepared(params, False) == (params, {"products": "xla"})


def test_sites(place, out):
    found = parsed("sites", place / "model")
    up = next(item for item in found if item["path"] == "layers/0/mlp/up/kernel")
    assert up == {
        "path": "layers/0/mlp/up/kernel", "kind": "matmul", "shape": [32, 32], "dtype": "float32",
        "in_axes": [0], "out_axes": [1], "batch_axes": [], "note": "",
    }  # fmt: skip
    assert "mlp/up" in run("sites", place / "model").stdout
    assert "layers/0/mlp/up/kernel" in run("sites", place / "model", "--all").stdout
    assert run("sites", out).exit_code == 0


def test_dry_run_reads_and_writes_nothing(place, tmp_path):
    broken = tmp_path / "model"
    broken.mkdir()
    for file in (place / "model").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    # Weights of nan cannot be quantized: a run that read them would fail.
    shards = broken / "model.safetensors"
    content = shards.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    shards.write_bytes(content[:start] + b"\xff" * (len(content) - start))
    args = ("quantize", broken, tmp_path / "out", "--calibration", place / "text.txt", *QUANTIZE)
    found = parsed(*args, "--bits", "3", "--dry-run")
    assert found["bytes_after"] < found["bytes_before"] and found["peak_bytes"] > 0
    up = next(item for item in found["sites"] if item["path"] == "layers/0/mlp/up/kernel")
    assert up["format"] == "uniform 3-bit g16" and up["bytes_before"] == 4 * 32 * 32 > up["bytes_after"]
    assert "peak memory about" in run(*args, "--dry-run").stdout
    assert sorted(os.listdir(tmp_path)) == ["model"]
    assert "layers/0/" in refused(*args)
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_the_plan_is_what_happens(place, tmp_path):
    args = (
        "quantize",
        place / "model",
        tmp_path / "out",
        "--recipe",
        "rtn",
        "--bits",
        "3",
        "--group-size",
        "16",
    )
    plan, done = parsed(*args, "--dry-run"), parsed(*args)
    assert (plan["bytes_before"], plan["bytes_after"]) == (done["bytes_before"], done["bytes_after"])
    after = {item["path"]: item["bytes_after"] for item in plan["sites"]}
    assert after == {item["path"]: item["bytes_after"] for item in done["sites"]}
    assert parsed("inspect", tmp_path / "out")["bytes"] == done["bytes_after"]


def test_rtn_needs_no_text_and_group_size_by_name(place, tmp_path):
    args = (
        "--recipe",
        "rtn",
        "--bits",
        "8",
        "--group-size",
        "channel",
        "--set",
        "symmetric=true",
        "--no-report",
    )
    done = parsed("quantize", place / "model", tmp_path / "out", *args)
    assert done["recipe"]["name"] == "rtn"
    assert "report.html" not in os.listdir(tmp_path / "out")
    formats = {str(item["format"]) for item in parsed("inspect", tmp_path / "out")["params"] if item["format"]}
    assert len(formats) == 1 and "'group_size': None" in formats.pop()


def test_equal_seeds_give_equal_arrays(place, out, tmp_path):
    def quantized(name, seed):
        args = ("--bits", "4", "--calibration", place / "text.txt", *QUANTIZE, "--seed", seed)
        assert run("quantize", place / "model", tmp_path / name, *args).exit_code == 0
        params = json.loads((tmp_path / name / "jaxq.json").read_text())["params"]
        return {path: entry["crc32"] for path, entry in params.items()}

    first = {path: entry["crc32"] for path, entry in json.loads((out / "jaxq.json").read_text())["params"].items()}
    assert quantized("same", 0) == first
    assert quantized("other", 1) != first


def test_a_recipe_survives_its_file(place, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(run("recipes", "rtn", "--bits", "3", "--group-size", "16").stdout)
    done = parsed("quantize", place / "model", tmp_path / "out", "--recipe", file)
    assert done["recipe"] == parsed("recipes", "rtn", "--bits", "3", "--group-size", "16")


def test_recipes():
    names = [item["name"] for item in parsed("recipes")]
    assert {"rtn", "gptq"} <= set(names)
    assert "gptq" in run("recipes").stdout


def test_overwrite(place, out, tmp_path):
    args = ("quantize", place / "model", tmp_path / "out", "--recipe", "rtn", "--group-size", "16")
    assert run(*args, "--bits", "2").exit_code == 0
    assert "exists" in refused(*args, "--bits", "3")
    assert parsed("inspect", tmp_path / "out")["recipe"]["rules"][0]["format"]["bits"] == 2
    assert run(*args, "--bits", "3", "--overwrite").exit_code == 0
    assert parsed("inspect", tmp_path / "out", "--verify")["recipe"]["rules"][0]["format"]["bits"] == 3


# Bad input: one line, exit code 2.


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("quantize {model}", "Missing argument 'OUT'"),
        ("quantize {model} {new} --bits x", "Invalid value for '--bits'"),
        ("quantize {model} {new} --samples 0", "Invalid value for '--samples'"),
        ("quantize {model} {new} --bogus", "No such option"),
        ("nonsense", "No such command 'nonsense'"),
        ("--bogus", "No such option"),
        ("quantize absent {new} --recipe rtn", "absent: no such directory or .gguf file"),
        ("quantize {model} {new} --recipe nope", "unknown recipe 'nope'"),
        ("quantize {model} {new} --recipe nope.toml", "cannot read the recipe nope.toml"),
        ("quantize {model} {new} --recipe {text}.toml", "cannot read the recipe"),
        ("quantize {model} {new} --recipe gptq", "recipe gptq needs text: add --calibration"),
        (
            "quantize {model} {new} --calibration absent.txt",
            "absent.txt: no such file, nor the name of a corpus",
        ),
        ("quantize {model} {new} --calibration {empty}", "is empty"),
        ("quantize {model} {new} --calibration {binary}", "is not UTF-8 text"),
        ("quantize {model} {new} --calibration {short}", "--seq-len"),
        ("quantize {model} {new} --calibration {text} --samples 9999 --seq-len 16", "--samples"),
        ("quantize {model} {new} --recipe rtn --bits 9 --group-size 16", "1 to 8 bits"),
        ("quantize {model} {new} --recipe rtn --group-size 64", "group size 64 is larger"),
        ("quantize {model} {new} --recipe rtn --group-size -1", "--group-size is a number"),
        ("quantize {model} {new} --recipe rtn --group-size many", "--group-size is a number"),
        ("quantize {model} {new} --recipe rtn --set bogus=1", "no setting bogus"),
        ("quantize {model} {new} --recipe rtn --set bogus", "--set takes KEY=VALUE"),
        ("quantize {model} {new} --recipe rtn --set pattern=none/**", "matches no site"),
        ("quantize {model} {new} --recipe rtn --dtype int3", "float32 or bfloat16"),
        ("quantize {out} {new} --recipe rtn", "is quantized already"),
        ("quantize {model} {out} --recipe rtn", "exists"),
        ("quantize {model} {model} --recipe rtn --overwrite", "holds no jaxq.json"),
        ("quantize {model} {text}/out --recipe rtn", "is not a directory"),
        ("eval {model} --data {text} --metric bleu", "unknown metric 'bleu'; use perplexity"),
        ("eval {model}", "add --data"),
        ("eval {model} --data absent.txt", "no such file"),
        ("eval {model} --data {short}", "one window needs 512"),
        ("eval {model} --data {empty}", "is empty"),
        ("eval absent --data {text}", "no such directory"),
        ("generate {model} --prompt", "requires an argument"),
        ("generate {model} --prompt ''", "the prompt is empty"),
        ("generate {model} --prompt x --top-p 2", "top_p"),
        ("generate {model} --prompt x --chat", "no chat template"),
        ("inspect {model}", "is not a jaxq directory"),
        ("inspect absent", "is not a jaxq directory"),
        ("recipes nope", "unknown recipe"),
        ("recipes rtn --bits 99", "1 to 8 bits"),
    ],
)
def test_bad_input_ends_in_one_line(args, message, place, out, tmp_path):
    import shlex

    names = {name: place / f"{name}.txt" for name in ("text", "short", "empty", "binary")}
    line = args.format(model=place / "model", out=out, new=tmp_path / "new", **names)
    assert message in refused(*shlex.split(line))
    assert os.listdir(tmp_path) == []


def test_settings_beside_a_recipe_file_are_refused(place, tmp_path):
    (tmp_path / "r.toml").write_text("")
    args = ("quantize", place / "model", tmp_path / "out", "--recipe", tmp_path / "r.toml")
    assert "--bits cannot be combined" in refused(*args, "--bits", "3")
    assert "r.toml: a recipe needs a list" in refused(*args)
    (tmp_path / "r.toml").write_bytes(b"\xff")
    assert "not UTF-8" in refused(*args)
    (tmp_path / "r.toml").write_text("name = [")
    assert "not valid TOML" in refused(*args)


def test_a_damaged_out_is_refused(place, out, tmp_path):
    import shutil

    copy = shutil.copytree(out, tmp_path / "out")
    for file in sorted((copy / "params").rglob("*")):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert "damaged" in refused("eval", copy, "--data", place / "text.txt", "--seq-len", "32")
    assert "damaged" in refused("inspect", copy, "--verify")
    (copy / "jaxq.json").write_text("{")
    assert "damaged" in refused("generate", copy, "--prompt", "x")


@pytest.mark.parametrize(
    ("bits", "size", "extra", "found"),
    [
        (None, None, [], {}),
        (3, "64", [], {"bits": 3, "group_size": 64}),
        (None, "0", [], {"group_size": None}),
        (None, "channel", [], {"group_size": None}),
        (None, "tensor", [], {"group_size": "tensor"}),
        (None, None, ["symmetric=true", "damping=0.1", "order=activation", "group_size=8"],
         {"symmetric": True, "damping": 0.1, "order": "activation", "group_size": 8}),
    ],
)  # fmt: skip
def test_settings(bits, size, extra, found):
    assert settings_of(bits, size, extra) == found


def test_settings_are_checked():
    for extra in (["x"], ["=1"], ["a-b=1"]):
        with pytest.raises(JaxqError, match="KEY=VALUE"):
            settings_of(None, None, extra)


# Help, progress, interrupts.


@pytest.mark.parametrize("command", ["sites", "quantize", "eval", "generate", "inspect", "recipes", "import"])
def test_every_command_has_help_with_examples(command):
    done = run(command, "--help")
    assert done.exit_code == 0
    assert "Examples" in done.stdout and f"$ jaxq {command}" in done.stdout


def test_help_and_version():
    assert "quantize" in run("--help").stdout == run().stdout
    assert re.fullmatch(r"jaxq \d+\.\d+\.\d+\S*\n", run("--version").stdout)
    command = [sys.executable, "-m", "jaxq", "--version"]
    module = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert module.stdout == run("--version").stdout


def test_the_command_line_itself_imports_nothing_heavy():
    # The package's own __init__ aside: it is replaced by an empty module with the same path.
    code = f"""
        import sys, types
        package = types.ModuleType("jaxq")
        package.__path__ = [{str(ROOT / "jaxq")!r}]
        sys.modules["jaxq"] = package
        import jaxq.cli
        heavy = {{"jax", "flax", "orbax", "transformers", "numpy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=60)


def test_progress_is_sparse_lines_without_a_terminal(capsys, monkeypatch):
    with console.meter("gptq") as meter:
        for step in range(1000):
            meter.update(step / 1000, f"site [{step}]", 12.0)
        monkeypatch.setattr(console, "LINE_SECONDS", 0.0)
        meter.update(0.5, "half", 12.0)
        meter.update(1.0, "done")
    lines = capsys.readouterr().err.strip().split("\n")
    assert lines == ["gptq: 0%  site [0]", "gptq: 50%  half, 12.0 s left", "gptq: 100%  done"]


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.meter("gptq") as meter, console.doing("reading"):
        meter.update(0.5, "stage 1/2 [x]", 3.0)
    assert capsys.readouterr().out == ""


def test_json_holds_no_nan(capsys):
    console.print_json({"a": float("nan"), "b": [float("inf"), 1.0], 3: ("x",)})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.0], "3": ["x"]}


def test_an_interrupt_exits_with_130(monkeypatch, place, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(jaxq, "quantize", interrupted)
    done = run("quantize", place / "model", tmp_path / "out", "--recipe", "rtn", "--group-size", "16")
    assert done.exit_code == 130 and "interrupted" in done.stderr
    assert os.listdir(tmp_path) == []


def test_the_program_is_interrupted_cleanly(place, tmp_path):
    write_model(tmp_path / "model", layers=4)
    command = [sys.executable, "-c", "from jaxq.cli import main; main()", "quantize", str(tmp_path / "model")]
    command += [str(tmp_path / "out"), "--calibration", str(place / "text.txt"), *QUANTIZE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest, _ = process.stderr.read(), process.wait(timeout=60)
    assert first.startswith("gptq: 0%")
    assert process.returncode == 130, rest
    assert "Traceback" not in rest and "interrupted" in rest
    assert os.listdir(tmp_path) == ["model"]


def test_the_program_prints_only_json_on_stdout(place, out):
    command = [sys.executable, "-c", "from jaxq.cli import main; main()", "eval", str(out), "--json"]
    command += ["--data", str(place / "text.txt"), "--windows", "3", "--seq-len", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"] == 93
