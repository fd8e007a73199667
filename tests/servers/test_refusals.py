"""What vLLM does with weights that cannot be followed: refused by name, before a weight is touched.

Most of it needs hardware, options or releases that tests do not have: modules are stand-ins with vLLM's attributes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from hubsync.errors import ReplicaRefused
from tests.support import uses
from vllm_plugin.refusals import refuse_configuration, refuse_modules


def config(**changes: Any) -> SimpleNamespace:
    """The parts of vLLM's configuration that are read, as in a server without options."""
    settings: dict[str, Any] = {
        "parallel_config": SimpleNamespace(),
        "cache_config": SimpleNamespace(),
        "quant_config": None,
        "lora_config": None,
        **changes,
    }
    return SimpleNamespace(**settings)


def offload(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = {"offload_backend": "auto", "uva": None, "prefetch": None, **changes}
    return {"offload_config": SimpleNamespace(**settings)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"parallel_config": SimpleNamespace(enable_eplb=True)}, "moves experts between workers"),
        ({"parallel_config": SimpleNamespace(enable_elastic_ep=True)}, "moves experts between workers"),
        ({"parallel_config": SimpleNamespace(all2all_backend="moonep")}, r"\(MoonEP\).*--all2all-backend"),
        ({"load_config": SimpleNamespace(load_format="ipc_cache")}, "without --load-format ipc_cache"),
        (offload(uva=SimpleNamespace(cpu_offload_gb=1)), "keeps weights in host memory"),
        (offload(prefetch=SimpleNamespace(offload_group_size=8)), "without --offload-group-size"),
        (offload(offload_backend="prefetch"), "without --offload-group-size"),
        ({"ec_transfer_config": object()}, "without --ec-transfer-config"),
        ({"cache_config": SimpleNamespace(cpu_offload_gb=1)}, "keeps weights in host memory"),
        (
            {"quant_config": object(), "model_config": SimpleNamespace(quantization="fp8")},
            r"quantises its weights \(fp8\)",
        ),
        ({"lora_config": object()}, "LoRA"),
    ],
)
def test_unsupported_configurations_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ReplicaRefused, match=f"^this server .*{reason}"):
        refuse_configuration(config(**changes))


def test_a_server_without_options_is_served() -> None:
    refuse_configuration(config())
    refuse_configuration(
        config(
            parallel_config=SimpleNamespace(enable_eplb=False, all2all_backend="allgather_reducescatter"),
            load_config=SimpleNamespace(load_format="auto"),
            **offload(uva=SimpleNamespace(cpu_offload_gb=0), prefetch=SimpleNamespace(offload_group_size=0)),
        )
    )


class OnlineLinearBase:
    """Stands for vLLM's base of methods that quantise a weight after it was loaded."""


class Fp8PtpcOnlineLinearMethod(OnlineLinearBase): ...


class ConstantExpertSubstitution(nn.Module):
    """Stands for vLLM's module of that name, which this release does not have."""


def with_attributes(**attributes: Any) -> nn.Module:
    layer = nn.Linear(2, 2)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


SINKS = nn.Parameter(torch.randn(4).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (
            with_attributes(impl=SimpleNamespace(_sinks_source=SINKS, sinks=SINKS.detach().float())),
            r"float32 copy of attention sinks \(FlashInfer\).*--attention-backend TRITON_ATTN",
        ),
        (with_attributes(is_amx_bmm_enabled=True), "--attention-backend CPU_MLA"),
        (with_attributes(W_K=torch.zeros(2), W_K_scale=torch.ones(1)), "VLLM_ROCM_USE_AITER_FP8BMM=0"),
        (with_attributes(W_UK_T_dcp_qrep=torch.zeros(2)), "--no-dcp-q-replicate"),
        (with_attributes(_moonep_weight_layout=object()), r"\(MoonEP\)"),
        (ConstantExpertSubstitution(), "replaces experts by constants"),
        (with_attributes(quant_method=Fp8PtpcOnlineLinearMethod()), "quantised copy of a weight.*head of a draft"),
    ],
)
def test_modules_with_copies_are_refused_with_their_path(layer: nn.Module, reason: str) -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(1, 1), layer)})
    with pytest.raises(ReplicaRefused, match=rf"^layers\.1: this server .*{reason}"):
        refuse_modules([nn.Linear(1, 1), model])


def test_modules_that_read_their_parameters_are_served() -> None:
    layers = [
        with_attributes(impl=SimpleNamespace(_sinks_source=SINKS, sinks=SINKS)),
        with_attributes(impl=SimpleNamespace(_sinks_source=None, sinks=None)),
        with_attributes(is_amx_bmm_enabled=False, W_UK_T_dcp_qrep=None, quant_method=object()),
    ]
    refuse_modules([nn.Sequential(*layers)])


@pytest.mark.server  # no server, but half of vLLM is imported
def test_the_installed_releases_have_what_hubsync_uses_of_them() -> None:
    """See docs/releases.md."""
    assert list(uses.moved()) == []
