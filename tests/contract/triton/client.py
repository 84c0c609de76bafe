"""Run by test_plain_mode.py in Triton's environment: `tritonclient` asks a server for its health, metadata and answers.

    python client.py HOST:PORT MODEL INPUTS.npz OUTPUTS.npz REPORT.json

Writes the outputs and what the server said of itself; a refusal is written as its status and sentence.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton


def main(target: str, model: str, inputs: str, outputs: str, report: str) -> None:
    said: dict[str, object] = {}
    with triton.InferenceServerClient(target) as client:
        said["live"], said["ready"] = (
            client.is_server_live(client_timeout=20),
            client.is_server_ready(client_timeout=20),
        )
        said["server"] = client.get_server_metadata(as_json=True, client_timeout=20)
        said["model_ready"] = client.is_model_ready(model, client_timeout=20)
        try:
            said["model"] = client.get_model_metadata(model, as_json=True, client_timeout=20)
            asked = []
            for name, array in np.load(inputs).items():
                asked.append(triton.InferInput(name, array.shape, triton.np_to_triton_dtype(array.dtype)))
                asked[-1].set_data_from_numpy(array)
            answer = client.infer(model, asked, request_id="7", client_timeout=20)
            said["id"] = answer.get_response().id
            np.savez(outputs, **{one.name: answer.as_numpy(one.name) for one in answer.get_response().outputs})
        except triton.InferenceServerException as error:
            said["refused"] = [error.status(), error.message()]
    Path(report).write_text(json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
