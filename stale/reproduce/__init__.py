"""The paper's tables: which runs they need, running them, and our figures beside the published ones."""
