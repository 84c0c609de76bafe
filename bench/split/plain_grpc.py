"""Plain grpcio, as anybody would write it: one channel, a call when there is something to ask, nothing in between.

    python -P plain_grpc.py HOST:PORT

Reads lines `MODEL BYTES`; for each, sends that many as a float tensor `x` to MODEL and prints the milliseconds to the answer.
"""

import json
import sys
import time

import numpy as np

from skills import oip


def main() -> None:
    import grpc

    stub = oip.service().GRPCInferenceServiceStub(grpc.insecure_channel(sys.argv[1]))
    for line in sys.stdin:
        model, size = line.split()
        array = np.zeros((1, 1, int(size) // 4), np.float32)
        start = time.perf_counter()
        stub.ModelInfer(oip.to_request(model, oip.Call({"x": array})), timeout=60)
        print(json.dumps({"ms": (time.perf_counter() - start) * 1e3}), flush=True)


if __name__ == "__main__":
    main()
