"""What an export says of where it comes from, and that it says nothing of whose machine made it."""

from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.export.convert import convert
from gptq_plugin.report.module_report import ModuleReport
from gptq_plugin.report.provenance import plain_name, provenance, publishable, strip_paths
from gptq_plugin.report.report import QuantizeReport

from models import Plain, tiny_llama, tokenizer

IDS = torch.randint(3, 60, (5, 21), generator=torch.Generator().manual_seed(0))
SMALL = QuantizeConfig(group_size=32, nsamples=5, seed=7)


def exported(folder, model=None, **options):
    quantizer, model = QuantizeModule(SMALL), tiny_llama(num_hidden_layers=1) if model is None else model
    quantizer.quantize(model, list(IDS))
    return quantizer, quantizer.export(model, folder, **options)


def metas(folder):
    description = json.loads((folder / "config.json").read_text())["quantization_config"]
    return description["meta"], json.loads((folder / "quantize_config.json").read_text())["meta"]


# --- what meta holds ---


def test_both_files_say_with_what_and_when_an_export_was_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quantizer, folder = exported(tmp_path / "out")
    config, full = metas(folder)
    said, run = config["gptq_plugin"], full["gptq_plugin"]
    assert config["quantizer"][0].startswith("gptq_plugin:")
    assert said.items() <= run.items() and run["files"]
    assert {"gptq_plugin", "python", "torch", "transformers"} <= set(said["versions"])
    assert run["date"].endswith("+00:00") and "date" not in said
    assert (said["seed"], said["nsamples"], said["samples"], said["tokens"]) == (7, 5, 5, 105)
    assert said["calibration"] == {"sha256": quantizer.report.calibration_sha256}
    assert run["run_id"] == quantizer.report.run_id and len(run["run_id"]) == 32 and "run_id" not in said
    written = json.loads((folder / "quantization_report.json").read_text())
    assert (written["calibration_sha256"], written["run_id"]) == (said["calibration"]["sha256"], run["run_id"])
    assert "git" not in said and "metrics" not in said  # no repository, nothing measured


def test_a_converted_export_keeps_where_it_comes_from(tmp_path):
    before = [meta["gptq_plugin"] for meta in metas(exported(tmp_path / "out")[1])]
    convert(tmp_path / "out", tmp_path / "v2", "gptq_v2")
    assert [meta["gptq_plugin"] for meta in metas(tmp_path / "v2")] == before


def test_two_runs_of_the_same_write_the_same_config_json(tmp_path, monkeypatch):
    one = exported(tmp_path / "one")[1]
    later = SimpleNamespace(now=lambda zone: datetime(2100, 1, 1, tzinfo=zone))
    monkeypatch.setattr("gptq_plugin.report.provenance.datetime", later)
    other = exported(tmp_path / "other")[1]
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    (_, first), (_, second) = metas(one), metas(other)
    differ = {key for key in first["gptq_plugin"] if first["gptq_plugin"][key] != second["gptq_plugin"][key]}
    assert differ == {"date", "run_id"} and second["gptq_plugin"]["date"] == "2100-01-01T00:00:00+00:00"


def test_metrics_that_are_no_numbers_stay_standard_json():
    report = QuantizeReport(SMALL, metrics={"val_loss": {"float": 2.5, "gptq": float("nan")}})
    assert provenance(report)["metrics"] == {"val_loss": {"float": 2.5, "gptq": None}}


def test_the_working_directorys_revision_is_named_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert "git" not in provenance(QuantizeReport(SMALL))  # no commit yet
    Path("train.py").write_text("1")
    git("add", "train.py")
    git("commit", "-qm", "x")
    revision = git("rev-parse", "HEAD")
    assert provenance(QuantizeReport(SMALL))["git"] == {"revision": revision, "dirty": False}
    Path("train.py").write_text("2")
    assert provenance(QuantizeReport(SMALL))["git"] == {"revision": revision, "dirty": True}
    monkeypatch.setenv("PATH", "")
    assert "git" not in provenance(QuantizeReport(SMALL))


@pytest.mark.parametrize("name", [None, 3, "", "a/b", "a\\b", "has space", "..", "/x", "é" * 200])
def test_a_run_id_that_is_no_plain_name_is_not_taken(name):
    assert plain_name(name) == ""


def test_a_run_id_that_is_a_plain_name_is_taken():
    assert plain_name("3fj2k9-x.1_b") == "3fj2k9-x.1_b"


# --- and nothing else ---


def files_that_say(word, folder):
    return [file.name for file in folder.rglob("*") if file.is_file() and word.encode() in file.read_bytes()]


def test_no_file_of_an_export_reveals_where_it_was_made(tmp_path, monkeypatch):
    secret = tmp_path / "secret-user"
    monkeypatch.chdir(tmp_path)
    tiny_llama(num_hidden_layers=1).save_pretrained(secret / "float")
    tokenizer().save_pretrained(secret / "float")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(secret / "float")
    words = AutoTokenizer.from_pretrained(secret / "float")
    assert model.config._name_or_path == words.name_or_path == str(secret / "float")
    quantizer = QuantizeModule(SMALL)
    report = quantizer.quantize(model, list(IDS))
    report.calibration = f"5 samples of {secret}/texts.jsonl"
    report.float_checkpoint = str(secret / "last.ckpt")
    report.deviations.append(f"the weights of {secret}/best.ckpt were not used")
    folder = quantizer.export(model, secret / "out", tokenizer=words)
    assert {"config.json", "README.md", "report.html", "tokenizer_config.json"} <= {f.name for f in folder.iterdir()}
    assert files_that_say("secret-user", folder) == []
    assert "5 samples of texts.jsonl" in metas(folder)[0]["gptq_plugin"]["calibration"]["description"]
    assert json.loads((folder / "quantization_report.json").read_text())["float_checkpoint"] == "last.ckpt"
    assert report.float_checkpoint == str(secret / "last.ckpt")  # in memory it stays


def test_no_file_of_a_plain_modules_export_reveals_where_it_was_made(tmp_path):
    quantizer, model = QuantizeModule(group_size=16, nsamples=4), Plain()
    quantizer.quantize(model, [IDS[:4, :12] % 8])
    folder = quantizer.export(model, tmp_path / "secret-user")
    assert files_that_say("secret-user", folder) == []


def test_paths_in_any_sentence_of_a_report_are_cut_to_their_end():
    module = ModuleReport("a", "float", None, None, (1, 1), reason="see /home/me/a.txt", deviations=("in ~/b.txt.",))
    short = publishable(QuantizeReport(SMALL, [module])).modules[0]
    assert (short.reason, short.deviations) == ("see a.txt", ("in b.txt.",))
    assert strip_paths(r"C:\Users\me\x.ckpt and 'file:///x/y'") == "x.ckpt and 'y'"


def test_paths_with_spaces_are_cut_to_their_end_too(tmp_path, monkeypatch):
    home = tmp_path / "Jane M. Doe, at work"
    (home / "my runs (old)").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for path in (home, f"file://{home}", "~"):
        said = strip_paths(f"weights of {path}/my runs (old)/best one.ckpt, and {path}/gone for/good.txt: not used")
        assert said == "weights of best one.ckpt, and good.txt: not used"
    assert strip_paths("of /Users/Jane Doe/other machine/x.txt or /a/b. Now") == "of x.txt or b. Now"
    assert strip_paths("1 / 2 and 3/4 at 5 tokens/s") == "1 / 2 and 3/4 at 5 tokens/s"
