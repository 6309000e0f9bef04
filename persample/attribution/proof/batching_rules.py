"""Where samples lie in an operation's inputs, given where they lie in its output: a table by kind of operation.

Where samples lie in a tensor is one number, the stride s: entry i, counted in row-major order, belongs to sample
(i // s) mod B. Views keep it; other operations see it as (axis, inner): samples along one axis, `inner`
neighbouring entries of it each. An operation is in the table if it treats samples apart whatever the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from persample.graph.nodes import Node, signed


@dataclass(frozen=True)
class AxisLayout:
    """Samples along `axis`, `inner` neighbouring entries each; the axis holds whole rounds of B · inner entries."""

    axis: int
    inner: int


def axis_layout(stride: int, shape: Sequence[int], batch: int) -> AxisLayout | None:
    """The axis along which samples with that stride lie, or None if they spread over several."""
    if batch * stride == 0:
        return None
    for axis in range(len(shape)):
        below = prod(shape[axis + 1 :])
        if below and stride % below == 0 and shape[axis] % (stride // below * batch) == 0:
            return AxisLayout(axis, stride // below)
    return None


def stride_of(at: AxisLayout, shape: Sequence[int]) -> int:
    """The inverse of `axis_layout`."""
    return at.inner * prod(shape[at.axis + 1 :])


@dataclass(frozen=True)
class Step:
    """One operation, backwards: where samples lie in its output, and the input slot that is asked for."""

    node: Node
    slot: int
    at: AxisLayout
    shape: tuple[int, ...]
    """Shape of the output."""
    entering: tuple[int, ...]
    """Shape of the input."""
    output: int = 0
    """Which output of the node it is."""

    def saved(self, name: str) -> Any:
        """A saved attribute of the node."""
        return getattr(self.node, f"_saved_{name}")

    def dims(self, name: str, ndim: int) -> tuple[int, ...]:
        """A saved dimension or tuple of dimensions, counted from the front."""
        value = self.saved(name)
        values = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(signed(d) % max(ndim, 1) for d in values)

    def kept(self) -> AxisLayout | None:
        """The same place, where the axis has the same size in the input."""
        axis = self.at.axis
        return self.at if axis < len(self.entering) and self.entering[axis] == self.shape[axis] else None


BatchingRule = Callable[[Step], AxisLayout | None]
BATCHING_RULES: dict[str, BatchingRule] = {}


def batching_rule(*kinds: str) -> Callable[[BatchingRule], BatchingRule]:
    """Registers where samples lie in the inputs of operations of these kinds; None: not along one axis."""

    def add(function: BatchingRule) -> BatchingRule:
        BATCHING_RULES.update({f"{kind}Backward{n}": function for kind in " ".join(kinds).split() for n in range(4)})
        return function

    return add


@batching_rule(
    "Add Sub Rsub Mul Div Neg Abs Pow Sqrt Rsqrt Exp Expm1 Log Log1p Sin Cos Tanh Sigmoid Relu Gelu Silu Elu Celu "
    "LeakyRelu Softplus Hardtanh Hardswish Hardsigmoid Threshold LogSigmoid Mish Selu Erf Reciprocal Square Clamp "
    "ClampMin ClampMax Maximum Minimum Where MaskedFill NativeDropout Clone ToCopy Addcmul Addcdiv Lerp "
    "PreluKernel MseLoss SmoothL1Loss HuberLoss BinaryCrossEntropy BinaryCrossEntropyWithLogits Expand Xlogy",
    "Acos Acosh Angle Asin Asinh Atan Atan2 Atanh Ceil Complex Conj ConjPhysical Copysign Cosh Deg2Rad Digamma Erfc "
    "Erfinv Exp2 Floor Fmax Fmin Fmod Frac Hardshrink Hypot I0 Lgamma Log10 Log1P Log2 Logaddexp Logaddexp2 Logit "
    "NanToNum Polar Polygamma Rad2Deg Remainder Round RreluWithNoise RreluWithNoiseFunctional Sgn Sign Sinc Sinh "
    "SoftMarginLoss Softshrink SpecialEntr SpecialErfcx SpecialI0E SpecialI1 SpecialI1E SpecialLogNdtr SpecialNdtri "
    "SpecialXlog1Py SpecialZeta Tan Trunc Repeat Tril Triu",
)
def by_entry(step: Step) -> AxisLayout | None:
    """Entry by entry after broadcasting, or by where it is; losses reduced to fewer entries do not keep the axis."""
    aligned = step.at.axis - (len(step.shape) - len(step.entering))
    if aligned < 0 or step.entering[aligned] != step.shape[step.at.axis]:
        return None
    return AxisLayout(aligned, step.at.inner)


@batching_rule("Transpose")
def transpose(step: Step) -> AxisLayout | None:
    """Two axes change places."""
    a, b = step.dims("dim0", len(step.shape))[0], step.dims("dim1", len(step.shape))[0]
    return AxisLayout({a: b, b: a}.get(step.at.axis, step.at.axis), step.at.inner)


@batching_rule("T")
def matrix_transpose(step: Step) -> AxisLayout | None:
    """The two axes of a matrix change places."""
    return AxisLayout(len(step.shape) - 1 - step.at.axis, step.at.inner)


@batching_rule("Permute")
def permute(step: Step) -> AxisLayout | None:
    """Axis d of the output is axis dims[d] of the input."""
    return AxisLayout(step.dims("dims", len(step.shape))[step.at.axis], step.at.inner)


@batching_rule(
    "Sum Mean Amax Amin Logsumexp LinalgVectorNorm Norm Var Std Select Unbind Max Min Aminmax Kthvalue Median Mode "
    "Nanmedian Nansum Prod StdMean VarMean"
)
def dropping(step: Step) -> AxisLayout | None:
    """Some axes of the input are reduced or indexed away; the samples' axis is among those that stay."""
    if not hasattr(step.node, "_saved_dim"):
        return None
    dims = step.dims("dim", len(step.entering))
    if len(step.shape) == len(step.entering):
        return step.kept() if step.at.axis not in dims else None
    stay = [axis for axis in range(len(step.entering)) if axis not in dims]
    return AxisLayout(stay[step.at.axis], step.at.inner) if len(stay) == len(step.shape) else None


@batching_rule("Stack")
def stack(step: Step) -> AxisLayout | None:
    """A new axis."""
    dim = step.dims("dim", len(step.shape))[0]
    if step.at.axis == dim:
        return None
    return AxisLayout(step.at.axis - (step.at.axis > dim), step.at.inner)


@batching_rule(
    "Softmax SafeSoftmax LogSoftmax Cat Slice Split SplitWithSizes UnsafeSplit Gather IndexSelect Glu Cumsum Cumprod "
    "Narrow Flip Sort Topk Cummax Cummin Logcumsumexp FftC2C FftC2R FftR2C IndexFill SliceScatter LinalgCross"
)
def along_another(step: Step) -> AxisLayout | None:
    """Whatever happens along `dim`, the other axes are kept apart."""
    name = "dim" if hasattr(step.node, "_saved_dim") else "dims"
    return step.kept() if step.at.axis not in step.dims(name, len(step.shape)) else None


@batching_rule("Unfold")
def windows(step: Step) -> AxisLayout | None:
    """Windows along another axis; what is in each becomes the last axis."""
    return step.kept() if step.at.axis not in step.dims("dimension", len(step.entering)) else None


@batching_rule("Diagonal")
def diagonal(step: Step) -> AxisLayout | None:
    """Two axes become the last one."""
    axes = len(step.entering)
    stay = [axis for axis in range(axes) if axis not in (*step.dims("dim1", axes), *step.dims("dim2", axes))]
    return AxisLayout(stay[step.at.axis], step.at.inner) if step.at.axis < len(stay) else None


@batching_rule("ViewAsReal ViewAsComplex")
def pairs(step: Step) -> AxisLayout | None:
    """The last axis holds real and imaginary parts."""
    return step.kept()


@batching_rule(
    "Cholesky CholeskyInverse LinalgCholeskyEx LinalgInvEx LinalgMatrixExp LinalgPinv LinalgQr LinalgSvd LinalgEigh "
    "LinalgDet LinalgSlogdet LinalgSolveEx LinalgSolveTriangular"
)
def matrices(step: Step) -> AxisLayout | None:
    """One matrix apart from another: the axes before the last two."""
    return step.kept() if step.at.axis < len(step.entering) - 2 else None


@batching_rule("Roll")
def roll(step: Step) -> AxisLayout | None:
    """Along other axes; without any all entries are rolled as one row, from sample to sample."""
    return along_another(step) if step.saved("dims") else None


@batching_rule("Addmm Mm")
def matrix_product(step: Step) -> AxisLayout | None:
    """Rows of the output come from rows of the left factor, columns from columns of the right one."""
    factor = step.slot - (step.node.name().startswith("Addmm"))
    if factor < 0:
        return by_entry(step)
    return step.kept() if step.at.axis == factor else None


@batching_rule("GroupedMm")
def grouped_product(step: Step) -> AxisLayout | None:
    """Rows of the output come from rows of the left factor, wherever groups of them end."""
    return step.kept() if step.slot == 0 and step.at.axis == 0 and len(step.shape) == 2 else None


@batching_rule("Mv")
def matrix_vector_product(step: Step) -> AxisLayout | None:
    """Entries of the output come from rows of the matrix."""
    return step.kept() if step.slot == 0 else None


@batching_rule("Bmm Baddbmm")
def batched_matrix_product(step: Step) -> AxisLayout | None:
    """As `matrix_product`, and axis 0 is kept apart."""
    factor = step.slot - (step.node.name().startswith("Baddbmm"))
    if factor < 0:
        return by_entry(step)
    return step.kept() if step.at.axis in (0, factor + 1) else None


@batching_rule(
    "Convolution MaxPool1D MaxPool2DWithIndices MaxPool3DWithIndices AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D "
    "MkldnnAdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D UpsampleNearest1D "
    "UpsampleNearest2D UpsampleNearest3D UpsampleBilinear2D UpsampleBicubic2D NativeGroupNorm PixelShuffle "
    "PixelUnshuffle ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D "
    "ReplicationPad3D ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention "
    "ScaledDotProductFlashAttention ScaledDotProductCudnnAttention NllLoss NllLoss2D UpsampleLinear1D Im2Col Col2Im "
    "UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D UpsampleBilinear2DAa "
    "UpsampleBicubic2DAa FractionalMaxPool2D FractionalMaxPool3D MaxUnpool2D MaxUnpool3D ChannelShuffle "
    "GridSampler2D GridSampler3D AffineGridGenerator MultiMarginLoss MultilabelMarginLoss"
)
def first_axis(step: Step) -> AxisLayout | None:
    """Axis 0 is the batch of the operation, in what it works on: weights, biases and masks count something else."""
    return step.kept() if step.at.axis == 0 and step.slot < _data_slots(step.node) else None


def _data_slots(node: Node) -> int:
    """How many of an operation's first inputs have its batch along axis 0: of attention query, key and value."""
    kind = node.name()
    return 3 if kind.startswith("ScaledDotProduct") else 2 if kind.startswith("GridSampler") else 1


@batching_rule("ConstantPadNd")
def pad(step: Step) -> AxisLayout | None:
    """Amounts come in pairs, those of the last axis first; an axis of which they are 0 is kept."""
    place = 2 * (len(step.shape) - 1 - step.at.axis)
    return step.kept() if not any(step.saved("pad")[place : place + 2]) else None


@batching_rule("NativeLayerNorm FusedRmsNorm")
def layer_norm(step: Step) -> AxisLayout | None:
    """Normalised over the last axes, which are those of weight and bias."""
    normalised = len(step.saved("normalized_shape"))
    return step.kept() if step.slot == 0 and step.at.axis < len(step.shape) - normalised else None


@batching_rule("NativeBatchNorm CudnnBatchNorm MiopenBatchNorm")
def batch_norm(step: Step) -> AxisLayout | None:
    """By running statistics every entry is apart; by the batch's, every channel."""
    training = getattr(step.node, "_saved_training", True)
    return step.kept() if step.slot == 0 and (not training or step.at.axis == 1) else None


@batching_rule("CudnnRnn MiopenRnn MkldnnRnnLayer")
def recurrent(step: Step) -> AxisLayout | None:
    """The sequence and the outputs at its steps have the batch on axis 0 or 1, states [layers, B, H] on axis 1."""
    if len(step.entering) != 3 or len(step.shape) != 3 or step.saved("batch_sizes"):
        return None  # weights, or a packed sequence
    # Before oneDNN's operation torch transposes what is batch first.
    sequence = 0 if step.saved("batch_first") and not step.node.name().startswith("Mkldnn") else 1
    here, there = (1 if state else sequence for state in (step.output, step.slot))
    return AxisLayout(there, step.at.inner) if step.at == AxisLayout(here, 1) else None
