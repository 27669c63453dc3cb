"""`Completions`: what a GRPO or RLOO trainer generates in training, as calibration data.

Tested by tests/hf/test_trl.py: with TRL's trainer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from gptq_plugin.options import fields


class Completions:
    """A reward function for TRL that judges nothing, and keeps the newest completions with their prompts.

    ``GRPOTrainer(model, [reward, completions], ...)`` calls it; a callback whose `calibration_data` returns it reads it
    when training has ended. Iterating gives the tokens of each prompt with its completion, as a list.

    Args:
        tokenizer: The trainer's `processing_class`.
        keep: Completions to keep on each rank; the configuration's `nsamples` are used of those of all ranks.
    """

    __name__ = "completions"  # TRL logs rewards by it

    def __init__(self, tokenizer: Any, keep: int = 128) -> None:
        fields.integer(1).check("keep", keep)
        self.tokenizer = tokenizer
        self.kept: deque[tuple[Any, Any]] = deque(maxlen=keep)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[None]:
        """Keeps a batch: texts, or lists of chat messages. Returns no rewards, which TRL leaves out."""
        self.kept.extend(zip(prompts, completions, strict=True))
        return [None] * len(prompts)

    def __iter__(self) -> Iterator[list[int]]:
        for prompt, completion in self.kept:
            if isinstance(prompt, str):
                yield list(self.tokenizer(prompt + completion)["input_ids"])
            else:
                messages = [*prompt, *completion]
                yield list(self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"])
