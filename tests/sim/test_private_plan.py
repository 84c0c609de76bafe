"""A private plan with its audit, end to end: only a cut that was shown to keep the input may be used."""

import json
from pathlib import Path
from typing import Any

from cloud.split import split
from skills.network import Link
from skills.split import admitted


def test_what_an_audit_does_not_call_private_is_never_used_and_the_report_says_so(
    small_net: Any, tmp_path: Path
) -> None:
    net, out = small_net("plain"), tmp_path / "out"
    report = split(
        net.model.SerializeToString(), {"x": net.x[:220]}, out=out, private=True, audit=True, rounds=1, most_samples=4,
        most_gate=220, links=(Link(1000, 0.1),), max_drop=50,
    )  # fmt: skip
    true = [cut for cut in report.plan.cuts if cut.name.startswith("c")]
    assert true
    assert all(cut.leak is not None and cut.leak.inputs == 220 for cut in true)
    private = {cut.name for cut in true if cut.leak is not None and cut.leak.verdict == "private"}
    assert {cut.name for cut, coding in admitted(report.plan) if coding is not None} <= private
    said = json.loads((out / "report.json").read_text())
    assert said["privacy_audit"]["control"] > 0.6
    assert "no guarantee" in said["privacy"]
    assert all(f"{cut.name} is " in said["privacy"] for cut in true)
