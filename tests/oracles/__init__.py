"""The oracles of the rows of the table, by the name of the row."""

from oracles import binary, gaussian, improved, messages, mixtures, optimizers, slang

MODULES = (binary, gaussian, improved, messages, mixtures, optimizers, slang)
ORACLES = {name: oracle for module in MODULES for name, oracle in module.ORACLES.items()}
TOLERANCE = {name: limit for module in MODULES for name, limit in module.TOLERANCE.items()}
