"""What tools and tool_choice ask for."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from router.api.chat_tools import ToolPlan, Tools, plan_tools

GIVEN: Any = pydantic.TypeAdapter(Tools).validate_python(
    [{"type": "function", "function": {"name": name}} for name in ("find", "get_time", "sum")]
)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("choice", "names", "required", "several"),
    [
        (None, ["find", "get_time", "sum"], False, True),
        ("auto", ["find", "get_time", "sum"], False, True),
        ("required", ["find", "get_time", "sum"], True, True),
        (named("sum"), ["sum"], True, False),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named("sum"), named("find")]}},
            ["sum", "find"],
            False,
            True,
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named("sum")]}},
            ["sum"],
            True,
            True,
        ),
    ],
)
def test_choices(choice: Any, names: list[str], required: bool, several: bool, parallel: bool) -> None:
    plan = plan_tools(GIVEN, choice, parallel=parallel)
    assert [tool.name for tool in plan.given] == ["find", "get_time", "sum"]
    assert [tool.name for tool in plan.callable] == names
    assert (plan.required, plan.parallel) == (required, several and parallel)
    assert plan.constrained == (required or not parallel)


def test_nothing_is_called_where_nothing_may_be() -> None:
    assert plan_tools(GIVEN, "none", parallel=True) == ToolPlan()
    assert plan_tools([], None, parallel=True) == ToolPlan()
    assert plan_tools([], "auto", parallel=True) == ToolPlan()


@pytest.mark.parametrize(
    "choice",
    [
        "maybe",
        5,
        {"type": "function"},
        {"type": "function", "function": {"name": 5}},
        {"type": "function", "function": {"name": "sum"}, "more": 1},
        {"type": "allowed_tools", "allowed_tools": {"mode": "none", "tools": [named("sum")]}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}},
        {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": ["sum", {"function": 5}]}},
        named("divide"),
    ],
)
def test_other_choices_are_refused(choice: Any) -> None:
    with pytest.raises(Exception, match="tool_choice") as caught:
        plan_tools(GIVEN, choice, parallel=True)
    assert caught.value.status == 400  # type: ignore[attr-defined]
