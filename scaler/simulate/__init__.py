"""The simulator: what a policy would have cost on a trace, with the planner's own code under a virtual clock."""
