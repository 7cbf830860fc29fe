"""The stages as ops `ciema::…`: schema of the forward and of its backward, one block a stage.

Shapes and dtypes of arguments and results are in `contract.shapes`. Batch-norm statistics are
results, biased variances: the module updates its buffers (`batchnorm.py`). `running_*` are None in
training. Statistics, gates and vectors are float32 (float64 for float64 maps).
"""

from __future__ import annotations

from .registration import StageOp

_BACKEND = "*, str backend='auto'"

# Mean, maximum and its first position over H×W of every channel: the first pass of 2.1. Autocast
# leaves x as it is, as it leaves poolings: rounded values tie where those of x do not.
channel_statistics = StageOp(
    name="channel_statistics",
    forward=f"(Tensor x, {_BACKEND}) -> (Tensor mean, Tensor maximum, Tensor argmax)",
    backward=f"(Tensor grad_mean, Tensor grad_maximum, Tensor argmax, Tensor x, {_BACKEND})"
    " -> Tensor",
    maps=("x",),
    differentiable=("mean", "maximum"),
    gradients=("x",),
    cast=(),
)

# ------------------------------------------------------------------------------------------- msff

_MSFF_PARAMETERS = (
    "Tensor weight, Tensor bn_weight, Tensor bn_bias, Tensor? running_mean, Tensor? running_var,"
    " bool training, float eps"
)
# `statistics` asks for the channel statistics of out, which spare channel_interaction a pass.
msff = StageOp(
    name="msff",
    forward=f"(Tensor[] features, {_MSFF_PARAMETERS}, bool statistics=False, {_BACKEND})"
    " -> (Tensor out, Tensor batch_mean, Tensor batch_var,"
    " Tensor mean, Tensor maximum, Tensor argmax)",
    backward="(Tensor grad_out, Tensor[] features, Tensor batch_mean, Tensor batch_var,"
    f" {_MSFF_PARAMETERS}, {_BACKEND})"
    " -> (Tensor[] grad_features, Tensor grad_weight, Tensor grad_bn_weight, Tensor grad_bn_bias)",
    maps=("features",),
    differentiable=("out",),
    gradients=("features", "weight", "bn_weight", "bn_bias"),
)

# ---------------------------------------------------------------------------- channel_interaction

_INTERACTION_PARAMETERS = "Tensor squeeze_weight, Tensor excite_weight, Tensor interaction_weight"
# `x_mean`, `x_maximum`, `x_argmax`: the channel statistics of x where they are known, else None.
channel_interaction = StageOp(
    name="channel_interaction",
    forward=f"(Tensor x, {_INTERACTION_PARAMETERS}, Tensor? x_mean=None, Tensor? x_maximum=None,"
    f" Tensor? x_argmax=None, {_BACKEND})"
    " -> (Tensor e, Tensor gate, Tensor mean, Tensor maximum, Tensor argmax)",
    backward="(Tensor grad_e, Tensor x, Tensor gate, Tensor mean, Tensor maximum, Tensor argmax,"
    f" {_INTERACTION_PARAMETERS}, {_BACKEND})"
    " -> (Tensor grad_x, Tensor grad_squeeze_weight, Tensor grad_excite_weight,"
    " Tensor grad_interaction_weight)",
    maps=("x",),
    differentiable=("e",),
    gradients=("x", "squeeze_weight", "excite_weight", "interaction_weight"),
)

# --------------------------------------------------------------------------- coordinate_attention

_VECTORS = "Tensor alpha_h, Tensor alpha_w, Tensor mean, Tensor rstd"
_GRAD_VECTORS = _VECTORS.replace("Tensor ", "Tensor grad_")
coordinate_attention = StageOp(
    name="coordinate_attention",
    forward=f"(Tensor e, Tensor weight, Tensor bias, int groups, float eps, {_BACKEND})"
    f" -> ({_VECTORS})",
    backward=f"({_GRAD_VECTORS}, Tensor e, {_VECTORS}, Tensor weight, Tensor bias, int groups,"
    f" {_BACKEND}) -> (Tensor grad_e, Tensor grad_weight, Tensor grad_bias)",
    maps=("e",),
    differentiable=("alpha_h", "alpha_w", "mean", "rstd"),
    gradients=("e", "weight", "bias"),
)

# ---------------------------------------------------------------------------------- cross_spatial

CROSS_PARAMETERS = (
    "Tensor gn_weight, Tensor gn_bias, Tensor conv3x3_weight, Tensor conv3x3_bias,"
    " Tensor spatial_conv1_weight, Tensor spatial_conv3_weight, Tensor spatial_conv5_weight,"
    " Tensor attention_weight, Tensor attention_bn_weight, Tensor attention_bn_bias,"
    " Tensor? attention_running_mean, Tensor? attention_running_var,"
    " Tensor reduce_weight, Tensor reduce_bn_weight, Tensor reduce_bn_bias,"
    " Tensor? reduce_running_mean, Tensor? reduce_running_var,"
    " Tensor channel_feat_weight, Tensor alpha,"
    " int groups, bool training, str bn_statistics, float attention_eps, float reduce_eps"
)
_CROSS_STATISTICS = (
    "Tensor w, Tensor softmax1, Tensor softmax2, Tensor attention_mean, Tensor attention_var,"
    " Tensor reduce_mean, Tensor reduce_var"
)
_CROSS_GRADIENTS = (
    *("gn_weight", "gn_bias", "conv3x3_weight", "conv3x3_bias"),
    *("spatial_conv1_weight", "spatial_conv3_weight", "spatial_conv5_weight"),
    *("attention_weight", "attention_bn_weight", "attention_bn_bias"),
    *("reduce_weight", "reduce_bn_weight", "reduce_bn_bias", "channel_feat_weight", "alpha"),
)
cross_spatial = StageOp(
    name="cross_spatial",
    forward=f"(Tensor e, {_VECTORS}, {CROSS_PARAMETERS}, {_BACKEND}) -> ({_CROSS_STATISTICS})",
    backward=f"(Tensor grad_w, Tensor e, {_VECTORS}, {_CROSS_STATISTICS}, {CROSS_PARAMETERS},"
    f" {_BACKEND}) -> (Tensor grad_e, {_GRAD_VECTORS}, "
    + ", ".join(f"Tensor grad_{name}" for name in _CROSS_GRADIENTS)
    + ")",
    maps=("e",),
    differentiable=("w",),
    gradients=("e", "alpha_h", "alpha_w", "mean", "rstd", *_CROSS_GRADIENTS),
)

# ----------------------------------------------------------------------------------- gated_fusion

_NORM = "Tensor bn{0}_weight, Tensor bn{0}_bias, Tensor? running_mean{0}, Tensor? running_var{0}"
FUSION_PARAMETERS = (
    f"Tensor squeeze_weight, {_NORM.format(1)}, Tensor expand_weight, {_NORM.format(2)},"
    f" Tensor fusion_weight, {_NORM.format(3)}, bool training,"
    " float eps1, float eps2, float eps3"
)
_FUSION_SAVED = (
    "Tensor hidden, Tensor gate_logits, Tensor mean1, Tensor var1, Tensor mean2, Tensor var2,"
    " Tensor mean3, Tensor var3"
)
_FUSION_GRADIENTS = (
    *("squeeze_weight", "bn1_weight", "bn1_bias", "expand_weight", "bn2_weight", "bn2_bias"),
    *("fusion_weight", "bn3_weight", "bn3_bias"),
)
# `save` asks for the two maps that the backward needs, W1∗s and Wf∗[s; M] before their norms.
gated_fusion = StageOp(
    name="gated_fusion",
    forward=f"(Tensor e, Tensor w, {FUSION_PARAMETERS}, bool save, {_BACKEND})"
    f" -> (Tensor out, {_FUSION_SAVED})",
    backward=f"(Tensor grad_out, Tensor e, Tensor w, {_FUSION_SAVED}, {FUSION_PARAMETERS},"
    f" {_BACKEND}) -> (Tensor grad_e, Tensor grad_w, "
    + ", ".join(f"Tensor grad_{name}" for name in _FUSION_GRADIENTS)
    + ")",
    maps=("e", "w"),
    differentiable=("out",),
    gradients=("e", "w", *_FUSION_GRADIENTS),
)

STAGE_OPS = (
    channel_statistics,
    msff,
    channel_interaction,
    coordinate_attention,
    cross_spatial,
    gated_fusion,
)
