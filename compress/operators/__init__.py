"""ONNX operators as torch functions, one table: operator -> builder of its computation."""

from compress.operators.elementwise import ELEMENTWISE
from compress.operators.layers import LAYERS
from compress.operators.layout import LAYOUT
from compress.operators.recurrent import RECURRENT
from compress.operators.reduce import REDUCTIONS
from compress.operators.resize import RESIZE
from compress.operators.site import Builder
from compress.operators.windows import POOLS

OPERATORS: dict[str, Builder] = {
    **LAYERS, **ELEMENTWISE, **POOLS, **REDUCTIONS, **LAYOUT, **RESIZE, **RECURRENT,
}  # fmt: skip
