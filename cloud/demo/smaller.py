"""Chapter a: train a net on handwritten digits and make it smaller and faster, within a point of accuracy."""

import dataclasses
import importlib.util
import sys
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from cloud.demo.facts import Smaller
from cloud.demo.scene import Scene
from skills.errors import MissingExtra

LEAST_SMALLER = 6.0
LEAST_FASTER = 1.2
TITLE = "Smaller: a model is trained and compressed"
TEXT = (
    "A convolutional net learns scikit-learn's 1,797 handwritten digits. Compression may cost one point of accuracy on "
    "digits that neither training nor compression has seen; size, accuracy and speed are measured on onnxruntime, here."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Workpiece:
    """What later chapters need of this one: the recipe, the trained net and the skill's folder."""

    recipe: Any
    built: Any
    folder: Path


def load_recipe(skill: str) -> ModuleType:
    """Load the recipe of a ready skill by its path: a skill's folder is no package."""
    path = Path(str(resources.files("skills") / "library" / skill / "recipe.py"))
    name = f"skerry_recipe_{skill}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def tell(scene: Scene) -> tuple[Smaller, Workpiece]:
    """Tell the chapter.

    Raises:
        MissingExtra: torch or scikit-learn is not installed.
    """
    from cloud.cli import findings

    scene.chapter("a", TITLE, TEXT)
    for package in ("torch", "sklearn"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(f"the demo needs {package}: pip install 'skerry[demo]'")
    recipe, folder = load_recipe("digits"), scene.folder / "digits"
    with scene.working("training") as step:
        trained = recipe.train(lambda what, share, best: step(best, share))
    scene.say(
        f"trained on {len(trained.y_train):,} digits; right on {trained.accuracy:.1%} of {len(trained.y)} held-out ones"
    )
    with scene.working("compressing") as step:
        built = recipe.assemble(trained, folder, lambda what, share, best: step(f"{what} {best}".strip(), share))
    report, lite = built.report, built.litert_report
    scene.table(findings.compressed(report))
    scene.say(
        f"[dim]the same for LiteRT: {lite.ratio_file:.1f}× smaller, {lite.result.metric:.2%} right, "
        f"{lite.speedup:.2f}× as fast as the float net on onnxruntime[/dim]"
    )
    scene.claim(f"at least {LEAST_SMALLER:g}× smaller", report.ratio_file >= LEAST_SMALLER, f"{report.ratio_file:.1f}×")
    scene.claim(f"at least {LEAST_FASTER:g}× faster", report.speedup >= LEAST_FASTER, f"{report.speedup:.2f}×")
    low, high = report.drop_ci95
    proof = "proven" if report.verdict == "proven" else f"not proven by {report.n_report} digits"
    scene.claim(
        "at most one point lost",
        report.verdict != "not_reached" and report.drop <= recipe.MAX_DROP,
        f"{report.drop:+.2f} points lost, 95 % interval {low:+.2f} … {high:+.2f}: {proof}",
    )
    return Smaller(trained.accuracy, report.to_json(), lite.to_json()), Workpiece(recipe, built, folder)
