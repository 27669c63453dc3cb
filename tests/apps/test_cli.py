"""gptq-finetune and gptq-quantize: real runs of the installed commands, and what they refuse."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import json
import math
import pickle
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import instantiate
from lightning import Trainer
from peft import LoraConfig, get_peft_model
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_plugin import QuantizeConfig, load_quantized
from gptq_plugin.apps import cli, data, evaluate
from gptq_plugin.apps.evaluate import mean_nll
from gptq_plugin.apps.fine_tuned import fine_tuned
from gptq_plugin.apps.language_model import LanguageModel, pretrained, small_llama
from gptq_plugin.apps.summary import SUMMARY, Summary, sweep_table
from gptq_plugin.errors import CheckpointError, DataError, ExportError
from gptq_plugin.model.adapters import merged_copy

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


def command(name: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs an installed command as a user would."""
    program = Path(sys.executable).parent / name
    return subprocess.run([program, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)


def succeeds(name: str, *arguments: str, cwd: Path) -> str:
    done = command(name, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture
def app(tmp_path):
    """app("finetune", "data.seq_len=64", ...) runs the application in this process, as Hydra would."""

    def run(name: str, *overrides: str):
        with initialize_config_module("gptq_plugin.conf", version_base="1.3"):
            cfg = compose(name, [*overrides, f"hydra.runtime.output_dir={tmp_path}/run"], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        (tmp_path / "run").mkdir(exist_ok=True)
        return getattr(cli, name)(cfg)

    yield run
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None


# --- gptq-finetune ---


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory):
    """The folder of one run on the built-in text, and what it printed."""
    cwd = tmp_path_factory.mktemp("finetune")
    printed = succeeds("gptq-finetune", *TINY, "hydra.run.dir=run", cwd=cwd)
    return cwd / "run", printed


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
    assert any(row["gptq/model.layers.1.mlp.down_proj/loss"] for row in rows)


def test_the_command_it_suggests_next_runs_and_puts_a_sweep_side_by_side(finetuned, tmp_path):
    _, printed = finetuned
    suggested = shlex.split(printed.split("Try next:")[1].strip().splitlines()[0])
    assert suggested[:2] == ["gptq-quantize", "-m"] and suggested[-1] == "quantizer.bits=2,3,4,8"
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


def test_an_export_can_be_evaluated_on_files(finetuned, tmp_path, capsys):
    run, _ = finetuned
    (tmp_path / "some.txt").write_text("The value of the expression is the object itself. " * 40)
    options = [f"--text={tmp_path}/some.txt", "--seq-len=32", "--rows=3", f"--json={tmp_path}/result.json"]
    evaluate.main([f"{run}/gptq", *options])
    assert "over 3 windows" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["windows"] == 3 and result["perplexity"] == pytest.approx(math.exp(result["nll"]))


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
        r"\d+ samples of the validation dataloader's \d+ \(seed 0\); 8 samples of the general text",
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


# --- gptq-quantize after a fine-tune ---

LORA = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
WORDS = ["some text to learn from"] * 9


def tiny(seed):
    torch.manual_seed(seed)
    return small_llama(WORDS, vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny base model, and the model."""
    folder, model = tmp_path_factory.mktemp("base") / "base", tiny(1)
    model.network.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder, model.network


def save_checkpoint(module, path):
    """As the Trainer writes one."""
    trainer = Trainer(accelerator="cpu", logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path, weights_only=True)
    return path


def save_sharded(module, folder, key="state_dict"):
    """The folder ModelParallelStrategy writes: the distributed checkpoint and meta.pt beside it."""
    state = {key: module.state_dict(), "optimizer_0": {"param_groups": [{"lr": 1e-3}]}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"epoch": 1, "global_step": 7}, folder / "meta.pt")
    return folder


def save_fsdp(module, folder):
    """The folder FSDPStrategy writes; read from its source, since it needs GPUs."""
    return save_sharded(module, folder, key="model")


def same_weights(network, other):
    state = other.state_dict()
    assert state.keys() == network.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("save", [save_checkpoint, save_sharded, save_fsdp])
def test_a_lightning_checkpoint_brings_its_weights(base, tmp_path, save):
    trained = tiny(2)
    ckpt = save(trained, tmp_path / "run.ckpt")
    for weights in (True, False):
        loaded = pretrained([], name_or_path=str(base[0]), weights=weights).network
        assert not torch.equal(loaded.lm_head.weight, trained.network.lm_head.weight)
        same_weights(fine_tuned(loaded, ckpt=ckpt), trained.network)


def test_a_sharded_checkpoint_is_read_into_another_dtype(base, tmp_path):
    trained = tiny(2)
    folder = save_sharded(trained, tmp_path / "run.ckpt")
    loaded = fine_tuned(pretrained([], name_or_path=str(base[0]), dtype="bfloat16").network, ckpt=folder)
    same_weights(loaded, trained.network.to(torch.bfloat16))


@pytest.mark.slow
def test_the_folder_of_a_model_parallel_run_on_two_processes_is_read(base, tmp_path):
    (tmp_path / "run.py").write_text(
        textwrap.dedent("""
        import sys
        import torch
        from lightning import LightningModule, Trainer
        from lightning.pytorch.strategies import ModelParallelStrategy
        from torch.distributed.fsdp import fully_shard
        from torch.utils.data import DataLoader
        from transformers import AutoModelForCausalLM

        class Run(LightningModule):
            def __init__(self):
                super().__init__()
                self.network = AutoModelForCausalLM.from_pretrained(sys.argv[1])

            def configure_model(self):
                fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

            def training_step(self, batch, index):
                return self.network(input_ids=batch, labels=batch).loss

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.5)

            def on_train_end(self):
                whole = {name: p.full_tensor() for name, p in self.network.named_parameters()}
                if self.trainer.is_global_zero:
                    torch.save(whole, "whole.pt")

        trainer = Trainer(strategy=ModelParallelStrategy(2, 1), accelerator="cpu", devices=2,
                          max_steps=2, logger=False, enable_progress_bar=False, enable_checkpointing=False)
        trainer.fit(Run(), DataLoader(torch.randint(0, 250, (8, 12)), batch_size=2))
        trainer.save_checkpoint("run.ckpt")
        """)
    )
    done = subprocess.run([sys.executable, "run.py", base[0]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run.ckpt" / ".metadata").is_file()
    loaded = fine_tuned(pretrained([], name_or_path=str(base[0])).network, ckpt=tmp_path / "run.ckpt")
    whole = torch.load(tmp_path / "whole.pt")
    assert not torch.equal(whole["lm_head.weight" if "lm_head.weight" in whole else "model.embed_tokens.weight"],
                           base[1].lm_head.weight)  # fmt: skip
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, whole[name]), name


def test_an_adapter_is_merged_into_its_base(base, tmp_path):
    adapted = get_peft_model(copy.deepcopy(base[1]), LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    network = fine_tuned(pretrained([], name_or_path=str(base[0])).network, adapter=tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(network(ids).logits, adapted.eval()(ids).logits)
        assert not torch.allclose(network(ids).logits, base[1].eval()(ids).logits, atol=1e-2)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("save", [save_checkpoint, save_sharded])
def test_a_checkpoint_with_adapters_takes_their_scaling_from_the_adapters_folder(base, tmp_path, save, own):
    trained = tiny(2)
    if own:  # transformers' own integration, without a wrapper
        trained.network.add_adapter(LoraConfig(**LORA), adapter_name="default")
    else:
        trained.network = get_peft_model(trained.network, LoraConfig(**LORA))
    ckpt = save(trained, tmp_path / "run.ckpt")
    LoraConfig(**LORA).save_pretrained(tmp_path / "adapter")  # no weights: those are the checkpoint's
    expected = merged_copy(trained.network)
    network = fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")
    same_weights(network, expected)
    with pytest.raises(CheckpointError, match=r"run\.ckpt was written with PEFT adapters.*Give adapter=FOLDER"):
        fine_tuned(tiny(3).network, ckpt=ckpt)
    LoraConfig(**{**LORA, "r": 3}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="does not hold the weights of LlamaForCausalLM"):
        fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")
    LoraConfig(**{**LORA, "target_modules": ["q_proj"]}).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"does not hold"):
        fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")


def test_an_adapter_on_top_of_a_plain_checkpoint_is_merged_into_the_checkpoints_weights(base, tmp_path):
    trained = tiny(2)
    ckpt = save_checkpoint(trained, tmp_path / "run.ckpt")
    adapted = get_peft_model(trained.network, LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "adapter")
    network = fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")
    same_weights(network, merged_copy(adapted))


def test_a_second_adapter_in_a_checkpoint_is_not_dropped_in_silence(base, tmp_path):
    trained = tiny(2)
    trained.network = get_peft_model(trained.network, LoraConfig(**LORA))
    trained.network.add_adapter("other", LoraConfig(**LORA))
    ckpt = save_checkpoint(trained, tmp_path / "run.ckpt")
    LoraConfig(**LORA).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"holds more than the weights.*lora_A\.other\.weight.*other adapters"):
        fine_tuned(tiny(3).network, ckpt=ckpt, adapter=tmp_path / "adapter")


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


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    network = torch.nn.Linear(3, 2)
    torch.save({"state_dict": {"net.weight": torch.zeros(2, 4), "net.bias": torch.zeros(2)}}, tmp_path / "other.ckpt")
    torch.save({"weights": 1}, tmp_path / "none.ckpt")
    (tmp_path / "broken.ckpt").write_bytes(b"not a checkpoint")
    (tmp_path / "folder").mkdir()
    save_sharded(torch.nn.Linear(4, 2), tmp_path / "sharded")
    with pytest.raises(CheckpointError, match="does not hold the weights of Linear"):
        fine_tuned(network, ckpt=tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="has no state_dict"):
        fine_tuned(network, ckpt=tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        fine_tuned(network, ckpt=tmp_path / "broken.ckpt")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fine_tuned(network, ckpt=tmp_path / "nowhere.ckpt")
    with pytest.raises(CheckpointError, match=r"folder without \.metadata"):
        fine_tuned(network, ckpt=tmp_path / "folder")
    with pytest.raises(CheckpointError, match="does not hold the weights of Linear"):
        fine_tuned(network, ckpt=tmp_path / "sharded")


def test_a_sharded_checkpoint_cut_off_is_refused(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")
    (folder / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(CheckpointError, match="cannot be read as a sharded checkpoint"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)


def test_code_in_a_sharded_checkpoint_is_not_run(tmp_path):
    folder = save_sharded(torch.nn.Linear(3, 2), tmp_path / "run.ckpt")

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (folder / ".metadata").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(CheckpointError, match="its index names .*which is no part of one"):
        fine_tuned(torch.nn.Linear(3, 2), ckpt=folder)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_that_is_none_or_another_models_is_refused(base, tmp_path):
    network = pretrained([], name_or_path=str(base[0])).network
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"adapter=.*empty cannot be put on the model: .*adapter_config\.json"):
        fine_tuned(network, adapter=tmp_path / "empty")
    other = get_peft_model(copy.deepcopy(base[1]), LoraConfig(**LORA))
    other.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"down_proj"', '"up_proj"'))
    with pytest.raises(CheckpointError, match="cannot be put on the model: .*missing adapter keys"):
        fine_tuned(network, adapter=tmp_path / "adapter")


def test_without_peft_an_adapter_says_what_to_install(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'gptq-plugin\[peft\]'"):
        fine_tuned(copy.deepcopy(base[1]), adapter=tmp_path)


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
    assert quantizer.offload_weights is None and quantizer.offload_activations is None
    fields = {field.name for field in dataclasses.fields(QuantizeConfig)}
    assert set(cfg.quantizer) - {"_target_"} == fields | {"offload_weights", "offload_activations"}


def test_mean_nll_is_the_mean_over_every_predicted_token():
    class Known(torch.nn.Module):
        """Gives the next token (t + 1) a probability that depends on t alone."""

        def __init__(self):
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(7, 7))

        def forward(self, input_ids):
            return type("Out", (), {"logits": self.table[input_ids]})

    network = Known()
    windows = torch.randint(0, 7, (5, 6))
    expected = [-network.table.log_softmax(-1)[window[i], window[i + 1]].item() for window in windows for i in range(5)]
    for batch_size in (1, 2, 5, 9):
        assert mean_nll(network, windows, batch_size) == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_the_learning_rate_rises_to_its_peak_and_falls_to_a_tenth():
    network = torch.nn.Linear(2, 2)
    model = LanguageModel(network, None, warmup_steps=4)
    model._trainer = type("T", (), {"estimated_stepping_batches": 24})()  # the property only forwards
    model._fabric = None
    shares = [model._share_of_peak(step) for step in range(25)]
    assert shares[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert shares[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in itertools.pairwise(shares[4:]))


def test_a_sweeps_table_shows_what_differs_and_survives_runs_without_evaluation(tmp_path):
    for number, nll in enumerate([{"float": 1.0, "rtn": 1.5, "gptq": 1.25}, {}]):
        folder = tmp_path / str(number)
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "overrides.yaml").write_text(f"- model=hf\n- quantizer.bits={number + 2}\n")
        Summary(number + 2, 128, 10_000_000, "float32", 2_000_000, nll=nll).write(folder)
    (tmp_path / "10").mkdir()
    lines = sweep_table(tmp_path).splitlines()
    assert lines[2].split() == [
        "0",
        "quantizer.bits=2",
        "2.718",
        "4.482",
        "3.490",
        "+0.25000",
        "2.00",
        "MB",
        "of",
        "10.00",
        "MB",
        "0",
    ]
    assert lines[3].split()[:2] == ["1", "quantizer.bits=3"]
    assert "model=hf" not in sweep_table(tmp_path)
    assert sweep_table(tmp_path / "nothing") == ""


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

    def test_text_too_short_for_one_row(self, app, tmp_path):
        (tmp_path / "short.txt").write_text("Too short.")
        refused(app, DataError, "too short", *TINY, "data=text", f"data.path={tmp_path}/short.txt")

    @pytest.mark.parametrize("name", ["finetune", "quantize"])
    def test_an_export_folder_that_exists(self, app, tmp_path, name):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("years of work")
        key = {"finetune": "callbacks.gptq.export_dir", "quantize": "export_dir"}[name]
        options = TINY if name == "finetune" else ["model.name_or_path=/no/such/model"]
        refused(app, ExportError, "no export of gptq_plugin", *options, f"{key}={tmp_path}/mine", name=name)
        assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"

    def test_a_model_without_a_name(self, app):
        refused(app, InstantiationException, r"needs model\.name_or_path", name="quantize")
        refused(
            app,
            InstantiationException,
            "is no dtype",
            "model.name_or_path=x",
            "model.dtype=float31",
            name="quantize",
        )

    def test_a_callback_that_would_not_leave_the_float_model_to_compare(self, app):
        refused(app, ValueError, "must hold one GPTQCallback", *TINY, "callbacks.gptq.swap=true")


def test_a_users_mistake_is_said_in_words_and_with_a_failing_exit(tmp_path):
    done = command("gptq-quantize", "data=text", "data.path=missing/*.txt", cwd=tmp_path)
    assert done.returncode == 1
    assert "no file matches the pattern missing/*.txt" in done.stderr
    assert "gptq" not in {path.name for path in tmp_path.rglob("*")}


def test_a_failed_quantization_leaves_the_fine_tuned_model_and_says_where(app, tmp_path, monkeypatch, caplog):
    import gptq_plugin.quantize.one_pass

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gptq_plugin.quantize.one_pass, "solve_shared", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        app("finetune", *TINY)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "float")
    assert saved.config.hidden_size == 128
    assert f"the fine-tuned float model is safe in {tmp_path / 'run' / 'float'}" in caplog.text
    assert not (tmp_path / "run" / "gptq").exists()
