"""The names of AutoGPTQ and of optimum's `GPTQQuantizer`, so that a script written for them runs with another import.

    from gptq_plugin.autogptq import AutoGPTQForCausalLM, BaseQuantizeConfig, GPTQQuantizer

Everything is forwarded to `QuantizeModule` and `load_quantized`; nothing is computed here. Options without a meaning
here are taken with a warning, options that would change the result and are not supported are refused with the remedy.

Imports quantize, checkpoint and what is below them; never lightning, hf or apps.
"""

from gptq_plugin.autogptq.base_config import BaseQuantizeConfig
from gptq_plugin.autogptq.causal_lm import AutoGPTQForCausalLM
from gptq_plugin.autogptq.gptq_model import BaseGPTQForCausalLM
from gptq_plugin.autogptq.gptq_quantizer import GPTQQuantizer, load_quantized_model

__all__ = [
    "AutoGPTQForCausalLM",
    "BaseGPTQForCausalLM",
    "BaseQuantizeConfig",
    "GPTQQuantizer",
    "load_quantized_model",
]
