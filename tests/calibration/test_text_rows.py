"""Rows of data sets as calibration data: text, chats, tokens with metadata."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from gptq_plugin import QuantizeConfig, QuantizeModule
from gptq_plugin.apps.tokenizer import train_tokenizer
from gptq_plugin.calibration.collect import collect
from gptq_plugin.calibration.text_rows import encoded, render_chat
from gptq_plugin.errors import CalibrationError

from models import tiny_llama
from texts import CHAT_TEMPLATE, CHATS, PROSE, chat_words

CONFIG = QuantizeConfig(nsamples=8, batch_size=4, model_seqlen=64)


@pytest.fixture(scope="module")
def words():
    return train_tokenizer(PROSE * 10, 300)


@pytest.fixture(scope="module")
def chatty():
    return chat_words()


def ids(item, tokenizer):
    (batch,) = collect([item], CONFIG, tokenizer).batches
    return batch.data["input_ids"][0].tolist()


def test_rows_with_a_text_are_the_texts_whatever_other_columns_they_have(words):
    rows = [{"text": text, "id": number, "meta": {"url": "x"}, "tags": ["a"]} for number, text in enumerate(PROSE)]
    plain, data_set = collect(PROSE, CONFIG, words), collect(Dataset.from_list(rows), CONFIG, words)
    assert [b.data["input_ids"].tolist() for b in plain.batches] == [
        b.data["input_ids"].tolist() for b in data_set.batches
    ]
    assert plain.digest == collect(rows, CONFIG, words).digest == data_set.digest
    assert plain.deviations == data_set.deviations


@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_goes_through_the_template_and_gets_no_other_special_tokens(chat, chatty):
    expected = chatty.apply_chat_template(chat, return_dict=True)["input_ids"][:64]
    assert chatty.decode(expected).count("<s>") == 1
    assert ids({"messages": chat}, chatty) == ids(chat, chatty) == ids({"text": chat}, chatty) == expected


def test_a_data_sets_chats_are_read_although_it_fills_missing_keys_with_none(chatty):
    chats = [*CHATS, [{"role": "user", "content": "Call it.", "name": "me"}, {"role": "assistant", "content": "Done."}]]
    data = Dataset.from_list([{"messages": chat} for chat in chats])
    assert data[0]["messages"][0]["name"] is None  # the template would write it
    for row, chat in zip(data, chats):
        assert ids(row, chatty) == ids(chat, chatty)


def test_a_chat_in_columns_and_tools_as_json_are_read_too(chatty):
    chat = CHATS[0]
    columns = {key: [message[key] for message in chat] for key in ("role", "content")}
    assert ids({"messages": columns}, chatty) == ids(chat, chatty)
    tools = [{"type": "function", "function": {"name": "add"}}]
    with_tools = ids({"messages": chat, "tools": tools}, chatty)
    assert with_tools == ids({"messages": chat, "tools": json.dumps(tools)}, chatty) != ids(chat, chatty)
    assert ids({"messages": chat, "tools": None}, chatty) == ids(chat, chatty)


def test_rows_without_text_are_dropped_and_reported(chatty):
    rows = [{"text": None}, {"messages": []}, {"messages": CHATS[0]}, {"text": "some words", "messages": None}]
    calibration = collect(rows, CONFIG, chatty)
    assert calibration.samples == 2 and calibration.deviations == ["2 empty calibration samples dropped"]


def test_templates_do_not_see_the_keys_that_a_row_lacks():
    class Template:
        chat_template = "any"

        def apply_chat_template(self, messages, tools, tokenize):
            return f"{messages} {tools}"

    part = {"type": "text", "text": "Who?", "image": None}
    chat = [
        {"role": "user", "content": [part], "name": None},
        {"role": "assistant", "content": "I.", "tool_calls": None},
    ]
    assert render_chat(chat, Template(), []) == (
        "[{'role': 'user', 'content': [{'type': 'text', 'text': 'Who?'}]}, {'role': 'assistant', 'content': 'I.'}] None"
    )


@pytest.mark.parametrize("as_tensors", [False, True])
def test_tokenized_rows_leave_their_metadata_out(as_tensors):
    rows = Dataset.from_list([{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "text": "abc", "length": 3}] * 3)
    if as_tensors:
        rows = [{**row, "input_ids": torch.tensor(row["input_ids"])} for row in rows]
    (batch,) = collect(rows, CONFIG).batches
    assert batch.data.keys() == {"input_ids", "attention_mask"} and batch.data["input_ids"].tolist() == [[5, 6, 7]] * 3


@pytest.mark.parametrize(
    "batch",
    [
        {"pixel_values": torch.zeros(1, 3, 4, 4), "text": "a cat"},
        {"input_ids": torch.zeros(2, 3, dtype=torch.long), "text": "a cat"},
        {"input_ids": torch.zeros(2, 3, dtype=torch.long), "messages": CHATS[0]},
        (torch.zeros(2, 3), "a cat"),
        [{"image": 1}],
        {"image": "a.png"},
    ],
)
def test_batches_for_the_model_stay_as_they_are(batch, chatty):
    assert encoded(batch, chatty) is batch


@pytest.mark.parametrize(
    ("rows", "tokenizer", "message"),
    [
        ([{"text": "a"}], None, "holds texts, and there is no tokenizer for them: give tokenizer="),
        ([{"messages": CHATS[0]}], None, "holds chat messages, and there is no tokenizer for them: give tokenizer="),
        ([{"messages": CHATS[0]}], "words", r"no chat template: take .* set tokenizer\.chat_template; or give texts"),
        ([{"messages": CHATS[0]}], lambda text: [1], "no chat template"),
        ([{"messages": [{"role": "critic", "content": "?"}]}], "chatty", "refuses a chat of critic: no such role"),
        (
            DatasetDict(train=Dataset.from_list([{"text": "a"}]), test=Dataset.from_list([{"text": "a"}])),
            "words",
            r"the splits train, test: give one, \['train'\]",
        ),
        (CHATS[0], "chatty", r"holds a single message \(of user\), not chats: give a list of chats, \[messages\]"),
        ([[{"role": "user"}]], "chatty", "refuses a chat of user"),
    ],
)
def test_what_cannot_be_made_into_tokens_is_refused_with_the_remedy(rows, tokenizer, message, request):
    if isinstance(tokenizer, str):
        tokenizer = request.getfixturevalue(tokenizer)
    with pytest.raises(CalibrationError, match=message):
        collect(rows, CONFIG, tokenizer)


def test_a_rendered_chat_is_what_transformers_renders(chatty):
    assert render_chat(CHATS[1], chatty) == chatty.apply_chat_template(CHATS[1], tokenize=False)


class Processor(ProcessorMixin):
    """As of a model of images and text: images come first, and the template may be its own."""

    def __init__(self, tokenizer, chat_template=None):
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **_):
        raise AssertionError("a text is no image")


@pytest.mark.parametrize("own", [True, False])
def test_of_a_processor_the_tokenizer_encodes_and_either_template_renders(own, words, chatty):
    processor = Processor(words, CHAT_TEMPLATE) if own else Processor(chatty)
    assert ids("The quick fox", processor) == ids("The quick fox", words if own else chatty)
    assert ids(CHATS[0], processor) == ids(CHATS[0], chatty)


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Who?", "answer": "The fox.", "id": 3},
        {"conversations": [{"from": "human", "value": "Who?"}]},
        {"prompt": CHATS[0][:1], "completion": CHATS[0][1:]},
    ],
)
def test_rows_with_their_text_elsewhere_are_told_where_it_is_read(row, chatty):
    names = ", ".join(row)
    with pytest.raises(
        CalibrationError, match=rf"a row .* has {names}, and its text is read from a column text, or mes"
    ):
        QuantizeModule(group_size=16).quantize(tiny_llama(), Dataset.from_list([row] * 9), tokenizer=chatty)


def test_a_loaders_batch_of_texts_is_told_to_be_the_data_set(chatty):
    loader = DataLoader(Dataset.from_list([{"text": "The quick fox."}] * 9), batch_size=4)
    with pytest.raises(CalibrationError, match="put together by a DataLoader: give the data set itself"):
        QuantizeModule(group_size=16).quantize(tiny_llama(), loader, tokenizer=chatty)
