"""Makes the small checkpoints under tests/fixtures with the tools whose files this package reads.

Each folder is what the tool wrote, without tokenizer and logs. ``NAME.expected.safetensors`` beside it holds fixed
token ids, the last float32 logits and the greedy continuation, computed by an independent reader of the format
(`gptq_ref.py` of the client checks), which uses neither the tool's kernels nor this package. llm-compressor's files are
read by compressed-tensors itself, and the unpacked weights multiplied in float32.

Each step runs in its tool's environment, never in ours (see scripts/check_clients.sh for `gm`)::

    gm/bin/python   scripts/make_fixtures.py gptqmodel     tests/fixtures
    gm/bin/python   scripts/make_fixtures.py optimum       tests/fixtures
    ag/bin/python   scripts/make_fixtures.py autogptq      tests/fixtures
    llmc/bin/python scripts/make_fixtures.py llmcompressor tests/fixtures
    gm/bin/python   scripts/make_fixtures.py expected      tests/fixtures --clients DIR_OF_GPTQ_REF
    llmc/bin/python scripts/make_fixtures.py expected-ct   tests/fixtures

`gm` holds gptqmodel 7.6.0, optimum 2.3.0, transformers 5.23.0, torch 2.13.0; `ag` holds the auto-gptq 0.7.1 wheel
(installed with --no-deps), transformers 4.41.2, accelerate 0.30.1, peft 0.11.1, datasets, rouge, gekko, torch 2.13.0;
`llmc` holds llmcompressor 0.14.0.1, compressed-tensors 0.19.0, transformers 5.17.0, torch 2.13.0.
Names as arguments select fixtures. The random weights are scaled so that every layer affects the logits.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "GPTQMODEL_CPU_WORKERS": "2",
    "TORCHDYNAMO_DISABLE": "1",
}.items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

VOCAB = 128
TOKEN_IDS = [1] + [(i * 97 + 13) % (VOCAB - 8) + 8 for i in range(31)]
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip

# name -> (architecture, options of GPTQModel's QuantizeConfig)
GPTQMODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "gptqmodel-w4g32": ("llama", {"bits": 4, "group_size": 32}),
    "gptqmodel-w4g32-v2": ("llama", {"bits": 4, "group_size": 32, "format": "gptq_v2"}),
    "gptqmodel-w4g32-desc-act": ("llama", {"bits": 4, "group_size": 32, "desc_act": True}),
    "gptqmodel-w4g32-asym-desc-act-v2": (
        "llama",
        {"bits": 4, "group_size": 32, "sym": False, "desc_act": True, "format": "gptq_v2"},
    ),
    "gptqmodel-w4g32-asym": ("llama", {"bits": 4, "group_size": 32, "sym": False}),
    "gptqmodel-w3g32": ("llama", {"bits": 3, "group_size": 32}),
    "gptqmodel-w3g32-asym-desc-act-v2": (
        "llama",
        {"bits": 3, "group_size": 32, "sym": False, "desc_act": True, "format": "gptq_v2"},
    ),
    "gptqmodel-w2g16-desc-act": ("llama", {"bits": 2, "group_size": 16, "desc_act": True}),
    "gptqmodel-w2g32-v2": ("llama", {"bits": 2, "group_size": 32, "format": "gptq_v2"}),
    "gptqmodel-w8g32-asym-v2": ("llama", {"bits": 8, "group_size": 32, "sym": False, "format": "gptq_v2"}),
    "gptqmodel-w8-channel-desc-act": ("llama", {"bits": 8, "group_size": -1, "desc_act": True}),
    "gptqmodel-qwen2-bias-w4g32": ("qwen2", {"bits": 4, "group_size": 32}),
    "gptqmodel-mixed-bits": (
        "llama",
        {"bits": 4, "group_size": 32, "dynamic": {r".*down_proj": {"bits": 8}, r"-:.*q_proj": {}}},
    ),
}
# name -> options of AutoGPTQ's BaseQuantizeConfig
AUTOGPTQ: dict[str, dict[str, Any]] = {
    "autogptq-w4g32": {"bits": 4, "group_size": 32, "desc_act": False},
    "autogptq-w4g32-asym-desc-act": {"bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "autogptq-w4g32-desc-act-static-groups": {
        "bits": 4,
        "group_size": 32,
        "desc_act": True,
        "static_groups": True,
    },
    "autogptq-w3g32": {"bits": 3, "group_size": 32, "desc_act": False},
    "autogptq-w2g32": {"bits": 2, "group_size": 32, "desc_act": False},
    "autogptq-w8g32-desc-act": {"bits": 8, "group_size": 32, "desc_act": True},
}
# name -> options of optimum's GPTQQuantizer
OPTIMUM: dict[str, dict[str, Any]] = {
    "optimum-w4g32-desc-act": {"bits": 4, "group_size": 32, "desc_act": True, "act_group_aware": False},
    "optimum-w8g32": {"bits": 8, "group_size": 32},
}
# name -> (architecture, dtype, {target: options of compressed-tensors' QuantizationArgs}, layers left float)
LLMCOMPRESSOR: dict[str, tuple[str, str, dict[str, dict[str, Any]], list[str]]] = {
    "llmcompressor-w4g32": ("llama", "float16", {"Linear": {"num_bits": 4, "group_size": 32}}, []),
    "llmcompressor-w4g32-asym": (
        "llama",
        "bfloat16",
        {"Linear": {"num_bits": 4, "group_size": 32, "symmetric": False}},
        [],
    ),
    "llmcompressor-w3g32-asym": (
        "llama",
        "float16",
        {"Linear": {"num_bits": 3, "group_size": 32, "symmetric": False}},
        [],
    ),
    "llmcompressor-w2g16": ("llama", "float16", {"Linear": {"num_bits": 2, "group_size": 16}}, []),
    "llmcompressor-w8-channel": ("llama", "bfloat16", {"Linear": {"num_bits": 8, "strategy": "channel"}}, []),
    "llmcompressor-w8-channel-asym": (
        "llama",
        "float16",
        {"Linear": {"num_bits": 8, "strategy": "channel", "symmetric": False}},
        [],
    ),
    "llmcompressor-qwen2-bias-w4g32": ("qwen2", "float16", {"Linear": {"num_bits": 4, "group_size": 32}}, []),
    "llmcompressor-mixed-bits": (
        "llama",
        "float16",
        {"re:.*down_proj": {"num_bits": 8, "strategy": "channel"}, "Linear": {"num_bits": 4, "group_size": 32}},
        ["re:.*q_proj"],
    ),
}


def calibration() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, VOCAB, (16, 64), generator=generator)
    return [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in rows]


def save_float_model(architecture: str, directory: Path) -> None:
    """Saves a random model whose layers each contribute O(1) to the residual stream."""
    import transformers
    from tokenizers import Tokenizer, models

    torch.manual_seed(1)
    if architecture == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "embed" in name:
                parameter.normal_(0, 0.5)
            elif parameter.ndim == 2:
                parameter.normal_(0, (3 if "lm_head" in name else 1) * parameter.shape[1] ** -0.5)
    model.to(torch.float16).save_pretrained(directory)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t3"
    ).save_pretrained(directory)


def write_gptqmodel(source: Path, target: Path, options: dict[str, Any]) -> None:
    from gptqmodel import GPTQModel, QuantizeConfig

    # The tool defaults to bfloat16: v1 files keep it, v2 files are made in float16.
    dtype = torch.float16 if options.get("format") == "gptq_v2" else torch.bfloat16
    model = GPTQModel.load(str(source), QuantizeConfig(**options), dtype=dtype)
    model.quantize(calibration(), batch_size=4)
    model.save(str(target))


def write_optimum(source: Path, target: Path, options: dict[str, Any]) -> None:
    from optimum.gptq import GPTQQuantizer
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(source, dtype=torch.float16)
    samples = [{key: torch.tensor([value]) for key, value in row.items()} for row in calibration()]
    quantizer = GPTQQuantizer(dataset=samples, **options)
    model = quantizer.quantize_model(model, None)
    model.config.quantization_config["dataset"] = None  # tensors, which would go into the JSON file
    # As transformers' GPTQConfig does. GPTQQuantizer.save makes the tensors v1 and leaves "gptq_v2" in config.json.
    model.save_pretrained(target)


def write_llmcompressor(
    source: Path, target: Path, dtype: str, schemes: dict[str, dict[str, Any]], skip: list[str]
) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    groups = {
        f"group_{i}": QuantizationScheme(targets=[name], weights=QuantizationArgs(**{"strategy": "group", **options}))
        for i, (name, options) in enumerate(schemes.items())
    }
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head", *skip])
    samples = Dataset.from_list(calibration())
    oneshot(model=model, dataset=samples, recipe=recipe, num_calibration_samples=16, max_seq_length=64)
    model.save_pretrained(target, save_compressed=True)


def write_autogptq(source: Path, target: Path, options: dict[str, Any]) -> None:
    import auto_gptq.modeling._base
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import LlamaGPTQForCausalLM
    from transformers import LlamaForCausalLM

    # The tool requires CUDA in three places, though neither quantizing nor packing needs it.
    auto_gptq.modeling._base.CUDA_0 = torch.device("cpu")
    torch.cuda.synchronize = lambda device=None: None
    model = LlamaForCausalLM.from_pretrained(source, torch_dtype=torch.float16).eval()
    wrapper = LlamaGPTQForCausalLM(model, False, BaseQuantizeConfig(**options))
    samples = [{key: torch.tensor([value]) for key, value in row.items()} for row in calibration()]
    wrapper.quantize(samples, batch_size=1, use_triton=False, cache_examples_on_gpu=False)
    wrapper.save_quantized(str(target), use_safetensors=True)


def keep_what_matters(written: Path, fixture: Path) -> None:
    shutil.rmtree(fixture, ignore_errors=True)
    fixture.mkdir(parents=True)
    for file in sorted(written.iterdir()):
        if file.suffix in (".safetensors", ".json") and "token" not in file.name:
            shutil.copy(file, fixture / file.name)


def write_expected(fixture: Path, clients: Path) -> None:
    from safetensors.torch import load_file, save_file

    assert clients is not None, "give --clients"
    sys.path.insert(0, str(clients))
    import gptq_ref  # type: ignore[import-not-found]

    config = json.loads((fixture / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        # The reader expects the configuration in config.json; AutoGPTQ may have written a separate file.
        copy = Path(scratch)
        for file in fixture.glob("*.safetensors"):
            # AutoGPTQ gives every layer a bias, of zeros if the model has none; the reader's model (a Llama) has no
            # parameter for these.
            tensors = load_file(file)
            bias = [n for n in tensors if n.endswith(".bias") and config["model_type"] == "llama"]
            assert not any(tensors.pop(n).any() for n in bias)
            save_file(tensors, str(copy / file.name))
        quantization = config.get("quantization_config") or json.loads((fixture / "quantize_config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
        logits, greedy = gptq_ref.run(gptq_ref.reference_model(str(copy)), TOKEN_IDS)
    save_expected(fixture, logits, greedy)


def write_expected_of_compressed_tensors(fixture: Path) -> None:
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(fixture)
    quantization = config.quantization_config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = load_file(fixture / "model.safetensors")
    # The tool also decides which layer has which scheme.
    schemes = AutoModelForCausalLM.from_config(config)
    known = QuantizationConfig.model_fields
    apply_quantization_config(schemes, QuantizationConfig(**{k: v for k, v in quantization.items() if k in known}))
    for name, module in schemes.named_modules():
        if (scheme := getattr(module, "quantization_scheme", None)) is None:
            continue
        suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        state = {suffix: stored.pop(f"{name}.{suffix}") for suffix in suffixes if f"{name}.{suffix}" in stored}
        state["weight_scale"] = state["weight_scale"].float()
        stored[f"{name}.weight"] = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    missing, unexpected = model.load_state_dict(stored, strict=False)
    assert not unexpected and set(missing) <= set(model.all_tied_weights_keys), (missing, unexpected)
    ids = torch.tensor([TOKEN_IDS])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
        greedy = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, min_new_tokens=16
        )[0, len(TOKEN_IDS) :]
    save_expected(fixture, logits, greedy)


def save_expected(fixture: Path, logits: torch.Tensor, greedy: torch.Tensor) -> None:
    from safetensors.torch import save_file

    ids = torch.tensor([TOKEN_IDS])
    tensors = {"input_ids": ids, "logits": logits[-8:].contiguous(), "greedy": greedy}
    save_file(tensors, f"{fixture}.expected.safetensors")
    print(f"{fixture.name}: logits {tuple(logits.shape)}, largest {logits.abs().max():.3f}, greedy {greedy.tolist()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ("gptqmodel", "autogptq", "optimum", "llmcompressor", "expected", "expected-ct")
    parser.add_argument("step", choices=steps)
    parser.add_argument("fixtures", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--clients", type=Path, help="the folder of gptq_ref.py (step `expected`)")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.step.startswith("expected"):
        for fixture in sorted(p.parent for p in arguments.fixtures.glob("*/config.json")):
            packed = fixture.name.startswith("llmcompressor")
            if packed != (arguments.step == "expected-ct") or fixture.name not in (arguments.names or [fixture.name]):
                continue
            if packed:
                write_expected_of_compressed_tensors(fixture)
            else:
                write_expected(fixture, arguments.clients)
        return
    jobs: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
        **{k: (a, partial(write_gptqmodel, options=o)) for k, (a, o) in GPTQMODEL.items()},
        **{k: ("llama", partial(write_autogptq, options=o)) for k, o in AUTOGPTQ.items()},
        **{k: ("llama", partial(write_optimum, options=o)) for k, o in OPTIMUM.items()},
        **{
            k: (a, partial(write_llmcompressor, dtype=d, schemes=g, skip=skip))
            for k, (a, d, g, skip) in LLMCOMPRESSOR.items()
        },
    }
    for name in arguments.names or [k for k in jobs if k.startswith(f"{arguments.step}-")]:
        architecture, write = jobs[name]
        with tempfile.TemporaryDirectory() as scratch:
            source, written = Path(scratch, "float"), Path(scratch, "written")
            save_float_model(architecture, source)
            write(source, written)
            keep_what_matters(written, arguments.fixtures / name)
        print(f"made {name} with torch {importlib.metadata.version('torch')}", flush=True)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # GPTQModel's worker threads would keep the interpreter alive
