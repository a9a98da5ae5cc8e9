"""Chat templates of known families, each beside the same text written out by hand with the speaker of every piece.

The templates behave as the published ones do, in fewer words. The text by hand is what tests compare with: it knows who
wrote what because it never looks at what was written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

Piece = tuple[str, str | None]
BOS, EOS = "<s>", "</s>"


class Family(NamedTuple):
    """A template, the same by hand, and what it has to do with.

    Args:
        template: In Jinja.
        by_hand: Pieces of text and their speakers, from messages, tools and whether the assistant is to go on.
        special: Its special tokens, besides BOS and EOS.
        system: Whether it takes a system message.
        repeated: Whether it takes two messages of one role after each other.
        alone: Whether the ids alone tell the messages, if those hold no special tokens.
        looks: What it looks for in messages, which are then not what stands in the text.
    """

    template: str
    by_hand: Callable[[list[dict], list[dict] | None, bool], Iterator[Piece]]
    special: tuple[str, ...] = ()
    system: bool = True
    repeated: bool = True
    alone: bool = True
    looks: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}


def dumps(value, **settings) -> str:
    return json.dumps(value, ensure_ascii=False, **settings)


def family(template: str, **about):
    def add(by_hand):
        FAMILIES[by_hand.__name__] = Family(template, by_hand, **about)
        return by_hand

    return add


@family(
    """{% for message in messages %}
{%- if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}
{{- '<|im_start|>' + message['role'] }}{% if message.name is defined %}{{ ' name=' + message.name }}{% endif %}
{{- '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    special=("<|im_start|>", "<|im_end|>"),
)
def chatml(messages, tools, prompt):
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", None
    for message in messages:
        name = f" name={message['name']}" if "name" in message else ""
        yield f"<|im_start|>{message['role']}{name}\n", None
        yield message["content"], message["role"]
        yield "<|im_end|>\n", None
    yield "<|im_start|>assistant\n" * prompt, None


@family("""{% for message in messages %}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""")
def zephyr(messages, tools, prompt):
    for message in messages:
        yield f"<|{message['role']}|>\n", None
        yield message["content"], message["role"]
        yield EOS + "\n", None
    yield "<|assistant|>\n" * prompt, None


@family(
    """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'].strip() }}{% set rest = messages[1:] %}
{%- else %}{{ 'A chat between a user and an assistant.' }}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- ' USER: ' + message['content'].strip() if message['role'] == 'user' }}
{{- ' ASSISTANT: ' + message['content'].strip() + eos_token if message['role'] == 'assistant' }}
{%- endfor %}{{ ' ASSISTANT:' if add_generation_prompt }}""",
    repeated=False,
    alone=False,
)
def vicuna(messages, tools, prompt):
    if messages[0]["role"] == "system":
        yield messages[0]["content"].strip(), "system"
        messages = messages[1:]
    else:
        yield "A chat between a user and an assistant.", None
    for message in messages:
        yield f" {message['role'].upper()}: ", None
        yield message["content"].strip(), message["role"]
        yield EOS * (message["role"] == "assistant"), None
    yield " ASSISTANT:" * prompt, None


@family(
    """{% for message in messages %}
{%- if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}
{%- elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}
{%- else %}{{ '### Response:\\n' + message['content'] | trim + '\\n\\n' }}{% endif %}
{%- endfor %}{{ '### Response:\\n' if add_generation_prompt }}""",
    alone=False,
)
def alpaca(messages, tools, prompt):
    for message in messages:
        role, content = message["role"], message["content"]
        yield {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[role], None
        yield content if role == "system" else content.strip(), role
        yield "\n\n", None
    yield "### Response:\n" * prompt, None


@family(
    """{{ bos_token }}{% for message in messages if message['role'] == 'system' %}{{ message['content'] }}{% endfor %}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
{%- if message['role'] == 'assistant' %}{{ '<｜Assistant｜>' }}
{%- if message.tool_calls %}
{%- for call in message['tool_calls'] %}{{ '<｜call｜>' + call['type'] + '<｜sep｜>' + call['function']['name'] + '\\n```json\\n' + call['function']['arguments'] + '\\n```' }}{% endfor %}
{%- else %}{{ message['content'].split('</think>')[-1] }}{% endif %}{{ eos_token }}{% endif %}
{%- if message['role'] == 'tool' %}{{ '<｜output｜>' + message['content'] }}{% endif %}
{%- endfor %}{{ '<｜Assistant｜><think>\\n' if add_generation_prompt }}""",
    special=("<｜User｜>", "<｜Assistant｜>"),
)
def deepseek(messages, tools, prompt):
    yield BOS, None
    yield from ((message["content"], "system") for message in messages if message["role"] == "system")
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "user":
            yield "<｜User｜>", None
            yield content, "user"
        elif role == "assistant":
            yield "<｜Assistant｜>", None
            if "tool_calls" in message:
                for call in message["tool_calls"]:
                    yield f"<｜call｜>{call['type']}<｜sep｜>", None
                    yield call["function"]["name"], "tool_call"
                    yield "\n```json\n", None
                    yield call["function"]["arguments"], "tool_call"
                    yield "\n```", None
            else:
                yield content.rsplit("</think>")[-1], "assistant"
            yield EOS, None
        elif role == "tool":
            yield "<｜output｜>", None
            yield content, "tool"
    yield "<｜Assistant｜><think>\n" * prompt, None


@family(
    """{% if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson(indent=4) + '<|end_of_text|>\\n' }}{% endif %}
{%- for document in documents or [] %}{{ '<|start_of_role|>document ' + document['id'] + '<|end_of_role|>' + document['text'] + '<|end_of_text|>\\n' }}{% endfor %}
{%- for message in messages %}
{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] }}
{%- for call in message.tool_calls or [] %}{{ '<|tool_call|>[' + call.function | tojson + ']' }}{% endfor %}{{ '<|end_of_text|>\\n' }}
{%- endfor %}{{ '<|start_of_role|>assistant<|end_of_role|>' if add_generation_prompt }}""",
    special=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>", "<|tool_call|>"),
)
def granite(messages, tools, prompt):
    if tools:
        yield "<|start_of_role|>tools<|end_of_role|>", None
        yield dumps(tools, indent=4), "tools"
        yield "<|end_of_text|>\n", None
    for message in messages:
        yield f"<|start_of_role|>{message['role']}<|end_of_role|>", None
        yield message["content"], message["role"]
        for call in message.get("tool_calls", ()):
            yield "<|tool_call|>", None
            yield f"[{dumps(call['function'])}]", "tool_call"
        yield "<|end_of_text|>\n", None
    yield "<|start_of_role|>assistant<|end_of_role|>" * prompt, None


@family(
    """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set system = false %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- if loop.first and system is not false %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message['content'] %}
{%- else %}{% set content = message['content'] %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}""",
    repeated=False,
    alone=False,
)
def llama2(messages, tools, prompt):
    system = None
    if messages[0]["role"] == "system":
        system, messages = messages[0]["content"], messages[1:]
    for number, message in enumerate(messages):
        content = message["content"]
        if message["role"] == "user":
            yield BOS + "[INST] ", None
            if number == 0 and system is not None:
                yield "<<SYS>>\n", None
                yield system, "system"
                # Stripped together with what stands before.
                yield "\n<</SYS>>\n\n" if content.strip() else "\n<</SYS>>", None
                yield content.rstrip() if content.strip() else "", "user"
            else:
                yield content.strip(), "user"
            yield " [/INST]", None
        else:
            yield " ", None
            yield content.strip(), "assistant"
            yield " " + EOS, None


@family(
    """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: 26 Jul 2024\\n\\n' + system + '<|eot_id|>' }}
{%- if tools %}{% set first = messages[0]['content'] | trim %}{% set messages = messages[1:] %}
{{- '<|start_header_id|>user<|end_header_id|>\\n\\nAnswer with {"name": function name, "parameters": values}.\\n\\n' }}
{%- for tool in tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}{{ first + '<|eot_id|>' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' or message.role == 'ipython' %}{{ '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
{%- if message.content is mapping or message.content is iterable %}{{ message.content | tojson }}{% else %}{{ message.content }}{% endif %}{{ '<|eot_id|>' }}
{%- elif message.tool_calls %}{% if message.tool_calls | length != 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = message.tool_calls[0].function %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ '}<|eot_id|>' }}
{%- else %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' if add_generation_prompt }}""",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
def llama3(messages, tools, prompt):
    def header(role):
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n", None

    yield BOS, None
    yield header("system")
    yield "Today Date: 26 Jul 2024\n\n", None
    if messages[0]["role"] == "system":
        yield messages[0]["content"].strip(), "system"
        messages = messages[1:]
    yield "<|eot_id|>", None
    if tools:
        yield header("user")
        yield 'Answer with {"name": function name, "parameters": values}.\n\n', None
        for tool in tools:
            yield dumps(tool, indent=4), "tools"
            yield "\n\n", None
        yield messages[0]["content"].strip(), "user"
        yield "<|eot_id|>", None
        messages = messages[1:]
    for message in messages:
        role, content = message["role"], message["content"]
        if role == "tool":
            yield header("ipython")
            if isinstance(content, str):
                yield '"', None
                yield dumps(content)[1:-1], role
                yield '"', None
            else:
                yield dumps(content), role
        elif "tool_calls" in message:
            call = message["tool_calls"][0]["function"]
            yield header("assistant")
            yield dumps({"name": call["name"], "parameters": call["arguments"]}), "tool_call"
        else:
            yield header(role)
            yield content.strip(), role
        yield "<|eot_id|>", None
    if prompt:
        yield header("assistant")


@family(
    """{{ bos_token }}{% for message in messages %}{{ '<|header_start|>' + message['role'] + '<|header_end|>\\n\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<|image|>' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{{ '<|eot|>' }}
{%- endfor %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' if add_generation_prompt }}""",
    special=("<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>"),
)
def llama4(messages, tools, prompt):
    yield BOS, None
    for message in messages:
        yield f"<|header_start|>{message['role']}<|header_end|>\n\n", None
        content = message["content"]
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            yield ("<|image|>", None) if part["type"] == "image" else (part["text"], message["role"])
        yield "<|eot|>", None
    yield "<|header_start|>assistant<|header_end|>\n\n" * prompt, None


@family(
    """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- set users = rest | selectattr('role', 'equalto', 'user') | list %}{{ bos_token }}
{%- for message in rest %}
{%- if message['role'] == 'user' %}
{%- if tools and message == users[-1] %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{%- if loop.last and system is defined %}{{ '[INST]' + system + '\\n\\n' + message['content'] + '[/INST]' }}
{%- else %}{{ '[INST]' + message['content'] + '[/INST]' }}{% endif %}
{%- elif message.tool_calls %}{{ '[TOOL_CALLS][' }}
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' + eos_token }}
{%- elif message['role'] == 'tool' %}{{ '[TOOL_RESULTS]{"content": ' + message['content'] | string + ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
{%- else %}{{ message['content'] + eos_token }}{% endif %}
{%- endfor %}""",
    special=(
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_CALLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
)
def mistral(messages, tools, prompt):
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    messages = messages[system is not None :]
    users = [message for message in messages if message["role"] == "user"]
    yield BOS, None
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "user":
            if tools and message == users[-1]:
                yield "[AVAILABLE_TOOLS]", None
                yield dumps(tools), "tools"
                yield "[/AVAILABLE_TOOLS]", None
            yield "[INST]", None
            if system is not None and number == len(messages) - 1:
                yield system, "system"
                yield "\n\n", None
            yield content, "user"
            yield "[/INST]", None
        elif "tool_calls" in message:
            yield "[TOOL_CALLS]", None
            yield dumps([call["function"] | {"id": call["id"]} for call in message["tool_calls"]]), "tool_call"
            yield EOS, None
        elif role == "tool":
            yield '[TOOL_RESULTS]{"content": ', None
            yield content, "tool"
            yield f', "call_id": "{message["tool_call_id"]}"}}[/TOOL_RESULTS]', None
        else:
            yield content, role
            yield EOS, None


@family(
    """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set prefix = messages[0]['content'] + '\\n\\n' %}{% set rest = messages[1:] %}
{%- else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' + (prefix if loop.first else '') }}
{{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{{ '<start_of_turn>model\\n' if add_generation_prompt }}""",
    special=("<start_of_turn>", "<end_of_turn>"),
    repeated=False,
)
def gemma(messages, tools, prompt):
    yield BOS, None
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    for number, message in enumerate(messages[system is not None :]):
        yield f"<start_of_turn>{'model' if message['role'] == 'assistant' else 'user'}\n", None
        if number == 0 and system is not None:
            yield system, "system"
            yield "\n\n", None
        yield message["content"].strip(), message["role"]
        yield "<end_of_turn>\n", None
    yield "<start_of_turn>model\n" * prompt, None


@family(
    """{% if tools %}{{ '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') + '# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{{ '\\n</tools>\\n{"name": <name>, "arguments": <json>}<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set last = namespace(query=messages | length - 1, found=false) %}
{%- for message in messages[::-1] %}{% if not last.found and message.role == 'user' and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
{%- set last.found = true %}{% set last.query = messages | length - 1 - loop.index0 %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- elif message.role == 'assistant' %}{% set content = message.content %}{% set thoughts = '' %}
{%- if message.reasoning_content is string %}{% set thoughts = message.reasoning_content %}
{%- elif '</think>' in content %}{% set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.query and (loop.last or thoughts) %}{{ '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}{% else %}{{ content }}{% endif %}
{%- for call in message.tool_calls or [] %}{{ '\\n' if content or not loop.first }}{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{ call.function.arguments }}{% else %}{{ call.function.arguments | tojson }}{% endif %}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- elif message.role == 'tool' %}{{ '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' }}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
{{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' }}{% endif %}
{%- endfor %}{{ '<|im_start|>assistant\\n' if add_generation_prompt }}{{ '<think>\\n\\n</think>\\n\\n' if add_generation_prompt and enable_thinking is defined and not enable_thinking }}""",
    special=("<|im_start|>", "<|im_end|>"),
    looks=("</think>", "<tool_response>", "</tool_response>"),
)
def qwen3(messages, tools, prompt):
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    if tools or system is not None:
        yield "<|im_start|>system\n", None
        yield system or "", "system"
    if tools:
        yield "\n\n# Tools\n<tools>" if system is not None else "# Tools\n<tools>", None
        for tool in tools:
            yield "\n", None
            yield dumps(tool), "tools"
        yield '\n</tools>\n{"name": <name>, "arguments": <json>}', None
    if tools or system is not None:
        yield "<|im_end|>\n", None
    query = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=len(messages) - 1)
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        if role == "user" or (role == "system" and number):
            yield f"<|im_start|>{role}\n", None
            yield content, role
            yield "<|im_end|>\n", None
        elif role == "assistant":
            yield "<|im_start|>assistant\n", None
            thoughts = message.get("reasoning_content", "")
            if number > query and (number == len(messages) - 1 or thoughts):
                yield "<think>\n", None
                yield thoughts.strip("\n"), role
                yield "\n</think>\n\n", None
                content = content.lstrip("\n")
            yield content, role
            for at, call in enumerate(message.get("tool_calls", ())):
                arguments = call["function"]["arguments"]
                name, string = call["function"]["name"], isinstance(arguments, str)
                yield ("\n" if content or at else "") + "<tool_call>\n", None
                yield (
                    f'{{"name": "{name}", "arguments": {arguments if string else dumps(arguments)}}}',
                    "tool_call",
                )
                yield "\n</tool_call>", None
            yield "<|im_end|>\n", None
        elif role == "tool":
            yield "<|im_start|>user" if messages[number - 1]["role"] != "tool" else "", None
            yield "\n<tool_response>\n", None
            yield content, role
            after = messages[number + 1]["role"] if number + 1 < len(messages) else None
            yield "\n</tool_response>" + "<|im_end|>\n" * (after != "tool"), None
    yield "<|im_start|>assistant\n" * prompt, None
