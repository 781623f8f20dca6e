"""Annotations, splits, class names, features and the data sets made of them."""
