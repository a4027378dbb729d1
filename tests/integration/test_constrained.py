"""Constrained output of the real model: through whole clusters, and for many grammars at once."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.config import EngineConfig
from protocol.membership import ReplicaRole
from tests.integration.worker_cluster import ReplicaSpec, WorkerCluster, worker_cluster
from tests.schemas.run import all_schemas, run_cases
from tests.schemas.written import SCHEMAS, text_cases

pytestmark = pytest.mark.integration

CONFIG = EngineConfig(max_total_tokens=16_384)
ROLES = {"pd": (ReplicaRole.PREFILL, ReplicaRole.DECODE), "aggregated": (ReplicaRole.AGGREGATED,)}


def body(prompt: str, **sampling: Any) -> dict[str, Any]:
    return {"text": prompt, "sampling_params": {"sampling_seed": 7, "max_new_tokens": 60, **sampling}}


BODIES = [
    body("A person as JSON: ", json_schema=json.dumps(SCHEMAS["person"])),
    body("A number to call: ", regex=r"\+\d{2} \d{3}-\d{4}", n=2),
    body("Is water wet? ", guided_choice=["yes", "no", 'it "depends"']),
    body("Brackets: ", ebnf='root ::= "(" root? ")"', temperature=0),
    body("No more than one token: ", regex="[a-z]+", max_new_tokens=1),
    body("The sea is"),
]


async def _outputs(cluster: WorkerCluster) -> list[Any]:
    answers = await asyncio.gather(*map(cluster.generate, BODIES))
    each = [answer if isinstance(answer, list) else [answer] for answer in answers]
    return [[(one["output_ids"], one["text"], one["meta_info"]["finish_reason"]["type"]) for one in a] for a in each]


async def _refusals(cluster: WorkerCluster) -> None:
    for field, value in (
        ("regex", "(a"),
        ("regex", "(.|..|...|....|.....){1,100}"),  # compiles, but takes seconds for a token
        ("ebnf", "root ::= root"),
        ("structural_tag", {"type": "x"}),
        ("json_schema", {"type": "string", "pattern": "(" * 50_000 + "a" + ")" * 50_000}),
    ):
        response = await cluster.client.post("/generate", json=body("x", **{field: value}))
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (field, "invalid_grammar")
        assert error["message"].startswith(f"{field}: ")
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    chat = {"messages": [{"role": "user", "content": "hi"}], "response_format": wanted, "stream": True}
    response = await cluster.client.post("/v1/chat/completions", json=chat)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "response_format.json_schema.schema"
    assert "uniqueItems" in response.json()["error"]["message"]


async def test_pd_equals_aggregated_within_grammars(folder: Path) -> None:
    outputs = {}
    for name, roles in ROLES.items():
        async with worker_cluster(folder, [ReplicaSpec(role=role, engine=CONFIG) for role in roles]) as cluster:
            outputs[name] = await _outputs(cluster)
            await _refusals(cluster)
            await cluster.assert_idle()
    assert outputs["pd"] == outputs["aggregated"]
    (person,), calls, (choice,), (brackets,), (one,), _ = outputs["pd"]
    if person[2] == "stop":
        assert json.loads(person[1]).keys() == {"name", "age", "email"}
    assert all(re.fullmatch(r"\+\d{2} \d{3}-\d{4}", text) for _, text, _ in calls)
    assert choice[1] in ("yes", "no", 'it "depends"')
    assert brackets[1].startswith("(")
    assert (one[2], len(one[0])) == ("length", 1)


def test_some_of_every_kind_of_grammar(folder: Path) -> None:
    """A few of what `make schemas` runs."""
    cases = [*all_schemas(packaged=8, made=8), *text_cases()]
    verdicts = list(run_cases(cases, folder=folder, max_tokens=80))
    assert not [(verdict.case.name, verdict.text, verdict.wrong) for verdict in verdicts if verdict.wrong]
    assert sum(verdict.complete for verdict in verdicts) >= 10
