"""Short texts with what text may hold, chats, and a tokenizer for them."""

from __future__ import annotations

from typing import Any

PROSE = [
    "The quick brown fox jumps over the lazy dog. ",
    "Ένα — naïve\ttext,\n\nwith  odd   spaces 🙂.\n",
    "",
    "x",
]

# As chat models have it: special tokens, roles that it knows, optional keys, tools.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}{% endif %}"
    "<{{ message.role }}>{% if message.name is defined %}({{ message.name }}){% endif %}{{ message['content'] + '' }}"
    "{{ eos_token }}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "Who jumps?"}, {"role": "assistant", "content": "The quick brown fox."}],
    [
        {"role": "system", "content": "Answer in one word."},
        {"role": "user", "content": "Over what?"},
        {"role": "assistant", "content": "Dog."},
    ],
]


def chat_words() -> Any:
    """A tokenizer with a chat template, trained on these texts. As Llama's, it puts BOS before a text by itself."""
    from tokenizers.processors import TemplateProcessing

    from gptq_plugin.apps.tokenizer import BOS, train_tokenizer

    words = train_tokenizer(PROSE * 10, 300)
    begun = TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words.bos_token_id)])
    words.backend_tokenizer.post_processor = begun
    words.chat_template = CHAT_TEMPLATE
    return words
