"""What a cluster can be told: the `args` of deploy/config.yaml, typed, checked and composed.

Lifecycle: Serve hands the YAML's `args` to `build_app` as a `ClusterConfig`; `resolve` turns every `auto` into a number
once, in a new object, which is logged and passed to all deployments. Nothing changes afterwards.

Names follow SGLang or vLLM where they have one. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, SecretStr, model_validator

from cluster.config_sections import (
    GrammarSection,
    MembershipSection,
    ModelSection,
    ReplicaSection,
    RouterSection,
    Section,
    TransferSection,
)


class ClusterConfig(Section):
    """A whole cluster. The defaults work on a laptop, with the embedded model."""

    mode: Literal["disaggregated", "aggregated"] = "disaggregated"
    model: ModelSection = ModelSection()
    page_size: int = Field(default=16, ge=1)
    """Tokens in a KV page, in all pools that do not say otherwise."""
    prefill: ReplicaSection = ReplicaSection()
    decode: ReplicaSection = ReplicaSection()
    aggregated: ReplicaSection = ReplicaSection()
    """The pool of `mode: aggregated`."""
    transfer: TransferSection = TransferSection()
    grammars: GrammarSection = GrammarSection()
    router: RouterSection = RouterSection()
    membership: MembershipSection = MembershipSection()
    secret: SecretStr | None = None
    """What members of this cluster prove to each other. Better given by the environment variable PD_CLUSTER_SECRET;
    made anew for every deployment when neither is set."""

    @model_validator(mode="after")
    def _secret_is_one(self) -> ClusterConfig:
        if self.secret is not None and not self.secret.get_secret_value():
            raise ValueError("secret is empty, which nobody can prove to know; choose a long one, or leave it out")
        return self

    @model_validator(mode="after")
    def _cuda_finds_pools_on_gpus(self) -> ClusterConfig:
        if self.transfer.transport == "cuda" and self.model.device != "cuda":
            raise ValueError(
                f"transport is 'cuda' and model.device {self.model.device!r}, but CUDA IPC moves pages between pools "
                "in GPU memory; set transport to auto, shm or tcp"
            )
        return self

    @model_validator(mode="after")
    def _slow_masks_are_no_hang(self) -> ClusterConfig:
        for name, pool in self.pools.items():
            if self.grammars.mask_timeout_s >= pool.hang_timeout_s:
                raise ValueError(
                    f"grammars.mask_timeout_s is {self.grammars.mask_timeout_s:g} and {name}.hang_timeout_s "
                    f"{pool.hang_timeout_s:g}: a replica that waits for one mask would be taken for hanging; make it "
                    "less"
                )
        return self

    @model_validator(mode="after")
    def _transport_takes_parts_of_pages(self) -> ClusterConfig:
        sizes = {name: self.page_size_of(name) for name in self.pools}
        if len(set(sizes.values())) > 1 and self.transfer.transport not in ("auto", "shm", "tcp"):
            raise ValueError(
                f"page_size is {sizes['prefill']} in the prefill pool and {sizes['decode']} in the decode pool, but "
                f"transport {self.transfer.transport!r} moves whole pages only; set transport to auto, shm or tcp, or "
                "give both pools the same page_size"
            )
        return self

    @model_validator(mode="after")
    def _pools_hold_pages(self) -> ClusterConfig:
        for name, pool in self.pools.items():
            page_size = self.page_size_of(name)
            for field, least in (("max_total_tokens", 2 * page_size), ("chunked_prefill_size", page_size)):
                if (value := getattr(pool, field)) < least:
                    raise ValueError(
                        f"{field} is {value} in the {name} pool, whose pages have {page_size} tokens; make it at least "
                        f"{least}, or lower page_size"
                    )
        return self

    def page_size_of(self, pool: str) -> int:
        """Tokens in a KV page of a pool."""
        return self.pools[pool].page_size or self.page_size

    @property
    def pools(self) -> dict[str, ReplicaSection]:
        """The pools of this mode, by role."""
        if self.mode == "aggregated":
            return {"aggregated": self.aggregated}
        return {"prefill": self.prefill, "decode": self.decode}

    def resolve(self, *, cluster_cpus: float) -> ClusterConfig:
        """A copy without any `auto`, for a cluster of `cluster_cpus` cores."""
        replicas = sum(pool.num_replicas for pool in self.pools.values())
        share = cluster_cpus / replicas
        resolved = {name: _resolve_pool(pool, share) for name, pool in self.pools.items()}
        return self.model_copy(update=resolved)


def _resolve_pool(pool: ReplicaSection, share: float) -> ReplicaSection:
    threads = max(1, math.floor(share)) if pool.num_threads == "auto" else pool.num_threads
    cpus = min(float(threads), share) if pool.num_cpus == "auto" else pool.num_cpus
    hundredths = math.floor(100 * cpus)  # never up: shares must fit together
    return pool.model_copy(update={"num_threads": threads, "num_cpus": max(1, hundredths) / 100})
