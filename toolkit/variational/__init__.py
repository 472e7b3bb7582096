"""The fits: guides, objectives, solvers and the verb `fit`."""
