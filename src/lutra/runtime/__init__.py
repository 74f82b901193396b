"""Running a graph: session, plan, fusing, shared codes, profile."""
