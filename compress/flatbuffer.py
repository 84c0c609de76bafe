"""A `.tflite` as the schema that ships in ai-edge-litert has it: grown tensor by tensor and operator by operator."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from compress.graph import Array

CHANNELS_LAST = "skerry, int8 in NHWC"  # the description of a file whose input lies otherwise than the ONNX model's


@dataclasses.dataclass(frozen=True, slots=True)
class Quantized:
    """A tensor with codes: its scale, zero point (as int8) and shape in NCHW, batch 1."""

    index: int
    scale: float
    zero: int
    shape: tuple[int, ...]


class Flatbuffer:
    """One file in the making; `schema` is LiteRT's module of generated classes."""

    def __init__(self, schema: Any) -> None:
        self.s = schema
        self.model = schema.ModelT()
        self.model.version, self.model.description = 3, "skerry"
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self.body = schema.SubGraphT()
        self.body.name, self.body.tensors, self.body.operators = "main", [], []
        self.kinds: dict[int, int] = {}

    @property
    def count(self) -> int:
        """Return how many tensors there are: the number of the next one."""
        return len(self.body.tensors)

    def codes(self, name: str, shape: tuple[int, ...], scale: float, zero: int, *, nhwc: bool = False) -> Quantized:
        """Add a tensor of int8 codes with one scale; `shape` is NCHW, and `nhwc` says that it lies otherwise in the file."""
        stored = (shape[0], *shape[2:], shape[1]) if nhwc and len(shape) == 4 else shape
        index = self.tensor(name, stored, self.s.TensorType.INT8, None, np.array([scale]), np.array([zero]))
        return Quantized(index, scale, zero, shape)

    def tensor(
        self, name: str, shape: Sequence[int], kind: int, data: Array | None = None, scale: Array | None = None,
        zero: Array | None = None, axis: int = 0,
    ) -> int:  # fmt: skip
        """Add a tensor and return its number; one with `data` is a constant."""
        tensor = self.s.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, 0
        if data is not None:
            buffer = self.s.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)
            tensor.buffer = len(self.model.buffers)
            self.model.buffers.append(buffer)
        if scale is not None and zero is not None:
            quantization = self.s.QuantizationParametersT()
            quantization.scale, quantization.zeroPoint = scale.astype(np.float32), zero.astype(np.int64)
            quantization.quantizedDimension = axis
            tensor.quantization = quantization
        self.body.tensors.append(tensor)
        return self.count - 1

    def op(
        self, kind: str, version: int, inputs: list[int], outputs: list[int], options_kind: str, options: Any
    ) -> None:
        """Add an operator in the least `version` that has what is used of it."""
        builtin = getattr(self.s.BuiltinOperator, kind)
        if builtin not in self.kinds:
            code = self.s.OperatorCodeT()
            code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), version
            self.kinds[builtin] = len(self.model.operatorCodes)
            self.model.operatorCodes.append(code)
        operator = self.s.OperatorT()
        operator.opcodeIndex, operator.inputs, operator.outputs = self.kinds[builtin], inputs, outputs
        operator.builtinOptionsType = getattr(self.s.BuiltinOptions, options_kind)
        operator.builtinOptions = options
        self.body.operators.append(operator)

    def to_nhwc(self, codes: Quantized) -> Quantized:
        """Return the codes in the order that LiteRT wants them."""
        return self._transposed(codes, (0, 2, 3, 1), nhwc=True) if len(codes.shape) == 4 else codes

    def to_nchw(self, codes: Quantized) -> Quantized:
        """Return the codes in the order that ONNX would have them; free where there is one pixel."""
        if len(codes.shape) != 4 or codes.shape[2:] == (1, 1):
            return codes
        return self._transposed(codes, (0, 3, 1, 2), nhwc=False)

    def _transposed(self, codes: Quantized, order: tuple[int, ...], *, nhwc: bool) -> Quantized:
        at = self.count
        made = self.codes(f"t{at}", codes.shape, codes.scale, codes.zero, nhwc=nhwc)
        how = self.tensor(f"order{at}", (4,), self.s.TensorType.INT32, np.array(order, np.int32))
        self.op("TRANSPOSE", 2, [codes.index, how], [made.index], "TransposeOptions", self.s.TransposeOptionsT())
        return made

    def finish(self, input_name: str, first: int, output_name: str, last: int) -> Any:
        """Return the whole model, whose one input is tensor `first` and whose one output is tensor `last`."""
        self.body.inputs, self.body.outputs = [first], [last]
        self.model.subgraphs = [self.body]
        self.model.signatureDefs = [self._signature(input_name, first, output_name, last)]
        return self.model

    def _signature(self, input_name: str, first: int, output_name: str, last: int) -> Any:
        signature = self.s.SignatureDefT()
        signature.signatureKey, signature.subgraphIndex = "serving_default", 0
        signature.inputs, signature.outputs = [self.s.TensorMapT()], [self.s.TensorMapT()]
        signature.inputs[0].name, signature.inputs[0].tensorIndex = input_name, first
        signature.outputs[0].name, signature.outputs[0].tensorIndex = output_name, last
        return signature
