"""The controller: command line, API, rollouts, split planner and tail server."""
