"""Run in Vela's environment: `python run_vela.py FOLDER` compiles FOLDER/model.tflite with the options in FOLDER/options.json.

Leaves model_vela.tflite and a summary as CSV in FOLDER; Vela prints which operators the NPU takes.
"""

import json
import sys
from pathlib import Path


def main(folder: str) -> None:
    from ethosu.vela import vela

    work = Path(folder)
    options = json.loads((work / "options.json").read_text())
    vela.main([str(work / "model.tflite"), "--output-dir", str(work), "--config", "Arm/vela.ini", *options])


if __name__ == "__main__":
    main(*sys.argv[1:])
