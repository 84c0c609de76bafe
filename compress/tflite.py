"""Lower our quantized graph to an int8 `.tflite`, with nothing but the schema that ships in ai-edge-litert.

The contract with whoever runs it: the file's one input and one output have the names, the float32 type and the NCHW
shapes of the ONNX model, with a batch of exactly 1. It quantizes and transposes inside, so control code calls
`model(x=array)` alike on both runtimes; the runtime's door runs a batch row by row and stacks the answers, as
`interpreter.Session` does. A signature `serving_default` maps the same names. With `whole` the ends are the int8 codes
themselves, NHWC, for targets that compute nothing else; `interpreter.Session` turns those into what the others take and give.

Only what our own emitter writes is understood: Conv (plain and depthwise), Relu and Clip behind it, MaxPool,
AveragePool, GlobalAveragePool, Gemm, Add, Softmax, Flatten, Reshape to two dimensions. Any other operator is an error that
names it.
"""

import dataclasses
from typing import Any

import numpy as np

from compress import graph
from compress.flatbuffer import CHANNELS_LAST, Flatbuffer, Quantized
from compress.graph import Array
from skills.errors import FormatError, MissingExtra

ADVICE = "give a profile of another runtime"


def lower(model: Any, *, whole: bool = False) -> bytes:
    """Return the bytes of an int8 `.tflite` for a graph that `compress.emit` wrote with quantized outputs.

    `whole`: its ends are codes, not float32.

    Raises:
        FormatError: an operator, or a form of one, that has no int8 counterpart here; names it.
        MissingExtra: ai-edge-litert or flatbuffers is not installed.
    """
    try:
        import flatbuffers
        from ai_edge_litert import schema_py_generated as schema
    except ImportError as error:
        raise MissingExtra(f"writing a .tflite needs {error.name}: pip install 'skerry[compress,tflite]'") from None
    written = _Lowering(model, schema, whole=whole).build()
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(written.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _channels_first(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1])


class _Lowering:
    """One walk over the graph; every tensor in it is known either by its codes or as a constant."""

    def __init__(self, model: Any, schema: Any, *, whole: bool) -> None:
        self.source, self.s, self.whole = model, schema, whole
        self.values = {item.name: item for item in model.graph.initializer}
        self.fixed = set(self.values)  # and what follows from them alone
        self.makers, self.readers = graph.producers(model), graph.consumers(model)
        self.sizes = graph.shapes(model)
        self.codes: dict[str, Quantized] = {}  # dequantized tensor of the ONNX graph -> codes here
        self.out = Flatbuffer(schema)

    # --- the walk

    def build(self) -> Any:
        (source,) = self.source.graph.input
        shape = self._shape(source.name)
        self.turn = self._turn(source.name)
        first = self._read_codes(source.name, shape) if self.whole else self._read_input(source.name, shape)
        for node in self.source.graph.node:
            self._node(node)
        (end,) = self.source.graph.output
        if end.name not in self.codes:
            raise FormatError(f"the output '{end.name}' is not quantized: this graph was not written for LiteRT")
        last = self.codes[end.name].index if self.whole else self._write_output(end.name)
        return self.out.finish(source.name, first, end.name, last)

    def _turn(self, name: str) -> Any:
        """Return the node that turns the input, which lies NHWC in the ONNX model, to NCHW; None where there is none."""
        readers = self.readers.get(name, [])
        turns = len(readers) == 1 and readers[0].op_type == "Transpose"
        return readers[0] if turns and list(graph.attributes(readers[0]).get("perm", ())) == [0, 3, 1, 2] else None

    def _rounding(self, name: str) -> list[Any]:
        """Return the nodes that round the input to codes."""
        readers = self.readers.get(name if self.turn is None else self.turn.output[0], [])
        for node in readers:
            if node.op_type != "QuantizeLinear":
                raise FormatError(f"LiteRT cannot take the operator {node.op_type} on the model's float input")
        return readers

    def _read_codes(self, name: str, shape: tuple[int, ...]) -> int:
        readers = self._rounding(name)
        parameters = {self._parameters(node) for node in readers}
        if len(parameters) != 1:
            raise FormatError(
                f"the input '{name}' is rounded in {len(parameters)} ways: a file in whole numbers takes one"
            )
        ((scale, zero),) = parameters
        made = self.out.codes(name, shape, scale, zero, nhwc=self.turn is None)
        if self.turn is not None:
            made = dataclasses.replace(made, shape=_channels_first(shape))
        elif len(shape) > 2:
            self.out.model.description = CHANNELS_LAST
        self.codes.update((self._dequantized(node), made) for node in readers)
        return made.index

    def _write_output(self, name: str) -> int:
        codes = self.out.to_nchw(self.codes[name])
        last = self.out.tensor(name, codes.shape, self.s.TensorType.FLOAT32)
        self.out.op("DEQUANTIZE", 2, [codes.index], [last], "DequantizeOptions", self.s.DequantizeOptionsT())
        return last

    def _read_input(self, name: str, shape: tuple[int, ...]) -> int:
        index = self.out.tensor(name, shape, self.s.TensorType.FLOAT32)
        for quantize in self._rounding(name):
            scale, zero = self._parameters(quantize)
            # QUANTIZE first, then TRANSPOSE on bytes: a quarter of the traffic.
            flat = self.out.codes(name + "_q", shape, scale, zero)
            self.out.op("QUANTIZE", 1, [index], [flat.index], "QuantizeOptions", self.s.QuantizeOptionsT())
            turned = self.turn is not None  # then it lies as LiteRT wants it
            self.codes[self._dequantized(quantize)] = (
                dataclasses.replace(flat, shape=_channels_first(shape)) if turned else self.out.to_nhwc(flat)
            )
        return index

    def _node(self, node: Any) -> None:
        kind = node.op_type
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return  # read from the operators that they belong to
        if kind in ("Cast", "Mul") and all(name in self.fixed for name in node.input):
            self.fixed.update(node.output)  # weights of an operator that computes in float: that one is named
            return
        if kind in ("Relu", "Clip") and node.input[0] not in self.codes:
            return  # the codes' own range cuts there
        if self.turn is not None and node.output[0] == self.turn.output[0]:
            return  # the input lies as LiteRT wants it
        lowerings = {
            "Conv": self._conv, "Gemm": self._gemm, "Add": self._add, "MaxPool": self._pool, "AveragePool": self._pool,
            "GlobalAveragePool": self._global_pool, "Softmax": self._softmax, "Flatten": self._flatten, "Reshape": self._flatten,
        }  # fmt: skip
        if kind not in lowerings:
            raise FormatError(f"the operator {kind} has no int8 form for LiteRT here: {ADVICE}")
        scale, zero, result = self._result(node)
        lowerings[kind](node, scale, zero, result)

    def _result(self, node: Any) -> tuple[float, int, str]:
        """Return the parameters of the codes that a node's result becomes, past a Relu or Clip, and their name."""
        name = node.output[0]
        while True:
            after = self.readers.get(name, [])
            if len(after) == 1 and after[0].op_type == "QuantizeLinear":
                scale, zero = self._parameters(after[0])
                return scale, zero, self._dequantized(after[0])
            if len(after) == 1 and after[0].op_type in ("Relu", "Clip", "LeakyRelu"):
                name = after[0].output[0]
                continue
            reads = ", ".join(sorted({item.op_type for item in after})) or "the graph output"
            raise FormatError(f"the result of {node.op_type} goes to {reads} in float, which LiteRT in int8 cannot do")

    def _parameters(self, quantize: Any) -> tuple[float, int]:
        scale, zero = (self._value(name) for name in quantize.input[1:3])
        shift = 128 if zero.dtype == np.uint8 else 0
        return float(scale.reshape(())), int(zero.reshape(())) - shift

    def _dequantized(self, quantize: Any) -> str:
        (after,) = self.readers[quantize.output[0]]
        return str(after.output[0])

    def _input(self, node: Any, at: int = 0) -> Quantized:
        codes = self.codes.get(node.input[at])
        if codes is None:
            raise FormatError(f"an input of {node.op_type} is not quantized: this graph was not written for LiteRT")
        return codes

    # --- operators

    def _conv(self, node: Any, scale: float, zero: int, result: str) -> None:
        facts = graph.attributes(node)
        source = self._input(node)
        codes, scales = self._weights(node)
        if codes.ndim != 4:
            raise FormatError(f"LiteRT takes Conv in two dimensions, found {codes.ndim - 2}")
        groups, (out_channels, per_group, high, wide) = int(facts.get("group", 1)), codes.shape
        depthwise = groups > 1
        if depthwise and (per_group != 1 or groups != source.shape[1]):
            raise FormatError(f"LiteRT takes Conv with 1 or {source.shape[1]} groups here, found {groups}")
        if facts.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise FormatError("LiteRT needs Conv with explicit pads, found auto_pad: export the model with fixed sizes")
        steps, spread = list(facts.get("strides", [1, 1])), list(facts.get("dilations", [1, 1]))
        source, padding = self._padded(source, list(facts.get("pads", [0] * 4)), (high, wide), steps, spread)
        if depthwise:
            weight, axis = codes.transpose(1, 2, 3, 0), 3
            options = self.s.DepthwiseConv2DOptionsT()
            options.depthMultiplier = out_channels // groups
        else:
            weight, axis = codes.transpose(0, 2, 3, 1), 0
            options = self.s.Conv2DOptionsT()
        options.padding = padding
        options.strideH, options.strideW = steps
        options.dilationHFactor, options.dilationWFactor = spread
        inputs = [source.index, *self._weight_tensors(node, weight, scales, axis, source.scale)]
        made = self.out.codes(result, self._shape(node.output[0]), scale, zero, nhwc=True)
        name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
        self.out.op(name, 3, inputs, [made.index], "DepthwiseConv2DOptions" if depthwise else "Conv2DOptions", options)
        self.codes[result] = made

    def _padded(
        self, source: Quantized, pads: list[int], kernel: tuple[int, int], steps: list[int], spread: list[int]
    ) -> tuple[Quantized, int]:
        """Return the input and LiteRT's word for its padding; a PAD goes in front where it has no word for it."""
        if not any(pads):
            return source, self.s.Padding.VALID
        same = []
        for axis in (0, 1):
            size, step, reach = source.shape[2 + axis], steps[axis], (kernel[axis] - 1) * spread[axis] + 1
            total = max((-(-size // step) - 1) * step + reach - size, 0)
            same.append((total // 2, total - total // 2))
        if [(pads[0], pads[2]), (pads[1], pads[3])] == same:
            return source, self.s.Padding.SAME
        n, c, high, wide = source.shape
        shape = (n, c, high + pads[0] + pads[2], wide + pads[1] + pads[3])
        padded = self.out.codes(f"pad{self.out.count}", shape, source.scale, source.zero, nhwc=True)
        around = np.array([[0, 0], [pads[0], pads[2]], [pads[1], pads[3]], [0, 0]], np.int32)
        amounts = self.out.tensor(f"pads{self.out.count}", around.shape, self.s.TensorType.INT32, around)
        self.out.op("PAD", 2, [source.index, amounts], [padded.index], "PadOptions", self.s.PadOptionsT())
        return padded, self.s.Padding.VALID

    def _gemm(self, node: Any, scale: float, zero: int, result: str) -> None:
        source = self._input(node)
        codes, scales = self._weights(node)
        inputs = [source.index, *self._weight_tensors(node, codes, scales, 0, source.scale)]
        made = self.out.codes(result, (1, codes.shape[0]), scale, zero)
        self.out.op(
            "FULLY_CONNECTED", 5, inputs, [made.index], "FullyConnectedOptions", self.s.FullyConnectedOptionsT()
        )
        self.codes[result] = made

    def _add(self, node: Any, scale: float, zero: int, result: str) -> None:
        first, second = self._input(node, 0), self._input(node, 1)
        made = self.out.codes(result, first.shape, scale, zero, nhwc=True)
        self.out.op("ADD", 2, [first.index, second.index], [made.index], "AddOptions", self.s.AddOptionsT())
        self.codes[result] = made

    def _pool(self, node: Any, scale: float, zero: int, result: str) -> None:
        facts, source = graph.attributes(node), self._input(node)
        kernel = tuple(facts["kernel_shape"])
        plain = len(kernel) == 2 and not facts.get("ceil_mode", 0) and facts.get("auto_pad", b"NOTSET") == b"NOTSET"
        if not plain or any(facts.get("pads", [0])) or any(d != 1 for d in facts.get("dilations", [1])):
            raise FormatError(
                f"LiteRT takes {node.op_type} in two dimensions without padding, ceil_mode or dilations here"
            )
        options = self.s.Pool2DOptionsT()
        options.padding = self.s.Padding.VALID
        options.filterHeight, options.filterWidth = kernel
        options.strideH, options.strideW = facts.get("strides", [1, 1])
        made = self.out.codes(result, self._shape(node.output[0]), scale, zero, nhwc=True)
        name = "MAX_POOL_2D" if node.op_type == "MaxPool" else "AVERAGE_POOL_2D"
        self.out.op(name, 2, [source.index], [made.index], "Pool2DOptions", options)
        self.codes[result] = made

    def _global_pool(self, node: Any, scale: float, zero: int, result: str) -> None:
        source = self._input(node)
        options = self.s.ReducerOptionsT()
        options.keepDims = True
        axes = self.out.tensor(f"axes{self.out.count}", (2,), self.s.TensorType.INT32, np.array([1, 2], np.int32))
        made = self.out.codes(result, (*source.shape[:2], 1, 1), scale, zero, nhwc=True)
        self.out.op("MEAN", 2, [source.index, axes], [made.index], "ReducerOptions", options)
        self.codes[result] = made

    def _softmax(self, node: Any, scale: float, zero: int, result: str) -> None:
        source = self._input(node)
        if len(source.shape) != 2 or graph.attributes(node).get("axis", -1) not in (-1, 1):
            raise FormatError(f"LiteRT takes Softmax over the last of two axes here, found {list(source.shape)}")
        options = self.s.SoftmaxOptionsT()
        options.beta = 1.0
        made = self.out.codes(result, source.shape, scale, zero)
        self.out.op("SOFTMAX", 2, [source.index], [made.index], "SoftmaxOptions", options)
        self.codes[result] = made

    def _flatten(self, node: Any, scale: float, zero: int, result: str) -> None:
        source = self.out.to_nchw(self._input(node))
        count = int(np.prod(source.shape))
        shape = self._shape(node.output[0])
        if len(shape) != 2 or (shape[1] > 0 and shape[1] != count):
            raise FormatError(f"LiteRT takes {node.op_type} to [N, {count}] here, found {list(shape)}")
        made = self.out.codes(result, (1, count), scale, zero)
        options = self.s.ReshapeOptionsT()
        options.newShape = [-1, count]
        to = self.out.tensor(f"to{self.out.count}", (2,), self.s.TensorType.INT32, np.array([-1, count], np.int32))
        self.out.op("RESHAPE", 1, [source.index, to], [made.index], "ReshapeOptions", options)
        self.codes[result] = made

    # --- weights

    def _weights(self, node: Any) -> tuple[Array, Array]:
        unfold = self.makers.get(node.input[1])
        if unfold is None or unfold.op_type != "DequantizeLinear":
            raise FormatError(f"the weights of {node.op_type} '{node.name}' are float, LiteRT in int8 cannot mix them")
        return self._value(unfold.input[0]), self._value(unfold.input[1]).reshape(-1)

    def _weight_tensors(self, node: Any, weight: Array, scales: Array, axis: int, input_scale: float) -> list[int]:
        channels = weight.shape[axis]
        at = self.out.count
        index = self.out.tensor(
            f"w{at}", weight.shape, self.s.TensorType.INT8, weight, scales, np.zeros(channels), axis
        )
        bias = np.zeros(channels, np.int32)  # XNNPACK wants one even where the model has none
        if len(node.input) > 2 and node.input[2]:
            bias = self._value(self.makers[node.input[2]].input[0]).reshape(-1)
        joint = scales.astype(np.float32) * np.float32(input_scale)
        return [index, self.out.tensor(f"b{at}", (channels,), self.s.TensorType.INT32, bias, joint, np.zeros(channels))]

    def _value(self, name: str) -> Array:
        return graph.array(self.values[name])

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self.sizes.get(name)
        if shape is None or any(size == -1 for size in shape[1:]):
            raise FormatError(f"the tensor '{name}' has no fixed size: LiteRT needs all but the batch to be known")
        return (1, *shape[1:])
