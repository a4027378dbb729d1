"""Chat templates of our own with the marks of real families, for tests."""

from __future__ import annotations

_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}[{{ message.reasoning_content }}]{% endif %}{{ message.content }}"
    "{% for call in message.tool_calls %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _with_tools(call: str) -> str:
    tools = "{% if tools %}{% for tool in tools %}tool: {{ tool.function | tojson }}\n{% endfor %}{% endif %}"
    return tools + _TURNS.replace("CALL", call)


_JSON = '{"name": "{{ call.function.name }}", "KEY": {{ call.function.arguments | tojson }}}'

HERMES = _with_tools("<tool_call>" + _JSON.replace("KEY", "arguments") + "</tool_call>")
LLAMA3 = _with_tools(_JSON.replace("KEY", "parameters")) + "{# <|python_tag|> #}"
PYTHONIC = _with_tools("[{{ call.function.name }}()]") + "{# <|python_start|> #}"
MISTRAL = _with_tools("[TOOL_CALLS][" + _JSON.replace("KEY", "arguments") + "]")
DEEPSEEK = _with_tools(
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"  # noqa: RUF001 - the models' own characters
    "{{ call.function.name }}\n```json\n{{ call.function.arguments | tojson }}\n```"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"  # noqa: RUF001
)
FAMILIES = {"hermes": HERMES, "llama3": LLAMA3, "pythonic": PYTHONIC, "mistral": MISTRAL, "deepseek": DEEPSEEK}

QWEN3 = HERMES + (
    "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
R1 = HERMES + "{% if add_generation_prompt %}<think>\n{% endif %}"
