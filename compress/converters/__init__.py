"""Foreign converters, each in an environment and a process of its own: their packages never meet ours."""
