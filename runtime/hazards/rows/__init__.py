"""The rows of the hazard table, a file for each family. :mod:`..table` puts them together."""
