"""gptq-finetune and gptq-quantize: real runs of the installed commands, and what they refuse."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_plugin import QuantizeConfig, QuantizeModule, load_quantized
from gptq_plugin.apps import data
from gptq_plugin.apps.evaluate import mean_nll
from gptq_plugin.apps.language_model import LanguageModel
from gptq_plugin.apps.summary import SUMMARY
from gptq_plugin.errors import DataError, ExportError
from gptq_plugin.model.adapters import merged_copy

from forked_python import python
from language_models import LORA, save_sharded, tiny
from texts import CHAT_TEMPLATE, CHATS

TINY = [
    "model.vocab_size=384",
    "model.hidden_size=128",
    "model.intermediate_size=256",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=2",
    "data.seq_len=64",
    "data.train_rows=200",
    "data.batch_size=16",
    "trainer.check_val_every_n_epoch=1",
    "trainer.max_steps=12",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=4",
]


def command(name: str, *arguments: str, cwd: Path, by: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs an installed command, by an interpreter that starts at once."""
    program = Path(sys.executable).parent / name
    return subprocess.run([by or python(), program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)


def succeeds(name: str, *arguments: str, cwd: Path) -> str:
    done = command(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


# --- gptq-finetune ---


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of one run on the built-in text, and what it printed; its other stream is in stderr.txt."""
    cwd = tmp_path_factory.mktemp("finetune")
    done = command("gptq-finetune", *TINY, "hydra.run.dir=run", cwd=cwd, by=sys.executable)  # as for a user
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    (cwd / "stderr.txt").write_text(done.stderr)
    return cwd / "run", done.stdout


def test_finetune_ends_with_a_table_a_person_understands(finetuned):
    run, printed = finetuned
    for words in (
        "float",
        "round-to-nearest, 4 bits",
        "GPTQ, 4 bits",
        "perplexity",
        "weights on disk",
        "held-out windows of 64 tokens",
        "Try next:",
        str(run.resolve() / "gptq"),
    ):
        assert words in printed, words
    assert printed.count("ERROR") == 0


def test_libraries_print_once_and_advertise_nothing(finetuned):
    run, printed = finetuned
    both = printed + (run.parent / "stderr.txt").read_text()
    for words in ("GPU available: ", "`Trainer.fit` stopped: "):
        assert both.count(words) == 1, both
    for words in ("Tip: ", "was configured so 100%", "LeafSpec"):
        assert words not in both, both


def test_finetune_measures_what_its_files_hold(finetuned):
    run, _ = finetuned
    summary = json.loads((run / SUMMARY).read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "gptq")
    windows = data.builtin(seq_len=64, train_rows=200).encode(tokenizer).validation
    assert tuple(windows.shape) == tuple(summary["windows"])
    float_model = AutoModelForCausalLM.from_pretrained(run / "float", dtype=torch.float32)
    assert summary["nll"]["float"] == pytest.approx(mean_nll(float_model, windows), abs=1e-4)
    assert summary["nll"]["gptq"] == pytest.approx(mean_nll(load_quantized(run / "gptq"), windows), abs=1e-3)
    assert summary["nll"]["float"] < math.log(384)
    assert summary["float_bytes"] == pytest.approx((run / "float/model.safetensors").stat().st_size, rel=0.02)
    assert summary["gptq_bytes"] == (run / "gptq/model.safetensors").stat().st_size
    assert summary["gptq_bytes"] < summary["float_bytes"] / 2
    assert summary["text"]
    assert summary["files"]["every layer"] == str((run / "gptq" / "report.html").resolve())
    assert all(seconds >= 0 for seconds in summary["seconds"].values())


def test_finetune_logs_losses_and_layers(finetuned):
    run, _ = finetuned
    rows = list(csv.DictReader((run / "logs" / "metrics.csv").open()))
    losses = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert any(row["val_loss"] for row in rows)
    assert any(row["gptq/loss"] for row in rows)
    layers = list(csv.DictReader((run / "logs" / "gptq" / "layers.csv").open()))
    assert any(row["name"] == "model.layers.1.mlp.down_proj" and float(row["loss"]) > 0 for row in layers)


def test_the_command_it_suggests_next_runs_and_puts_a_sweep_side_by_side(finetuned, tmp_path):
    _, printed = finetuned
    suggested = shlex.split(printed.split("Try next:")[1].strip().splitlines()[0])
    assert Path(suggested[0]) == Path(sys.executable).parent / "gptq-quantize"  # which is not on PATH here
    assert suggested[1] == "-m" and suggested[-1] == "quantizer.bits=2,3,4,8"
    out = succeeds(*suggested[:-1], "quantizer.bits=2,8", "hydra.sweep.dir=sweep", "device=cpu", cwd=tmp_path)
    table = (tmp_path / "sweep" / "sweep.txt").read_text()
    assert table.strip() in out
    lines = table.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["quantizer.bits=2", "quantizer.bits=8"]
    runs = [json.loads((tmp_path / "sweep" / str(i) / SUMMARY).read_text()) for i in range(2)]
    assert [run["bits"] for run in runs] == [2, 8]
    assert runs[0]["gptq_bytes"] < runs[1]["gptq_bytes"]
    reports = [tmp_path / "sweep" / str(i) / "gptq" / "quantization_report.json" for i in range(2)]
    losses = [json.loads(report.read_text())["totals"]["loss"] for report in reports]
    assert losses[1] < losses[0] / 100


@pytest.mark.slow
def test_two_processes_give_one_folder_one_export_and_one_table(tmp_path):
    printed = succeeds(
        "gptq-finetune",
        *TINY,
        "trainer.devices=2",
        "trainer.strategy=ddp",
        "trainer.accelerator=cpu",
        cwd=tmp_path,
    )
    assert printed.count("round-to-nearest, 4 bits") == 1
    (run,) = (tmp_path / "outputs" / "finetune").iterdir()  # named by the time, and both ranks'
    summary = json.loads((run / SUMMARY).read_text())
    assert summary["nll"]["gptq"] == pytest.approx(summary["nll"]["float"], abs=0.1)


def test_finetune_mixes_general_text_into_the_runs_own_calibration(app, tmp_path):
    (tmp_path / "own.txt").write_text("The statement is executed when the name is not bound. " * 400)
    app(
        "finetune",
        *TINY,
        "data=text",
        f"data.path={tmp_path}/own.txt",
        "quantizer.nsamples=20",
        "evaluate=false",
        "callbacks.gptq.calibration=val",
        "callbacks.gptq.mix_fraction=0.4",
        "callbacks.gptq.mix={_target_:gptq_plugin.apps.documents.passages,"
        "documents:{_target_:gptq_plugin.apps.documents.builtin_documents}}",
    )
    report = json.loads((tmp_path / "run" / "gptq" / "quantization_report.json").read_text())
    assert re.fullmatch(
        r"\d+ samples of the validation dataloader's \d+ of own\.txt \(seed 0\); 8 samples of the general text",
        report["calibration"],
    )


# --- gptq-quantize ---


def test_quantize_takes_files_in_their_order_and_other_files_to_evaluate_on(finetuned, app, tmp_path):
    run, _ = finetuned
    sentences = [f"The statement number {i} is executed when the name {i % 9} is not bound." for i in range(150)]
    calibration, held_out = tmp_path / "calib.jsonl", tmp_path / "eval.jsonl"
    calibration.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences[:100]))
    held_out.write_text("".join(json.dumps({"text": s}) + "\n" for s in sentences[100:]))
    app(
        "quantize",
        f"model.name_or_path={run / 'float'}",
        "data=text",
        f"data.path={calibration}",
        f"data.eval_path={held_out}",
        "data.eval_rows=5",
        "data.shuffle=false",
        "data.seq_len=32",
        "quantizer.nsamples=16",
        "quantizer=w3g128",
        "quantizer.group_size=64",
        f"export_dir={tmp_path}/out",
        "device=cpu",
    )
    summary = json.loads((tmp_path / "run" / SUMMARY).read_text())
    assert summary["windows"] == [5, 32] and summary["bits"] == 3
    written = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert (written["bits"], written["group_size"]) == (3, 64)
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert report["totals"]["samples"] == 16


def chats(file, count=60):
    rows = [{"messages": [{**message, "content": f"{message['content']} {n}"} for message in CHATS[n % 2]]} for n in
            range(count)]  # fmt: skip
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ["quantize", "finetune"])
def test_chats_are_trained_and_calibrated_on_through_the_tokenizers_template(name, app, base, tmp_path):
    shutil.copytree(base[0], tmp_path / "chatty")
    words = AutoTokenizer.from_pretrained(base[0])
    words.chat_template = CHAT_TEMPLATE
    words.save_pretrained(tmp_path / "chatty")
    data = ["data=text", f"data.path={chats(tmp_path / 'chats.jsonl')}", "data.column=messages", "data.seq_len=16"]
    model = ["model=hf", f"model.name_or_path={tmp_path / 'chatty'}", "quantizer.group_size=32", "quantizer.nsamples=8"]
    more = ["device=cpu"] if name == "quantize" else ["trainer.max_steps=2", "trainer.accelerator=cpu"]
    app(name, *model, *data, *more, "evaluate=false")
    report = json.loads((tmp_path / "run" / "gptq" / "quantization_report.json").read_text())
    assert report["totals"]["samples"] == 8
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "gptq").chat_template == CHAT_TEMPLATE


def test_a_second_run_with_cache_dir_takes_every_layer_and_writes_the_same_bytes(app, base, tmp_path):
    def run(name, *overrides):
        options = ["data.seq_len=64", "quantizer.nsamples=8", "quantizer.group_size=32", "evaluate=false", "device=cpu"]
        folders = [f"quantizer.cache_dir={tmp_path / 'cache'}", f"export_dir={tmp_path / name}"]
        app("quantize", f"model.name_or_path={base[0]}", *options, *folders, *overrides)
        report = json.loads((tmp_path / name / "quantization_report.json").read_text())
        return report["cache"], (tmp_path / name / "model.safetensors").read_bytes()

    first, again, wider = run("first"), run("again"), run("wider", "quantizer.bits=8")
    assert (first[0]["layers_solved"], again[0]["layers_taken"], wider[0]["layers_taken"]) == (7, 7, 0)
    assert first[1] == again[1]


def test_a_run_to_be_resumed_has_an_export_dir_that_the_next_one_finds(app, base, tmp_path):
    options = [f"model.name_or_path={base[0]}", "data.seq_len=64", "quantizer.nsamples=8", "quantizer.group_size=32"]
    options += ["evaluate=false", "device=cpu", "quantizer.resume=true"]
    with pytest.raises(ValueError, match=r"has a new name in every run: give export_dir=DIR or hydra\.run\.dir=DIR"):
        app("quantize", *options)
    app("quantize", *options, f"export_dir={tmp_path / 'found'}")
    assert (tmp_path / "found/config.json").exists() and not list(tmp_path.glob(".found*"))


# --- gptq-quantize after a fine-tune ---


def test_a_checkpoint_and_an_adapter_go_through_the_command(app, base, tmp_path):
    trained = tiny(2)
    trained.network = get_peft_model(trained.network, LoraConfig(**LORA))
    ckpt = save_sharded(trained, tmp_path / "run.ckpt")
    trained.network.save_pretrained(tmp_path / "adapter")
    app(
        "quantize",
        f"model.name_or_path={base[0]}",
        "model.weights=false",
        f"ckpt={ckpt}",
        f"adapter={tmp_path / 'adapter'}",
        "data.seq_len=32",
        "data.train_rows=16",
        "evaluate=false",
        "device=cpu",
        "quantizer.bits=8",
        "quantizer.group_size=32",
    )
    loaded, expected = load_quantized(tmp_path / "run" / "gptq"), merged_copy(trained.network)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        difference = (loaded(ids).logits - expected.eval()(ids).logits).abs().max()
        assert difference < 0.1 * (expected(ids).logits - base[1].eval()(ids).logits).abs().max()


def test_random_weights_are_not_quantized(app, base):
    with pytest.raises(ValueError, match="model.weights=false leaves the model's weights random: give ckpt=PATH"):
        app("quantize", f"model.name_or_path={base[0]}", "model.weights=false")


# --- the pieces ---


def test_rules_for_modules_can_be_given_on_the_command_line():
    with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
        cfg = compose("quantize", [r"+quantizer.dynamic={.*down_proj:{bits:8},-\:.*gate_proj:{}}"])
    config = instantiate(cfg.quantizer, model_seqlen=64, _convert_="all").config
    assert config.for_module("model.layers.0.mlp.down_proj").bits == 8
    assert config.for_module("model.layers.0.mlp.gate_proj") is None
    assert config.for_module("model.layers.0.mlp.up_proj").bits == 4


def test_the_default_quantizer_is_the_configurations_defaults():
    with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
        cfg = compose("quantize", ["quantizer.model_seqlen=2048"])
    quantizer = instantiate(cfg.quantizer, _convert_="all")
    assert quantizer.config == QuantizeConfig()
    switches = {"offload_weights", "offload_activations", "exact_sums"}
    assert [getattr(quantizer, name) for name in switches] == [None] * 3
    fields = {field.name for field in dataclasses.fields(QuantizeConfig)}
    assert (quantizer.cache_dir, quantizer.cache_gb) == (None, QuantizeModule().cache_gb)
    assert set(cfg.quantizer) - {"_target_"} == fields | switches | {"cache_dir", "cache_gb", "resume"}


# --- bad input, before anything is trained ---


@pytest.fixture
def no_training(monkeypatch):
    def fit(*_, **__):
        raise AssertionError("training started")

    monkeypatch.setattr(Trainer, "_run_stage", fit)


def refused(app, error, message, *overrides, name="finetune"):
    with pytest.raises(error, match=message):
        app(name, *overrides)


@pytest.mark.usefixtures("no_training")
class TestRefusedBeforeTraining:
    def test_the_check_itself_would_see_training(self, app):
        refused(app, AssertionError, "training started", *TINY)

    def test_an_unknown_option(self, app):
        refused(app, ConfigCompositionException, r"quantizer\.bitz", *TINY, "quantizer.bitz=3")
        refused(app, InstantiationException, "did you mean 'bits'", *TINY, "+quantizer.bitz=3")

    def test_five_bits(self, app):
        refused(app, InstantiationException, "bits must be one of 2, 3, 4, 8; got 5", *TINY, "quantizer.bits=5")

    def test_a_missing_file(self, app):
        missing = ["data=text", "data.path=/no/such/file.txt"]
        refused(app, InstantiationException, r"no such file or folder: /no/such/file\.txt", *TINY, *missing)

    def test_text_files_without_a_path(self, app):
        refused(app, InstantiationException, r"data=text needs data\.path", *TINY, "data=text")

    def test_empty_text(self, app, tmp_path):
        (tmp_path / "empty.txt").touch()
        refused(app, InstantiationException, "is empty", *TINY, "data=text", f"data.path={tmp_path}/empty.txt")

    @pytest.mark.parametrize("name", ["finetune", "quantize"])
    def test_chats_without_a_template(self, app, base, tmp_path, name):
        data = ["data=text", f"data.path={chats(tmp_path / 'chats.jsonl')}", "data.column=messages"]
        model = ["model=hf", f"model.name_or_path={base[0]}"]
        refused(app, DataError, "the tokenizer has no chat template: take the tokenizer", *model, *data, name=name)
        if name == "finetune":
            refused(app, InstantiationException, "take a model that was tuned for chat", *TINY, *data)

    def test_a_tokenizer_that_is_none(self, app, tmp_path):
        nowhere = f"callbacks.gptq.tokenizer={tmp_path}/nowhere"
        refused(app, InstantiationException, "is neither a folder nor a hub id", *TINY, f"+{nowhere}")

    def test_text_too_short_for_one_row(self, app, tmp_path):
        (tmp_path / "short.txt").write_text("Too short.")
        refused(app, DataError, "too short", *TINY, "data=text", f"data.path={tmp_path}/short.txt")

    @pytest.mark.parametrize("name", ["finetune", "quantize"])
    def test_an_export_folder_that_exists(self, app, tmp_path, name):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        key = {"finetune": "callbacks.gptq.export_dir", "quantize": "export_dir"}[name]
        options = TINY if name == "finetune" else ["model.name_or_path=/no/such/model"]
        refused(app, ExportError, "not an export of gptq_plugin", *options, f"{key}={tmp_path}/mine", name=name)
        assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"

    def test_a_model_without_a_name(self, app):
        refused(app, InstantiationException, r"needs model\.name_or_path", name="quantize")
        refused(
            app,
            InstantiationException,
            "is not a dtype",
            "model.name_or_path=x",
            "model.dtype=float31",
            name="quantize",
        )

    def test_a_callback_that_would_not_leave_the_float_model_to_compare(self, app):
        refused(app, ValueError, "must hold one GPTQCallback", *TINY, "callbacks.gptq.swap=true")


@pytest.mark.parametrize("sanity", [0, 2])
def test_a_metric_that_is_not_logged_is_refused_before_training_with_the_nearest(app, sanity, monkeypatch):
    def step(*_):
        raise AssertionError("training started")

    monkeypatch.setattr(LanguageModel, "training_step", step)
    limit = ["callbacks.gptq.max_degradation={val_los:0.02}", f"trainer.num_sanity_val_steps={sanity}"]
    refused(app, ValueError, r"names val_los, .* did you mean val_loss\?", *TINY, *limit)


def test_a_users_mistake_ends_in_a_sentence_and_a_failing_exit(tmp_path):
    done = command("gptq-quantize", "data=text", "data.path=missing/*.txt", cwd=tmp_path)
    assert done.returncode == 1
    assert "no file matches the pattern missing/*.txt" in done.stderr
    assert "gptq" not in {path.name for path in tmp_path.rglob("*")}


def test_a_failed_quantization_leaves_the_fine_tuned_model_and_tells_where(app, tmp_path, monkeypatch, caplog):
    import gptq_plugin.quantize.one_pass

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gptq_plugin.quantize.one_pass, "solve_shared", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        app("finetune", *TINY)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "float")
    assert saved.config.hidden_size == 128
    assert f"the fine-tuned float model is safe in {tmp_path / 'run' / 'float'}" in caplog.text
    assert not (tmp_path / "run" / "gptq").exists()


def test_finetune_trains_with_the_models_dropout(app, base, monkeypatch):
    """`from_pretrained` gives a model in evaluation mode, and Lightning leaves it there."""
    modes = []

    def step(model, batch, index):
        modes.append({module.training for module in model.modules()})
        return model._loss(batch)

    monkeypatch.setattr(LanguageModel, "training_step", step)
    app(
        "finetune", "model=hf", f"model.name_or_path={base[0]}", "data.seq_len=32", "data.train_rows=32",
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "save_float=false",
        "quantizer.group_size=16", "quantizer.nsamples=4", "evaluate=false",
    )  # fmt: skip
    assert modes == [{True}, {True}]


@pytest.mark.parametrize(("name", "kind"), [("quantize", "scales"), ("finetune", "scales"), ("quantize", "full")])
def test_a_finish_trains_on_the_commands_rows_and_its_export_replaces_that_of_gptq(name, kind, app, base, tmp_path):
    (tmp_path / "own.txt").write_text("The statement is executed when the name is not bound. " * 400)
    options = [f"model.name_or_path={base[0]}", "device=cpu"] if name == "quantize" else [*TINY, "save_float=false"]
    finish = [
        f"finish={kind}",
        "finish.steps=4",
        "finish.held_out=4",
        "finish.tokens_per_step=64",
        "finish.judgements=2",
        *(["finish.block_steps=3"] if kind == "full" else []),
    ]
    app(
        name, *options, "data=text", f"data.path={tmp_path}/own.txt", "data.seq_len=32", "quantizer.bits=2",
        "quantizer.group_size=16", "quantizer.nsamples=16", "evaluate=false", *finish,
    )  # fmt: skip
    told = json.loads((tmp_path / "run/gptq/quantization_report.json").read_text())
    record = told["finish"]
    assert record["samples"] == 16 and record["held_out_tokens"] == 4 * 32 and record["steps"] == 4
    assert record["kind"] == kind and bool(record["blocks"]) == (kind == "full")
    assert "of own.txt" in record["data"] and record["options"]["tokens_per_step"] == 64
    assert record["kept"] == (record["after"] < record["before"])
    described = json.loads((tmp_path / "run/gptq/quantize_config.json").read_text())["meta"]["gptq_plugin"]
    assert described["finish"]["steps"] == 4 and described["finish"]["data"]["sha256"] == record["data_sha256"]
    assert len([one for one in (tmp_path / "run").iterdir() if one.name.startswith("gptq")]) == 1
