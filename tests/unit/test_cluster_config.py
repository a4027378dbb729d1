"""The configuration: defaults, `auto`, and errors that help."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from cluster.config import ClusterConfig
from cluster.config_file import BadConfigFile, ServeApplication
from cluster.config_sections import TransferSection
from cluster.placement import shortfalls
from transfer.choice import TransportName

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_defaults_resolve_to_one_thread_each_on_two_cores() -> None:
    config = ClusterConfig().resolve(cluster_cpus=2)
    assert [(pool.num_threads, pool.num_cpus) for pool in config.pools.values()] == [(1, 1.0), (1, 1.0)]


def test_auto_shares_the_cores_among_all_replicas() -> None:
    config = ClusterConfig.model_validate({"prefill": {"num_replicas": 1}, "decode": {"num_replicas": 2}})
    resolved = config.resolve(cluster_cpus=16)
    assert [(pool.num_threads, pool.num_cpus) for pool in resolved.pools.values()] == [(5, 5.0), (5, 5.0)]


def test_more_replicas_than_cores_ask_ray_for_a_share_of_a_core() -> None:
    config = ClusterConfig.model_validate({"prefill": {"num_replicas": 2}, "decode": {"num_replicas": 2}})
    resolved = config.resolve(cluster_cpus=2)
    assert [(pool.num_threads, pool.num_cpus) for pool in resolved.pools.values()] == [(1, 0.5), (1, 0.5)]


def test_what_is_given_is_kept_and_the_given_object_does_not_change() -> None:
    config = ClusterConfig.model_validate({"mode": "aggregated", "aggregated": {"num_threads": 2}})
    resolved = config.resolve(cluster_cpus=8)
    assert resolved.aggregated.num_threads == 2
    assert resolved.aggregated.num_cpus == 2.0
    assert config.aggregated.num_cpus == "auto"
    assert list(resolved.pools) == ["aggregated"]


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        ({"transport": "disk"}, "folder is not set"),
        ({"transport": "disk", "folder": "kv"}, "folder is 'kv'; write it from the root"),
        ({"transport": "disk", "folder": "/mnt/kv", "checksum": False}, "set checksum: true"),
    ],
)
def test_a_shared_folder_needs_what_it_needs(transfer: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ClusterConfig.model_validate({"transfer": transfer})
    whole = {"transport": "disk", "folder": "/mnt/kv"}
    assert ClusterConfig.model_validate({"transfer": whole}).transfer.folder == "/mnt/kv"


@pytest.mark.parametrize(
    ("args", "place", "key", "nearest"),
    [
        ({"prefil": {}}, (), "prefil", "prefill"),
        ({"prefill": {"max_tokens_total": 1024}}, ("prefill",), "max_tokens_total", "max_total_tokens"),
        ({"transfer": {"checksums": False}}, ("transfer",), "checksums", "checksum"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(
    args: dict[str, object], place: tuple[str, ...], key: str, nearest: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        ClusterConfig.model_validate(args)
    (error,) = caught.value.errors()
    assert error["loc"] == place
    assert f"unknown key {key!r}; did you mean {nearest!r}?" in error["msg"]


def test_a_timeout_that_one_late_heartbeat_would_pass_is_refused() -> None:
    with pytest.raises(ValidationError, match="make timeout_s at least 4"):
        ClusterConfig.model_validate({"membership": {"heartbeat_s": 2, "timeout_s": 3}})


def test_the_secret_is_not_printed() -> None:
    config = ClusterConfig.model_validate({"secret": "open sesame"})
    assert "sesame" not in repr(config) + str(config) + config.model_dump_json()


def test_an_empty_secret_is_refused() -> None:
    """Else each replica would refuse it, one start after the other."""
    with pytest.raises(ValidationError, match=r"secret is empty.*choose a long one, or leave it out"):
        ClusterConfig.model_validate({"secret": ""})


def test_a_secret_of_the_wrong_type_is_not_printed_either(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("applications: [{args: {secret: 271828182845}}]")
    with pytest.raises(BadConfigFile, match=r"args\.secret: Input should be a valid string") as caught:
        ServeApplication.read(path)
    assert "2718" not in str(caught.value)


def test_threads_that_copy_are_bounded() -> None:
    """Each is started with its replica."""
    with pytest.raises(ValidationError, match=r"num_threads[\s\S]*less than or equal to 64"):
        ClusterConfig.model_validate({"transfer": {"num_threads": 1_000_000_000}})


def test_what_the_pools_ask_for_is_compared_with_what_is_there() -> None:
    pools = {
        "prefill": {"num_replicas": 2, "num_cpus": 3, "num_gpus": 1},
        "decode": {"num_cpus": 1.5, "resources": {"fast": 1}},
    }
    config = ClusterConfig.model_validate(pools).resolve(cluster_cpus=4)
    assert shortfalls(config, {"CPU": 7.5, "GPU": 2.0, "fast": 1.0}) == []
    assert shortfalls(config, {"CPU": 4.0, "GPU": 2.0}) == [
        "CPU: 7.5 needed, 4 there; prefill 6 (2 replicas), decode 1.5 (1 replica)",
        "fast: 1 needed, 0 there; decode 1 (1 replica)",
    ]


@pytest.mark.parametrize("cpus", [1.0, 2.0, 3.0, 7.0, 64.0])
def test_what_is_resolved_by_itself_always_fits(cpus: float) -> None:
    pools = {"prefill": {"num_replicas": 3}, "decode": {"num_replicas": 4}}
    assert shortfalls(ClusterConfig.model_validate(pools).resolve(cluster_cpus=cpus), {"CPU": cpus}) == []


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("config*.yaml")), ids=lambda path: path.name)
def test_every_config_file_in_deploy_is_valid(path: Path) -> None:
    (application,) = yaml.safe_load(path.read_text())["applications"]
    assert application["import_path"] == "cluster.app:build_app"
    ClusterConfig.model_validate(application["args"]).resolve(cluster_cpus=4)


def test_a_config_file_is_read_as_serve_reads_it() -> None:
    application = ServeApplication.read(DEPLOY / "config-aggregated.yaml")
    assert (application.host, application.port) == ("127.0.0.1", 8000)
    assert application.at(None, 8001).port == 8001
    assert (application.name, application.route_prefix, application.config.mode) == ("pd", "/", "aggregated")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("applications: [", "is not YAML"),
        ("applications: []", "must list exactly one application"),
        (
            "applications: [{args: {prefill: {num_replicas: 0}}}]",
            "args.prefill.num_replicas is 0: Input",
        ),
        ("applications: [{args: {decode: {threads: 2}}}]", "args.decode: unknown key 'threads'; did you mean"),
        ("applications: [{deployments: [{name: Decode}]}]", "has 'deployments', which `make serve` does not apply"),
        ("{logging_config: {}, applications: [{}]}", "has 'logging_config'"),
        ("{http_options: {root_path: /a}, applications: [{}]}", "has 'root_path'"),
        (
            "applications: [{args: {mode: both}}]",
            "args.mode is 'both': Input should be",
        ),
        ("\xff\xfe", "is not YAML"),
        ("{http_options: 8000, applications: [{}]}", "http_options is 8000"),
        ("applications: [{import_path: 'other:app'}]", "import_path is 'other:app'"),
    ],
)
def test_a_config_file_that_cannot_be_started_says_why(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(BadConfigFile) as caught:
        ServeApplication.read(path)
    assert complaint in str(caught.value)


def test_pools_may_have_pages_of_their_own_size_where_the_transport_takes_parts_of_them() -> None:
    config = ClusterConfig(page_size=32, decode={"page_size": 16})
    assert (config.page_size_of("prefill"), config.page_size_of("decode")) == (32, 16)
    with pytest.raises(ValueError, match=r"page_size is 32 in the prefill pool and 16 .* set transport to auto"):
        ClusterConfig(page_size=32, decode={"page_size": 16}, transfer={"transport": "gloo"})
    ClusterConfig(page_size=32, decode={"page_size": 32}, transfer={"transport": "gloo"})


@pytest.mark.parametrize(("field", "least"), [("chunked_prefill_size", 64), ("max_total_tokens", 128)])
def test_a_pool_too_small_for_its_pages_is_refused(field: str, least: int) -> None:
    """Else each replica would refuse it, one start after the other."""
    with pytest.raises(ValueError, match=rf"{field} is 63 in the decode pool.*at least {least}, or lower page_size"):
        ClusterConfig(decode={"page_size": 64, field: 63})
    ClusterConfig(decode={"page_size": 64, field: least})


def test_cuda_ipc_is_refused_where_models_run_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"pools in GPU memory; set transport to auto, shm or tcp"):
        ClusterConfig(transfer={"transport": "cuda"})
    ClusterConfig(model={"device": "cuda"}, transfer={"transport": "cuda"})


def test_a_step_that_waits_for_one_mask_is_no_hang() -> None:
    args = {"grammars": {"mask_timeout_s": 10}, "decode": {"hang_timeout_s": 10}}
    with pytest.raises(ValidationError, match=r"mask_timeout_s is 10 and decode\.hang_timeout_s 10.*make it less"):
        ClusterConfig.model_validate(args)
    with pytest.raises(ValidationError, match="compile_timeout_s"):
        ClusterConfig.model_validate({"grammars": {"compile_timeout_s": 9.5}})


TRANSPORTS = get_args(TransportName)
NEEDS = {"disk": {"folder": "/mnt/kv"}}
"""What a transport is refused without."""


@pytest.mark.parametrize(
    ("name", "value", "default", "users"),
    [
        ("wire_dtype", "int8", "auto", ("auto", "tcp")),
        ("num_threads", 4, 1, ("auto", "shm", "disk")),
        ("ib_device", "mlx5_0", "", ("mooncake",)),
        ("folder", "/mnt/kv", None, ("disk",)),
        ("folder_max_mb", 10, 4096, ("disk",)),
    ],
)
def test_a_transfer_setting_that_would_have_no_effect_is_refused(
    name: str, value: object, default: object, users: tuple[str, ...]
) -> None:
    remedy = f"set transport to {' or '.join(users)}, or leave {name} out"
    for transport in TRANSPORTS:
        chosen = {"transport": transport, **NEEDS.get(transport, {})}
        if transport in users:
            assert getattr(TransferSection(**{**chosen, name: value}), name) == value
        else:
            with pytest.raises(ValueError, match=f"{name} is {value!r}, but transport '{transport}' has no.*{remedy}"):
                TransferSection(**{**chosen, name: value})
            assert getattr(TransferSection(**{**chosen, name: default}), name) == default
