"""Stage-wise training against its oracles: what is frozen stays, what begins alike is shared, each option acts."""

from __future__ import annotations

import dataclasses
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from orchestrator.identity import canonical, feature_key
from strategies.backprop import CrossEntropy
from strategies.batch_growth import BatchGrowth
from strategies.contract import Batch, Clock, ModelSpec, Plan, PlanError
from strategies.fop import Fop
from strategies.lars import Lars
from strategies.natural_gradient import NaturalGradient
from strategies.net import Net
from strategies.stage_wise import Patience, Reconstruction, StageWise, first, listed
from tests.strategies.cases import staged_net, with_step_decay
from tests.strategies.harness import CLASSES, EXAMPLES, WIDTH, Blobs, baseline, distance, train
from tests.strategies.parts_of_nets import Pictures, convolved, network, plan, record, untimed

CLOCK = Clock(0, 1, 0.0, 1.0, 12, 0)


# -------------------------------------------------------------------------------------------------------------- frozen


def test_what_is_frozen_stays_as_it_was(tmp_path: Path) -> None:
    """Weights and running statistics, through momentum, weight decay and batch norm."""
    edited = plan(convolved, cuts=[1, 2])
    train(edited, tmp_path, Pictures())
    one, two, three = (record(edited, i, tmp_path) for i in range(3))
    stage = [name for name in one if name.startswith("stages.0.")]
    assert len(stage) == 7 and all(torch.equal(one[name], three[name]) for name in stage)
    assert all(torch.equal(two[name], three[name]) for name in two if name.startswith("stages.1."))
    assert not torch.equal(one["head.0.weight"], two["head.0.weight"][:, :5])
    assert {name.split(".")[1] for name in one if name.startswith("stages")} == {"0"}
    assert three.keys() == plan(convolved).phases[0].model(Pictures().inputs, CLASSES).state_dict().keys()


@pytest.mark.parametrize("growth_first", [False, True])
def test_what_is_frozen_stays_so_in_each_phase_of_a_part(growth_first: bool, tmp_path: Path) -> None:
    """With batches that grow, each part has several phases, of which the later ones take all weights over."""
    whole = with_step_decay(plan(convolved))
    methods = [StageWise(cuts=[1], cache="exact"), BatchGrowth()]
    for method in reversed(methods) if growth_first else methods:
        whole = method.edit(whole)
    assert len(whole.phases) == 4
    train(whole, tmp_path, Pictures())
    first, last = record(whole, 1, tmp_path), record(whole, 3, tmp_path)
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("stages.0."))
    assert not torch.equal(record(whole, 2, tmp_path)["stages.1.0.weight"], last["stages.1.0.weight"])
    contexts = {"test": str(tmp_path)}
    assert feature_key(whole, 2, contexts) == feature_key(whole, 3, contexts)


def test_no_gradient_reaches_what_is_frozen() -> None:
    edited = plan(convolved, cuts=[1, 2])
    net = network(edited, 1, (2, 4, 4))
    net.take(network(edited, 0, (2, 4, 4)).state_dict())
    net.train()
    before = {name: value.clone() for name, value in net.stages[0].state_dict().items()}
    cross_entropy(net(Pictures().x), Pictures().y).backward()
    assert all(p.grad is None for p in net.stages[0].parameters())
    assert all(p.grad is not None for module in (net.stages[1], net.head) for p in module.parameters())
    assert not net.stages[0].training and net.stages[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.stages[0].state_dict().items())


def test_the_last_part_predicts_with_the_networks_own_head(tmp_path: Path) -> None:
    edited = plan(cuts=[1])
    trained = train(edited, tmp_path)
    whole = staged_net((WIDTH,), CLASSES).double()
    whole.load_state_dict(trained.weights)
    loss = cross_entropy(whole(Blobs().x[:31]), Blobs().y[:31])
    assert trained.rows[-1]["test_loss"] == pytest.approx(loss.item(), abs=1e-12)


def steep_net(inputs: tuple[int, ...], classes: int) -> Net:
    net = staged_net(inputs, classes)
    assert isinstance(net.head, nn.Linear)
    net.head.weight.data *= 100
    return net


def test_a_part_that_starts_at_a_higher_loss_has_not_diverged(tmp_path: Path) -> None:
    trained = train(plan(steep_net, cuts=[1], rates=[None, 1e-6]), tmp_path)
    losses = [row["train_loss"] for row in trained.rows]
    assert min(losses[12:]) > 3 * losses[0] and trained.progress.status == "done"


# ------------------------------------------------------------------------------------------------------------- options


def test_heads_have_the_parameters_of_their_kind() -> None:
    def head(kind: str, build: Any = convolved, inputs: tuple[int, ...] = (2, 4, 4)) -> int:
        net = network(plan(build, cuts=[1], head=kind), 0, inputs)
        return sum(p.numel() for module in (net.pool, net.head) for p in module.parameters())

    assert head("linear") == 80 * CLASSES + CLASSES
    assert head("pooled") == 5 * CLASSES + CLASSES
    assert head("network") == 5 * 5 * 9 + 5 + 5 * CLASSES + CLASSES
    assert head("pooled", staged_net, (WIDTH,)) == head("linear", staged_net, (WIDTH,)) == 8 * CLASSES + CLASSES
    assert head("network", staged_net, (WIDTH,)) == 8 * 8 + 8 + 8 * CLASSES + CLASSES


def test_each_part_has_its_own_epochs_rate_and_decay() -> None:
    one, two = plan(cuts=[1], epochs=[1, 2.5], rates=[0.3, None], weight_decay=[None, 0.5]).phases
    base = plan().phases[0].learner
    assert (one.epochs, two.epochs) == (1, 2.5)
    assert (one.learner.rate.peak, two.learner.rate) == (0.3, base.rate)  # type: ignore[attr-defined]
    assert one.learner.rate.warmup == base.rate.warmup  # type: ignore[attr-defined]
    assert one.learner.optimizer == base.optimizer  # type: ignore[attr-defined]
    assert two.learner.optimizer.weight_decay == 0.5  # type: ignore[attr-defined]


def test_the_ensemble_is_the_weighted_mean_of_all_heads(tmp_path: Path) -> None:
    edited = plan(cuts=[1], ensemble=2.0)
    trained = train(edited, tmp_path)
    one, x, y = record(edited, 0, tmp_path), Blobs().x[:31], Blobs().y[:31]
    features = (x @ one["stages.0.1.weight"].T + one["stages.0.1.bias"]).tanh()
    early = features @ one["head.0.weight"].T + one["head.0.bias"]
    w = trained.weights
    late = (features @ w["stages.1.0.weight"].T + w["stages.1.0.bias"]).tanh() @ w["head.weight"].T + w["head.bias"]
    loss = cross_entropy((early + 2 * late) / 3, y)
    assert trained.rows[-1]["test_loss"] == pytest.approx(loss.item(), abs=1e-12)
    alone = train(plan(cuts=[1]), tmp_path / "alone")
    assert trained.rows[-1]["train_loss"] == alone.rows[-1]["train_loss"]  # heads are trained each for itself


@pytest.mark.parametrize(("build", "inputs"), [(staged_net, (WIDTH,)), (convolved, (2, 4, 4))])
def test_an_unsupervised_part_learns_to_reconstruct(build: Any, inputs: tuple[int, ...], tmp_path: Path) -> None:
    """The labels move its head alone, and the loss is the sum of both."""
    edited = plan(build, cuts=[1], unsupervised=1)
    net = network(edited, 0, inputs).train()
    data = Blobs() if inputs == (WIDTH,) else Pictures()
    out = net(data.x)
    labels = torch.autograd.grad(
        cross_entropy(out[:, :-1], data.y), net.parameters(), allow_unused=True, retain_graph=True
    )
    moved = {name for (name, _), g in zip(net.named_parameters(), labels, strict=True) if g is not None and g.any()}
    assert moved == {name for name, _ in net.named_parameters() if name.startswith("head.")}
    error = (net.decoder(net.stages[0](data.x)) - data.x).square().mean()
    assert out[:, -1].mean().item() == pytest.approx(error.item(), abs=1e-12)
    total = Reconstruction(CrossEntropy())(net, Batch(data.x, data.y, torch.arange(EXAMPLES)), CLOCK)
    assert total.item() == pytest.approx((cross_entropy(out[:, :-1], data.y) + error).item(), abs=1e-12)
    rows = train(edited, tmp_path, data).rows
    assert rows[11]["train_loss"] < rows[0]["train_loss"] and "test_accuracy" in rows[11]


def test_patience_ends_a_part_early(tmp_path: Path) -> None:
    """A rate of zero lowers no loss: the first evaluation is the best, and the step after the third is the last."""
    edited = plan(cuts=[1], epochs=[10, 1], rates=[0.0, None], patience=2, watched=24)
    trained = train(edited, tmp_path)
    steps = [row["step"] for row in trained.rows if row["phase"] == 0]
    assert steps[-1] == 3 * 4 + 1 and trained.progress.steps == 13 + 4
    assert Patience(2, 24) in edited.phases[0].learner.updates  # type: ignore[attr-defined]


def test_patience_watches_the_loss_of_the_first_examples(tmp_path: Path) -> None:
    from cluster.engines import make_worker

    worker = make_worker("solo", {}, "fp64", 0, 1, torch.device("cpu"))
    net, watch = staged_net((WIDTH,), CLASSES).double(), Patience(1, 7)
    state = watch.init(net, worker)
    watch.refresh(state, Blobs().first)
    loss = cross_entropy(net(Blobs().x[:7]), Blobs().y[:7]).item()
    assert state.saved["best"] == pytest.approx(loss, abs=1e-12) and not watch.ended(state)
    watch.refresh(state, Blobs().first)
    assert watch.ended(state)


# ----------------------------------------------------------------------------------------------------- shared beginnings


def listing(inputs: tuple[int, ...], classes: int, stages: list[int]) -> Net:
    """A network that lists its stages: widths of linear layers."""
    sizes = [WIDTH, *stages]
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in zip(sizes, stages, strict=False)]
    return Net(layers, head=nn.Linear(sizes[-1], classes))


def of(*stages: int, **options: Any) -> Plan:
    spec = ModelSpec(listing, (("stages", list(stages)),))
    whole = baseline().map(lambda phase: dataclasses.replace(phase, model=spec))
    return StageWise(**{"head": "own"} | options).edit(whole)


def test_networks_that_begin_alike_are_alike_up_to_there() -> None:
    short, long, other = of(8, 8), of(8, 8, 5), of(8, 7)
    assert canonical(short.phases) == canonical(long.phases[:2])
    assert canonical(short.phases[0]) == canonical(other.phases[0])
    assert canonical(of(8).phases) == canonical(long.phases[:1])
    assert listed(ModelSpec(listing, (("stages", [8]),))) == 1 and listed(ModelSpec(staged_net)) is None
    assert first(ModelSpec(staged_net), 1) == ModelSpec(staged_net)


def test_a_shared_beginning_equals_an_unshared_one(tmp_path: Path) -> None:
    """Seeds and the order of examples do not depend on what follows: the same weights and rows, bit for bit."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    train(of(8, 8), shared)
    for path in (shared / "trial").iterdir():
        path.unlink()
    long = train(of(8, 8, 5), shared)
    assert long.progress.reused_steps == 24
    again = train(of(8, 8, 5), alone)
    assert again.progress.reused_steps == 0
    assert distance(long, again) == 0 and untimed(long) == untimed(again)


# ---------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "does not list its stages: state where to cut"),
        ({"cuts": [2, 1]}, "expected rising numbers"),
        ({"cuts": [0]}, "expected rising numbers"),
        ({"cuts": [1], "rates": [0.1]}, "rates is .* expected 2 numbers"),
        ({"cuts": [1], "weight_decay": [-1, None]}, "expected 2 numbers"),
        ({"cuts": [1], "epochs": [0, 1]}, "expected > 0"),
        ({"cuts": [1], "unsupervised": 2}, "expected less than its 2 parts"),
        ({"cuts": [1], "unsupervised": 1, "patience": 2}, "leave out patience or unsupervised"),
        ({"cuts": [1], "head": "own"}, "needs a model that lists its stages"),
        ({"cuts": [1], "ensemble": 1.0, "cache": "exact"}, "leave out cache or ensemble"),
    ],
)
def test_what_cannot_be_is_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        StageWise(**options).edit(plan())


def test_labels_are_not_drawn_where_a_part_reconstructs() -> None:
    stages, natural = StageWise(cuts=[1], unsupervised=1), NaturalGradient(fisher="sampled")
    for methods in ([stages, natural], [natural, stages], [natural, Fop(), stages]):
        with pytest.raises(PlanError, match="write fisher: empirical, or leave out unsupervised"):
            reduce(lambda edited, method: method.edit(edited), methods, plan())
    natural.edit(StageWise(cuts=[1]).edit(plan()))
    NaturalGradient().edit(stages.edit(plan()))


def test_networks_that_cannot_be_cut_are_told() -> None:
    from tests.strategies.harness import tiny_net

    for build, cuts, message in (
        (staged_net, [2], "the network has 2 stages"),
        (tiny_net, [], "forward pass of its own"),
    ):
        with pytest.raises(PlanError, match=message):
            network(plan(build, cuts=cuts), 0)


def test_a_plan_of_several_networks_is_told() -> None:
    one, other = plan().phases[0], plan(convolved).phases[0]
    with pytest.raises(PlanError, match="cuts one network"):
        StageWise(cuts=[1]).edit(Plan((one, other)))


def test_rates_and_decay_of_another_optimizer_are_told() -> None:
    with pytest.raises(PlanError, match="put stage_wise before"):
        StageWise(cuts=[1], weight_decay=[0.1, 0.1]).edit(Lars().edit(plan()))
