"""Run in litert-torch's environment: `python run_litert.py FOLDER` turns FOLDER/model.pt2 into `.tflite` files in FOLDER.

FOLDER/inputs.npy holds inputs to calibrate on, one a row; FOLDER/ask.json the names that the file's ends are to have, and whether
activations are to be int8 too. Files are written one after the other, so that a crash leaves those that were done:
float.tflite; weights.tflite, whose weights alone are int8; static.tflite, which computes in int8 between float ends. Last comes
said.json: the kinds of operators that had to stay float in static.tflite, and why there is none where there is none.
"""

import json
import sys
from pathlib import Path
from typing import Any

DYNAMIC = (
    "FULLY_CONNECTED",
    "BATCH_MATMUL",
)  # their kernels take int8 weights as they lie; a convolution's unpacks them first
TRIED = 4  # inputs that a quantized file is tried on


def main(folder: str) -> None:
    import numpy as np

    work = Path(folder)
    ask = json.loads((work / "ask.json").read_text())
    x = np.load(work / "inputs.npy")
    convert(work, x, ask["input"], ask["output"])
    (work / "weights.tflite").write_bytes(quantized(work, weights_recipe(), None))
    left: tuple[str, ...] = ()
    refused = "not asked for"
    if ask["static"]:
        made, left, refused = static(work, x, ask["input"])
        if made:
            (work / "static.tflite").write_bytes(named(made, ask["input"], ask["output"]))
    (work / "said.json").write_text(json.dumps({"left": left, "refused": refused}))


def convert(work: Path, x: Any, source: str, end: str) -> None:
    """Leave float.tflite, its ends under the names of the ONNX model."""
    import litert_torch
    import torch

    module = torch.export.load(work / "model.pt2").module()
    path = work / "float.tflite"
    litert_torch.convert(module, (torch.from_numpy(x[:1]),)).export(str(path))
    path.write_bytes(named(path.read_bytes(), source, end))


def named(file: bytes, source: str, end: str) -> bytes:
    """Return a file whose ends have these names; the converter makes up its own, the quantizer puts operators behind them."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(file))
    body, (signature,) = model.subgraphs[0], model.signatureDefs
    for tensors, mapped, name in ((body.inputs, signature.inputs, source), (body.outputs, signature.outputs, end)):
        for tensor in body.tensors:
            if tensor.name == name.encode():
                tensor.name += b"_inside"
        body.tensors[tensors[0]].name = mapped[0].name = name.encode()
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def static(work: Path, x: Any, source: str) -> tuple[bytes, tuple[str, ...], str]:
    """Return the file in int8, the kinds of operators that stay float in it, and why there is none.

    Where the whole cannot be had, each kind is left float in turn, until one file comes out that runs.
    """
    refused = ""
    for left in ((), *((kind,) for kind in kinds(work))):
        try:
            recipe = static_recipe(left)
            made = quantized(work, recipe, ranges(work, recipe, x, source))
            run(made, x[:TRIED])
        except Exception as error:  # noqa: BLE001 - the quantizer raises whatever its parts raise, and each is a reason
            refused = refused or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        return made, left, ""
    return b"", (), refused


def ranges(work: Path, recipe: Any, x: Any, source: str) -> Any:
    """Return the least and the most of each tensor over these inputs.

    The quantizer's own calibration takes a moving average of them, which cuts off what only some inputs reach: the scores of
    classes, for one (docs/decisions/0033).
    """
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    rules = recipe_manager.RecipeManager()
    rules.load_quantization_recipe(recipe)
    seen = calibrator.Calibrator(str(work / "float.tflite"), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    seen.calibrate({"serving_default": [{source: row[None]} for row in x]}, rules)
    return seen.get_model_qsvs()


def quantized(work: Path, recipe: Any, seen: Any) -> bytes:
    """Return float.tflite as a recipe has it; `seen` are the ranges of activations, where it needs them."""
    from ai_edge_quantizer import quantizer

    maker = quantizer.Quantizer(str(work / "float.tflite"), recipe)
    return bytes(maker.quantize(seen, enable_progress_report=False).quantized_model)


def static_recipe(left: tuple[str, ...]) -> Any:
    """Return a recipe: int8 for all but the file's ends and these kinds of operators."""
    from ai_edge_quantizer import qtyping, recipe_manager

    rules, kind = recipe_manager.RecipeManager(), qtyping.TFLOperationName
    rules.add_static_config(".*", kind.ALL_SUPPORTED, activation_num_bits=8, weight_num_bits=8)
    for name in (kind.INPUT, kind.OUTPUT, *(kind(item) for item in left)):
        rules.add_quantization_config(".*", name, algorithm_key="no_quantize")
    return rules.get_quantization_recipe()


def weights_recipe() -> Any:
    """Return a recipe: weights in int8, activations in float."""
    from ai_edge_quantizer import qtyping, recipe_manager

    rules, kind = recipe_manager.RecipeManager(), qtyping.TFLOperationName
    rules.add_weight_only_config(".*", kind.ALL_SUPPORTED, num_bits=8)
    for name in DYNAMIC:
        rules.add_dynamic_config(".*", kind(name), num_bits=8)
    return rules.get_quantization_recipe()


def kinds(work: Path) -> list[str]:
    """Return the kinds of operators in float.tflite that the quantizer knows."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import qtyping

    known = {str(item.value) for item in qtyping.TFLOperationName}
    operators = Interpreter(model_path=str(work / "float.tflite"))._get_ops_details()  # noqa: SLF001 - LiteRT has no other list
    return sorted({item["op_name"] for item in operators} & known)


def run(file: bytes, x: Any) -> None:
    """Run a file on these inputs."""
    import numpy as np
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(model_content=file, num_threads=1)
    model.allocate_tensors()
    (source,), (end,) = model.get_input_details(), model.get_output_details()
    for row in x:
        model.set_tensor(source["index"], row[None])
        model.invoke()
        if not np.isfinite(model.get_tensor(end["index"])).all():
            raise ValueError("it answers NaN or infinity")


if __name__ == "__main__":
    main(*sys.argv[1:])
