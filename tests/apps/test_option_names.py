"""Names on the command line that do not exist, and the nearest that do."""

from __future__ import annotations

import pytest

from gptq_plugin.apps.option_names import unknown_names, unreadable_overrides

WRONG = {
    "added": [
        ("+quantizer.bit=3", "there is no option quantizer.bit: did you mean quantizer.bits=3?"),
        ("++quantizer.bit=3", "there is no option quantizer.bit: did you mean quantizer.bits=3?"),
        ("+callbacks.gptqq.export_dir=x", "did you mean callbacks.gptq.export_dir=x?"),
        ("+trainer.logger.nam=x", "did you mean trainer.logger.name=x?"),
        ("+trainer.max_step=1", "there is no option trainer.max_step: did you mean trainer.max_steps=1?"),
        ("+data.seqlen=9", "there is no option data.seqlen: did you mean data.seq_len=9?"),
        ("+data.zzz=9", "there is no option data.zzz: data has seq_len"),
        ("+evalute=false", "there is no option evalute: did you mean evaluate=false?"),
        ("+model.name_or_pth=x", "small_llama has no model.name_or_pth: did you mean model=hf model.name_or_path=x?"),
        ("++data.path=x", "data=builtin has no data.path: did you mean data=hub data.path=x or data=text data.path=x?"),
    ],
    "choices": [
        ("quantizer=w4g12", "there is no quantizer=w4g12: did you mean quantizer=w4g128? quantizer is one of mixed"),
        ("quantizer=w4g128,w3g12", "there is no quantizer=w3g12: did you mean quantizer=w3g128?"),
        ("data=wikipedia", "there is no data=wikipedia: data is one of builtin, hub, text"),
        ("hydra/launcher=fast", "there is no hydra/launcher=fast: hydra/launcher is one of"),
    ],
    "bare": [
        ("quantizer.bits", "quantizer.bits has no value: options are written name=value"),
    ],
    "keys": [
        ("quantizer.bit=3", "there is no option quantizer.bit: did you mean quantizer.bits=3?"),
        ("~quantizer.bit", "there is no option quantizer.bit: did you mean ~quantizer.bits?"),
        ("quantizer.bit=2,3", "there is no option quantizer.bit: did you mean quantizer.bits=2,3?"),
        ("quantiser.bits=3", "there is no option quantiser.bits: did you mean quantizer.bits=3?"),
        ("quantiser.bit=3", "there is no option quantiser.bit: did you mean quantizer.bits=3?"),
        ("bits=3", "there is no option bits: did you mean quantizer.bits=3?"),
        ("bit=3", "there is no option bit: did you mean quantizer.bits=3?"),
        ("target=vllm", "there is no option target: did you mean callbacks.gptq.target=vllm?"),
        ("callbacks.gptq.max_degredation=1", "did you mean callbacks.gptq.max_degradation=1?"),
        ("callbacks.gtpq.swap=true", "did you mean callbacks.gptq.swap=true?"),
        ("trainer.logger.nam=x", "did you mean trainer.logger.name=x?"),
        ("trainer.min_epoch=1", "there is no option trainer.min_epoch: did you mean +trainer.min_epochs=1?"),
        ("trainer.min_epochs=1", "is not in the configuration, but lightning.Trainer takes it: +trainer.min_epochs=1"),
        ("data.zzz=9", "there is no option data.zzz: data has seq_len, batch_size, bos, shuffle, seed, train_rows"),
        ("zzz=9", "there is no option zzz: the configuration has model, data, quantizer, finish, trainer, callbacks"),
        ("hydra.run.dirr=x", "there is no option hydra.run.dirr: did you mean hydra.run.dir=x?"),
        ("callbacks.gptq.max_degradation.val_loss=1", "+callbacks.gptq.max_degradation.val_loss=1 adds it"),
        ("seed.x=1", "seed has no x: it is 0"),
        ("model.name_or_path=x", "has no model.name_or_path: did you mean model=hf model.name_or_path=x?"),
        ("data.path=x", "did you mean data=hub data.path=x or data=text data.path=x?"),
        ("model.name_or_pth=x", "small_llama has no model.name_or_pth: did you mean model=hf model.name_or_path=x?"),
        ("data.pth=x", "data=builtin has no data.pth: did you mean data=hub data.path=x or data=text data.path=x?"),
        ("data.pth=x,y", "did you mean data=hub data.path=x,y or data=text data.path=x,y?"),
        ("data.splt=x", "data=builtin has no data.splt: did you mean data=hub data.split=x?"),
        ("dta.path=x", "there is no option dta.path: did you mean data=hub data.path=x or data=text data.path=x?"),
        ("name_or_path=x", "there is no option name_or_path: did you mean model=hf model.name_or_path=x?"),
        ("data.zzz=9", "; data=hub also path, name, "),
        ("data.batch_sze=9", "there is no option data.batch_sze: did you mean data.batch_size=9?"),
        ("~data.pth", "there is no option data.pth: data has seq_len"),
        ("finish.steps=9", "finish=none has no finish.steps: did you mean finish=blocks finish.steps=9 or finish=full"),
        ("callback=gptq", "there is no option callback: did you mean callbacks=gptq?"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_name_that_does_not_exist_comes_with_the_nearest_that_does(kind):
    """All of a kind on one command line: each has its own sentence, whatever else is wrong there."""
    overrides, sentences = zip(*WRONG[kind])
    found = unknown_names("finetune", ["seed=3", *overrides, "trainer.max_steps=5"])
    assert len(found) == len(sentences)
    for sentence, told in zip(sentences, found):
        assert sentence in told


@pytest.mark.parametrize(("chosen", "option"), [("none", "steps=9"), ("scales", "block_steps=9")])
def test_an_added_option_of_another_choice_is_told_with_that(chosen, option):
    """The target takes it, and does nothing with it."""
    for override in (f"finish.{option}", f"+finish.{option}"):
        (told,) = unknown_names("quantize", [f"finish={chosen}", override])
        assert f"finish={chosen} has no finish.{option.partition('=')[0]}: did you mean finish=blocks" in told


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["quantizer=w3g128", "quantizer.bits=2,3", "seed=1"],
        ["+trainer.min_epochs=2", "++trainer.max_steps=2", "~trainer.logger"],
        ["+quantizer.dynamic={.*down_proj:{bits:8}}", "+callbacks.gptq.max_degradation.val_loss=0.1"],
        ["+callbacks.ema._target_=lightning.pytorch.callbacks.Timer", "+callbacks.ema.duration=1"],
        ["+callbacks.stop={_target_:lightning.pytorch.callbacks.Timer}", "callbacks.stop._target_=x.y"],
        ["+width=64", "model.hidden_size=${width}"],
        ["+own.width=64", "model.hidden_size=${own.width}"],
        ["+trainer.plugins={_target_:my.Plugin,anything:3}"],
        ["model={_target_:my.model,anything:3}"],
        ["+model.anything=3", "model._target_=dict"],
        ["+hydra.job.env_set.X=1", "hydra.run.dir=out"],
        ["data=text", "data.path=[a.txt,b.txt]", "model=hf", "model.name_or_path=x"],
    ],
)
def test_names_that_exist_or_are_added_for_somebody_pass(overrides):
    assert unknown_names("finetune", overrides) == []


@pytest.mark.parametrize("override", ["quantizer.bits=[", "callbacks.gptq.on_fail=a=b", "+x={a", "data.path=a b'"])
def test_an_option_that_hydra_cannot_read_is_told_which_one_it_is(override):
    (found,) = unreadable_overrides(["seed=1", override])
    assert found.startswith(f"{override} cannot be read: ") and "See https" not in found


def test_a_list_of_choices_that_are_no_names_is_refused_by_its_group():
    (found,) = unreadable_overrides(["+callbacks=[1.0,0.9]", "callbacks=[gptq]", "quantizer.clip_ratios=[1.0,0.9]"])
    assert found.startswith("+callbacks=[1.0,0.9]: callbacks is chosen by names")


def test_a_choice_that_is_no_name_is_told_the_names():
    (found,) = unknown_names("finetune", ["quantizer=3"])
    assert "there is no quantizer=3: " in found and "w4g128" in found


def test_each_wrong_name_has_its_sentence_and_the_configuration_of_the_command_counts():
    assert len(unknown_names("finetune", ["quantizer.bit=3", "seeed=1", "data.shuffle=true"])) == 2
    assert unknown_names("quantize", ["target=vllm", "model.name_or_path=x"]) == []
    assert "has no option" not in "".join(unknown_names("quantize", ["trainer.max_steps=1"]))


@pytest.mark.parametrize("sign", ["", "+", "++"])
def test_a_group_that_the_command_does_not_read_is_refused_also_when_it_is_added(sign):
    """Composed, it would be in the configuration, and its options would do nothing."""
    (found,) = unknown_names("quantize", [f"{sign}callbacks=gptq", "+callbacks.gptq.max_degradation={val_loss:0.1}"])
    assert found == "callbacks is no group of this command, which has data, finish, model, quantizer"
    assert unknown_names("finetune", ["callbacks=gptq", "hydra/launcher=basic"]) == []


def test_a_model_without_weights_is_no_choice_of_a_command_that_does_not_train():
    (found,) = unknown_names("quantize", ["model=hf,small_llama"])
    assert found.startswith("model=small_llama is no choice of this command: its weights are random")
    assert unknown_names("finetune", ["model=small_llama"]) == []
    (found,) = unknown_names("quantize", ["model.vocab_size=300"])
    assert "small_llama" not in found


def test_a_sweep_over_the_choices_that_a_pattern_matches_passes():
    assert unknown_names("finetune", ["quantizer=glob(w*)"]) == []
    (sentence,) = unknown_names("finetune", ["quantizer=glob(w*)", "seeed=1"])
    assert sentence.endswith("did you mean seed=1?")
