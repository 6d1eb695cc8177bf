"""Networks: sizes as published, starts as in the literature, clear refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from orchestrator.recipe.workload_schema import Network
from orchestrator.workloads import build_network
from orchestrator.workloads.models import Residual, resnet
from strategies.contract import PlanError
from strategies.net import Net

RGB = (3, 32, 32)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "options", "parameters", "stages"),
    [
        ("resnet", {"depth": 8}, 75_290, 4),
        ("resnet", {"depth": 20}, 269_722, 4),  # 0.27 M in the paper
        ("resnet", {"depth": 56}, 853_018, 4),  # 0.85 M
        ("resnet", {"depth": 18}, 11_173_962, 5),  # 11.17 M
        ("vgg", {"depth": 11, "width": 64}, 9_228_362, 5),
        ("vgg", {"depth": 13, "width": 64}, 9_413_066, 5),
        ("vgg", {"depth": 16, "width": 64}, 14_724_042, 5),
        ("small_cnn", {"width": 16, "batch_norm": True}, 24_346, 3),
        ("small_cnn", {"width": 16, "batch_norm": False}, 24_234, 3),
        ("mlp", {"width": 128, "depth": 3}, 3072 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10, 3),
        ("mlp", {"width": 128, "depth": 1}, 3072 * 10 + 10, 1),
    ],
)
def test_parameters_and_stages(name: str, options: dict[str, Any], parameters: int, stages: int) -> None:
    net = build_network(RGB, 10, name, **options)
    assert count(net) == parameters
    assert isinstance(net, Net) and len(net.stages) == stages and isinstance(net.head, nn.Linear)


@pytest.mark.parametrize("inputs", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 5, 9)])
@pytest.mark.parametrize(
    "recipe", ["mlp", "small_cnn", {"resnet": {"depth": 8}}, {"resnet": {"depth": 18, "width": 8}}, "vgg"]
)
def test_every_recipe_name_builds_with_its_schema_defaults(recipe: Any, inputs: tuple[int, ...]) -> None:
    model = Network.model_validate(recipe)
    net = build_network(inputs, 7, model.name, **model.options.model_dump())
    x = torch.randn(4, *inputs, requires_grad=True)
    logits = net(x.to(memory_format=torch.channels_last))
    assert logits.shape == (4, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_resnets_halve_the_side_and_double_the_channels() -> None:
    x, shapes = torch.randn(1, *RGB), []
    for stage in resnet(RGB, 10, 20).stages:
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]


def test_depth_counts_the_layers_with_weights() -> None:
    for depth in (8, 20, 56):
        assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in resnet(RGB, 10, depth).modules()) == depth
    for depth in (11, 13, 16):  # two of the paper's three linear layers are left out
        layers = build_network(RGB, 10, "vgg", depth=depth, width=8).modules()
        assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in layers) == depth - 2


@pytest.mark.parametrize("depth", [8, 18])
def test_gamma_zero_start(depth: int) -> None:
    """The last batch norm of each branch starts at 0: branches add nothing, their convolutions get no gradient, gamma does."""
    net = resnet((3, 8, 8), 4, depth, width=8).double()
    x = torch.randn(6, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits = net(x)
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3, 0, 1])).backward()
    residuals = [m for m in net.modules() if isinstance(m, Residual)]
    assert len(residuals) == (3 if depth == 8 else 8)
    for residual in residuals:
        assert all(not m.weight.grad.any() for m in residual.branch.modules() if isinstance(m, nn.Conv2d))
        assert residual.branch[-1].weight.grad.abs().max() > 0 and not residual.branch[-1].weight.any()
        assert bool((residual.branch[1].weight == 1).all())

    def without_branches(block: Residual, args: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.relu(block.shortcut(args[0]))

    for residual in residuals:
        residual.register_forward_hook(without_branches)
    assert (net(x) - logits).abs().max() < 1e-12


def test_airbench() -> None:
    """Parameters and floating-point operations as in the paper's network; sides of its maps; norms without learnt scale."""
    net = build_network(RGB, 10, "airbench", widths=[64, 256, 256])
    assert count(net) == 1_972_792 and len(net.stages) == 4
    frozen = [name for name, p in net.named_parameters() if not p.requires_grad]
    assert len(frozen) == 6 and all(bool((net.get_parameter(name) == 1).all()) for name in frozen)
    x = torch.randn(2, *RGB, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    assert counter.get_total_flops() / 2 == pytest.approx(0.708e9, rel=1e-3)
    sides, seen = [], x
    for stage in net.stages:
        seen = stage(seen)
        sides.append(tuple(seen.shape[1:]))
    assert sides == [(24, 31, 31), (64, 15, 15), (256, 7, 7), (256, 3, 3)]
    assert torch.allclose(net.head(net.pool(seen)), seen.amax((2, 3)) @ net.head[0].weight.T / 9, atol=1e-6)


def test_airbench_on_other_images() -> None:
    assert build_network((1, 9, 12), 10, "airbench", widths=[4, 8, 8])(torch.randn(3, 1, 9, 12)).shape == (3, 10)
    with pytest.raises(PlanError, match=r"needs images of 9 pixels a side or more, the data have shape \(1, 8, 8\)"):
        build_network((1, 8, 8), 10, "airbench", widths=[4, 8, 8])
    assert build_network((1, 8, 8), 10, "airbench", widths=[4, 8])(torch.randn(3, 1, 8, 8)).shape == (3, 10)


def test_he_normal() -> None:
    torch.manual_seed(0)
    net = build_network(RGB, 10, "vgg", depth=11, width=64)
    for conv in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        assert conv.weight.detach().std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.05)
    hidden = build_network(RGB, 10, "mlp", width=256, depth=2).stages[1][0]
    assert hidden.weight.detach().std().item() == pytest.approx((2 / 3072) ** 0.5, rel=0.02) and not hidden.bias.any()


def test_flat_data_need_an_mlp() -> None:
    for name, options in (
        ("small_cnn", {"width": 4, "batch_norm": True}),
        ("resnet", {"depth": 8}),
        ("vgg", {"depth": 11, "width": 4}),
        ("airbench", {"widths": [4]}),
    ):
        with pytest.raises(PlanError, match=rf"model {name} needs images .* shape \(64,\): use mlp"):
            build_network((64,), 10, name, **options)
    assert build_network((64,), 10, "mlp", width=4, depth=2)(torch.randn(3, 64)).shape == (3, 10)


OWN = """
from torch import nn
from strategies.net import Net
def net(inputs, classes): return nn.Sequential(nn.Flatten(), nn.Linear(inputs[0] * inputs[1] * inputs[2], classes))
def staged(inputs, classes): return Net([nn.Flatten()], head=nn.LazyLinear(classes))
def number(inputs, classes): return 3
"""


def test_the_users_own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_networks.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    net = build_network((1, 8, 8), 10, "import", path="own_networks:net")
    assert isinstance(net, Net) and net(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert len(build_network((1, 8, 8), 10, "import", path="own_networks:staged").stages) == 1
    for path, message in (
        ("own_networks:none", "model import own_networks:none: own_networks has no function none"),
        ("own_networks:number", "returned int, expected a torch.nn.Module"),
        ("no_such_networks:net", "cannot import no_such_networks: .*PYTHONPATH"),
    ):
        with pytest.raises(PlanError, match=message):
            build_network((1, 8, 8), 10, "import", path=path)


def test_an_own_module_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_networks.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PlanError, match=r"cannot import broken_networks: ZeroDivisionError"):
        build_network((1, 8, 8), 10, "import", path="broken_networks:net")
