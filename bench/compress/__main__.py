"""What `skerry compress` makes of the reference models, beside what other tools make of them: size, speed, accuracy.

    SKERRY_REFERENCE=../shared/data python -P bench/compress [--row NAME ...] [--baselines TOOL ...] [--time-only]

The reference folder brings the models, the data and a `load.py` that reads them. Everything that is made or measured is
kept under --work and taken from there the next time, unless what it was made from has changed: an interrupted bench goes
on where it was. All speeds of a row come from one interleaved run at one thread. Prints Markdown.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import candidates
import judge
import measuring
import onnx
import rows
import table
from candidates import Made
from judge import Entry, Interval
from measuring import Quality, Speed
from rows import Prepared, Row

from compress import measure
from compress.measure import Drop
from compress.passes.strip import strip

REFERENCE = Path(os.environ.get("SKERRY_REFERENCE", Path(__file__).parents[3] / "shared" / "data"))
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skerry-bench"
ORIGINAL, OURS = "original", "ours"


def main() -> None:
    names = [row.name for row in rows.rows()]
    parser = argparse.ArgumentParser(prog="bench/compress", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--work", type=Path, default=CACHE, metavar="DIR", help=f"where all is kept (default: {CACHE})")
    parser.add_argument(
        "--time-budget", default="60m", metavar="TIME", help="what `skerry compress` is given (default: 60m)"
    )
    parser.add_argument("--our-out", type=Path, metavar="DIR", help="a result of ours, or a folder of them by row")
    parser.add_argument("--skip-baselines", action="store_true", help="only our result")
    parser.add_argument(
        "--baselines", nargs="+", metavar="TOOL", help="of the other tools' results only these, as onnxruntime-tuned"
    )
    parser.add_argument("--skip-ours", action="store_true", help="only the other tools' results")
    parser.add_argument(
        "--time-only", action="store_true", help="measure the speeds anew, of what is there; make nothing"
    )
    given = parser.parse_args()
    work, outcomes = given.work.resolve(), []
    load = rows.loader(REFERENCE)
    for row in rows.rows():
        if row.name in given.row:
            outcomes.append(_outcome(row, load, work, given))
            say(f"{row.name}: done")
    text = table.page(outcomes)
    (work / "table.md").write_text(text)
    print(text)


def say(text: str) -> None:
    """Tell on standard error what is being done."""
    print(text, file=sys.stderr, flush=True)


def _outcome(row: Row, load: Any, work: Path, given: argparse.Namespace) -> table.Outcome:
    prepared = rows.prepare(row, load, work)
    made = [] if given.skip_baselines else _made(row, prepared, work, given)
    out = None if given.skip_ours else _our_folder(row, prepared, work, given)
    files = {ORIGINAL: _original(row, work)} | ({OURS: out / "model.onnx"} if out else {})
    files |= {item.name: item.model for item in made if item.model is not None}
    say(f"{row.name}: measuring")
    qualities = {name: measuring.quality(path, prepared, work) for name, path in files.items()}
    points = (
        [measuring.quality(path, prepared, work) for path in sorted((out / "pareto").glob("*.onnx"))] if out else []
    )
    speeds, about = measuring.race(row.name, files, prepared.splits.report.x[:1], work, anew=given.time_only)
    titles = {ORIGINAL: "the original", OURS: "**skerry compress**"} | {item.name: item.title for item in made}
    notes = {item.name: _notes(item) for item in made}
    entries = {name: _entry(name, titles[name], notes.get(name, ""), prepared, qualities, speeds) for name in files}
    ours, baselines = entries.get(OURS), [entries[item.name] for item in made if item.name in entries]
    answers: list[judge.Answer] = []
    ladder = sorted([*points, qualities[OURS]], key=lambda one: one.file) if ours is not None else []
    if ours is not None:
        beside = [
            (entry, [(one.file, _interval(measuring.drop(qualities[entry.name], one, prepared))) for one in ladder])
            for entry in baselines
        ]
        fast = judge.fast_enough(ours, baselines, pruned=row.trains)
        answers = [judge.smallest(ours, baselines), judge.covered(beside), fast]
    pareto = [(one.file, _interval(measuring.drop(qualities[ORIGINAL], one, prepared))) for one in ladder]
    report = _read(out / "report.json") if out else {}
    minutes = report["seconds"] / 60 if "seconds" in report else None
    verdicts = [report["verdict"]] if "verdict" in report else []
    if ours:
        verdicts.append(measure.verdict(measuring.drop(qualities[ORIGINAL], qualities[OURS], prepared), judge.BUDGET))
    verdict = max(verdicts, key=get_args(measure.Verdict).index, default="")  # the report's counts what was passed over
    return table.Outcome(
        row, entries[ORIGINAL], len(prepared.splits.report), ours, verdict, minutes, tuple(baselines),
        tuple((item.title, item.failure) for item in made if item.model is None), tuple(answers), tuple(pareto),
        _progress(out), about,
    )  # fmt: skip


def _made(row: Row, prepared: Prepared, work: Path, given: argparse.Namespace) -> list[Made]:
    wanted = [one for one in candidates.baselines(row) if given.baselines is None or one.name in given.baselines]
    if given.time_only:
        found = (candidates.earlier(item, row, work) for item in wanted)
        return [item for item in found if item is not None]
    return [candidates.make(item, row, prepared, REFERENCE, work, say) for item in wanted]


def _our_folder(row: Row, prepared: Prepared, work: Path, given: argparse.Namespace) -> Path | None:
    """Return the folder with our result, or None where there is none and none shall be made."""
    if given.our_out is not None:
        for folder in (given.our_out / row.name, given.our_out):
            if (folder / "model.onnx").is_file():
                return Path(folder)
        return None
    if given.time_only:
        return candidates.our_earlier(row, work)
    try:
        return candidates.ours(row, prepared, REFERENCE, work, given.time_budget, say)
    except RuntimeError as error:
        say(f"{row.name}: {error}")
        return None


def _original(row: Row, work: Path) -> Path:
    """Write the original without what no runtime needs: all sizes are held against that."""
    path = work / "original" / f"{row.name}.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(strip(onnx.load(REFERENCE / row.model)).SerializeToString())
    return path


def _entry(
    name: str, title: str, notes: str, prepared: Prepared, qualities: Mapping[str, Quality], speeds: Mapping[str, Speed]
) -> Entry:
    one, ours, speed = qualities[name], qualities.get(OURS), speeds[name]
    return Entry(
        name, title, one.file, one.package, one.accuracy, _interval(measuring.drop(qualities[ORIGINAL], one, prepared)),
        _interval(measuring.drop(ours, one, prepared)) if ours is not None and name != OURS else None,
        speeds[ORIGINAL].p50_ms / speed.p50_ms, speed.p50_ms, speed.load_ms, one.whole, notes,
    )  # fmt: skip


def _interval(drop: Drop) -> Interval:
    return Interval(drop.points, drop.lo, drop.hi)


def _notes(item: Made) -> str:
    """Say what the reader must know of how a baseline was made."""
    shown = {"calibration": "{}", "macs": "{:.0%} of the multiplications", "epochs": "{:.1f} epochs"}
    return ", ".join(text.format(item.notes[key]) for key, text in shown.items() if key in item.notes)


def _progress(out: Path | None) -> tuple[tuple[float, float, float | None], ...]:
    found = _read(out / "search.json").get("trail", []) if out else []
    return tuple((step["minutes"], step["ratio_file"], step["drop_select"]) for step in found)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


if __name__ == "__main__":
    main()
