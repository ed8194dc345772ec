"""The operators that the TensorRT parser supports and the element types each takes; data for `export/operators.py`.

Source: the operator support matrix of onnx-tensorrt at TensorRT 10.15. An operator that is not here is not supported. The types are
those of the operator's data input (see `DATA_INPUT`), and of its output for the operators of `OUTPUT_TYPED`.
"""

from onnx import TensorProto as T

PARSER = "onnx-tensorrt 10.15"
OPSETS = range(9, 25)
MAX_RANK = 8
MAX_K = 3840

FLOAT = frozenset((T.FLOAT, T.FLOAT16, T.BFLOAT16))
HALF = frozenset((T.FLOAT, T.FLOAT16))
NUMBER = FLOAT | {T.INT32, T.INT64}
ANY = NUMBER | {T.BOOL}
# INT8 and below exist only between QuantizeLinear and DequantizeLinear.
QUANTIZED = frozenset((T.INT8, T.INT4, T.FLOAT8E4M3FN, T.FLOAT4E2M1))


def _take(types: frozenset[int], names: str) -> dict[str, frozenset[int]]:
    return dict.fromkeys(names.split(), types)


OPERATORS: dict[str, frozenset[int]] = {
    **_take(
        FLOAT,
        "Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh CumSum Dropout "
        "Einsum Elu Erf Exp Floor Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization GRU HardSigmoid HardSwish "
        "Hardmax ImageScaler InstanceNormalization IsInf LayerNormalization LeakyRelu Log LogSoftmax LRN LSTM LpNormalization "
        "LpPool MatMul MaxPool MeanVarianceNormalization ParametricSoftplus PRelu QuantizeLinear RandomNormal RandomNormalLike "
        "RandomUniform RandomUniformLike Reciprocal Resize RMSNormalization RNN RotaryEmbedding Round ScaledTanh Scan Selu Sigmoid "
        "Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh ThresholdedRelu Upsample",
    ),
    **_take(HALF, "BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign"),
    **_take(
        NUMBER,
        "Abs Add ArgMax ArgMin DepthToSpace Div Equal Gelu Greater GreaterOrEqual IsNaN Less LessOrEqual Max Mean Min Mod Mul Neg "
        "Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum "
        "ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK",
    ),
    **_take(
        ANY,
        "Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity Loop OneHot Reshape ReverseSequence Shape Size "
        "Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where",
    ),
    # UINT8 exists only as a network input or output, that is, on one side of a Cast.
    **_take(ANY | {T.UINT8}, "Cast CastLike"),
    **_take(ANY | QUANTIZED, "Constant ConstantOfShape"),
    **_take(FLOAT | {T.INT8, T.FLOAT8E4M3FN}, "Attention"),
    **_take(QUANTIZED, "DequantizeLinear"),
    **_take(FLOAT | {T.INT32}, "TensorScatter"),
    **_take(frozenset((T.FLOAT,)), "STFT"),
    **_take(frozenset((T.BOOL,)), "And If Not Or Xor"),
}

DATA_INPUT = {"OneHot": 2, "Where": 1}
OUTPUT_TYPED = frozenset(("Cast", "CastLike", "Constant", "ConstantOfShape"))

CAUTIONS = {
    "GridSample": "is built without a fused kernel; measure it",
    "NonMaxSuppression": "has an output whose size depends on the data",
    "NonZero": "has an output whose size depends on the data",
    "RandomNormal": "has its `seed` ignored",
    "RandomNormalLike": "has its `seed` ignored",
    "RandomUniform": "has its `seed` ignored",
    "RandomUniformLike": "has its `seed` ignored",
}
