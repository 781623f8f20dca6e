"""From nothing to data that training can read: downloads, archives, other layouts, checks, simulated features."""
