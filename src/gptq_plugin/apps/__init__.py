"""The two Hydra applications: ``gptq-finetune`` and ``gptq-quantize``.

In the order the data passes them: documents → tokenizer → rows → data → language_model → fine_tuned
(lightning_weights, sharded_weights) → evaluate → summary → cli. Everything here is built on the library's public names
and could be a user's own.
"""
