"""Estimators: functions of an Objective's HVPs, each with its error and its cost."""
