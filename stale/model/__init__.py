"""The components of STALE, one file each, assembled in ``stale.model.stale``."""
