"""Chat messages to a prompt, by the jinja2 template that comes with a model.

A template is compiled once and rendered in a sandbox without access to Python's internals. Templates expect a few
names and tags beyond plain jinja: `raise_exception`, `strftime_now`, loop controls, a `tojson` that leaves text as it
is, and `{% generation %}` blocks, which mark the assistant's words for training and are plain text here.

`render` gives the prompt of an assistant's next message, or of the rest of one that has begun (`continue_final`).
"""

from __future__ import annotations

import datetime
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from text.tokenizer import read_json, token_content

_DEFAULT, _FOR_TOOLS = "default", "tool_use"
_ADDITIONAL = "additional_chat_templates"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


RESERVED_NAMES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What every template is given by `render`; `variables` must not have them."""


class ChatTemplateError(ValueError):
    """The model has no chat template, or its template refuses these messages."""


class ChatTemplate:
    """One model's chat template; rendering is thread-safe."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str] | None = None,
        for_tools: ChatTemplate | None = None,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """`special_tokens` are names a template may use, such as bos_token; raises `ChatTemplateError` if malformed."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format_: now().strftime(format_)
        try:
            self.names = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))
            """The names it looks at, of those that it is given and others."""
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is not valid jinja: {error}") from error
        self.source = source
        self.for_tools = for_tools
        """Another one, which the model wants for conversations with tools."""
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def load(cls, folder: str | Path, *, file: str | Path | None = None) -> ChatTemplate | None:
        """The template in `file`, else in a model folder (chat_template.jinja, else tokenizer_config.json); None when
        it has none. Raises `ChatTemplateError` for a file that cannot be read."""
        folder = Path(folder)
        config = read_json(folder / "tokenizer_config.json")
        named = _templates_of(config.get("chat_template"))
        if file is not None:
            named = {_DEFAULT: _read(Path(file))}
        else:
            paths = {_DEFAULT: folder / "chat_template.jinja", _FOR_TOOLS: folder / _ADDITIONAL / f"{_FOR_TOOLS}.jinja"}
            named |= {name: _read(path) for name, path in paths.items() if path.is_file()}
        source = named.get(_DEFAULT) or next(iter(named.values()), None)
        if source is None:
            return None
        tokens = {name: token_content(config.get(name)) for name in _SPECIAL_TOKENS}
        special = {name: token for name, token in tokens.items() if token is not None}
        for_tools = cls(named[_FOR_TOOLS], special_tokens=special) if _FOR_TOOLS in named else None
        return cls(source, special_tokens=special, for_tools=for_tools)

    def with_source(self, source: str) -> ChatTemplate:
        """Another template for the same model."""
        return ChatTemplate(source, special_tokens=self._special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; `variables` are further names that this model's template knows.

        `continue_final` ends it within the last message, right after its content. Raises `ChatTemplateError` with the
        template's own words when it refuses the messages.
        """
        if continue_final:
            mark = secrets.token_hex(16)
            *before, last = messages
            marked = [*before, {**last, "content": last["content"] + mark}]
            text = self._render(marked, tools, documents, add_generation_prompt=False, variables=variables)
            prompt, found, _ = text.partition(mark)
            if not found:
                raise ChatTemplateError(
                    "the model's chat template does not show the final message; it has no continuation"
                )
            return prompt
        return self._render(
            messages, tools, documents, add_generation_prompt=add_generation_prompt, variables=variables
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        documents: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None,
    ) -> str:
        names = {**self._special_tokens, **(variables or {})}
        assert not RESERVED_NAMES & names.keys(), "the caller keeps them apart"
        try:
            return self._template.render(
                **names,
                messages=messages,
                tools=tools,
                documents=documents,
                add_generation_prompt=add_generation_prompt,
            )
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can raise anything its expressions can, for instance TypeError
            raise ChatTemplateError(f"the model's chat template cannot render these messages: {error}") from error


def _templates_of(value: object) -> dict[str, str]:
    """The templates in a configuration, by name: one, or a list of several."""
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return {_DEFAULT: value} if isinstance(value, str) else {}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(f"the chat template {path} cannot be read: {error}; name another") from error


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(f"the model's chat template refuses these messages: {message}")


def _to_json(value: object, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` renders its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
