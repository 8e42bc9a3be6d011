"""Features of perturbations from prior knowledge: networks, gene sets, annotations, embeddings, co-expression.

``sources`` reads each kind of file into a table of genes. ``make`` joins the tables into one file of features.
"""

from vcelltools.descriptors.make import FeaturesResult, features
from vcelltools.descriptors.sources import read_edges, read_networks

__all__ = ["FeaturesResult", "features", "read_edges", "read_networks"]
