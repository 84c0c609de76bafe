"""Chapter e, in the middle: does the planner's verdict stand when a real tail answers over each link?"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloud.demo.scene import Scene
from skills.files import write_atomic

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cloud.split.measure import Measured, Row
    from skills.split_plan import Plan

ROUNDS = 7
MOST_REGRET = 0.10  # as a share; two options closer than this are one answer on a machine that does other work too


def tell(
    scene: Scene, plan_folder: Path, plan: "Plan", feeds: "Mapping[str, NDArray[Any]]"
) -> tuple[Mapping[str, Any], ...]:
    """Run the best of each kind over each emulated link, interleaved, show prediction beside measurement, and judge."""
    from cloud.split import LINKS
    from cloud.split.measure import measure_links
    from skills.wire import encode_yaml

    folder = scene.folder / "open-plan"
    shutil.copytree(plan_folder, folder)
    write_atomic(folder / "split.yaml", encode_yaml(plan).encode())
    with scene.working("running the candidates over each link") as step:
        found = measure_links(
            folder, feeds, LINKS, rounds=ROUNDS, progress=lambda stage, done, of: step(stage, done / of if of else 0.0)
        )
    _show(scene, found)
    worst = max(one.regret for one in found)
    scene.claim(
        "the verdict stands as measured, on every link",
        worst <= MOST_REGRET,
        f"the option it names is at most {worst:.1%} slower than the fastest measured",
    )
    return tuple(
        {"link": str(one.link), "regret": round(one.regret, 4), "rows": [dataclasses.asdict(row) for row in one.rows]}
        for one in found
    )


def _show(scene: Scene, found: "tuple[Measured, ...]") -> None:
    from cloud.cli import tables

    kinds = {"input": "send the photo", "split": "best split", "local": "stay local"}
    made = tables.table("predicted → measured, ms", *kinds.values(), "fastest measured", right=tuple(kinds.values()))
    for one in found:
        rows = {row.option: row for row in one.rows}
        fastest = min(one.rows, key=lambda row: row.measured_ms.p50)
        link = f"{one.link.mbit:g} Mbit/s, {one.link.rtt_ms:g} ms"
        made.add_row(link, *(_pair(rows.get(kind)) for kind in kinds), kinds[fastest.option])
    scene.table(made)


def _pair(row: "Row | None") -> str:
    return "–" if row is None else f"{row.predicted_ms:.0f} → {row.measured_ms.p50:.0f}"
