"""The tools of a chat request: which of them the output may or must call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from router.api.fields import ApiModel, invalid, shown

_MAX_TOOLS = 128
_NAME = r"^[a-zA-Z0-9_.-]{1,64}$"


class FunctionTool(ApiModel):
    name: str = Field(pattern=_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object; none means no parameters."""
    strict: bool | None = None
    """Arguments follow the schema, whatever the model would rather write."""

    @property
    def schema_(self) -> dict[str, Any]:
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return self.parameters

    @property
    def for_template(self) -> dict[str, Any]:
        """As the client wrote it; `strict` is our business."""
        return {"type": "function", "function": self.model_dump(exclude_none=True, exclude={"strict"})}


def _function_only(tool: Any) -> Any:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if isinstance(kind, str) and kind != "function":
        raise ValueError(f"tools of type {shown(kind)} are not supported; give functions")
    return tool


class _Tool(ApiModel):
    type: Literal["function"]
    function: FunctionTool


Tool = Annotated[_Tool, BeforeValidator(_function_only)]
Tools = Annotated[list[Tool], Field(max_length=_MAX_TOOLS)]

_NAMED = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": {"type": "object"}},
    "required": ["type", "function"],
}
_ALLOWED = {
    "type": "object",
    "properties": {"type": {"const": "allowed_tools"}, "allowed_tools": {"type": "object"}},
    "required": ["type", "allowed_tools"],
}
ToolChoice = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required"]}, _NAMED, _ALLOWED]})]
"""Read by `plan_tools`."""


@dataclass(frozen=True)
class ToolPlan:
    """What the output may do with tools."""

    given: tuple[FunctionTool, ...] = ()
    """All that the model is told of."""
    callable: tuple[FunctionTool, ...] = ()
    """Those that it may call: none of them, or some."""
    required: bool = False
    """It must call one, and says nothing else."""
    parallel: bool = True
    """It may call several."""

    @property
    def constrained(self) -> bool:
        """Something is promised about calls that a model could break."""
        return bool(self.callable) and (
            self.required or not self.parallel or any(tool.strict for tool in self.callable)
        )


def plan_tools(tools: Sequence[_Tool], choice: Any, *, parallel: bool) -> ToolPlan:
    """What `tools` and `tool_choice` ask for; raises `ApiError` (400)."""
    functions = {tool.function.name: tool.function for tool in tools}
    if len(functions) < len(tools):
        names = [tool.function.name for tool in tools]
        twice = next(name for name in names if names.count(name) > 1)
        raise invalid("tools", f"{twice} is there more than once; give each tool a name of its own")
    for number, tool in enumerate(tools):
        kind = tool.function.schema_.get("type", "object")
        if kind != "object":
            path = f"tools[{number}].function.parameters"
            raise invalid(path, f"its type is {shown(kind)}; arguments are an object, so give a schema of one")
    choice = ("auto" if tools else "none") if choice is None else choice
    if choice == "none":
        return ToolPlan()
    names, required = _chosen(choice, list(functions))
    if _named(choice) is not None:
        parallel = False  # one call of the tool that is named, as OpenAI has it
    if required and not functions:
        raise invalid("tool_choice", f"{shown(choice)} needs tools; give at least one")
    if not functions:
        return ToolPlan()
    for name in names:
        if name not in functions:
            raise invalid("tool_choice", f"{shown(name)} is none of the tools, which are {', '.join(functions)}")
    one = isinstance(choice, dict) and choice["type"] == "function"  # as OpenAI has it: the named one, once
    callable_ = tuple(functions[name] for name in names)
    return ToolPlan(tuple(functions.values()), callable_, required, parallel and not one)


def _chosen(choice: Any, names: list[str]) -> tuple[list[str], bool]:
    """(the names that may be called, whether one must be)."""
    if choice in ("auto", "required"):
        return names, choice == "required"
    if (name := _named(choice)) is not None:
        return [name], True
    match choice:
        case {"type": "allowed_tools", "allowed_tools": {"mode": ("auto" | "required") as mode, "tools": [*allowed]}}:
            named = [name for tool in allowed if (name := _named(tool)) is not None]
            if named and len(named) == len(allowed):
                return list(dict.fromkeys(named)), mode == "required"
    raise invalid(
        "tool_choice",
        f"{shown(choice)} is no choice; give none, auto, required, "
        'or {"type": "function", "function": {"name": ...}} to name one',
    )


def _named(value: Any) -> str | None:
    """The name in `{"type": "function", "function": {"name": ...}}`."""
    match value:
        case {"type": "function", "function": {"name": str(name), **rest}, **more} if not rest and not more:
            return name
    return None
