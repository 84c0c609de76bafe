"""The tail server: the cloud's part of split models, over the Open Inference Protocol v2 (gRPC)."""
