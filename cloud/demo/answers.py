"""Chapter c: every device is asked for every held-out digit, on the spot and through the cloud."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cloud.demo.facts import Asked, Times
from cloud.demo.scene import Scene
from cloud.demo.smaller import Workpiece

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

TITLE = "Answered: the devices read digits"
TEXT = (
    "Each device is asked for all held-out digits: one by one at its own endpoint, as a program on it would, and through "
    "the controller over MQTT, as works behind any NAT. Every answer is compared with the compressed model's own."
)
RELAYED = 40  # single digits through the cloud, for the latency; all of them go in batches for the answers
BATCH = 100


def tell(scene: Scene, piece: Workpiece) -> tuple[Asked, ...]:
    """Tell the chapter."""
    import numpy as np

    from cloud.cli import tables

    scene.chapter("c", TITLE, TEXT)
    trained = piece.built.trained
    found = []
    for name, variant, runtime in (
        ("dock", "digits-int8.onnx", "onnxruntime"),
        ("lighthouse", "digits-int8.tflite", "litert"),
    ):
        expected = model_answers(piece, variant, runtime)
        with scene.working(f"asking {name}") as step:
            found.append(_ask(scene, name, trained.image, trained.y, expected, step))
    made = tables.table("device", "variant", "right", "as the model", "on the device p50", "p90", "through MQTT p50", "p90 ",
                        right=("right", "as the model", "on the device p50", "p90", "through MQTT p50", "p90 "))  # fmt: skip
    for one in found:
        made.add_row(
            one.device, one.variant, f"{one.right / one.asked:.2%}", f"{one.same_as_model} of {one.asked}",
            f"{one.local.p50:.2f} ms", f"{one.local.p90:.2f} ms", f"{one.relayed.p50:.1f} ms", f"{one.relayed.p90:.1f} ms",
        )  # fmt: skip
    scene.table(made)
    for one, report in zip(found, (piece.built.report, piece.built.litert_report), strict=True):
        exact = one.same_as_model == one.asked == len(np.asarray(trained.y))
        scene.claim(
            f"{one.device} answers as the compressed model does, digit by digit",
            exact and one.right == round(report.result.metric * one.asked),  # the report has six decimals
            f"{one.right} of {one.asked} right, the report says {report.result.metric:.2%}",
        )
    return tuple(found)


def model_answers(piece: Workpiece, file: str, runtime: str) -> "Array":
    """Return what a model file answers for the held-out digits, run right here with the skill's own control code."""
    from edge_agent import runtimes

    model = runtimes.door(runtime).load(piece.folder / "models" / file)
    code: Any = piece.recipe._control_code()  # noqa: SLF001  the recipe's own way to its control code
    images = piece.built.trained.image
    run: Callable[..., Mapping[str, Any]] = lambda **feeds: model.run(feeds)  # noqa: E731
    import numpy as np

    return np.concatenate([code.classify({"image": images[at : at + 1]}, run)["digit"] for at in range(len(images))])


def _ask(
    scene: Scene, name: str, images: "Array", labels: "Array", expected: "Array", step: Callable[[str, float], None]
) -> Asked:
    import numpy as np

    from skills.oip import Call

    board, client = scene.boards[name], scene.client
    serving = client.device(name).serving("digits")
    local, answers = [], []
    for at in range(len(images)):
        answer, took_ms = board.ask("digits", Call({"image": images[at : at + 1]}))
        local.append(took_ms)
        answers.append(int(answer.arrays["digit"][0]))
        step(f"{at + 1} of {len(images)} digits on the device", 0.7 * at / len(images))
    batches = [
        client.infer(name, "digits", Call({"image": images[at : at + BATCH]})).arrays["digit"]
        for at in range(0, len(images), BATCH)
    ]
    relayed = []
    for at in range(RELAYED):
        begin = time.perf_counter()
        client.infer(name, "digits", Call({"image": images[at : at + 1]}))
        relayed.append((time.perf_counter() - begin) * 1000)
        step(f"{at + 1} of {RELAYED} through the cloud", 0.7 + 0.3 * at / RELAYED)
    here, there = np.array(answers), np.concatenate(batches)
    same = int(((here == expected) & (there == expected)).sum())
    variant = ", ".join(serving.variants.values()) if serving else "–"
    return Asked(name, variant, len(images), int((here == labels).sum()), same, Times.of(local), Times.of(relayed))
