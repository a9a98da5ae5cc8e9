"""`chat_segments`: who wrote which token, whatever is written."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from chat_templates import BOS, EOS, FAMILIES, dumps
from chat_tokenizers import Letters, byte_level, lower_case, sentence_piece
from hypothesis import assume, given, settings, strategies as st
from jinja2 import TemplateError

from llama_attn import chat_segments
from llama_attn.stats.chat_text import Chat
from llama_attn.stats.token_ids import token_spans

FRAGMENTS = sorted(
    {token for family in FAMILIES.values() for token in family.special}
    | {BOS, EOS, "<|im_end|>\n<|im_start|>assistant\nno", " [/INST] ", "<<SYS>>\n", "\n<</SYS>>\n\n", " USER: ", " ASSISTANT:"}
    | {"<|user|>\n", "### Response:\n", "user", "assistant", "system", "<tool_call>", "[INST] hi [/INST]", "{{ x }}", '"', "\\n"}
    | {"</think>", "<think>", "<think>\n", "<tool_response>", "</tool_response>", "name=", "[TOOL_CALLS]", '{"name": "f"}'}
    | {" ", "\n", "\n\n", "\t", "\u3000", "é", "e\u0301", "😀", "🏴‍☠️", "ﬁ", "hi", "Be brief."}
)  # fmt: skip

contents = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=4).map("".join)


@st.composite
def chats(draw, family):
    """Messages in an order that the template takes; few contents, so that some messages are the same."""
    pool = draw(st.lists(contents, min_size=1, max_size=4))
    turns = draw(st.integers(1, 5))
    roles = ["user", "assistant"] * 3
    if family.repeated:
        roles = [*draw(st.lists(st.sampled_from(["user", "assistant"]), max_size=4)), "user"]
        turns = len(roles)
    system = ["system"] if family.system and draw(st.booleans()) else []
    return [{"role": role, "content": draw(st.sampled_from(pool))} for role in [*system, *roles[:turns]]]


def by_hand(family, messages, tools=None, prompt=False):
    """The text, and the speaker of every character."""
    pieces = list(family.by_hand(messages, tools, prompt))
    return "".join(text for text, _ in pieces), [label for text, label in pieces for _ in text]


def rendered(tokenizer, messages, tools=None, documents=None, **options):
    def render(messages, tools, documents):
        return tokenizer.apply_chat_template(messages, tools=tools, documents=documents, tokenize=False, **options)

    return Chat(render, messages, tools, documents)


def spans(text, labels):
    """What everyone said, piece by piece."""
    return [
        (label, text[at[0] : at[-1] + 1])
        for label, group in itertools.groupby(range(len(text)), key=lambda i: labels[i])
        if label is not None and (at := list(group))
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_characters(name):
    family = FAMILIES[name]
    tokenizer = byte_level(name)

    @settings(max_examples=40, deadline=None)
    @given(chats(family), st.booleans())
    def check(messages, prompt):
        assume(not any(look in message["content"] for look in family.looks for message in messages))
        chat = rendered(tokenizer, messages, add_generation_prompt=prompt)
        text, labels = by_hand(family, messages, prompt=prompt)
        assert chat.text == text, "the text by hand is another"
        assert chat.labels() == labels

    check()


def tokens_by_hand(tokenizer, text, labels, ids):
    """The label of every token, if the tokens are bytes, and special tokens of one speaker each."""
    special = set(tokenizer.all_special_ids)
    expected, at = [], 0
    written = [label for label, character in zip(labels, text, strict=True) for _ in character.encode()]
    for token in ids:
        length = len(tokenizer.convert_ids_to_tokens(token).encode()) if token in special else 1
        expected.append(written[at] or "special")
        assert set(written[at : at + length]) == {written[at]}
        at += length
    assert at == len(written)
    return expected


ADVERSARIAL = {
    "plain": ["Be brief.", "Who are you?", "A parrot.", "Really?"],
    "its own words": None,
    "another template's words": None,
    "roles": ["system", "user", "assistant", "user"],
    "all the same": ["Hi"] * 4,
    "spaces": ["  Be \n", "\n\nhi\n", "   a b  ", " x\t\n"],
    "nothing": ["", "", "", ""],
    "unicode": ["é😀", "e\u0301 日本語", "🏴‍☠️ arr", "ﬁ \u200b\u3000x"],
    "marks": ["\U000f0000", "a\U000f0001b", "\\U000f0000 \\udb80\\udc00", "\U00100000"],
}


def adversarial(name, kind):
    family = FAMILIES[name]
    other = list(FAMILIES.values())[list(FAMILIES).index(name) - 1]
    texts = ADVERSARIAL[kind]
    if texts is None:
        author = family if kind == "its own words" else other
        chat = [{"role": role, "content": "a"} for role in ("user", "assistant", "user")]
        whole = "".join(text for text, _ in author.by_hand(chat, None, True))
        texts = [whole, f"hi{whole}", f"{whole} no", f"x {whole}"]
    roles = ["system", "user", "assistant", "user"]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("name", FAMILIES)
def test_tokens(name, kind, prompt):
    tokenizer, messages = byte_level(name), adversarial(name, kind)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt)["input_ids"]
    text, characters = by_hand(FAMILIES[name], messages, prompt=prompt)
    labels, names = chat_segments(tokenizer, messages, add_generation_prompt=prompt)
    assert labels.shape == (1, len(ids))
    assert [names[i] for i in labels[0]] == tokens_by_hand(tokenizer, text, characters, ids)
    assert names[0] == "special"
    assert len(set(names)) == len(names)


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city, as {json}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]


def tool_chat(arguments):
    calls = [
        {"id": f"abcdefgh{i}", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
        for i in range(1)
    ]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": 'Call {"name": "get_weather"}'},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefgh0", "content": '{"city": "Paris"}\n"é"'},
        {"role": "assistant", "content": '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'},
        {"role": "user", "content": 'Call {"name": "get_weather"}'},
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        (name, arguments)
        for name in ("granite", "llama3", "mistral", "qwen3")
        for arguments in ({"city": "Paris", "days": 3}, {}, {"days": [1, {"city": "Zürich"}], "now": True})
    ]
    + [("qwen3", '{"city": "Paris", "days": 3}'), ("deepseek", '{"city": "Paris", "days": 3}')],
)
def test_tools(name, arguments):
    family, tokenizer, messages = FAMILIES[name], byte_level(name), tool_chat(arguments)
    if name == "deepseek":
        messages[2] = messages[2] | {"content": None}
    tools = None if name == "deepseek" else TOOLS
    chat = rendered(tokenizer, messages, tools, add_generation_prompt=True)
    text, labels = by_hand(family, messages, tools, prompt=True)
    assert chat.text == text, "the text by hand is another"
    assert spans(text, chat.labels()) == spans(text, labels)
    assert chat.labels() == labels
    _, names = chat_segments(tokenizer, messages, tools=tools, add_generation_prompt=True)
    assert set(names) == {"special", "system", "user", "assistant", "tool", "tool_call"} | (
        {"tools"} if tools else set()
    )


def test_what_a_tool_returns_may_be_a_structure():
    tokenizer = byte_level("llama3")
    messages = tool_chat({"city": "Paris"})
    messages[3] = messages[3] | {"content": {"city": "Paris", "degrees": [20, 21.5], "type": "user"}}
    text, labels = by_hand(FAMILIES["llama3"], messages)
    assert rendered(tokenizer, messages).labels() == labels
    assert spans(text, labels)[3] == ("tool", '{"city": "Paris", "degrees": [20, 21.5], "type": "user"}')


CALLS = """{% for message in messages %}{{ '<' + message.role + '>' + message.content }}{% for call in message.tool_calls or [] %}
{%- for name, value in call.function.arguments.items() %}{{ '<' + name + '=' + (value | string) + '>' }}{% endfor %}{% endfor %}{% endfor %}
{{- tools | string if tools }}"""


def test_calls_and_tools_that_are_not_written_as_json():
    """Numbers as they are, 3 and True, and a tool in Python's notation."""
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = CALLS
    messages = [
        {"role": "user", "content": "3 True"},
        {
            "role": "assistant",
            "content": "3",
            "tool_calls": [{"function": {"name": "f", "arguments": {"city": "é'", "days": 3, "now": True, "t": -1.5}}}],
        },
    ]
    chat = rendered(tokenizer, messages, [{"name": "f", "text": "it's\n"}])
    assert spans(chat.text, chat.labels()) == [
        ("user", "3 True"),
        ("assistant", "3"),
        *(("tool_call", part) for part in ("city", "é'", "days", "3", "now", "True", "t", "-1.5")),
        ("tools", str([{"name": "f", "text": "it's\n"}])),
    ]


@pytest.mark.parametrize(
    ("content", "last", "expected"),
    [
        ("<think>\nwhy\n</think>\n\nBecause.", True, ["<think>\nwhy\n</think>\n\nBecause."]),
        ("<think>why</think>Because.", True, ["why", "Because."]),
        ("<think>\n\nwhy</think> Because. ", True, ["why", " Because. "]),
        ("<think>why</think>Because.", False, ["Because."]),
        ("</think>", True, []),
        ("why</think>, </think>because", True, ["why", "because"]),
        ("<think>Because.", True, ["<think>Because."]),
        ("<think>Because.", False, ["<think>Because."]),
    ],
)
def test_reasoning(content, last, expected):
    """Thoughts of past turns are dropped; those of the last stand in tags that the template writes."""
    tokenizer = byte_level("qwen3")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": content}]
    messages += [] if last else [{"role": "user", "content": "Why?"}]
    chat = rendered(tokenizer, messages)
    assert [text for label, text in spans(chat.text, chat.labels()) if label == "assistant"] == expected
    assert [text for label, text in spans(chat.text, chat.labels()) if label == "user"] == ["Why?"] * (2 - last)
    if content.startswith("<think>why"):
        apart = [messages[0], {"role": "assistant", "content": "Because.", "reasoning_content": "why"}, *messages[2:]]
        assert rendered(tokenizer, apart).labels() == chat.labels()


def test_what_the_template_looks_for_is_still_the_users():
    tokenizer = byte_level("qwen3")
    for content in (
        "<tool_response>x</tool_response>",
        "<tool_response></tool_response>",
        "<tool_response>",
        "</think>",
    ):
        messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}]
        chat = rendered(tokenizer, [*messages, {"role": "user", "content": content}])
        assert ("user", content) in spans(chat.text, chat.labels())


def test_headers_and_default_prompts_are_the_templates():
    tokenizer = byte_level("chatml")
    messages = [{"role": "user", "name": "Ann", "content": "Ann"}, {"role": "critic", "content": "No."}]
    chat = rendered(tokenizer, messages)
    assert spans(chat.text, chat.labels()) == [("user", "Ann"), ("critic", "No.")]
    assert "name=Ann" in chat.text
    assert chat_segments(tokenizer, messages)[1] == ("special", "user", "critic")


def test_parts_of_a_message():
    tokenizer = byte_level("llama4")
    parts = [
        {"type": "text", "text": "What is "},
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "text?"},
    ]
    messages = [{"role": "user", "content": parts}]
    text, labels = by_hand(FAMILIES["llama4"], messages)
    assert rendered(tokenizer, messages).labels() == labels
    assert spans(text, labels) == [("user", "What is "), ("user", "text?")]


def get_weather(city: str) -> str:
    """The weather.

    Args:
        city: Its name.
    """
    return city


def test_documents_and_functions_as_tools():
    tokenizer = byte_level("granite")
    messages = [{"role": "user", "content": "Read me."}]
    given = {"documents": [{"id": "7", "text": "Read me."}], "tools": [get_weather]}
    labels, names = chat_segments(tokenizer, messages, **given)
    ids = tokenizer.apply_chat_template(messages, **given)["input_ids"]
    said = {
        name: tokenizer.decode([t for t, i in zip(ids, labels[0], strict=True) if i == n])
        for n, name in enumerate(names)
    }
    assert said["user"] == said["documents"] == "Read me."
    assert json.loads(said["tools"])[0]["function"]["parameters"]["properties"]["city"]["description"] == "Its name."


def test_orders_of_roles_that_the_template_refuses():
    messages = [{"role": "user", "content": "a"}] * 2
    for name in (name for name, family in FAMILIES.items() if not family.repeated):
        with pytest.raises(TemplateError, match="roles must alternate"):
            chat_segments(byte_level(name), messages)


LOOKS = """{% for message in messages %}{% if message.content == 'yes' %}{{ '<yes>yes' }}{% else %}{{ message.content }}{% endif %}{% endfor %}"""


def test_a_template_that_looks_too_closely_is_refused():
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = LOOKS
    assert chat_segments(tokenizer, [{"role": "user", "content": "yes!"}])[0].tolist() == [[1] * 4]
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template looks so closely at 'yes'"):
        chat_segments(tokenizer, [{"role": "user", "content": "no"}, {"role": "user", "content": "yes"}])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", ["<pad>", "<|im_end|>"], ids=["a token of its own", "the token that ends a message"])
def test_padding(side, pad):
    tokenizer = byte_level("chatml", pad_token=pad, padding_side=side)
    long = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "<|im_end|> or <pad>? <pad>"}]
    chats = [long, [{"role": "assistant", "content": "<|im_end|>"}], long[1:]]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|im_end|>\\n' }}\n{%- endfor %}", "<|im_end|>' }}{% endfor %}"
    )
    encoded = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
    labels, names = chat_segments(tokenizer, chats, input_ids=encoded)
    assert torch.equal(labels == -1, encoded["attention_mask"] == 0)
    assert (labels == -1).any()
    for chat, row, mask in zip(chats, labels, encoded["attention_mask"].bool(), strict=True):
        alone, its_names = chat_segments(tokenizer, chat)
        assert [its_names[i] for i in alone[0]] == [names[i] for i in row[mask]]
    for ids in (encoded["input_ids"], encoded["input_ids"].tolist(), encoded["input_ids"].numpy(), dict(encoded)):
        assert torch.equal(chat_segments(tokenizer, chats, input_ids=ids)[0], labels)
    assert torch.equal(chat_segments(tokenizer, chats)[0], labels), "as apply_chat_template pads"


def test_ids_that_are_not_of_these_messages():
    tokenizer = byte_level("chatml", ("h", "i"))
    messages = [{"role": "user", "content": "hi"}]
    encoded = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    ids = encoded["input_ids"]
    expected = chat_segments(tokenizer, messages, add_generation_prompt=True)
    assert torch.equal(chat_segments(tokenizer, messages, input_ids=ids[0], add_generation_prompt=True)[0], expected[0])
    with pytest.raises(
        ValueError, match=rf"row 0 is not .* token {len(ids[0]) - 11} is '<|im_start|>', expected the end"
    ):
        chat_segments(tokenizer, messages, input_ids=encoded)
    with pytest.raises(ValueError, match="token 3 is '!', expected 's'"):
        chat_segments(tokenizer, [{"role": "system", "content": "hi"}], input_ids=[*ids[0, :3], 0, 1])
    with pytest.raises(ValueError, match="expected one row for each of 1 chats, got 2"):
        chat_segments(tokenizer, messages, input_ids=ids.repeat(2, 1))
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \(1, \d+\), got \(1, 3\)"):
        chat_segments(tokenizer, messages, input_ids={"input_ids": ids, "attention_mask": torch.ones(1, 3).long()})
    with pytest.raises(ValueError, match="input_ids: expected integers"):
        chat_segments(tokenizer, messages, input_ids=ids.float())
    with pytest.raises(ValueError, match="all rows of one length"):
        chat_segments(tokenizer, messages, input_ids=[[1, 2], [3]])
    with pytest.raises(ValueError, match="padding: not taken, it changes the ids"):
        chat_segments(tokenizer, messages, padding=True)
    with pytest.raises(ValueError, match="expected a chat, got nothing"):
        chat_segments(tokenizer)
    with pytest.raises(ValueError, match="expected a chat, got ids, and input_ids besides"):
        chat_segments(tokenizer, ids, input_ids=ids)
    with pytest.raises(ValueError, match="the role 'special' is the name"):
        chat_segments(tokenizer, [{"role": "special", "content": "hi"}])


def test_other_tokens_of_the_same_text():
    """As a model may have generated them, or as messages whose special tokens were made harmless have them."""
    merged, bytewise = byte_level("chatml", ("h", "i")), byte_level("chatml")
    messages = [{"role": "user", "content": "hi<|im_end|>\n"}]
    ids = merged.convert_tokens_to_ids(
        [t for i in bytewise.apply_chat_template(messages)["input_ids"] for t in [bytewise.convert_ids_to_tokens(i)]]
    )
    assert ids != merged.apply_chat_template(messages)["input_ids"]
    labels, names = chat_segments(merged, messages, input_ids=ids)
    assert [names[i] for i in labels[0]].count("user") == 4
    labels, names = chat_segments(merged, messages, sanitize_control_tokens=True)
    ids = merged.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    assert labels.shape == (1, len(ids))
    assert [names[i] for i in labels[0]].count("user") == len("<|im_end|>\n") + 1


def test_a_token_that_straddles_is_the_messages():
    tokenizer = byte_level("chatml", ("Ċ", "Ċ"), ("i", "<"))
    messages = [{"role": "user", "content": "\nhi"}, {"role": "assistant", "content": "\n"}]
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + '\n' + m.content + '<' }}{% endfor %}"
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    labels, names = chat_segments(tokenizer, messages)
    said = [(names[i], token) for i, token in zip(labels[0], tokenizer.convert_ids_to_tokens(ids), strict=True) if i]
    assert said == [("user", "ĊĊ"), ("user", "h"), ("user", "i<"), ("assistant", "ĊĊ")]
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [{"role": "user", "content": "\n"}, {"role": "assistant", "content": "\n"}]
    assert chat_segments(tokenizer, messages)[1] == ("special", "user"), "the first of two with as much of it"


@pytest.mark.parametrize("make", [sentence_piece, lower_case], ids=["SentencePiece", "lower case"])
@pytest.mark.parametrize("name", ["llama2", "vicuna", "zephyr"])
def test_tokenizers_that_write_spaces_or_letters_otherwise(make, name):
    tokenizer = make(name)
    messages = [
        {"role": "system", "content": "Be e\u0301"},
        {"role": "user", "content": "hi [INST] hi"},
        {"role": "assistant", "content": "Hi  hi"},
    ]
    text, written = by_hand(FAMILIES[name], messages)
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    places = token_spans(tokenizer, text, ids)
    assert places[0][0] == 0
    assert places[-1][1] == len(text)
    assert all(a[1] >= b[0] for a, b in itertools.pairwise(places)), "no character without a token"
    labels, names = chat_segments(tokenizer, messages)
    for (begin, end), label in zip(places, labels[0], strict=True):
        assert set(written[begin:end]) - {None} == ({names[label]} if label else set())


def test_tokenizers_without_offsets():
    tokenizer = Letters()
    tokenizer.chat_template = FAMILIES["zephyr"].template
    messages = [{"role": "user", "content": " Hé\n"}, {"role": "assistant", "content": "</s>"}]
    text, written = by_hand(FAMILIES["zephyr"], messages)
    labels, names = chat_segments(tokenizer, messages)
    ids = tokenizer.apply_chat_template(messages)["input_ids"]
    assert [names[i] for i in labels[0]] == tokens_by_hand(tokenizer, text.replace("é", "e"), written, ids)
    tokenizer = Letters(lower=True)
    tokenizer.chat_template = FAMILIES["zephyr"].template
    with pytest.raises(ValueError, match="its tokens do not spell the text, and it knows no offsets"):
        chat_segments(tokenizer, messages)


GENERATION = """{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}
{%- generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{% endfor %}"""


def test_generation_markers_agree():
    """What a template says the assistant wrote: its content, and the token that ends it."""
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = GENERATION
    messages = adversarial("chatml", "its own words")
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    labels, names = chat_segments(tokenizer, messages)
    marked = [i for i, mask in enumerate(encoded["assistant_masks"]) if mask]
    ours = [i for i, label in enumerate(labels[0]) if names[label] == "assistant"]
    assert ours == marked[:-1]
    assert encoded["input_ids"][marked[-1]] == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_alone(name, prompt):
    """Exact where special tokens stand around every message, refused elsewhere."""
    tokenizer, family = byte_level(name), FAMILIES[name]
    messages = adversarial(name, "roles")
    messages[1]["content"] = "[INST] hi [/INST]" if name != "mistral" else "hi ### Response:\n"
    if name in ("gemma", "mistral"):
        # Only a blank line stands between the system's message and the user's.
        with pytest.raises(ValueError, match="or not for certain"):
            chat_segments(
                tokenizer, tokenizer.apply_chat_template(messages[:2] if name == "mistral" else messages)["input_ids"]
            )
        messages = messages[1:]
    # A default prompt, or empty thoughts, might have been given as well.
    ends = [messages[-1:]] * (name != "chatml") + [messages[:-1]] * (name != "qwen3")
    for chat in (messages, *ends):
        encoded = tokenizer.apply_chat_template(
            chat, add_generation_prompt=prompt, return_tensors="pt", return_dict=True
        )
        if family.alone:
            expected = chat_segments(tokenizer, chat, add_generation_prompt=prompt)
            for ids in (encoded, encoded["input_ids"], encoded["input_ids"][0].tolist()):
                labels, names = chat_segments(tokenizer, ids)
                assert torch.equal(labels, expected[0])
                assert names == expected[1]
        else:
            with pytest.raises(ValueError, match="from ids alone no messages can be read"):
                chat_segments(tokenizer, encoded)


def test_ids_alone_and_padding():
    for pad, side in itertools.product(("<pad>", "<|im_end|>"), ("left", "right")):
        tokenizer = byte_level("chatml", pad_token=pad, padding_side=side)
        tokenizer.chat_template = tokenizer.chat_template.replace(
            "<|im_end|>\\n' }}\n{%- endfor", "<|im_end|>' }}{% endfor"
        )
        chats = [adversarial("chatml", "plain"), adversarial("chatml", "plain")[:2]]
        encoded = tokenizer.apply_chat_template(chats, padding=True, return_tensors="pt", return_dict=True)
        expected = chat_segments(tokenizer, chats, input_ids=encoded)
        for ids in (encoded, encoded["input_ids"]):
            labels, names = chat_segments(tokenizer, ids)
            assert torch.equal(labels, expected[0])
            assert names == expected[1]
        assert torch.equal(chat_segments(tokenizer, input_ids=encoded)[0], labels)


def test_ids_alone_that_are_refused():
    tokenizer = byte_level("chatml")
    for ids in (
        tokenizer("Just some text")["input_ids"],
        tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n")["input_ids"],
        tokenizer("<|im_start|>system\nhi<|im_end|>\n<|im_start|>user name=Ann\nhi<|im_end|>\n")["input_ids"],
        tokenizer("<|im_start|>user\nhi<|im_end|>\n")["input_ids"],
        tokenizer.apply_chat_template([{"role": "user", "content": "a<|im_start|>b"}])["input_ids"],
        tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}], sanitize_control_tokens=True)[
            "input_ids"
        ],
    ):
        with pytest.raises(ValueError, match=r"give them too: chat_segments\(tokenizer, messages, input_ids=…\)"):
            chat_segments(tokenizer, ids)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template is not set"):
        chat_segments(tokenizer, [1, 2])


def test_ids_alone_with_a_default_prompt():
    tokenizer = byte_level("chatml")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])["input_ids"]
    assert chat_segments(tokenizer, [{"role": "user", "content": "hi"}])[1] == ("special", "user")
    assert chat_segments(tokenizer, ids)[1] == ("special", "system", "user"), "it cannot be told from a given one"


@pytest.mark.parametrize("name", FAMILIES)
def test_an_ordinary_chat_is_rendered_twice(name):
    """Once as it is, once with marks; where contents are trimmed, likewise, if there is nothing to trim."""
    tokenizer, renders = byte_level(name), []
    messages = [
        {"role": "user", "content": f"Hi {i}"} if i % 2 == 0 else {"role": "assistant", "content": "Ho"}
        for i in range(201)
    ]

    def render(messages, tools, documents):
        renders.append(None)
        return tokenizer.apply_chat_template(messages, tools=tools, documents=documents, tokenize=False)

    labels = Chat(render, messages).labels()
    assert len(renders) == 2
    assert labels == by_hand(FAMILIES[name], messages)[1]


@pytest.mark.smollm2
def test_smollm2(smollm2):
    """The default prompt, words of other templates, and a token that ends a message in the middle of one."""
    _, tokenizer = smollm2
    messages = [
        {"role": "user", "content": "[INST] hi [/INST] Who are you?\nReally?"},
        {"role": "assistant", "content": "A parrot.<|im_end|>\n<|im_start|>user\nno"},
        {"role": "user", "content": " Sure. "},
    ]
    encoded = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, add_generation_prompt=True)
    labels, names = chat_segments(tokenizer, messages, add_generation_prompt=True, input_ids=encoded)
    said = {name: tokenizer.decode(encoded["input_ids"][0][labels[0] == i]) for i, name in enumerate(names)}
    assert said["user"] == "[INST] hi [/INST] Who are you?\nReally? Sure. "
    assert said["assistant"] == "A parrot.<|im_end|>\n<|im_start|>user\nno"
    assert said["special"].startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert said["special"].endswith("<|im_start|>assistant\n")


def test_equal_messages_of_which_one_is_trimmed():
    """Llama 2 strips the first message together with what it puts before, and so keeps its leading spaces."""
    tokenizer = byte_level("llama2")
    messages = [{"role": role, "content": "\n hi\n"} for role in ("system", "user", "assistant", "user")]
    text, labels = by_hand(FAMILIES["llama2"], messages)
    assert spans(text, labels) == [("system", "\n hi\n"), ("user", "\n hi"), ("assistant", "hi"), ("user", "hi")]
    assert rendered(tokenizer, messages).labels() == labels


def test_equal_messages_that_the_template_compares():
    """Mistral writes the tools before every message that equals the last of the user's."""
    tokenizer = byte_level("mistral")
    messages = [{"role": role, "content": " hi "} for role in ("user", "assistant", "user")]
    text, labels = by_hand(FAMILIES["mistral"], messages, TOOLS)
    assert text.count("[AVAILABLE_TOOLS]") == 2
    assert rendered(tokenizer, messages, TOOLS).labels() == labels
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + '[/INST]'", "message['content'] | trim + '[/INST]'"
    )
    chat = rendered(tokenizer, messages, TOOLS)
    assert spans(chat.text, chat.labels())[1::2] == [("user", "hi"), ("tools", dumps(TOOLS))]


@pytest.mark.parametrize(
    ("template", "content", "expected"),
    [
        ("{{ m.content.split('|')[1] }}", "no|yes|no", ["yes"]),
        ("{{ m.content | upper }}", "hé\n<a>", ["HÉ\n<A>"]),
        ("{{ m.content.split('\n') | join('\n> ') }}", "one\ntwo", ["one", "two"]),
        ("{{ m.content + ' ' + m.content }}", "a b", ["a b", "a b"]),
        ("{{ m.content[:5] }}", "a b c d", ["a b c"]),
        ("{{ m.content | length }}: {{ m.content }}", "a b", ["a b"]),
        ("{% for letter in m.content %}{{ letter + ',' }}{% endfor %}", "abc", ["a", "b", "c"]),
        ("{{ m.content | replace('cat', 'dog') }}", "a cat, a cow", ["a ", ", a cow"]),
        ("{{ {'said': m.content} | tojson }}", 'é "b"\n', ['é \\"b\\"\\n']),
        ("{{ m | tojson }}", "\U000f0000\\u", ["\U000f0000\\\\u"]),
        ("{{ m }}", "it's\n'", ["it's\\n'"]),
        ("{{ m.content.lstrip('\n') }}", "\n \n a\n", [" \n a\n"]),
    ],
)
def test_what_templates_make_of_a_content(template, content, expected):
    tokenizer = byte_level("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'a b' }}" + template.replace("\n", "\\n") + "{{ 'a b' }}{% endfor %}"
    )
    chat = rendered(tokenizer, [{"role": "user", "content": content}])
    assert [text for _, text in spans(chat.text, chat.labels())] == expected


def test_what_is_written_around_a_call_is_not_the_call():
    tokenizer = byte_level("chatml")
    call = {"function": {"name": "f", "arguments": {"x": 12}}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    tokenizer.chat_template = "{{ {'by': 'me', 'call': messages[0].tool_calls[0].function} | tojson }}"
    chat = rendered(tokenizer, messages)
    assert spans(chat.text, chat.labels()) == [("tool_call", '{"name": "f", "arguments": {"x": 12}}')]
    # The template looks at the number, which can then not be exchanged.
    tokenizer.chat_template = (
        """{% set x = messages[0].tool_calls[0].function.arguments.x %}{{ 'many' if x > 12 else 'less' }} {{ x }}"""
    )
    assert rendered(tokenizer, messages).labels() == [None] * len("less 12")


def test_ids_alone_that_two_chats_make():
    """A user may have written what a tool's answer stands in, and an assistant the thoughts that it did not have."""
    tokenizer = byte_level("qwen3")
    messages = adversarial("qwen3", "plain")
    assert chat_segments(tokenizer, tokenizer.apply_chat_template(messages)["input_ids"])[1][1:] == (
        "system",
        "user",
        "assistant",
    )
    messages[3]["content"] = "<tool_response>\n20\n</tool_response>"
    for chat in (messages, messages[:3]):
        with pytest.raises(ValueError, match="or not for certain"):
            chat_segments(tokenizer, tokenizer.apply_chat_template(chat)["input_ids"])


def test_ids_alone_that_the_template_would_not_make():
    """Spaces that it trims, and other tokens of the same text."""
    tokenizer = byte_level("gemma")
    for spaces, made in (("", True), (" ", False)):
        ids = tokenizer(f"<s><start_of_turn>user\nhi{spaces}<end_of_turn>\n")["input_ids"]
        if made:
            assert chat_segments(tokenizer, ids)[1] == ("special", "user")
        else:
            with pytest.raises(ValueError, match="from ids alone no messages"):
                chat_segments(tokenizer, ids)
    with pytest.raises(ValueError, match="from ids alone no messages"):
        chat_segments(
            byte_level("gemma", ("h", "i")), tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        )


class Spelled:
    """A tokenizer without offsets, of which only the strings of its tokens are known."""

    def __init__(self, *tokens, added=()):
        self.tokens, self.added_tokens_decoder, self.all_special_ids = tokens, {tokens.index(a): a for a in added}, []

    def convert_ids_to_tokens(self, ids):
        return [self.tokens[i] if i < len(self.tokens) else None for i in ids]


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (Spelled("▁hi", "▁", "<0x0A>", "▁▁x"), "hi  \n  x", None),
        (Spelled("▁hi", "▁", "<0x0A>", "▁▁x"), "hi \n  x", ["hi", " ", "\n", "  x"]),
        (Spelled("<s>", "▁hi", "</s>", "▁", added=("<s>", "</s>")), "<s>hi</s>", ["<s>", "hi", "</s>", ""]),
        (Spelled("<|end|>", "hi", added=("<|end|>",)), "<|end|>\n\nhi", ["<|end|>\n\n", "hi"]),
        (Spelled("<é>", "Ã", "©", "Ġhi", added=("<é>",)), "<é>é hi", ["<é>", "é", "é", " hi"]),
        (Spelled("<é>", "é", "Ġ"), "<é>é ", None),
        (Spelled("<é>", added=("<é>",)), "<é>\n", ["<é>\n"]),
        (Spelled("hi", "<é>", added=("<é>",)), "hi <é>", ["hi ", "<é>"]),
        (Spelled("hi"), "hi there", None),
        (Spelled("hi", "<0xC3>", "<0xA9>"), "hié", ["hi", "é", "é"]),
        (Spelled(), "", []),
    ],
)
def test_spelling(tokenizer, text, expected):
    places = token_spans(tokenizer, text, range(len(tokenizer.tokens)))
    assert (None if places is None else [text[begin:end] for begin, end in places]) == expected
    assert token_spans(tokenizer, "x" + text, range(len(tokenizer.tokens))) is None
    assert token_spans(tokenizer, text, [0, 99]) is None


def test_padding_that_only_the_mask_knows():
    tokenizer = byte_level("chatml", pad_token=None)
    messages = [{"role": "user", "content": "hi"}]
    ids = torch.tensor([tokenizer.apply_chat_template(messages)["input_ids"]])
    padded, mask = (torch.nn.functional.pad(tensor, (3, 2)) for tensor in (ids, torch.ones_like(ids)))
    labels, _ = chat_segments(tokenizer, messages, input_ids={"input_ids": padded, "attention_mask": mask})
    assert torch.equal(labels, torch.nn.functional.pad(chat_segments(tokenizer, messages)[0], (3, 2), value=-1))
    with pytest.raises(ValueError, match="row 0 is not what the chat template makes"):
        chat_segments(tokenizer, messages, input_ids=padded)
