"""What a recipe may say beside its workload: the base learner, engine, cluster, tracking, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from orchestrator.recipe.choices import LARGEST, WHOLE, Choice, Count, Empty, Model, Name, Positive
from orchestrator.recipe.deepspeed_schema import DeepSpeed

# -------------------------------------------------------------------------------------------------------------- base


class Sgd(Model):
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.0, description="not applied to 1-D parameters")


class AdamW(Model):
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.01, description="not applied to 1-D parameters")


class Optimizer(Choice):
    sgd: Sgd | None = None
    adamw: AdamW | None = None


class Polynomial(Model):
    power: Annotated[float, Field(gt=0)] = 2.0
    end: Annotated[float, Field(ge=0, le=1)] = Field(default=0.0, description="final rate as a share of the peak")


class StepDecay(Model):
    at: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default=[0.5, 0.75], description="shares of the run")
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Decay(Choice):
    none: Empty | None = None
    cosine: Empty | None = None
    linear: Empty | None = None
    polynomial: Polynomial | None = None
    step: StepDecay | None = None


class Rate(Model):
    peak: Annotated[float, Field(gt=0)] = Field(default=0.1, description="learning rate at batch size `per`")
    per: Positive = Field(default=256, description="batch size at which `peak` holds as it is")
    scale: Literal["none", "linear", "sqrt", "adam_sde", "noise_scale"] = Field(
        default="none",
        description="how the peak grows with k = batch / per: k, sqrt(k), sqrt(k) with adamw's betas and eps scaled too, "
        "or as 1 / (1 + noise_scale / batch)",
    )
    noise_scale: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="gradient noise scale in examples, which `scale: noise_scale` needs"
    )
    warmup: Annotated[float, Field(ge=0)] = Field(default=0.0, description="epochs of linear warm-up, per iteration")
    start: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.0, description="first rate of the warm-up, as a share of the peak"
    )
    decay: Decay = Decay(none=Empty())


class Base(Model):
    """The learner that arms start from."""

    optimizer: Optimizer = Optimizer(sgd=Sgd())
    epochs: Annotated[float, Field(gt=0, le=1e6)] | None = Field(
        default=None, description="budget in passes over the data"
    )
    steps: Positive | None = Field(default=None, description="budget in optimizer steps, instead of epochs")
    batch: Positive = Field(description="global batch: examples per optimizer step")
    micro_batch: Positive | Literal["auto"] = Field(
        default="auto", description="examples per forward pass and worker at most"
    )
    rate: Rate = Rate()

    @classmethod
    def alternatives(cls) -> list[str]:
        return ["epochs", "steps"]


# ------------------------------------------------------------------------------------------------------------- study


class PowerSgd(Model):
    rank: Positive = Field(default=2, description="columns and rows that a gradient matrix is sent as")
    start: Annotated[int, Field(ge=2, le=LARGEST), WHOLE] = Field(
        default=10, description="steps of each phase before the first compressed one"
    )
    error_feedback: bool = Field(default=True, description="what was lost is added to the next gradient")


class Compression(Choice):
    """How gradients are sent between workers. It changes results, so it is part of a trial's name."""

    none: Empty | None = None
    bf16: Empty | None = None
    powersgd: PowerSgd | None = None


class Ddp(Model):
    find_unused_parameters: bool = False
    bucket_mib: Annotated[float, Field(gt=0, le=65536)] | Literal["auto"] = Field(
        default="auto", description="gradients sent at once, in MiB; auto: 25 after a first bucket of 1"
    )
    compression: Compression = Compression(none=Empty())
    share_memory: bool = Field(
        default=True, description="workers of one node sum large gradients through memory, not sockets (CPU)"
    )


class Engine(Choice):
    solo: Empty | None = None
    ddp: Ddp | None = None
    deepspeed: DeepSpeed | None = None


class Cluster(Model):
    """Where trials run. None of it changes a result, save rounding when the number of workers changes."""

    workers: Positive = 1
    threads: Positive = Field(default=1, description="CPU threads per worker")
    launcher: Literal["auto", "solo", "gang", "ray_train", "torchrun"] = "auto"
    placement: Literal["pack", "spread"] = Field(
        default="pack", description="workers of a trial on as few nodes as possible, or on as many"
    )
    gangs: Positive | Literal["auto"] = Field(default="auto", description="trials that run side by side")
    max_failures: Count = Field(default=2, description="times that a lost worker may be replaced, per trial")
    timeout: Annotated[float, Field(gt=0)] = Field(default=300, description="seconds without a sign of life")


class Speed(Model):
    """How the same numbers are computed faster. None of it changes a result, save rounding."""

    patch_convolutions: bool | Literal["auto"] = Field(
        default="auto",
        description="convolutions on small maps as one matrix product, on CPUs; auto: those that were measured to gain",
    )
    keep_memory: bool = Field(default=True, description="freed memory stays with the worker (glibc), for the next step")
    channels_last: bool = Field(default=True, description="images lie in memory as (n, h, w, c)")
    compile: Literal["off", "default", "cuda_graphs"] = Field(
        default="off",
        description="torch.compile of the network; cuda_graphs: with its mode reduce-overhead, on GPUs, where a step takes "
        "one backward pass",
    )


class Wandb(Model):
    project: Name = "bigbatch"
    mode: Literal["offline", "online"] = "offline"
    entity: Name | None = None


class Tracking(Model):
    wandb: Wandb | None = None


class Checkpoint(Model):
    seconds: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        default="auto",
        description="seconds of training between checkpoints; 0: each log row; auto: as often as pays off, "
        "at no more than 3 % of the training time",
    )
    mtbf: Annotated[float, Field(gt=0)] = Field(
        default=3600, description="mean seconds between failures of the workers, for `seconds: auto`"
    )
    keep: Positive = 2


Precision = Literal["auto", "fp32", "bf16", "fp64"]
