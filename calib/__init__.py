"""Calibration of the cost model: measure a machine (sweep), fit, validate, predict, plot, transfer. Each module is a command."""
