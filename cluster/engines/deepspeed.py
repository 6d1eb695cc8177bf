"""The engine that spreads optimizer state, gradients and weights over workers: DeepSpeed's ZeRO, stages 0 to 3.

The one file that imports deepspeed. Seen with 0.19.8; nothing is compiled: optimizers are torch's, and no DeepSpeed op is used.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from cluster.engines.base import ProcessWorker
from cluster.engines.groups import patience
from strategies.contract import PlanError

if TYPE_CHECKING:
    from strategies.net import Net


LARGEST_BUCKET = 25 * 2**20  # elements of 4 bytes, where the recipe does not say: 100 MiB


class DeepSpeedWorker(ProcessWorker):
    """Averages gradients over workers. A loss that is to be a mean over the global batch carries `size` as a factor.

    `stage`: 0 spreads nothing, 1 optimizer state, 2 also gradients, 3 also weights.
    `bucket_mib`: gradients sent at once; "auto": 100 at most. `extra`: DeepSpeed's own configuration, merged in.
    Weights stay in float32; bf16 is autocast, as with the other engines, so that results and checkpoints are theirs.
    """

    engine: Any = None

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        precision: str,
        stage: int = 1,
        bucket_mib: float | str = "auto",
        extra: Mapping[str, Any] | None = None,
    ):
        super().__init__(rank, size, device, precision)
        self.stage, self.extra = stage, extra or {}
        self.holders = size if stage else 1
        self.bucket = LARGEST_BUCKET if bucket_mib == "auto" else int(float(bucket_mib) * 2**18)
        self.shards: Shards | None = None

    def prepare(self, net: Net, optimizer: Optimizer, open_model: bool) -> nn.Module:
        if open_model:
            raise PlanError("engine deepspeed wraps the model, and a strategy here needs it open: use engine ddp")
        if not any(p.requires_grad for p in net.parameters()):
            return net
        net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # DeepSpeed takes no channels_last
        groups = [list(group["params"]) for group in optimizer.param_groups]
        bucket = min(self.bucket, sum(p.numel() for p in net.parameters()))  # DeepSpeed allocates it whole
        config = configuration(self.stage, bucket, self.size, self.precision, self.extra)
        self.engine = initialize(net, optimizer, config, self.device)
        self.shards = Shards(self.engine, groups) if self.stage else None
        self.gather()
        return self.engine

    def whole(self, optimizer: Optimizer) -> Any:
        return self.shards or optimizer

    def backward(self, value: Tensor, grad: Tensor | None = None) -> None:
        self.engine.backward(value if grad is None else (value * grad).sum())

    def micro(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        if self._trains(model):
            if self.shards:
                self.shards.scatter()
            self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def apply(
        self, model: nn.Module, optimizer: Optimizer, before: Callable[[], None], after: Callable[[], None]
    ) -> None:
        if not self._trains(model):
            return super().apply(model, optimizer, before, after)
        before()
        self.engine.step()
        if self.shards:
            self.shards.spoil_if_skipped()
        after()

    def _trains(self, model: nn.Module) -> bool:
        """Whether DeepSpeed has the model; one without parameters is left as it is."""
        return model is self.engine

    def gather(self, optimizer: bool = False) -> None:
        if self.shards:
            self.shards.gather(optimizer)


class Shards:
    """Weights and optimizer state that are spread over workers, and the same whole, as one worker alone has them.

    `gather` makes them whole on every worker, and `scatter` lets them go before the next step. It stands in for the optimizer
    in checkpoints: state_dict, which needs the state gathered, and load_state_dict are those of the torch optimizer.
    """

    def __init__(self, engine: Any, groups: list[list[nn.Parameter]]):
        self.zero, self.optimizer = engine.optimizer, engine.basic_optimizer
        self.net: nn.Module = engine.module
        self.groups = groups
        self.index = {p: i for i, p in enumerate(p for group in groups for p in group)}
        self.hooks: Any = getattr(self.zero, "parameter_offload", None)  # at stage 3, which spreads weights
        self.whole = False  # the weights, where they are spread
        self.state: dict[int, dict[str, Any]] | None = None  # of the optimizer, by index of the parameter; None: spread

    def gather(self, optimizer: bool) -> None:
        """On all workers at once: the weights and, with `optimizer`, its state. What is whole already stays."""
        if self.hooks and not self.whole:
            self._gather_weights()
        if optimizer and self.state is None:
            self.state = self._gathered_state()

    def _gather_weights(self) -> None:
        """DeepSpeed's hooks, which would take weights apart again, are off until `scatter`."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        self.hooks.partition_all_parameters()
        self.hooks._remove_module_hooks()
        self.hooks.forward_hooks, self.hooks.backward_hooks = [], []
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not self.net]
        params: list[Any] = list(self.net.parameters())
        params[0].all_gather(param_list=params)
        self.whole = True

    def scatter(self) -> None:
        """Each worker keeps its part of the weights, as they are now, and of the optimizer's state."""
        if self.whole:
            params: list[Any] = list(self.net.parameters())
            params[0].partition(param_list=params, has_been_updated=True)
            self.hooks.setup_zero_stage3_hooks()
        self.whole, self.state = False, None

    def spoil_if_skipped(self) -> None:
        """DeepSpeed skips a step whose gradient is not finite. Here it ends the trial, as with the other engines."""
        if self.zero.overflow:
            for p in self.net.parameters():
                p.data.fill_(torch.nan)
                getattr(p, "ds_tensor", p).data.fill_(torch.nan)

    def state_dict(self) -> dict[str, Any]:
        if self.state is None:
            raise RuntimeError("the optimizer's state is spread over workers: gather(optimizer=True) makes it whole")
        first = [self.index[group[0]] for group in self.groups]
        return {
            "state": self.state,
            "param_groups": [
                {k: v for k, v in options.items() if k != "params" and not k.startswith("_ds")}
                | {"params": list(range(start, start + len(group)))}
                for options, group, start in zip(self.optimizer.param_groups, self.groups, first, strict=True)
            ],
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """The net's weights, loaded by now, become the optimizer's own, too: ZeRO's copy is separate."""
        for options, old in zip(self.optimizer.param_groups, saved["param_groups"], strict=True):
            options.update({k: v for k, v in old.items() if k != "params"})
        for flat, params in self._flats():
            for p in params:
                self._write(flat, p, p.detach())
            self._load(flat, params, [saved["state"].get(self.index[p], {}) for p in params])
        self.state = saved["state"]

    def _load(self, flat: Tensor, params: list[nn.Parameter], states: list[dict[str, Any]]) -> None:
        """One part's state from those of its parameters, whose keys are the same."""
        own = {key: torch.zeros_like(flat) if spread(key, value) else value for key, value in states[0].items()}
        self.optimizer.state[flat] = own
        for key, part in own.items():
            for p, state in zip(params, states, strict=True):
                if spread(key, part):
                    self._write(part, p, state[key])

    def _gathered_state(self) -> dict[int, dict[str, Any]]:
        """Each parameter's state whole, by its index."""
        found: dict[int, dict[str, Any]] = {i: {} for i in self.index.values()}
        for flat, params in self._flats():
            for key, value in self.optimizer.state.get(flat, {}).items():
                wholes = self._wholes(value, params) if spread(key, value) else [value] * len(params)
                for p, whole in zip(params, wholes, strict=True):
                    found[self.index[p]][key] = whole
        return {i: state for i, state in found.items() if state}

    def _flats(self) -> Iterator[tuple[Tensor, list[nn.Parameter]]]:
        """This worker's part of each group, which torch's optimizer moves, and the parameters that it is a part of."""
        if self.hooks:
            yield from zip(self.zero.fp32_partitioned_groups_flat, self.zero.fp16_groups, strict=True)
        else:
            yield from zip(self.zero.single_partition_of_fp32_groups, self.zero.bit16_groups, strict=True)

    def _wholes(self, flat: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
        """Whole tensors in the shapes of `params`, by one sum over workers that each hold a part and zeros elsewhere."""
        sizes = [size(p) for p in params]
        full = torch.zeros(sum(sizes), dtype=flat.dtype, device=flat.device)
        wholes = full.split(sizes)
        for p, whole in zip(params, wholes, strict=True):
            here, there, count = self._place(p)
            whole[there : there + count] = flat[here : here + count]
        dist.all_reduce(full)
        return [whole.view(shape(p)) for p, whole in zip(params, wholes, strict=True)]

    def _write(self, flat: Tensor, p: nn.Parameter, whole: Tensor) -> None:
        here, there, count = self._place(p)
        flat.data[here : here + count] = whole.reshape(-1)[there : there + count].to(flat.device)

    def _place(self, p: nn.Parameter) -> tuple[int, int, int]:
        """(place in this worker's part, place in the parameter, elements) of what both share."""
        if self.hooks:
            _, here, most = self.zero.grad_position[self.zero.get_param_id(p)]
            there = min(most * dist.get_rank(), size(p))
            return here, there, min(most, size(p) - there)
        held: Any = p._hp_mapping  # type: ignore[attr-defined]
        if held is None:
            return 0, 0, 0
        return held.hp_fragment_address.start, held.lp_fragment_address.start, held.lp_fragment_address.numel


def spread(key: str, value: Any) -> bool:
    """Whether an entry of an optimizer's state has the parameter's shape: all tensors but torch's count of steps."""
    return isinstance(value, Tensor) and key != "step"


def size(p: nn.Parameter) -> int:
    return int(getattr(p, "ds_numel", p.numel()))


def shape(p: nn.Parameter) -> torch.Size:
    return getattr(p, "ds_shape", p.shape)


# ------------------------------------------------------------------------------------------------------------- DeepSpeed


def configuration(stage: int, bucket: int, workers: int, precision: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's configuration. Batches come weighted by their share of the recipe's, so DeepSpeed is told of none."""
    zero = {"stage": stage, "reduce_bucket_size": bucket}
    zero |= {"memory_efficient_linear": False, "override_module_apply": False}  # they would change torch for good
    own: dict[str, Any] = {
        "train_batch_size": workers,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if precision == "bf16":  # sums over workers stay in float32: no module counts as safe
        own["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return merged(own, extra)


def merged(own: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """`extra` in `own`, maps in maps; what is set here stays."""
    both = {k: merged(own[k], extra[k]) for k in own.keys() & extra.keys() if isinstance(own[k], Mapping)}
    return {**extra, **own, **both}


def initialize(net: nn.Module, optimizer: Optimizer, config: Any, device: torch.device) -> Any:
    deepspeed = load(device)
    os.environ["LOCAL_RANK"] = str(device.index or 0)  # read in training, too; by itself, DeepSpeed counts by host name
    with environment(RANK=dist.get_rank(), WORLD_SIZE=dist.get_world_size()):
        return deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)[0]


def load(device: torch.device) -> Any:
    """The package, on the worker's kind of device, in the worker's process group, its log with the rank's own."""
    with warnings.catch_warnings(), environment(DS_ACCELERATOR=device.type):
        warnings.simplefilter("ignore")
        try:
            import deepspeed
        except ModuleNotFoundError as error:
            raise PlanError(f"engine deepspeed: no module {error.name}: pip install 'bigbatch[deepspeed]'") from None
        from deepspeed import comm, ops
        from deepspeed.utils import groups, logger
    comm.TorchBackend.new_group = lambda self, ranks: dist.new_group(list(ranks), patience())
    ops.__compatible_ops__.clear()  # else it builds one for CPUs, and a build that is killed leaves a lock
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    logger.handlers[:] = [logging.lastResort]  # writes warnings to sys.stderr as it is at that moment
    if not dist.is_initialized():  # a worker alone
        kind = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(kind, store=dist.HashStore(), rank=0, world_size=1)
    global _group
    if _group is not dist.group.WORLD:
        comm.comm.cdb = None
        groups._release_process_group_references()
        _group = dist.group.WORLD
    return deepspeed


_group: Any = None  # the process group that DeepSpeed has seen; a gang may form another one after an error


@contextmanager
def environment(**variables: object) -> Iterator[None]:
    """The environment with `variables` in it, for as long as the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update({name: str(value) for name, value in variables.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
