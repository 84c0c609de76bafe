"""Golden inputs and outputs: a version serves only when it reproduces them on this very device, with this very runtime."""

import zipfile
from typing import TYPE_CHECKING, Any

from skills.errors import FormatError
from skills.manifest import Probe

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edge_agent.worker import LoadedSkill


def check(loaded: "LoadedSkill") -> str:
    """Run the probe; return "" when every output agrees, else how far the worst one is off.

    Raises:
        FormatError: the probe file is not what it should be, or the skill refuses the golden input.
    """
    import numpy as np

    probe = loaded.skill.probe
    try:
        with np.load(loaded.folder / probe.file, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"the probe file {probe.file} cannot be read: {error}") from None
    inputs = {name[3:]: array for name, array in arrays.items() if name.startswith("in.")}
    golden = {name[4:]: array for name, array in arrays.items() if name.startswith("out.")}
    if not inputs or not golden:
        raise FormatError(f"the probe file {probe.file} needs arrays in.NAME and out.NAME")
    outputs = loaded.run_here(inputs).outputs
    for name, expected in golden.items():
        if name not in outputs:
            return f"the probe expects the output '{name}', the skill returned {', '.join(sorted(outputs))}"
        if reason := differs(name, np.asarray(outputs[name]), expected, probe):
            return reason
    return ""


def differs(name: str, found: "NDArray[Any]", expected: "NDArray[Any]", probe: Probe) -> str:
    """Say how an output differs from the golden one by more than the skill allows, or return ""."""
    import numpy as np

    if found.shape != expected.shape:
        return f"output '{name}' has the shape {list(found.shape)}, the golden one {list(expected.shape)}"
    if expected.size == 0:
        return ""
    if np.issubdtype(expected.dtype, np.floating):
        worst = float(np.max(np.abs(found.astype(np.float64) - expected.astype(np.float64))))
        if not worst <= probe.tolerance:  # also when it is NaN
            return f"output '{name}' is off by {worst:.4g} from the golden output, allowed is {probe.tolerance:g}"
        return ""
    share = float(np.mean(found == expected))
    if share < probe.agreement:
        need = f"at least {probe.agreement:.1%} are needed"
        return f"output '{name}' agrees with the golden output in {share:.1%} of entries, {need}"
    return ""
