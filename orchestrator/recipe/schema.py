"""What a recipe may say: pydantic models, strict at every depth. The only definition of the recipe language.

A choice between variants is written as a map with one key (`optimizer: {sgd: {momentum: 0.9}}`); a variant whose
options all have defaults may be written as its bare name (`optimizer: adamw`). Each choice is a model whose fields are
its variants, exactly one of them set, so that `choice.name` and `choice.options` say which.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def whole(value: Any) -> Any:
    """A float that is a whole number is an integer, as in JSON Schema: `batch: 1e3` is 1000."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(whole)
LARGEST = 10**12
Int = Annotated[int, Field(le=LARGEST), WHOLE]
Positive = Annotated[int, Field(gt=0, le=LARGEST), WHOLE]
Count = Annotated[int, Field(ge=0, le=LARGEST), WHOLE]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
ImportPath = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$")]
Side = Annotated[int, Field(ge=1, le=4096), WHOLE]


class Model(BaseModel):
    model_config = STRICT

    @classmethod
    def alternatives(cls) -> list[str]:
        """Keys of which one stated in an arm, a grid or an override takes the place of another."""
        return []


class OneOf(Model):
    """Exactly one of the alternatives is stated."""

    @model_validator(mode="after")
    def exactly_one(self) -> Self:
        by_key = {f.alias or name: name for name, f in type(self).model_fields.items()}
        fields = [by_key[key] for key in self.alternatives()]
        stated = [name for name in fields if name in self.model_fields_set]
        if len(stated) != 1 or getattr(self, stated[0]) is None:
            names = ", ".join(self.alternatives())
            raise PydanticCustomError("one_of", "expected exactly one of {names}", {"names": names})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        for key in cls.alternatives():
            schema["properties"][key] = without_null(schema["properties"][key])
        schema["oneOf"] = [{"required": [key]} for key in cls.alternatives()]
        return schema


def without_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    """The JSON Schema of `X | None = None` as that of X."""
    rest = {k: v for k, v in schema.items() if k not in ("anyOf", "default")}
    variants = [v for v in schema.get("anyOf", []) if v != {"type": "null"}]
    return rest | (variants[0] if len(variants) == 1 else {"anyOf": variants} if variants else {})


class Choice(OneOf):
    """Exactly one variant; a bare name stands for the variant with its defaults."""

    @model_validator(mode="before")
    @classmethod
    def bare_name(cls, value: Any) -> Any:
        if isinstance(value, dict | cls):
            return value
        if isinstance(value, str) and value in cls.bare_names():
            return {value: {}}
        names = cls.model_fields_by_key()
        problem = "needs_options" if isinstance(value, str) and value in names else "unknown_variant"
        raise PydanticCustomError(problem, "expected one of {names}", {"names": ", ".join(names)})

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = super().__get_pydantic_json_schema__(core, handler)
        about = {key: schema.pop(key) for key in ("title", "description") if key in schema}
        return about | {"anyOf": [{"enum": cls.bare_names()}, schema]}

    @classmethod
    def alternatives(cls) -> list[str]:
        return cls.model_fields_by_key()

    @classmethod
    def model_fields_by_key(cls) -> list[str]:
        return [f.alias or name for name, f in cls.model_fields.items()]

    @classmethod
    def bare_names(cls) -> list[str]:
        """Variants whose options all have defaults."""
        return [f.alias or name for name, f in cls.model_fields.items() if cls._has_defaults(f.annotation)]

    @staticmethod
    def _has_defaults(annotation: Any) -> bool:
        members = get_args(annotation) or [annotation]
        models = [member for member in members if isinstance(member, type) and issubclass(member, Model)]
        return bool(models) and not any(f.is_required() for f in models[0].model_fields.values())

    @property
    def field(self) -> str:
        return next(iter(self.model_fields_set))

    @property
    def name(self) -> str:
        """The variant's name as the recipe spells it."""
        return type(self).model_fields[self.field].alias or self.field

    @property
    def options(self) -> Any:
        """The variant's options: a model, or a plain value."""
        return getattr(self, self.field)


class Empty(Model):
    """No options."""


# ---------------------------------------------------------------------------------------------------------- workload


class ArrayFile(Model):
    path: str = Field(description="an .npz file with train_x, train_y, test_x, test_y")


class ImageFolder(Model):
    path: str = Field(description="a folder with train/CLASS/*.jpg|png and test/CLASS/*")
    size: Side = Field(default=32, description="side in pixels to which images are resized")


class QuadraticData(Model):
    dimension: Positive = Field(default=10_000, description="coordinates; curvature and noise of coordinate i are 1/i")


class Data(Choice):
    digits: Empty | None = Field(default=None, description="scikit-learn's 8x8 digits, embedded: 1,437 train, 360 test")
    mnist: Empty | None = Field(default=None, description="the four official IDX files in $BIGBATCH_DATA/mnist")
    cifar10: Empty | None = Field(default=None, description="official binary or python layout under $BIGBATCH_DATA")
    npz: ArrayFile | None = None
    image_folder: ImageFolder | None = None
    noisy_quadratic: QuadraticData | None = Field(
        default=None, description="expected SGD on a noisy quadratic, in closed form"
    )


class Mlp(Model):
    width: Positive = 128
    depth: Positive = Field(default=3, description="linear layers, the last one to the classes")


class SmallCnn(Model):
    width: Positive = Field(default=16, description="channels of the first stage; doubled at each of the next two")
    batch_norm: bool = True


class Resnet(Model):
    depth: Annotated[Literal[8, 18, 20, 56], WHOLE] = Field(
        default=20, description="8, 20, 56: CIFAR form (6n+2); 18: the wide four-stage form"
    )
    width: Positive | None = Field(
        default=None, description="channels of the first stage; default 16, or 64 for depth 18"
    )


class Vgg(Model):
    depth: Annotated[Literal[11, 13, 16], WHOLE] = 11
    width: Positive = Field(default=64, description="channels of the first stage")


class Network(Choice):
    mlp: Mlp | None = None
    small_cnn: SmallCnn | None = None
    resnet: Resnet | None = None
    vgg: Vgg | None = None
    import_: ImportPath | None = Field(
        default=None, alias="import", description="package.module:function; needs --allow-code"
    )


class Augment(Model):
    crop: Annotated[int, Field(ge=0, le=64), WHOLE] = Field(
        default=0, description="pixels of zero padding around a random crop"
    )
    flip: bool = Field(default=False, description="mirror left-right at random")


class Target(OneOf):
    """One metric and the value to reach."""

    test_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    test_loss: Annotated[float, Field(ge=0)] | None = None
    train_loss: Annotated[float, Field(ge=0)] | None = None
    stop: bool = Field(default=False, description="end the trial once the target is reached")

    @classmethod
    def alternatives(cls) -> list[str]:
        return ["test_accuracy", "test_loss", "train_loss"]

    @property
    def metric(self) -> str:
        return next(iter(self.model_fields_set - {"stop"}))

    @property
    def value(self) -> float:
        return getattr(self, self.metric)

    @property
    def higher_is_better(self) -> bool:
        return self.metric.endswith("accuracy")


class Interval(OneOf):
    """A stretch of training, in passes over the data set or in optimizer steps."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = None

    @classmethod
    def alternatives(cls) -> list[str]:
        return ["epochs", "steps"]

    def in_steps(self, examples: int, batch: int) -> int:
        """At least 1; `examples` in the data set, `batch` per step."""
        return self.steps or max(1, round((self.epochs or 0) * examples / batch))


class Workload(Model):
    data: Data
    model: Network = Network(mlp=Mlp())
    augment: Augment = Augment()
    target: Target | None = None
    evaluate: Interval = Field(
        default=Interval(epochs=1), description="how often test metrics and the target are checked"
    )


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
    scale: Literal["none", "linear", "sqrt"] = Field(default="none", description="how the peak grows with batch / per")
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


class Engine(Choice):
    solo: Empty | None = None
    ddp: Ddp | None = None


class Cluster(Model):
    """Where trials run. None of it changes a result, save rounding when the number of workers changes."""

    workers: Positive = 1
    threads: Positive = Field(default=1, description="CPU threads per worker")
    launcher: Literal["auto", "solo", "gang", "ray_train", "torchrun"] = "auto"
    gangs: Positive | Literal["auto"] = Field(default="auto", description="trials that run side by side")
    max_failures: Count = Field(default=2, description="times that a lost worker may be replaced, per trial")
    timeout: Annotated[float, Field(gt=0)] = Field(default=300, description="seconds without a sign of life")


class Wandb(Model):
    project: Name = "bigbatch"
    mode: Literal["offline", "online"] = "offline"
    entity: Name | None = None


class Tracking(Model):
    wandb: Wandb | None = None


class Checkpoint(Model):
    seconds: Annotated[float, Field(ge=0)] = Field(
        default=30, description="seconds of training between checkpoints; 0: each log row"
    )
    keep: Positive = 2


Precision = Literal["auto", "fp32", "bf16", "fp64"]
