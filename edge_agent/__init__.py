"""The device: the daemon that fetches, verifies, probes and serves skills."""
