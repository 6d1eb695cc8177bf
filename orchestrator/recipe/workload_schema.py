"""What a recipe may say of its workload: data, network, augmentation, target."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from orchestrator.recipe.choices import WHOLE, Choice, Empty, ImportPath, Model, OneOf, Positive, Side


class ArrayFile(Model):
    path: str = Field(description="an .npz file with train_x, train_y, test_x, test_y")


class ImageFolder(Model):
    path: str = Field(description="a folder with train/CLASS/*.jpg|png and test/CLASS/*")
    size: Side = Field(default=32, description="side in pixels to which images are resized")


class QuadraticData(Model):
    dimension: Positive = Field(default=10_000, description="coordinates; curvature and noise of coordinate i are 1/i")


class Subset(Model):
    train: Positive | None = Field(default=None, description="training examples, the first so many; by default all")


class Data(Choice):
    digits: Empty | None = Field(default=None, description="scikit-learn's 8x8 digits, embedded: 1,437 train, 360 test")
    mnist: Subset | None = Field(default=None, description="the four official IDX files in $BIGBATCH_DATA/mnist")
    cifar10: Subset | None = Field(default=None, description="official binary or python layout under $BIGBATCH_DATA")
    spoken_digits: Empty | None = Field(
        default=None,
        description="the wav files in $BIGBATCH_DATA/fsdd/recordings (FSDD) as 32x32 log-mel images: 2,700 train, 300 test",
    )
    npz: ArrayFile | None = None
    image_folder: ImageFolder | None = None
    noisy_quadratic: QuadraticData | None = Field(
        default=None, description="expected SGD on a noisy quadratic, in closed form"
    )


class Mlp(Model):
    width: Positive = 128
    depth: Positive = Field(default=3, description="linear layers, the last one to the classes")


Kernel = Annotated[Literal[3, 5, 7, 9, 11, 13, 15], WHOLE]
Kernels = Annotated[list[Kernel], Field(min_length=3, max_length=3)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
KERNEL = "side of the kernels, in taps"
KERNELS = "sides of the kernels, in taps: of the first, the second and the other three convolutions"
DROPOUT = "share of the hidden features that is dropped in training"


class SmallCnn(Model):
    width: Positive = Field(default=16, description="channels of the first stage; doubled at each of the next two")
    batch_norm: bool = True
    kernel: Kernel = Field(default=3, description=KERNEL)


class Resnet(Model):
    depth: Annotated[Literal[8, 18, 20, 56], WHOLE] = Field(
        default=20, description="8, 20, 56: CIFAR form (6n+2); 18: the wide four-stage form"
    )
    width: Positive | None = Field(
        default=None, description="channels of the first stage; default 16, or 64 for depth 18"
    )
    kernel: Kernel = Field(default=3, description=f"{KERNEL}, of all convolutions but the stem")
    stem: Kernel = Field(default=3, description="side of the stem's kernel, in taps")


class Vgg(Model):
    depth: Annotated[Literal[11, 13, 16], WHOLE] = 11
    width: Positive = Field(default=64, description="channels of the first stage")


class Airbench(Model):
    widths: Annotated[list[Positive], Field(min_length=1, max_length=8)] = Field(
        default=[64, 256, 256], description="channels of each block of two convolutions"
    )


class PlainCnn(Model):
    stages: Annotated[
        list[Annotated[str, StringConstraints(pattern=r"^(C[1357]|P)( (C[1357]|P))*$")]],
        Field(min_length=1, max_length=64),
    ] = Field(
        default=["C3 C3 P"],
        description="of each stage its layers: C3, a 3x3 convolution with ReLU (C1, C5, C7 likewise), P, a 2x2 max-pool",
    )
    width: Positive = Field(default=32, description="channels of each convolution")


class Overfeat(Model):
    kernels: Kernels = Field(default=[11, 5, 3], description=KERNELS)
    dropout: Dropout = Field(default=0.5, description=DROPOUT)


class SmallOverfeat(Model):
    kernels: Kernels = Field(default=[7, 5, 3], description=KERNELS)
    width: Positive = Field(default=24, description="channels of the first convolution; the rest in proportion")
    dropout: Dropout = Field(default=0.5, description=DROPOUT)


class Alexnet(Model):
    kernels: Kernels = Field(default=[5, 5, 3], description=KERNELS)
    width: Positive = Field(default=64, description="channels of the first convolution; the rest in proportion")
    dropout: Dropout = Field(default=0.5, description=DROPOUT)


class Convnext(Model):
    kernel: Kernel = Field(default=7, description=f"{KERNEL}, of depthwise convolutions")
    width: Positive = Field(default=40, description="channels of the first stage; doubled at each of the next")
    blocks: Annotated[list[Positive], Field(min_length=1, max_length=4)] = Field(
        default=[2, 2, 2], description="blocks of each stage"
    )
    patch: Annotated[int, Field(ge=1, le=16), WHOLE] = Field(
        default=2, description="side of the patches that the stem takes images apart into, in pixels"
    )


class Network(Choice):
    mlp: Mlp | None = None
    small_cnn: SmallCnn | None = None
    resnet: Resnet | None = None
    vgg: Vgg | None = None
    airbench: Airbench | None = None
    plain_cnn: PlainCnn | None = None
    overfeat: Overfeat | None = Field(default=None, description="the fast OverFeat, for images of 231 pixels a side")
    small_overfeat: SmallOverfeat | None = Field(default=None, description="OverFeat for images of 32 pixels a side")
    alexnet: Alexnet | None = Field(default=None, description="AlexNet for images of 32 pixels a side")
    convnext: Convnext | None = Field(default=None, description="ConvNeXt for small images")
    import_: ImportPath | None = Field(
        default=None, alias="import", description="package.module:function; needs --allow-code"
    )


class Augment(Model):
    crop: Annotated[int, Field(ge=0, le=64), WHOLE] = Field(
        default=0, description="pixels of padding around a random crop"
    )
    pad: Literal["zero", "reflect"] = Field(default="zero", description="what the padding holds")
    flip: bool | Literal["alternating"] = Field(
        default=False, description="mirror left-right at random; alternating: at random once, then every other epoch"
    )


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
