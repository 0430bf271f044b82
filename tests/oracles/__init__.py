"""The oracles of the rows of the table, by the name of the row."""

from oracles import gaussian, optimizers

MODULES = (gaussian, optimizers)
ORACLES = {name: oracle for module in MODULES for name, oracle in module.ORACLES.items()}
TOLERANCE = {name: limit for module in MODULES for name, limit in module.TOLERANCE.items()}
