"""The paper's tables: which runs they need, running them, and our results beside the published ones."""
