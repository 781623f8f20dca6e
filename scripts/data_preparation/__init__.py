"""From nothing to data that training can load: downloads, layouts of other projects, checks."""
